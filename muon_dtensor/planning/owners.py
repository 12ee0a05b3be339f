"""Which rank orthogonalizes which matrix.

Balances flops over the ranks that hold a copy. Sees costs, names and positions; never a tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace

from muon_dtensor.layout import Layout, Region
from muon_dtensor.planning.ir import Gram, Strategy


@dataclass(frozen=True, slots=True)
class Work:
    """One matrix to give away: its cost, its name for ties, and who may own it."""

    flops: int
    name: tuple[str, int]
    candidates: tuple[int, ...]


def assign_owners(work: Sequence[Work]) -> tuple[int, ...]:
    """Longest processing time first: the costliest matrix to the least loaded candidate.

    Within 4/3 - 1/(3 ranks) of the best makespan where every rank may own everything (Graham
    1969, "Bounds on multiprocessing timing anomalies", theorem 2). Ties go by name, then to the
    earlier candidate.
    """
    loads: dict[int, int] = {}
    owners = [0] * len(work)
    queues: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for index in sorted(range(len(work)), key=lambda i: (-work[i].flops, work[i].name)):
        candidates = work[index].candidates
        queue = queues.get(candidates)
        if queue is None:
            queue = queues[candidates] = [
                (loads.get(rank, 0), turn) for turn, rank in enumerate(candidates)
            ]
            heapify(queue)
        # Loads only grow, so an entry that is out of date is too small: renew it and look again.
        while queue[0][0] != loads.get(candidates[queue[0][1]], 0):
            turn = queue[0][1]
            heapreplace(queue, (loads.get(candidates[turn], 0), turn))
        owner = candidates[queue[0][1]]
        owners[index] = owner
        loads[owner] = loads.get(owner, 0) + work[index].flops
        if len(candidates) == 1:
            heappop(queue)
            del queues[candidates]
    return tuple(owners)


def candidates_for(
    layout: Layout, matrix: Region, strategy: Strategy | None = None
) -> tuple[int, ...]:
    """Positions that hold a part of the matrix, the ones to prefer first; first members of teams.

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
    found = (home + offset for home, _ in homes for offset in replicas)
    if isinstance(strategy, Gram):
        found = (mesh.peers(position, strategy.team_dims)[0] for position in found)
    return tuple(dict.fromkeys(found))
