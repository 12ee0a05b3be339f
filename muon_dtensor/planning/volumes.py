"""What one bucket moves, computes and holds at each position of its mesh.

Arithmetic on layouts, for all positions at once. Knows no seconds.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import assert_never

from muon_dtensor.layout import Layout, Region
from muon_dtensor.planning.ir import (
    Assignment,
    Bucket,
    Collective,
    Gathered,
    Gram,
    Local,
    Owned,
    Phase,
    Plan,
    Route,
)
from muon_dtensor.planning.matrix_costs import ITEMSIZES, matrix_flops
from muon_dtensor.planning.teams import member_flops, members, slabs, team_sent_nbytes

Numels = list[int]
"""Elements, position by position."""


@dataclass(frozen=True, slots=True)
class Hop:
    """Elements in the buffers of one collective; `kept` is what a rank sends to itself.

    `is_mirror`: its send buffer is the one that holds what came before.
    """

    collective: Collective
    send: Numels
    recv: Numels
    kept: Numels
    is_mirror: bool


@dataclass(frozen=True)
class BucketCost:
    """What one bucket does at each position of its mesh. All numels count wire elements.

    `pieces`: what a rank packs; `touched`: what it holds of all matrices of the bucket, in
    `num_touched` pieces; `wholes`: what it orthogonalizes, put together from about `num_parts`
    pieces, and `team_nbytes` what it sends to its teams meanwhile.
    """

    bucket: Bucket
    flops: tuple[int, ...]
    pieces: Numels
    touched: Numels
    num_touched: list[int]
    wholes: Numels
    num_parts: list[int]
    team_nbytes: list[int]
    unshard: tuple[Hop, ...]
    reshard: tuple[Hop, ...]

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.bucket.wire_dtype]

    def sent_nbytes(self, hop: Hop) -> list[int]:
        """Bytes each position sends to others in this collective."""
        return [self.itemsize * (n - k) for n, k in zip(hop.send, hop.kept, strict=True)]

    def received_nbytes(self, hop: Hop) -> list[int]:
        """Bytes each position receives from others in this collective."""
        return [self.itemsize * (n - k) for n, k in zip(hop.recv, hop.kept, strict=True)]

    def buffers(self) -> dict[Phase, tuple[list[int], list[int]]]:
        """Bytes of exchange buffers each position holds: (at most during a phase, at its end).

        Not counted is what one matrix needs while it is orthogonalized (several, where they are
        batched), and one piece while it is packed.
        """
        none = [0] * len(self.wholes)
        there = _walk(self.pieces, self.unshard)
        back = _walk(self.wholes, self.reshard)
        before, after = there[0] if there else (self.pieces, self.pieces)
        phases = {Phase.UNSHARD: (_most(before, after), after)}
        later = [numels for step in there[1:] for numels in step]
        phases[Phase.WAIT] = (_most(after, *later, self.wholes), self.wholes)
        phases[Phase.ORTHOGONALIZE] = (self.wholes, self.wholes)
        before, after = back[0] if back else (self.wholes, self.wholes)
        phases[Phase.RESHARD] = (_most(before, after), after)
        later = [numels for step in back[1:] for numels in step]
        phases[Phase.APPLY] = (_most(after, *later), none)
        size = self.itemsize
        return {
            phase: ([size * n for n in during], [size * n for n in end])
            for phase, (during, end) in phases.items()
        }

    @cached_property
    def peak_nbytes(self) -> int:
        """Most bytes of buffers that any rank holds for this bucket."""
        return max(max(during, default=0) for during, _ in self.buffers().values())


def _walk(start: Numels, hops: tuple[Hop, ...]) -> list[tuple[Numels, Numels]]:
    """Per hop what is held while its send buffer is filled, and while it is in flight."""
    steps = []
    for hop in hops:
        filling = start if hop.is_mirror else [a + b for a, b in zip(start, hop.send, strict=True)]
        steps.append((filling, [a + b for a, b in zip(hop.send, hop.recv, strict=True)]))
        start = hop.recv
    return steps


def _most(*numels: Numels) -> Numels:
    return [max(values) for values in zip(*numels, strict=True)]


def _alike(
    assignments: Sequence[Assignment], same: Callable[[Assignment], Hashable]
) -> Iterator[tuple[Assignment, int]]:
    """An example of all assignments for which `same` says the same, and how many there are."""
    keys = [same(assignment) for assignment in assignments]
    examples = dict(zip(keys, assignments, strict=True))
    for key, count in Counter(keys).items():
        yield examples[key], count


class _Sums:
    """The pieces of a bucket's matrices, added up position by position.

    Matrices of equal layout have the same holders: they are counted, and the holders walked once.
    """

    def __init__(self, plan: Plan, bucket: Bucket) -> None:
        self.plan = plan
        self.bucket = bucket
        self.mesh = bucket.mesh
        self.num_positions = bucket.mesh.num_ranks

    def tables(
        self, key: Callable[[Layout, Assignment], int]
    ) -> Iterator[tuple[Layout, Assignment, int, int]]:
        """(layout, an example, key, how many) for matrices of one table of holders and one key."""
        plan = self.plan

        def same(a: Assignment) -> Hashable:
            return (id(plan.holders(a)), key(plan.spec(a).layout, a))

        for a, count in _alike(self.bucket.assignments, same):
            layout = plan.spec(a).layout
            yield layout, a, key(layout, a), count

    def touched(self) -> tuple[Numels, list[int]]:
        """What each position stores of all matrices, and in how many pieces."""
        numels, nums = [0] * self.num_positions, [0] * self.num_positions
        for layout, assignment, _, count in self.tables(lambda *_: 0):
            for home, piece in self.plan.holders(assignment).items():
                numel = count * piece.numel
                for offset in layout.replica_offsets:
                    numels[home + offset] += numel
                    nums[home + offset] += count
        return numels, nums

    def near(self) -> Numels:
        """What each position stores of the matrices owned in its replica."""
        numels = [0] * self.num_positions
        for _, assignment, offset, count in self.tables(lambda x, a: x.replica_offset(a.owner)):
            for home, piece in self.plan.holders(assignment).items():
                numels[home + offset] += count * piece.numel
        return numels

    def arrived(self, done: tuple[str, ...]) -> Numels:
        """What is at each position after moves towards the owners along `done`."""
        numels, mesh = [0] * self.num_positions, self.mesh

        def key(layout: Layout, assignment: Assignment) -> int:
            along = mesh.offset_of(mesh.index_along(assignment.owner, done), done)
            return layout.replica_offset(assignment.owner) + along

        for _, assignment, offset, count in self.tables(key):
            for home, piece in self.plan.holders(assignment).items():
                start = home - mesh.offset_of(mesh.index_along(home, done), done)
                numels[start + offset] += count * piece.numel
        return numels

    def stayed(self, done: tuple[str, ...], dims: tuple[str, ...]) -> Numels:
        """What is where it must be along `dims` already, having moved along `done`."""
        numels, mesh = [0] * self.num_positions, self.mesh
        by_index: dict[int, dict[int, list[tuple[int, int]]]] = {}
        for assignment in self.bucket.assignments:
            holders = self.plan.holders(assignment)
            rows = by_index.get(id(holders))
            if rows is None:
                rows = by_index[id(holders)] = defaultdict(list)
                for home, piece in holders.items():
                    start = home - mesh.offset_of(mesh.index_along(home, done), done)
                    rows[mesh.index_along(home, dims)].append((start, piece.numel))
            owner = assignment.owner
            layout = self.plan.spec(assignment).layout
            offset = layout.replica_offset(owner)
            offset += mesh.offset_of(mesh.index_along(owner, done), done)
            for start, numel in rows.get(mesh.index_along(owner, dims), ()):
                numels[start + offset] += numel
        return numels


def bucket_cost(plan: Plan, bucket: Bucket) -> BucketCost:
    """Volumes and flops of one bucket at every position of its mesh."""
    sums = _Sums(plan, bucket)
    touched, num_touched = sums.touched()
    count = bucket.mesh.num_ranks
    flops, wholes, team_nbytes = [0] * count, [0] * count, [0] * count
    pieces = wholes
    unshard: tuple[Hop, ...] = ()
    reshard: tuple[Hop, ...] = ()
    match bucket.strategy:
        case Local() | Owned():
            for a in bucket.assignments:
                flops[a.owner] += matrix_flops(plan.matrix(a), plan.spec(a).num_iterations)
                wholes[a.owner] += plan.matrix(a).numel
            if isinstance(bucket.strategy, Owned):
                pieces, unshard, reshard = _owned_hops(sums, bucket, touched, wholes)
        case Gathered():
            unshard = _gathered(sums, bucket, flops, wholes, touched)
            pieces = touched
        case Gram() as strategy:
            unshard, reshard = _gram(sums, bucket, strategy, flops, wholes, team_nbytes, touched)
            pieces = unshard[0].send if unshard else wholes
        case _:
            assert_never(bucket.strategy)
    return BucketCost(
        bucket,
        tuple(flops),
        pieces,
        touched,
        num_touched,
        wholes,
        _num_parts(plan, bucket),
        team_nbytes,
        unshard,
        reshard,
    )


def boxes_of(plan: Plan, bucket: Bucket, assignment: Assignment) -> list[tuple[int, int]]:
    """(position, elements) of what each of those who orthogonalize a matrix has of it."""
    matrix = plan.matrix(assignment)
    match bucket.strategy:
        case Local() | Owned():
            return [(assignment.owner, matrix.numel)]
        case Gathered():
            layout, homes = plan.spec(assignment).layout, plan.holders(assignment)
            return [(home + o, matrix.numel) for home in homes for o in layout.replica_offsets]
        case Gram() as strategy:
            team = members(bucket.mesh, strategy, assignment.owner)
            parts = slabs(matrix, len(team))
            return [(m, slab.numel) for m, slab in zip(team, parts, strict=True)]
        case _:
            assert_never(bucket.strategy)


def _num_parts(plan: Plan, bucket: Bucket) -> list[int]:
    """In how many pieces what each position orthogonalizes arrives; of a slab about its share."""
    counts = [0] * bucket.mesh.num_ranks
    if isinstance(bucket.strategy, Local):
        return counts
    for a in bucket.assignments:
        boxes, num_parts = boxes_of(plan, bucket, a), len(plan.holders(a))
        if isinstance(bucket.strategy, Gram):
            num_parts = -(-num_parts // len(boxes))
        for position, _ in boxes:
            counts[position] += num_parts
    return counts


def _owned_hops(
    sums: _Sums, bucket: Bucket, touched: Numels, wholes: Numels
) -> tuple[Numels, tuple[Hop, ...], tuple[Hop, ...]]:
    """What owners' ranks pack, and the exchanges there and back."""
    assert isinstance(bucket.strategy, Owned)
    near = sums.near() if bucket.strategy.replica_dims else touched
    done: tuple[str, ...] = ()
    held, hops = near, []
    for collective in bucket.unshard:
        dims = collective.mesh_dims
        is_last = collective is bucket.unshard[-1]
        then = wholes if is_last else sums.arrived((*done, *dims))
        hops.append(Hop(collective, held, then, sums.stayed(done, dims), not done))
        held, done = then, (*done, *dims)
    mirrors = {hop.collective.mesh_dims: hop for hop in hops}
    copies = bucket.mesh.num_ranks_along(bucket.strategy.replica_dims)
    back = []
    for index, collective in enumerate(bucket.reshard):
        mirror = mirrors.get(collective.mesh_dims)
        if collective.route is Route.TO_REPLICAS:
            send = [copies * n for n in near]
            back.append(Hop(collective, send, touched, near, False))
        elif mirror is not None:
            back.append(Hop(collective, mirror.recv, mirror.send, mirror.kept, index == 0))
        else:
            own = hops[0].kept if hops else wholes
            back.append(Hop(collective, [copies * n for n in wholes], touched, own, False))
    return (near if hops else wholes), tuple(hops), tuple(back)


def _gathered(
    sums: _Sums, bucket: Bucket, flops: Numels, wholes: Numels, touched: Numels
) -> tuple[Hop, ...]:
    """Fills in flops and wholes; the exchange, if there is one."""
    plan, send = sums.plan, [0] * len(wholes)
    for a in bucket.assignments:
        work = matrix_flops(plan.matrix(a), plan.spec(a).num_iterations)
        holders, layout = plan.holders(a), plan.spec(a).layout
        for home, piece in holders.items():
            for offset in layout.replica_offsets:
                flops[home + offset] += work
                wholes[home + offset] += plan.matrix(a).numel
                send[home + offset] += len(holders) * piece.numel
    return tuple(Hop(c, send, wholes, touched, False) for c in bucket.unshard)


def _gram(
    sums: _Sums,
    bucket: Bucket,
    strategy: Gram,
    flops: Numels,
    wholes: Numels,
    team_nbytes: list[int],
    touched: Numels,
) -> tuple[tuple[Hop, ...], tuple[Hop, ...]]:
    """Fills in flops, wholes and what teams send; the exchanges there and back."""
    plan, mesh = sums.plan, bucket.mesh
    send, kept = [0] * mesh.num_ranks, [0] * mesh.num_ranks

    def same(a: Assignment) -> Hashable:
        return (id(plan.holders(a)), plan.matrix(a), plan.spec(a).num_iterations, a.owner)

    for a, count in _alike(bucket.assignments, same):
        spec, matrix, holders = plan.spec(a), plan.matrix(a), plan.holders(a)
        team = members(mesh, strategy, a.owner)
        sent = team_sent_nbytes(matrix, spec.num_iterations, len(team))
        for index, (member, slab) in enumerate(zip(team, slabs(matrix, len(team)), strict=True)):
            flops[member] += count * member_flops(matrix, spec.num_iterations, len(team), index)
            wholes[member] += count * slab.numel
            team_nbytes[member] += count * sent
            own = holders.get(spec.layout.home(member))
            kept[member] += 0 if own is None else count * own.intersect(slab).numel
    if bucket.unshard:
        _add_parts(sums, strategy, send)
    unshard = tuple(Hop(c, send, wholes, kept, True) for c in bucket.unshard)
    copies = mesh.num_ranks_along(strategy.replica_dims)
    if strategy.is_in_place:
        back = [copies * n for n in wholes]
        return unshard, tuple(Hop(c, back, touched, wholes, False) for c in bucket.reshard)
    mirror = copies == 1
    back = [copies * n for n in wholes]
    return unshard, tuple(Hop(c, back, touched, kept, mirror) for c in bucket.reshard)


def _add_parts(sums: _Sums, strategy: Gram, send: Numels) -> None:
    """Adds what each holder sends to the members of each team in its own replica."""
    mesh, plan = sums.mesh, sums.plan
    shared = tuple(name for name in strategy.team_dims if name in strategy.replica_dims)

    def same(a: Assignment) -> Hashable:
        offset = plan.spec(a).layout.replica_offset(a.owner)
        return (id(plan.holders(a)), plan.matrix(a), offset)

    for a, count in _alike(sums.bucket.assignments, same):
        holders, layout = plan.holders(a), plan.spec(a).layout
        team = members(mesh, strategy, a.owner)
        parts: dict[int, list[Region]] = defaultdict(list)
        for member, slab in zip(team, slabs(plan.matrix(a), len(team)), strict=True):
            parts[layout.replica_offset(member)].append(slab)
        for offset, slabs_here in parts.items():
            for home, piece in holders.items():
                numel = (
                    sum(piece.intersect(slab).numel for slab in slabs_here)
                    if shared
                    else piece.numel
                )
                send[home + offset] += count * numel
