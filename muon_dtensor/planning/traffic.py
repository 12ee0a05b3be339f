"""Elements sent, received, buffered and orthogonalized by a bucket at each position."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from muon_dtensor.layout import Layout
from muon_dtensor.planning.matrix_costs import (
    ITEMSIZES,
    gram_itemsize,
    matrix_flops,
    rows_of_member,
    slab_flops,
)
from muon_dtensor.planning.plan import Assignment, Bucket, ParamSpec, Plan
from muon_dtensor.planning.schedule import BufferSequence, Content, Hop, buffer_sequence
from muon_dtensor.planning.strategies import Distributed, Route

Numels = list[int]
"""Number of elements at each position of a mesh."""


@dataclass(frozen=True)
class BucketTraffic:
    """What one bucket sends, computes and holds at each position of its mesh.

    Numels count elements of the wire dtype. `buffers`: per numbered buffer, the elements that it
    holds. `self_sent`: per hop, the elements that a rank sends to itself. `stored`: elements of
    the bucket's matrices that a rank stores, in `num_stored` pieces; `momenta`, `num_momenta`: the
    same of their momenta. `num_parts`: number of pieces
    from which a rank assembles the matrices that it owns. `team_nbytes`: bytes that a rank sends to
    the other members of its teams while they orthogonalize.
    """

    bucket: Bucket
    sequence: BufferSequence
    flops: tuple[int, ...]
    buffers: tuple[Numels, ...]
    self_sent: tuple[Numels, ...]
    stored: Numels
    num_stored: list[int]
    momenta: Numels
    num_momenta: list[int]
    num_parts: list[int]
    team_nbytes: list[int]

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.bucket.wire_dtype]

    @property
    def pieces(self) -> Numels:
        """Elements that each position packs."""
        return self.buffers[0]

    @property
    def wholes(self) -> Numels:
        """Elements that each position orthogonalizes."""
        return self.buffers[self.sequence.wholes]

    def sent_nbytes(self, hop: Hop) -> list[int]:
        """Return the bytes that each position sends to other ranks in a collective."""
        return self._exchanged_nbytes([hop.copies * n for n in self.buffers[hop.send]], hop)

    def received_nbytes(self, hop: Hop) -> list[int]:
        """Return the bytes that each position receives from other ranks in a collective."""
        return self._exchanged_nbytes(self.buffers[hop.recv], hop)

    def _exchanged_nbytes(self, numels: Numels, hop: Hop) -> list[int]:
        self_sent = self.self_sent[hop.index]
        return [self.itemsize * (n - s) for n, s in zip(numels, self_sent, strict=True)]


def _distinct(
    assignments: Sequence[Assignment], key_of: Callable[[Assignment], Hashable]
) -> Iterator[tuple[Assignment, int]]:
    """Yield (an example, the number of assignments) for each distinct key."""
    keys = [key_of(assignment) for assignment in assignments]
    examples = dict(zip(keys, assignments, strict=True))
    for key, count in Counter(keys).items():
        yield examples[key], count


class _Sums:
    """Sums over the pieces of a bucket's matrices, for each position.

    Matrices with equal holders are counted, and only one of them is visited.
    """

    def __init__(self, plan: Plan, bucket: Bucket) -> None:
        self.plan = plan
        self.bucket = bucket
        self.mesh = bucket.mesh
        self.num_positions = bucket.mesh.num_ranks

    def tables(
        self, key: Callable[[Layout, Assignment], int]
    ) -> Iterator[tuple[Layout, Assignment, int, int]]:
        """Yield (layout, an example, key, count) for matrices with equal holders and equal key.

        Layouts and holders are those of momenta.
        """
        plan = self.plan

        def full_key(a: Assignment) -> Hashable:
            return (id(plan.holders(a)), key(plan.spec(a).momentum_layout, a))

        for a, count in _distinct(self.bucket.assignments, full_key):
            layout = plan.spec(a).momentum_layout
            yield layout, a, key(layout, a), count

    @cached_property
    def stored(self) -> tuple[Numels, list[int]]:
        """The elements that each position stores of all matrices, and in how many pieces."""
        return self._over_replicas(lambda spec: spec.layout)

    @cached_property
    def momenta(self) -> tuple[Numels, list[int]]:
        """The same of their momenta."""
        if not any(self.plan.spec(a).gathered_dims for a in self.bucket.assignments):
            return self.stored
        return self._over_replicas(lambda spec: spec.momentum_layout)

    def _over_replicas(self, layout_of: Callable[[ParamSpec], Layout]) -> tuple[Numels, list[int]]:
        """Return the elements of pieces, and their number, on all ranks that replicate them."""
        numels, nums = [0] * self.num_positions, [0] * self.num_positions
        for _, assignment, _, count in self.tables(lambda *_: 0):
            layout = layout_of(self.plan.spec(assignment))
            offsets = layout.replica_offsets
            for home, piece_numel in self.plan.holder_numels(assignment):
                numel = count * piece_numel
                first = home if len(offsets) == 1 else layout.home(home)
                for offset in offsets:
                    numels[first + offset] += numel
                    nums[first + offset] += count
        return numels, nums

    def after_stages(self, done: tuple[str, ...]) -> Numels:
        """Return the elements at each position once pieces were sent along `done`."""
        numels, offsets = [0] * self.num_positions, self.mesh.offsets_along(done)

        def key(layout: Layout, assignment: Assignment) -> int:
            return layout.replica_offset(assignment.owner) + offsets[assignment.owner]

        for _, assignment, offset, count in self.tables(key):
            for home, numel in self.plan.holder_numels(assignment):
                numels[home - offsets[home] + offset] += count * numel
        return numels

    def unmoved(self, done: tuple[str, ...], dims: tuple[str, ...]) -> Numels:
        """Return the elements that need no move along `dims` after stages along `done`."""
        numels, mesh = [0] * self.num_positions, self.mesh
        offsets, along = mesh.offsets_along(done), mesh.offsets_along(dims)
        by_index: dict[int, dict[int, list[tuple[int, int]]]] = {}
        for assignment in self.bucket.assignments:
            holders = self.plan.holders(assignment)
            pieces = by_index.get(id(holders))
            if pieces is None:
                pieces = by_index[id(holders)] = defaultdict(list)
                for home, numel in self.plan.holder_numels(assignment):
                    pieces[along[home]].append((home - offsets[home], numel))
            owner = assignment.owner
            layout = self.plan.spec(assignment).momentum_layout
            offset = layout.replica_offset(owner) + offsets[owner]
            for start, numel in pieces.get(along[owner], ()):
                numels[start + offset] += numel
        return numels

    def of(self, content: Content) -> Numels:
        """Return the elements of a buffer at each position."""
        if content.done is None:
            numels, _ = self.stored
        elif set(content.done) >= set(self.bucket.strategy.unshard_dims):
            numels = self.owned()
        else:
            numels = self.after_stages(content.done)
        return numels

    def owned(self) -> Numels:
        """Return the elements of the matrices that each position owns."""
        numels = [0] * self.num_positions
        for assignment in self.bucket.assignments:
            numels[assignment.owner] += self.plan.region(assignment).numel
        return numels

    def self_sent(self, sequence: BufferSequence) -> tuple[Numels, ...]:
        """Return the elements that each position sends to itself, for each hop."""
        self_sent: list[Numels] = []
        by_dims: dict[tuple[str, ...], Numels] = {}  # of exchanges with the owners
        done: tuple[str, ...] = ()
        for hop in sequence.unshard:
            dims = hop.collective.mesh_dims
            by_dims[dims] = self.unmoved(done, dims)
            self_sent.append(by_dims[dims])
            done = (*done, *dims)
        for hop in sequence.reshard:
            # A rank sends itself its piece: as an owner to the holders of all replicas, or as a
            # holder to its replicas.
            if hop.collective.route is Route.TO_REPLICAS:
                self_sent.append(self.of(Content(())))
            else:
                self_sent.append(by_dims.get(hop.collective.mesh_dims, self_sent[0]))
        return tuple(self_sent)


def bucket_traffic(plan: Plan, bucket: Bucket) -> BucketTraffic:
    """Return the traffic of one bucket."""
    sums = _Sums(plan, bucket)
    sequence = buffer_sequence(bucket.strategy, bucket.mesh)
    contents = {content: sums.of(content) for content in dict.fromkeys(sequence.contents)}
    flops, num_parts, team_nbytes = ([0] * bucket.mesh.num_ranks for _ in range(3))
    for a in bucket.assignments:
        num_iterations = plan.spec(a).num_iterations
        num_parts[a.owner] += 0 if bucket.strategy.is_local else len(plan.holders(a))
        if isinstance(bucket.strategy, Distributed):
            member = _member_cost(plan, bucket, bucket.strategy, a)
            flops[a.owner] += member.flops
            team_nbytes[a.owner] += member.sent_nbytes
        else:
            flops[a.owner] += matrix_flops(plan.matrix(a), num_iterations)
    return BucketTraffic(
        bucket,
        sequence,
        tuple(flops),
        tuple(contents[content] for content in sequence.contents),
        sums.self_sent(sequence),
        *sums.stored,
        *sums.momenta,
        num_parts,
        team_nbytes,
    )


class _MemberCost(NamedTuple):
    flops: int
    sent_nbytes: int


def _member_cost(
    plan: Plan, bucket: Bucket, strategy: Distributed, assignment: Assignment
) -> _MemberCost:
    """Return what a member of a team computes and sends to the others for its slab.

    Once the sums that give the scale; in each iteration the other members' rows of the Gram matrix,
    then its own rows of the sum, and of the polynomial if that is shared.
    """
    matrix, num_iterations = plan.matrix(assignment), plan.spec(assignment).num_iterations
    team = bucket.mesh.team(assignment.owner, strategy.team_dims, strategy.team_size)
    short = min(matrix.rows, matrix.cols)
    num_rows = len(rows_of_member(short, team.index(assignment.owner), len(team)))
    others = len(team) - 1
    gathered = num_rows * short * others * ITEMSIZES[bucket.wire_dtype]
    num_gathers = 1 + strategy.shares_polynomial
    summed = (short - num_rows) * short * gram_itemsize(bucket.wire_dtype)
    scale_nbytes = 2 * gram_itemsize(bucket.wire_dtype)
    return _MemberCost(
        slab_flops(
            short,
            plan.region(assignment).numel // short,
            num_rows if strategy.shares_polynomial else short,
            num_iterations,
        ),
        num_iterations * (summed + num_gathers * gathered) + others * scale_nbytes,
    )


class LinkBytes(NamedTuple):
    """Bytes that all ranks send in a step to ranks of the same node, and to other nodes."""

    within_nodes: int
    between_nodes: int


def link_nbytes(plan: Plan) -> LinkBytes:
    """Return the bytes of a step by kind of link, without those of teams' iterations.

    Results for replicas that go by an all-gather are counted from their source to each replica.
    """
    node_size = plan.options.topology.node_size
    totals = [0, 0]
    for bucket in plan.buckets:
        mesh, strategy = bucket.mesh, bucket.strategy
        nodes = [rank // node_size for rank in mesh.ranks]
        itemsize = ITEMSIZES[bucket.wire_dtype]
        stages = [mesh.offsets_along(dims) for dims in strategy.stages]
        # over two hops, results return as directions came, and go on to replicas from there
        returns = strategy.hops > 1 or not strategy.replica_dims
        over_replicas = mesh.offsets_along(strategy.replica_dims)
        passed_on: Counter[int] = Counter()  # elements by position
        for assignment in bucket.assignments:
            spec, owner = plan.spec(assignment), assignment.owner
            first = spec.momentum_layout.replica_offset(owner)
            is_direct = strategy.hops == 1 and not spec.gathered_dims
            for home, numel in plan.holder_numels(assignment):
                position = first + home
                if is_direct and strategy.replica_dims:
                    base = position - over_replicas[position]
                    for replica in mesh.peers(owner, strategy.replica_dims):
                        reached = base + over_replicas[replica]
                        if reached != owner:
                            totals[nodes[owner] != nodes[reached]] += itemsize * numel
                else:
                    passed_on[position] += numel
                for offsets in stages:
                    target = position + offsets[owner] - offsets[position]
                    if target != position:
                        nbytes = itemsize * numel * (1 + returns)
                        totals[nodes[position] != nodes[target]] += nbytes
                    position = target
        for position, numel in passed_on.items():
            for reached in mesh.peers(position, strategy.replica_dims):
                if reached != position:
                    totals[nodes[position] != nodes[reached]] += itemsize * numel
    return LinkBytes(*totals)


def plan_traffic(plan: Plan) -> tuple[BucketTraffic, ...]:
    """Return the traffic of each bucket of a plan."""
    return tuple(bucket_traffic(plan, bucket) for bucket in plan.buckets)
