"""Bytes, flops and buffers of a plan, rank by rank, and the least that any plan could do.

Arithmetic only. Prices what it is shown; does not choose.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from muon_dtensor.layout import Matrix, MeshSpec
from muon_dtensor.planning.ir import Bucket, Collective, Local, Owned, Phase, Plan, Route

ITEMSIZES = {"bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes per element of each wire dtype."""


def newton_schulz_flops(rows: int, cols: int, num_iterations: int) -> int:
    """Floating-point operations of Newton-Schulz on one matrix.

    An iteration on the short side r and the long side c multiplies X X^T (2 r^2 c), its square
    (2 r^3), and their polynomial with X (2 r^2 c).
    """
    short, long = sorted((rows, cols))
    return num_iterations * (4 * short * short * long + 2 * short**3)


def matrix_flops(matrix: Matrix, num_iterations: int) -> int:
    """`newton_schulz_flops` of one matrix of a parameter."""
    return newton_schulz_flops(matrix.rows, matrix.cols, num_iterations)


@dataclass(frozen=True)
class BucketCost:
    """What one bucket does at each position of its mesh. All numels count wire elements.

    `pieces`: what a rank holds of the matrices owned in its own replica; `spread`: of all
    matrices of the bucket; `wholes`: the matrices it owns; `kept`: its own part of those.
    """

    bucket: Bucket
    flops: tuple[int, ...]
    pieces: tuple[int, ...]
    spread: tuple[int, ...]
    wholes: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def num_replicas(self) -> int:
        match self.bucket.strategy:
            case Local():
                return 1
            case Owned(replica_dims=dims):
                return self.bucket.mesh.num_ranks_along(dims)

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.bucket.wire_dtype]

    def sent_nbytes(self, collective: Collective) -> tuple[int, ...]:
        """Bytes each position sends to others in this collective."""
        match collective.route:
            case Route.TO_OWNER:
                numels = [a - k for a, k in zip(self.pieces, self.kept, strict=True)]
            case Route.TO_HOLDERS:
                copies = self._owner_copies
                numels = [copies * w - k for w, k in zip(self.wholes, self.kept, strict=True)]
            case Route.TO_REPLICAS:
                numels = [(self.num_replicas - 1) * a for a in self.pieces]
        return tuple(self.itemsize * numel for numel in numels)

    def received_nbytes(self, collective: Collective) -> tuple[int, ...]:
        """Bytes each position receives from others in this collective."""
        match collective.route:
            case Route.TO_OWNER:
                numels = [w - k for w, k in zip(self.wholes, self.kept, strict=True)]
            case Route.TO_HOLDERS:
                held = self.spread if self._owner_copies > 1 else self.pieces
                numels = [h - k for h, k in zip(held, self.kept, strict=True)]
            case Route.TO_REPLICAS:
                numels = [s - a for s, a in zip(self.spread, self.pieces, strict=True)]
        return tuple(self.itemsize * numel for numel in numels)

    @property
    def _owner_copies(self) -> int:
        """Into how many replicas the owner itself sends."""
        return self.num_replicas if len(self.bucket.reshard) == 1 else 1

    def buffers(self) -> dict[Phase, tuple[int, ...]]:
        """Bytes of exchange buffers each position holds from the end of a phase to the next.

        At the end of APPLY nothing is held; the value there is the peak during it. Not counted is
        what one matrix needs while it is orthogonalized (several, where they are batched).
        """
        copies = self.num_replicas
        unshard = reshard = apply = self.wholes
        if self.bucket.unshard:
            unshard = _sums(self.pieces, self.wholes)
        match len(self.bucket.reshard):
            case 1 if copies > 1:
                reshard = tuple(
                    copies * w + max(w, s) for w, s in zip(self.wholes, self.spread, strict=True)
                )
                apply = tuple(copies * w + s for w, s in zip(self.wholes, self.spread, strict=True))
            case 1:
                reshard = apply = _sums(self.wholes, self.pieces)
            case 2:
                reshard = _sums(self.wholes, self.pieces)
                relayed = (
                    copies * p + max(p, s) for p, s in zip(self.pieces, self.spread, strict=True)
                )
                apply = tuple(map(max, reshard, relayed))
        numels = {
            Phase.UNSHARD: unshard,
            Phase.WAIT: self.wholes,
            Phase.ORTHOGONALIZE: self.wholes,
            Phase.RESHARD: reshard,
            Phase.APPLY: apply,
        }
        return {
            phase: tuple(self.itemsize * numel for numel in values)
            for phase, values in numels.items()
        }

    @cached_property
    def peak_nbytes(self) -> int:
        """Most bytes of buffers that any rank holds for this bucket."""
        return max(max(values, default=0) for values in self.buffers().values())


def _sums(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(first, second, strict=True))


@dataclass(frozen=True)
class PlanCost:
    """Totals of a plan. Per-rank values follow `ranks`, the sorted global ranks of its meshes.

    `flops` and `makespan_flops` (see `makespan`) count what ranks do, `model_flops` each matrix
    once; `buffer_nbytes` is each rank's peak over the schedule; `bound_nbytes` see there.
    """

    ranks: tuple[int, ...]
    buckets: tuple[BucketCost, ...]
    flops: tuple[int, ...]
    sent_nbytes: tuple[int, ...]
    received_nbytes: tuple[int, ...]
    buffer_nbytes: tuple[int, ...]
    model_flops: int
    bound_nbytes: int
    num_matrices: int
    makespan_flops: int

    @property
    def total_nbytes(self) -> int:
        """Bytes sent in one step, summed over ranks."""
        return sum(self.sent_nbytes)

    @property
    def peak_buffer_nbytes(self) -> int:
        """Most bytes of exchange buffers any rank holds at any time of a step."""
        return max(self.buffer_nbytes, default=0)

    @property
    def redundancy(self) -> float:
        """Orthogonalization flops of all ranks over those of the model; 1 = each matrix once."""
        return sum(self.flops) / self.model_flops if self.model_flops else 1.0

    @property
    def imbalance(self) -> float:
        """Flops of the slowest rank over the mean of all ranks; 1 = perfect balance."""
        return self._over_mean(max(self.flops, default=0))

    @property
    def makespan(self) -> float:
        """Sum over buckets of the slowest rank's flops, over the mean of all ranks.

        What the step takes if ranks wait for each other after every bucket. Buckets that
        together hold at most one round of matrices count as one, as the schedule runs them.
        """
        return self._over_mean(self.makespan_flops)

    def _over_mean(self, flops: int) -> float:
        total = sum(self.flops)
        return flops * len(self.ranks) / total if total else 1.0


def bucket_cost(plan: Plan, bucket: Bucket) -> BucketCost:
    """Volumes and flops of one bucket at every position of its mesh."""
    mesh = bucket.mesh
    flops, wholes, kept = ([0] * mesh.num_ranks for _ in range(3))
    pieces, spread = ([0] * mesh.num_ranks for _ in range(2))
    # Matrices of equal layout have the same holders: count them and walk the holders once.
    num_spread: Counter[tuple[int, int, int]] = Counter()
    num_in_replica: Counter[tuple[int, int, int]] = Counter()
    for assignment in bucket.assignments:
        spec, matrix, owner = plan.spec(assignment), plan.matrix(assignment), assignment.owner
        flops[owner] += matrix_flops(matrix, spec.num_iterations)
        wholes[owner] += matrix.numel
        own = plan.holders(assignment).get(spec.layout.home(owner))
        kept[owner] += 0 if own is None else own.numel
        num_spread[assignment.param, assignment.matrix, 0] += 1
        num_in_replica[assignment.param, assignment.matrix, spec.layout.replica_offset(owner)] += 1
    for (param, index, _), count in _same_holders(plan, num_spread).items():
        layout = plan.params[param].layout
        for home, piece in layout.holders(plan.params[param].matrices[index].region).items():
            for offset in layout.replica_offsets:
                spread[home + offset] += count * piece.numel
    for (param, index, offset), count in _same_holders(plan, num_in_replica).items():
        layout = plan.params[param].layout
        for home, piece in layout.holders(plan.params[param].matrices[index].region).items():
            pieces[home + offset] += count * piece.numel
    return BucketCost(
        bucket, tuple(flops), tuple(pieces), tuple(spread), tuple(wholes), tuple(kept)
    )


def _same_holders(
    plan: Plan, counts: Counter[tuple[int, int, int]]
) -> dict[tuple[int, int, int], int]:
    """Counts of matrices, merged into one entry wherever the table of holders is the same."""
    merged: dict[tuple[int, int], tuple[tuple[int, int, int], int]] = {}
    for key, count in counts.items():
        param, index, offset = key
        spec = plan.params[param]
        same = (id(spec.layout.holders(spec.matrices[index].region)), offset)
        first, so_far = merged.get(same, (key, 0))
        merged[same] = (first, so_far + count)
    return dict(merged.values())


def bound_nbytes(plan: Plan) -> int:
    """The least bytes a step can send, summed over ranks, when owners are balanced.

    Of P elements in N pieces an owner lacks P - P/N in the mean over all that could be the owner;
    they travel to it and back, and every further replica receives P once. Where pieces differ, a
    plan whose owners hold the larger ones sends a little less.
    """
    total = 0.0
    for spec in plan.params:
        itemsize = ITEMSIZES[spec.wire_dtype]
        for matrix in spec.matrices:
            if matrix.numel == 0:
                continue
            num_holders = len(spec.layout.holders(matrix.region))
            away = matrix.numel * (1 - 1 / num_holders)
            further = matrix.numel * (len(spec.layout.replica_offsets) - 1)
            total += itemsize * (2 * away + further)
    return round(total)


def plan_cost(plan: Plan) -> PlanCost:
    """Price a plan."""
    ranks = tuple(sorted(set().union(*(mesh.rank_set for mesh in plan.meshes))))
    index_of = {rank: index for index, rank in enumerate(ranks)}
    buckets = tuple(bucket_cost(plan, bucket) for bucket in plan.buckets)
    flops, sent, received = ([0] * len(ranks) for _ in range(3))
    for cost in buckets:
        _add(flops, cost.flops, cost.bucket.mesh, index_of)
        for collective in (*cost.bucket.unshard, *cost.bucket.reshard):
            _add(sent, cost.sent_nbytes(collective), cost.bucket.mesh, index_of)
            _add(received, cost.received_nbytes(collective), cost.bucket.mesh, index_of)
    matrices = [(spec, m) for spec in plan.params for m in spec.matrices if m.numel]
    return PlanCost(
        ranks=ranks,
        buckets=buckets,
        flops=tuple(flops),
        sent_nbytes=tuple(sent),
        received_nbytes=tuple(received),
        buffer_nbytes=_buffer_peaks(plan, buckets, index_of),
        model_flops=sum(matrix_flops(m, spec.num_iterations) for spec, m in matrices),
        bound_nbytes=bound_nbytes(plan),
        num_matrices=len(matrices),
        makespan_flops=_makespan_flops(plan, buckets, index_of),
    )


def _add(
    totals: list[int], values: tuple[int, ...], mesh: MeshSpec, index_of: dict[int, int]
) -> None:
    for rank, value in zip(mesh.ranks, values, strict=True):
        totals[index_of[rank]] += value


def _buffer_peaks(
    plan: Plan, costs: tuple[BucketCost, ...], index_of: dict[int, int]
) -> tuple[int, ...]:
    """Most bytes of buffers each rank holds while it walks the schedule."""
    held, peaks = [0] * len(index_of), [0] * len(index_of)
    now: dict[int, tuple[int, ...]] = {}
    buffers: dict[int, dict[Phase, tuple[int, ...]]] = {}
    for action in plan.schedule:
        cost = costs[action.bucket]
        ranks = cost.bucket.mesh.ranks
        phases = buffers.setdefault(action.bucket, cost.buffers())
        before = now.get(action.bucket, (0,) * len(ranks))
        after = now[action.bucket] = phases[action.phase]
        for rank, old, new in zip(ranks, before, after, strict=True):
            index = index_of[rank]
            held[index] += new - old
            peaks[index] = max(peaks[index], held[index])
        if action.phase is Phase.APPLY:
            for rank, old in zip(ranks, after, strict=True):
                held[index_of[rank]] -= old
            del now[action.bucket], buffers[action.bucket]
    return tuple(peaks)


def _makespan_flops(plan: Plan, costs: tuple[BucketCost, ...], index_of: dict[int, int]) -> int:
    """Sum over runs of consecutive ORTHOGONALIZE actions of the slowest rank's flops."""
    total = 0
    for computes, actions in groupby(plan.schedule, lambda a: a.phase is Phase.ORTHOGONALIZE):
        if not computes:
            continue
        run = [0] * len(index_of)
        for action in actions:
            cost = costs[action.bucket]
            _add(run, cost.flops, cost.bucket.mesh, index_of)
        total += max(run)
    return total
