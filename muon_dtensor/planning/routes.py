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

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import assert_never

from muon_dtensor.layout import Matrix, Region
from muon_dtensor.planning.ir import Assignment, Bucket, Collective, Plan, Route

Piece = tuple[Assignment, Region]


@dataclass(frozen=True, slots=True)
class Slot:
    """One piece of one matrix in a flat buffer; `region` in coordinates of the parameter."""

    assignment: Assignment
    region: Region
    offset: int

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
        return tuple(sum(slot.region.numel for slot in slots) for slots in self.by_peer)

    @cached_property
    def numel(self) -> int:
        return sum(self.numels)


@dataclass(frozen=True, slots=True)
class RankCollective:
    """A collective as one rank sees it: what it sends, what it receives."""

    collective: Collective
    send: Packing
    recv: Packing


@dataclass(frozen=True, slots=True)
class Move:
    """A run of elements from one flat buffer to another."""

    source: int
    target: int
    numel: int


@dataclass(frozen=True)
class RankBucket:
    """One bucket as one rank sees it; see Note [Three buffers].

    `touched`: this rank's pieces of all matrices of the bucket, owned in whichever replica.
    `shards`: per parameter the box this rank stores. `moves`: per collective of the way back, how
    its send buffer is filled from the one before; None where it is the one before.
    """

    bucket: Bucket
    touched: tuple[Piece, ...]
    shards: dict[int, Region]
    owned: tuple[Assignment, ...]
    matrices: dict[Assignment, Matrix]
    pieces: Packing
    wholes: Packing
    unshard: tuple[RankCollective, ...]
    reshard: tuple[RankCollective, ...]
    moves: tuple[tuple[Move, ...] | None, ...]
    results: Packing

    @cached_property
    def runs(self) -> tuple[tuple[int, Region], ...]:
        """The touched pieces by parameter; where they are all of a shard, the shard itself."""
        by_param: dict[int, list[Region]] = defaultdict(list)
        for assignment, region in self.touched:
            by_param[assignment.param].append(region)
        runs: list[tuple[int, Region]] = []
        for param, regions in by_param.items():
            shard = self.shards[param]
            whole = sum(region.numel for region in regions) == shard.numel
            runs += [(param, shard)] if whole else [(param, region) for region in regions]
        return tuple(runs)

    @cached_property
    def slots_of(self) -> dict[Assignment, tuple[Slot, ...]]:
        """Per owned matrix, where its pieces lie in `wholes`."""
        slots: dict[Assignment, list[Slot]] = defaultdict(list)
        for slot in self.wholes.slots:
            slots[slot.assignment].append(slot)
        return {assignment: tuple(found) for assignment, found in slots.items()}

    def batches(self, batched: bool) -> tuple[tuple[Assignment, ...], ...]:
        """Owned matrices that are orthogonalized together: of one size if batched, else alone."""
        if not batched:
            return tuple((assignment,) for assignment in self.owned)
        by_size: dict[tuple[int, int], list[Assignment]] = defaultdict(list)
        for assignment in self.owned:
            matrix = self.matrices[assignment]
            by_size[matrix.rows, matrix.cols].append(assignment)
        return tuple(map(tuple, by_size.values()))


def rank_bucket(plan: Plan, bucket: Bucket, position: int) -> RankBucket:
    """What the rank at this position does for a bucket of its mesh."""
    touched = []
    for assignment in bucket.assignments:
        layout = plan.spec(assignment).layout
        region = plan.holders(assignment).get(layout.home(position))
        if region is not None:
            touched.append((assignment, region))
    owned = tuple(a for a in bucket.assignments if a.owner == position)
    unshard, reshard = (
        tuple(_rank_collective(plan, bucket, c, position, touched, owned) for c in collectives)
        for collectives in (bucket.unshard, bucket.reshard)
    )
    if unshard:
        pieces, wholes = unshard[0].send, unshard[0].recv
    else:
        pieces = wholes = _pack([[(a, plan.matrix(a).region) for a in owned]])
    moves, before = [], wholes
    for rank_collective in reshard:
        mirror = rank_collective.send.by_peer == before.by_peer
        moves.append(None if mirror else _moves(before, rank_collective.send))
        before = rank_collective.recv
    return RankBucket(
        bucket=bucket,
        touched=tuple(touched),
        shards={a.param: plan.spec(a).layout.region(position) for a, _ in touched},
        owned=owned,
        matrices={a: plan.matrix(a) for a in (*(a for a, _ in touched), *owned)},
        pieces=pieces,
        wholes=wholes,
        unshard=unshard,
        reshard=reshard,
        moves=tuple(moves),
        results=before,
    )


def _rank_collective(
    plan: Plan,
    bucket: Bucket,
    collective: Collective,
    position: int,
    touched: Sequence[Piece],
    owned: Sequence[Assignment],
) -> RankCollective:
    peers = bucket.mesh.peers(position, collective.mesh_dims)
    match collective.route:
        case Route.TO_OWNER:
            send, recv = _owned_by(touched, peers), _held_by(plan, owned, peers)
        case Route.TO_HOLDERS:
            send, recv = _held_by(plan, owned, peers), _owned_by(touched, peers)
        case Route.TO_REPLICAS:
            recv = [_owned_near(plan, touched, peer) for peer in peers]
            send = [_owned_near(plan, touched, position)] * len(peers)
        case _:
            assert_never(collective.route)
    return RankCollective(collective, _pack(send), _pack(recv))


def _owned_by(pieces: Iterable[Piece], peers: Sequence[int]) -> list[list[Piece]]:
    """Per peer, those of the pieces whose matrix it owns."""
    owned: dict[int, list[Piece]] = {peer: [] for peer in peers}
    for assignment, region in pieces:
        if assignment.owner in owned:
            owned[assignment.owner].append((assignment, region))
    return list(owned.values())


def _held_by(
    plan: Plan, assignments: Iterable[Assignment], peers: Sequence[int]
) -> list[list[Piece]]:
    """Per peer, the pieces it holds of these matrices."""
    held: dict[int, list[Piece]] = {peer: [] for peer in peers}
    for assignment in assignments:
        layout, pieces = plan.spec(assignment).layout, plan.holders(assignment)
        for peer, found in held.items():
            region = pieces.get(layout.home(peer))
            if region is not None:
                found.append((assignment, region))
    return list(held.values())


def _owned_near(plan: Plan, pieces: Iterable[Piece], position: int) -> list[Piece]:
    """Those of the pieces whose matrix is owned in the replica of this position."""
    near = []
    for assignment, region in pieces:
        layout = plan.spec(assignment).layout
        if layout.replica_offset(assignment.owner) == layout.replica_offset(position):
            near.append((assignment, region))
    return near


def _pack(by_peer: Sequence[Sequence[Piece]]) -> Packing:
    offset, packed = 0, []
    for pieces in by_peer:
        slots = []
        for assignment, region in pieces:
            slots.append(Slot(assignment, region, offset))
            offset += region.numel
        packed.append(tuple(slots))
    return Packing(tuple(packed))


def _moves(source: Packing, target: Packing) -> tuple[Move, ...]:
    """How to fill `target` with slots that `source` holds; adjacent runs are merged."""
    places = {(slot.assignment, slot.region): slot.offset for slot in source.slots}
    merged: list[Move] = []
    for slot in target.slots:
        offset, numel = places[slot.assignment, slot.region], slot.region.numel
        last = merged[-1] if merged else None
        if last and (last.source + last.numel, last.target + last.numel) == (offset, slot.offset):
            merged[-1] = Move(last.source, last.target, last.numel + numel)
        else:
            merged.append(Move(offset, slot.offset, numel))
    return tuple(merged)
