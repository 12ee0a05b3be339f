"""Totals of a plan for every rank, and the lower bound of its traffic."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from muon_dtensor.layout import MeshSpec
from muon_dtensor.planning.matrix_costs import ITEMSIZES, matrix_flops
from muon_dtensor.planning.memory import peaks
from muon_dtensor.planning.plan import Phase, Plan
from muon_dtensor.planning.traffic import BucketTraffic


@dataclass(frozen=True)
class PlanCost:
    """Totals of a plan. Per-rank values follow `ranks`, the sorted global ranks of its meshes.

    `flops`: orthogonalization of each rank. `model_flops`: that of each matrix, counted once.
    `makespan_flops`: see `makespan`. `buffer_nbytes`: peak of exchange buffers of each rank over
    the schedule. `peak_nbytes`: the same with the work space of packing, orthogonalization and
    update. `bound_nbytes`: see the function.
    """

    ranks: tuple[int, ...]
    buckets: tuple[BucketTraffic, ...]
    flops: tuple[int, ...]
    sent_nbytes: tuple[int, ...]
    received_nbytes: tuple[int, ...]
    buffer_nbytes: tuple[int, ...]
    peak_nbytes: tuple[int, ...]
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
        """The most bytes of exchange buffers that any rank holds at any time of a step."""
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
        """Sum over waves of the slowest rank's flops, over the mean of all ranks.

        This is the relative time of a step if ranks wait for each other after every wave.
        """
        return self._over_mean(self.makespan_flops)

    def _over_mean(self, flops: int) -> float:
        total = sum(self.flops)
        return flops * len(self.ranks) / total if total else 1.0


def bound_nbytes(plan: Plan) -> int:
    """Return the fewest bytes that a step with balanced owners can send, summed over ranks.

    A matrix of P elements has N pieces. The mean over its possible owners of the elements that an
    owner does not store is P - P/N. These are sent to the owner and back, and each further replica
    receives P elements once. If the pieces differ in size, a plan whose owners store the larger
    ones sends slightly less.
    """
    total = 0.0
    for spec in plan.params:
        itemsize = ITEMSIZES[spec.wire_dtype]
        for matrix in spec.matrices:
            if matrix.numel == 0:
                continue
            num_holders = len(spec.momentum_layout.holders(matrix.region))
            missing_numel = matrix.numel * (1 - 1 / num_holders)
            replica_numel = matrix.numel * (len(spec.layout.replica_offsets) - 1)
            total += itemsize * (2 * missing_numel + replica_numel)
    return round(total)


def plan_cost(plan: Plan, buckets: Sequence[BucketTraffic]) -> PlanCost:
    """Return the totals of a plan, from the traffic of its buckets."""
    ranks = tuple(sorted(set().union(*(mesh.rank_set for mesh in plan.meshes))))
    index_of = {rank: index for index, rank in enumerate(ranks)}
    flops, sent, received = ([0] * len(ranks) for _ in range(3))
    for traffic in buckets:
        mesh = traffic.bucket.mesh
        _add(flops, traffic.flops, mesh, index_of)
        # a member of a team receives what it sends, up to a row of the Gram matrix
        _add(sent, traffic.team_nbytes, mesh, index_of)
        _add(received, traffic.team_nbytes, mesh, index_of)
        for hop in traffic.sequence.hops:
            _add(sent, traffic.sent_nbytes(hop), mesh, index_of)
            _add(received, traffic.received_nbytes(hop), mesh, index_of)
    matrices = [(spec, m) for spec in plan.params for m in spec.matrices if m.numel]
    buffer_nbytes, peak_nbytes = peaks(plan, buckets, index_of)
    return PlanCost(
        ranks=ranks,
        buckets=tuple(buckets),
        flops=tuple(flops),
        sent_nbytes=tuple(sent),
        received_nbytes=tuple(received),
        buffer_nbytes=buffer_nbytes,
        peak_nbytes=peak_nbytes,
        model_flops=sum(matrix_flops(m, spec.num_iterations) for spec, m in matrices),
        bound_nbytes=bound_nbytes(plan),
        num_matrices=len(matrices),
        makespan_flops=_makespan_flops(plan, buckets, index_of),
    )


def _add(
    totals: list[int], values: Sequence[int], mesh: MeshSpec, index_of: dict[int, int]
) -> None:
    for rank, value in zip(mesh.ranks, values, strict=True):
        totals[index_of[rank]] += value


def _makespan_flops(plan: Plan, buckets: Sequence[BucketTraffic], index_of: dict[int, int]) -> int:
    """Return the sum over runs of ORTHOGONALIZE actions (waves) of the slowest rank's flops."""
    total = 0
    for computes, actions in groupby(plan.schedule, lambda a: a.phase is Phase.ORTHOGONALIZE):
        if not computes:
            continue
        flops = [0] * len(index_of)
        for action in actions:
            traffic = buckets[action.bucket]
            _add(flops, traffic.flops, traffic.bucket.mesh, index_of)
        total += max(flops)
    return total
