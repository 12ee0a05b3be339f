"""One rank's part of a bucket: the offset of each piece in each flat buffer, and its peer.

Derived from a Plan for one position at a time, so that a plan for thousands of ranks stays
small. Offsets and numels count elements of the wire dtype.

Note [Three buffers]
    `pieces`: this rank's pieces of the matrices owned in its replica, sorted by owner.
    `wholes`: all pieces of the matrices this rank owns, sorted by sender. If this rank stores
    them all, no exchange is needed and `wholes` is `pieces`.
    `results`: the pieces of the update that this rank applies, sorted by sender.
    A piece that a rank sends to itself has a slot too, so buffers need no special case. Results
    return through the mirror images of the exchanges that brought the pieces. The buffers in
    between are in `schedule`, Note [Numbered buffers].
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from muon_dtensor.layout import Matrix, Region
from muon_dtensor.planning.matrix_costs import ITEMSIZES
from muon_dtensor.planning.plan import Assignment, Bucket, Plan, PlanOptions
from muon_dtensor.planning.schedule import BufferSequence, Hop, buffer_sequence
from muon_dtensor.planning.strategies import AllGather, Collective, Route

Piece = tuple[Assignment, Region]


@dataclass(frozen=True)
class Slot:
    """A piece in a flat buffer, or one of the strided parts of a piece."""

    assignment: Assignment
    region: Region
    offset: int

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of views of the slot: in the buffer, and in a shard."""
        return self.region.view_shape

    @cached_property
    def stop(self) -> int:
        return self.offset + self.region.numel


@dataclass(frozen=True)
class Packing:
    """Slots of a flat buffer, grouped by source or destination, peers in rank order."""

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

    @cached_property
    def intervals(self) -> tuple[tuple[int, int], ...]:
        """The elements of each peer in the buffer, which are adjacent."""
        return tuple((s[0].offset, s[-1].stop) if s else (0, 0) for s in self.by_peer)


@dataclass(frozen=True, slots=True)
class Move:
    """A run of elements from one flat buffer to another."""

    source: int
    target: int
    numel: int


@dataclass(frozen=True, slots=True)
class RankCollective:
    """A collective on one rank: the packings it sends and receives.

    `moves`: copies that fill the send buffer from the previous buffer; empty if it is that buffer.
    `shares_slots`: whether several peers are sent the same slots of the send buffer.
    """

    collective: Collective
    send: Packing
    recv: Packing
    moves: tuple[Move, ...] = ()
    shares_slots: bool = False


@dataclass(frozen=True)
class RankBucket:
    """One bucket on one rank; see Note [Three buffers].

    `momenta`: the pieces of all matrices of the bucket whose momentum this rank stores, whichever
    replica owns them. `shards`: per parameter the box of it that this rank stores, and
    `momentum_shards` that of its momentum. `owned`: the matrices it orthogonalizes, alone
    or with a team, and `boxes` the part of each that it has then. `matrices`: all of the above.
    """

    bucket: Bucket
    sequence: BufferSequence
    momenta: tuple[Piece, ...]
    shards: dict[int, Region]
    momentum_shards: dict[int, Region]
    owned: tuple[Assignment, ...]
    matrices: dict[Assignment, Matrix]
    boxes: dict[Assignment, Region]
    pieces: Packing
    unshard: tuple[RankCollective, ...]
    reshard: tuple[RankCollective, ...]

    @cached_property
    def wholes(self) -> Packing:
        return self.unshard[-1].recv if self.unshard else self.pieces

    @cached_property
    def results(self) -> Packing:
        return self.reshard[-1].recv if self.reshard else self.wholes

    def collective(self, hop: Hop) -> RankCollective:
        """The collective of a hop of the sequence."""
        return (*self.unshard, *self.reshard)[hop.index]

    @cached_property
    def numels(self) -> tuple[int, ...]:
        """Elements of each numbered buffer."""
        numels = [self.pieces.numel] * len(self.sequence.contents)
        for hop in self.sequence.hops:
            collective = self.collective(hop)
            numels[hop.recv] = collective.recv.numel
            if hop.repacks:
                numels[hop.send] = collective.send.numel
        return tuple(numels)

    @cached_property
    def momentum_regions(self) -> tuple[tuple[int, Region], ...]:
        """Per parameter the parts of its momentum; its whole shard if they are all of it."""
        by_param: dict[int, list[Region]] = defaultdict(list)
        for assignment, region in self.momenta:
            by_param[assignment.param].append(region)
        result: list[tuple[int, Region]] = []
        for param, regions in by_param.items():
            shard = self.momentum_shards[param]
            if sum(region.numel for region in regions) == shard.numel:
                regions = [shard]
            result += [(param, part) for region in regions for part in region.strided_parts()]
        return tuple(result)

    def batches(self, options: PlanOptions) -> tuple[tuple[Assignment, ...], ...]:
        """Owned matrices, batch by batch: one by one, or several of one size if batched."""
        if not options.batched:  # in the order of the buffer
            return tuple((assignment,) for assignment in self.owned)
        by_size: dict[tuple[int, int], list[Assignment]] = defaultdict(list)
        for assignment in self.owned:
            matrix = self.matrices[assignment]
            by_size[matrix.rows, matrix.cols].append(assignment)
        batches: list[tuple[Assignment, ...]] = []
        for (rows, cols), owned in by_size.items():
            most = options.max_batch(ITEMSIZES[self.bucket.wire_dtype] * rows * cols)
            batches += [tuple(owned[i : i + most]) for i in range(0, len(owned), most)]
        return tuple(batches)


def rank_bucket(plan: Plan, bucket: Bucket, position: int) -> RankBucket:
    """The part of the rank at this position in a bucket of its mesh."""
    momenta = []
    for assignment in bucket.assignments:
        layout = plan.spec(assignment).momentum_layout
        region = plan.holders(assignment).get(layout.home(position))
        if region is not None:
            momenta.append((assignment, region))
    owned = tuple(a for a in bucket.assignments if a.owner == position)
    view = _RankView(plan, bucket, position)
    sequence = buffer_sequence(bucket.strategy, bucket.mesh)
    unshard: list[RankCollective] = []
    for index, collective in enumerate(bucket.unshard):
        unshard.append(_to_owner(view, collective, bucket.unshard[:index]))
    boxes = {a: plan.region(a) for a in owned}
    wholes = unshard[-1].recv if unshard else _pack([list(boxes.items())])
    reshard: list[RankCollective] = []
    for collective in bucket.reshard:
        mirrored = [c for c in unshard if c.collective.mesh_dims == collective.mesh_dims]
        if mirrored and collective.route is Route.TO_HOLDERS:
            reshard.append(RankCollective(collective, mirrored[0].recv, mirrored[0].send))
        else:
            reshard.append(_to_replicas(view, collective, reshard[-1].recv if reshard else wholes))
    pieces = unshard[0].send if unshard else wholes
    received = [pieces, *(collective.recv for collective in (*unshard, *reshard))]
    collectives = tuple(
        replace(collective, moves=_moves(before, collective.send)) if hop.repacks else collective
        for hop, before, collective in zip(
            sequence.hops, received, (*unshard, *reshard), strict=False
        )
    )
    stored = [*(a for a, _ in momenta), *(slot.assignment for slot in received[-1].slots)]
    return RankBucket(
        bucket=bucket,
        sequence=sequence,
        momenta=tuple(momenta),
        shards={a.param: plan.spec(a).layout.region(position) for a in stored},
        momentum_shards={
            a.param: plan.spec(a).momentum_layout.region(position) for a, _ in momenta
        },
        owned=owned,
        matrices={a: plan.matrix(a) for a in (*stored, *owned)},
        boxes=boxes,
        pieces=pieces,
        unshard=collectives[: len(unshard)],
        reshard=collectives[len(unshard) :],
    )


@dataclass(frozen=True, slots=True)
class _RankView:
    """One position in a bucket of a plan."""

    plan: Plan
    bucket: Bucket
    position: int


def _to_owner(
    view: _RankView, collective: Collective, before: Sequence[Collective]
) -> RankCollective:
    """A collective that moves pieces along its dims, after those in `before`.

    After a move along some dims a piece has its owner's coordinates along these, and its holder's
    along all others.
    """
    mesh, position, dims = view.bucket.mesh, view.position, collective.mesh_dims
    done = tuple(name for c in before for name in c.mesh_dims)
    send: dict[int, list[Piece]] = {peer: [] for peer in mesh.peers(position, dims)}
    recv: dict[int, list[Piece]] = {peer: [] for peer in send}
    for assignment in view.bucket.assignments:
        layout = view.plan.spec(assignment).momentum_layout
        if layout.replica_offset(assignment.owner) != layout.replica_offset(position):
            continue
        target = mesh.moved(position, dims, to=assignment.owner)
        send[target] += [(assignment, box) for _, box in _pieces_after(view, assignment, done)]
        for home, box in _pieces_after(view, assignment, (*done, *dims)):
            recv[mesh.moved(position, dims, to=home)].append((assignment, box))
    return RankCollective(collective, _pack(list(send.values())), _pack(list(recv.values())))


def _to_replicas(view: _RankView, collective: Collective, source: Packing) -> RankCollective:
    """A collective that sends results to the holders in all replicas, from the slots of `source`.

    The owner sends them, or, after a first hop, the ranks that hold them in the owner's replica.
    Pieces of a momentum that is cut over the replicas are each sent by the only rank that holds it.
    """
    mesh, position = view.bucket.mesh, view.position
    peers = mesh.peers(position, collective.mesh_dims)
    slots_of: dict[int, list[Slot]] = defaultdict(list)
    homes: dict[Assignment, dict[Region, int]] = {}
    replica_dims = view.bucket.strategy.replica_dims
    for slot in source.slots:
        a = slot.assignment
        if a not in homes:
            homes[a] = {
                part: home
                for home, piece in view.plan.holders(a).items()
                for part in piece.strided_parts()
            }
        home = homes[a][slot.region]
        slots_of[mesh.moved(home, replica_dims, to=0)].append(slot)
    send = [tuple(slots_of[mesh.moved(peer, replica_dims, to=0)]) for peer in peers]
    recv: dict[int, list[Piece]] = {peer: [] for peer in peers}
    for a in view.bucket.assignments:
        holders, spec = view.plan.holders(a), view.plan.spec(a)
        for home in mesh.peers(spec.layout.home(position), spec.gathered_dims):
            if home in holders:
                owner_side = mesh.moved(position, collective.mesh_dims, to=a.owner)
                sender = home if spec.gathered_dims else owner_side
                recv[sender].append((a, holders[home]))
    if isinstance(collective, AllGather) and view.bucket.unshard:
        # a holder has its pieces in the order of their owners
        dims = view.bucket.unshard[0].mesh_dims
        for peer, pieces in recv.items():
            pieces.sort(key=lambda piece: mesh.ranks[mesh.moved(peer, dims, to=piece[0].owner)])
    packed = _pack(list(recv.values()))
    return RankCollective(collective, Packing(tuple(send)), packed, shares_slots=True)


def _pieces_after(
    view: _RankView, assignment: Assignment, done: tuple[str, ...]
) -> list[tuple[int, Region]]:
    """The pieces of a matrix on this rank after moves along `done`, each with its home."""
    mesh, layout = view.bucket.mesh, view.plan.spec(assignment).momentum_layout
    if mesh.index_along(view.position, done) != mesh.index_along(assignment.owner, done):
        return []
    holders, home = view.plan.holders(assignment), layout.home(view.position)
    base = home - mesh.offset_of(mesh.index_along(home, done), done)
    homes = sorted(base + mesh.offset_of(i, done) for i in range(mesh.num_ranks_along(done)))
    return [(home, holders[home]) for home in homes if home in holders]


def _pack(by_peer: Sequence[Sequence[Piece]]) -> Packing:
    offset, packed = 0, []
    for pieces in by_peer:
        slots = []
        for assignment, piece in pieces:
            for region in piece.strided_parts():
                slots.append(Slot(assignment, region, offset))
                offset += region.numel
        packed.append(tuple(slots))
    return Packing(tuple(packed))


def _moves(source: Packing, target: Packing) -> tuple[Move, ...]:
    """Copies that fill `target` with the slots of `source`; adjacent runs are merged."""
    offsets = {(slot.assignment, slot.region): slot.offset for slot in source.slots}
    merged: list[Move] = []
    for slot in target.slots:
        offset, numel = offsets[slot.assignment, slot.region], slot.region.numel
        last = merged[-1] if merged else None
        if last and last.source + last.numel == offset:  # targets have no gaps between them
            merged[-1] = Move(last.source, last.target, last.numel + numel)
        else:
            merged.append(Move(offset, slot.offset, numel))
    return tuple(merged)
