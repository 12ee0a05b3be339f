"""Assigns each matrix to the rank that orthogonalizes it, balancing flops over the mesh."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace

from muon_dtensor.layout import Layout, Matrix, Region


@dataclass(frozen=True, slots=True)
class Candidate:
    """One matrix on its way through the planner.

    `param` and `index` as in `plan.Assignment`, `flops` of its orthogonalization, `name` breaks
    ties.
    """

    param: int
    index: int
    matrix: Matrix
    flops: int
    name: tuple[str, int]


def assign_owners(work: Sequence[tuple[Candidate, tuple[int, ...]]]) -> tuple[int, ...]:
    """Longest processing time first: the costliest matrix to the least loaded rank that may own it.

    `work`: each matrix with the ranks that may own it.

    Within 4/3 - 1/(3 ranks) of the best makespan where every rank may own everything (Graham
    1969, "Bounds on multiprocessing timing anomalies", theorem 2). Ties go by name, then to the
    earlier rank.
    """
    loads: dict[int, int] = {}
    owners = [0] * len(work)
    queues: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    costs = [max(candidate.flops, candidate.matrix.numel) for candidate, _ in work]
    for index in sorted(range(len(work)), key=lambda i: (-costs[i], work[i][0].name)):
        ranks = work[index][1]
        queue = queues.get(ranks)
        if queue is None:
            queue = queues[ranks] = [(loads.get(rank, 0), turn) for turn, rank in enumerate(ranks)]
            heapify(queue)
        # Loads only grow, so an entry that is out of date is too small: renew it and look again.
        while queue[0][0] != loads.get(ranks[queue[0][1]], 0):
            turn = queue[0][1]
            heapreplace(queue, (loads.get(ranks[turn], 0), turn))
        owner = ranks[queue[0][1]]
        owners[index] = owner
        loads[owner] = loads.get(owner, 0) + costs[index]
        if len(ranks) == 1:
            heappop(queue)
            del queues[ranks]
    return tuple(owners)


def possible_owners(layout: Layout, matrix: Region) -> tuple[int, ...]:
    """Positions that hold a part of the matrix, the preferred ones first.

    Larger pieces first, since an owner keeps its own. Then neighbours in this order differ in
    replica first and in the outermost mesh dim next, so that equal matrices spread over replicas
    and nodes.
    """
    mesh = layout.mesh

    def spread(position: int, dims: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(mesh.index_along(position, (name,)) for name in reversed(dims))

    homes = sorted(
        layout.holders(matrix).items(),
        key=lambda item: (-item[1].numel, spread(item[0], layout.cut_dims)),
    )
    replicas = sorted(layout.replica_offsets, key=lambda o: spread(o, layout.replica_dims))
    return tuple(home + offset for home, _ in homes for offset in replicas)
