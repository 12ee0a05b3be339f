"""Assign each matrix to the rank that orthogonalizes it, balancing flops over the mesh."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace

from muon_dtensor.layout import Layout, Matrix, Region


@dataclass(frozen=True, slots=True)
class Candidate:
    """One matrix in the planner.

    `param`: index of its parameter. `index`: index among the parameter's matrices. `flops`: of its
    orthogonalization. `name`: (parameter name, `index`), breaks ties.
    """

    param: int
    index: int
    matrix: Matrix
    flops: int
    name: tuple[str, int]


def assign_owners(work: Sequence[tuple[Candidate, tuple[int, ...]]]) -> tuple[int, ...]:
    """Return the owner of each matrix: longest processing time first.

    Assigns the costliest matrix first, always to the least loaded rank that may own it. `work`:
    each matrix with the ranks that may own it. Ties between matrices are broken by name, ties
    between ranks by their order in `work`.

    The makespan is within 4/3 - 1/(3 ranks) of the best one if every rank may own every matrix
    (Graham 1969, "Bounds on multiprocessing timing anomalies", theorem 2).
    """
    loads: dict[int, int] = {}
    owners = [0] * len(work)
    queues: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    costs = [max(candidate.flops, candidate.matrix.numel) for candidate, _ in work]
    for index in sorted(range(len(work)), key=lambda i: (-costs[i], work[i][0].name)):
        ranks = work[index][1]
        queue = queues.get(ranks)
        if queue is None:
            queue = queues[ranks] = [(loads.get(rank, 0), i) for i, rank in enumerate(ranks)]
            heapify(queue)
        # Loads only grow, so a stale entry is too small: replace it and check the next smallest.
        while queue[0][0] != loads.get(ranks[queue[0][1]], 0):
            rank_index = queue[0][1]
            heapreplace(queue, (loads.get(ranks[rank_index], 0), rank_index))
        owner = ranks[queue[0][1]]
        owners[index] = owner
        loads[owner] = loads.get(owner, 0) + costs[index]
        if len(ranks) == 1:
            heappop(queue)
            del queues[ranks]
    return tuple(owners)


def possible_owners(layout: Layout, matrix: Region) -> tuple[int, ...]:
    """Return the positions that store a part of the matrix, preferred owners first.

    Positions with larger pieces come first, because an owner does not send its own piece. Among
    equal pieces, consecutive positions differ in replica first and in the outermost mesh dim next,
    so that equal matrices spread over replicas and nodes.
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
