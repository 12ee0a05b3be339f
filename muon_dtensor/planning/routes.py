"""One rank's part of a bucket: which piece lies where in which flat buffer, and who gets it.

Derived from a Plan for one position at a time, so that a plan for thousands of ranks stays
small. Offsets and numels count elements of the wire dtype.

Note [Three buffers]
    `pieces`: this rank's pieces of the matrices owned in its replica, sorted by owner.
    `wholes`: the pieces of the matrices this rank owns, sorted by sender. Where a matrix lies
    whole at its owner no exchange is needed, and `wholes` is `pieces`.
    `results`: the pieces of the update this rank applies, sorted by sender.
    A piece that a rank sends to itself has its place too, so buffers need no special case, and
    results travel back through the mirror image of the exchange that brought the pieces.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from muon_dtensor.layout import Region
from muon_dtensor.planning.ir import AllToAll, Assignment, Bucket, Plan, Route


@dataclass(frozen=True, slots=True)
class Slot:
    """One piece of one matrix in a flat buffer; `region` in coordinates of the parameter."""

    assignment: Assignment
    region: Region
    offset: int

    @property
    def numel(self) -> int:
        return self.region.numel

    @property
    def stop(self) -> int:
        return self.offset + self.region.numel


@dataclass(frozen=True)
class Packing:
    """A flat buffer: slots grouped by the peer they come from or go to, peers in rank order."""

    by_peer: tuple[tuple[Slot, ...], ...]

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(slot for slots in self.by_peer for slot in slots)

    @cached_property
    def numels(self) -> tuple[int, ...]:
        """Elements per peer: the split sizes of the collective."""
        return tuple(sum(slot.numel for slot in slots) for slots in self.by_peer)

    @cached_property
    def numel(self) -> int:
        return sum(self.numels)


@dataclass(frozen=True, slots=True)
class Transfer:
    """One all-to-all as this rank sees it."""

    collective: AllToAll
    send: Packing
    recv: Packing


@dataclass(frozen=True, slots=True)
class RankBucket:
    """One bucket as one rank sees it; see Note [Three buffers].

    `touched`: this rank's pieces of all matrices of the bucket, owned in whichever replica.
    """

    bucket: Bucket
    touched: tuple[tuple[Assignment, Region], ...]
    owned: tuple[Assignment, ...]
    pieces: Packing
    wholes: Packing
    unshard: tuple[Transfer, ...]
    reshard: tuple[Transfer, ...]
    results: Packing


def rank_bucket(plan: Plan, bucket: Bucket, position: int) -> RankBucket:
    """What the rank at this position does for a bucket of its mesh."""
    touched = tuple(_touched(plan, bucket, position))
    owned = tuple(a for a in bucket.assignments if a.owner == position)
    unshard: tuple[Transfer, ...] = ()
    if bucket.unshard:
        (gather,) = bucket.unshard
        unshard = (_to_owner(plan, bucket, gather, position),)
        pieces, wholes = unshard[0].send, unshard[0].recv
    else:
        pieces = wholes = _pack([[(a, plan.matrix(a)) for a in owned]])
    reshard = tuple(_back(plan, bucket, c, position) for c in bucket.reshard)
    results = reshard[-1].recv if reshard else wholes
    return RankBucket(bucket, touched, owned, pieces, wholes, unshard, reshard, results)


def _touched(plan: Plan, bucket: Bucket, position: int) -> Iterator[tuple[Assignment, Region]]:
    """This position's pieces of all matrices of a bucket."""
    for assignment in bucket.assignments:
        layout = plan.spec(assignment).layout
        piece = plan.holders(assignment).get(layout.home(position))
        if piece is not None:
            yield assignment, piece


def _pack(by_peer: list[list[tuple[Assignment, Region]]]) -> Packing:
    offset, packed = 0, []
    for pieces in by_peer:
        slots = []
        for assignment, region in pieces:
            slots.append(Slot(assignment, region, offset))
            offset += region.numel
        packed.append(tuple(slots))
    return Packing(tuple(packed))


def _to_owner(plan: Plan, bucket: Bucket, collective: AllToAll, position: int) -> Transfer:
    peers = bucket.mesh.peers(position, collective.mesh_dims)
    assert collective.route is Route.TO_OWNER, collective
    send = _owned_by(_touched(plan, bucket, position), peers)
    owned = [a for a in bucket.assignments if a.owner == position]
    return Transfer(collective, _pack(send), _pack(_pieces_at(plan, owned, peers)))


def _owned_by(
    pieces: Iterable[tuple[Assignment, Region]], peers: tuple[int, ...]
) -> list[list[tuple[Assignment, Region]]]:
    """Per peer, those of the pieces whose matrix it owns."""
    owned: dict[int, list[tuple[Assignment, Region]]] = {peer: [] for peer in peers}
    for assignment, region in pieces:
        if assignment.owner in owned:
            owned[assignment.owner].append((assignment, region))
    return list(owned.values())


def _pieces_at(
    plan: Plan, assignments: list[Assignment], peers: tuple[int, ...]
) -> list[list[tuple[Assignment, Region]]]:
    """Per peer, the pieces it holds of these matrices."""
    held: dict[int, list[tuple[Assignment, Region]]] = {peer: [] for peer in peers}
    for assignment in assignments:
        layout = plan.spec(assignment).layout
        for home, region in plan.holders(assignment).items():
            for offset in layout.replica_offsets:
                if home + offset in held:
                    held[home + offset].append((assignment, region))
    return list(held.values())


def _back(plan: Plan, bucket: Bucket, collective: AllToAll, position: int) -> Transfer:
    peers = bucket.mesh.peers(position, collective.mesh_dims)
    mine = list(_touched(plan, bucket, position))
    if collective.route is Route.TO_HOLDERS:
        owned = [a for a in bucket.assignments if a.owner == position]
        recv = _owned_by(mine, peers)
        return Transfer(collective, _pack(_pieces_at(plan, owned, peers)), _pack(recv))
    assert collective.route is Route.TO_REPLICAS, collective

    def owned_near(peer: int) -> list[tuple[Assignment, Region]]:
        def replica(place: int, assignment: Assignment) -> int:
            return plan.spec(assignment).layout.replica_offset(place)

        return [(a, r) for a, r in mine if replica(a.owner, a) == replica(peer, a)]

    send = [owned_near(position) for _ in peers]
    recv = [owned_near(peer) for peer in peers]
    return Transfer(collective, _pack(send), _pack(recv))
