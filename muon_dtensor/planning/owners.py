"""Assign each matrix to the rank that orthogonalizes it, balancing flops over the mesh."""

from collections import defaultdict
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


Team = tuple[int, ...]
"""Global ranks that orthogonalize a matrix together; one rank, unless it is distributed."""


@dataclass(frozen=True, slots=True)
class Work:
    """A matrix, the teams that may own it, and its cost for each member of the team."""

    candidate: Candidate
    teams: tuple[Team, ...]
    cost: int


def assign_owners(work: Sequence[Work]) -> tuple[Team, ...]:
    """Return the team of each matrix: longest processing time first.

    Assigns the costliest matrix first, always to the team with the least loaded busiest member.
    Ties between matrices are broken by name, ties between teams by their order.

    The makespan is within 4/3 - 1/(3 ranks) of the best one if every rank may own every matrix
    (Graham 1969, "Bounds on multiprocessing timing anomalies", theorem 2).
    """
    loads: dict[int, int] = defaultdict(int)

    def load(team: Team) -> int:
        return max([loads[rank] for rank in team])

    owners: list[Team] = [()] * len(work)
    queues: dict[tuple[Team, ...], list[tuple[int, int]]] = {}
    for index in sorted(range(len(work)), key=lambda i: (-work[i].cost, work[i].candidate.name)):
        teams = work[index].teams
        queue = queues.get(teams)
        if queue is None:
            queue = queues[teams] = [(load(team), i) for i, team in enumerate(teams)]
            heapify(queue)
        # Loads only grow, so a stale entry is too small: replace it and check the next smallest.
        while queue[0][0] != load(teams[queue[0][1]]):
            team_index = queue[0][1]
            heapreplace(queue, (load(teams[team_index]), team_index))
        owners[index] = teams[queue[0][1]]
        for rank in owners[index]:
            loads[rank] += work[index].cost
        if len(teams) == 1:
            heappop(queue)
            del queues[teams]
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
