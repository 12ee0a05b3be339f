"""Teams of ranks that orthogonalize a matrix together: legal teams, slabs, and team sizes."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from muon_dtensor.layout import Layout, Matrix, MeshSpec, Region
from muon_dtensor.layout.matrices import is_slab, slabs_of
from muon_dtensor.planning.owners import Candidate
from muon_dtensor.planning.plan import ParamSpec, PlanOptions
from muon_dtensor.planning.search import GroupKey
from muon_dtensor.planning.simulate import distributed_seconds, orthogonalize_seconds
from muon_dtensor.planning.strategies import Distributed, Owned, Strategy

MAX_TEAM_SIZE = 64
"""The most ranks of a team. Every member stores the Gram matrix, and the ranks of a team wait for
each other three times in each iteration."""


def distributed_strategies(spec: ParamSpec, matrix: Matrix) -> Iterator[Distributed]:
    """Yield the legal `Distributed` strategies of a non-empty matrix."""
    if not spec.can_distribute:
        return
    layout = spec.momentum_layout
    owned = [s for s in spec.strategies(matrix.region) if not s.is_staged]
    unshard_dims, replica_dims = owned[0].unshard_dims, owned[0].replica_dims
    # no exchange moves pieces along other dims that cut the momentum, as one over replicas may be
    used = {*unshard_dims, *(name for name in replica_dims if name not in layout.cut_dims)}
    all_dims = tuple(name for name in layout.mesh.dim_names if name in used)
    for team_dims in dict.fromkeys((unshard_dims, all_dims)):
        count = layout.mesh.num_ranks_along(team_dims)
        for size in range(2, min(count, MAX_TEAM_SIZE) + 1):
            if count % size or not slabs_of(matrix, size):
                continue
            moves: Iterable[Owned] = owned
            if team_dims == unshard_dims and size == count and holds_slabs(layout, matrix, size):
                moves = [Owned((), replica_dims)]
            for move in moves:
                for shares_polynomial in (True, False):
                    yield Distributed(
                        move.unshard_dims,
                        replica_dims,
                        move.hops,
                        team_dims=team_dims,
                        team_size=size,
                        shares_polynomial=shares_polynomial,
                    )


def holds_slabs(layout: Layout, matrix: Matrix, count: int) -> bool:
    """Whether each replica stores the matrix as `count` slabs on different ranks."""
    holders = layout.holders(matrix.region)
    return len(holders) == count and all(is_slab(matrix, piece) for piece in holders.values())


def team_slabs(
    strategy: Distributed, layout: Layout, matrix: Matrix, team: Sequence[int]
) -> dict[int, Region]:
    """Return {position: its slab} for the positions of a team.

    A member keeps the slab that it stores. Otherwise it takes the one of which it stores most.
    """
    if not strategy.unshard_dims and holds_slabs(layout, matrix, len(team)):
        holders = layout.holders(matrix.region)
        return {position: holders[layout.home(position)] for position in team}
    free = list(team)
    stored = {position: layout.region(position) for position in team}
    slabs: dict[int, Region] = {}
    for slab in slabs_of(matrix, len(team)):
        member = max(free, key=lambda position: stored[position].intersect(slab).numel)
        free.remove(member)
        slabs[member] = slab
    return dict(sorted(slabs.items()))


def team_of(position: int, mesh: MeshSpec, strategy: Distributed | None) -> tuple[int, ...]:
    """Return the positions of the team of a position; itself alone without a strategy."""
    if strategy is None:
        return (position,)
    return mesh.team(position, strategy.team_dims, strategy.team_size)


def team_seconds(
    spec: ParamSpec, matrix: Matrix, strategy: Distributed | None, options: PlanOptions
) -> float:
    """Return the seconds that each member of a team works on a matrix; None: one rank alone."""
    topology, layout = options.topology, spec.momentum_layout
    if strategy is None:
        seconds = orthogonalize_seconds(topology, matrix, spec.num_iterations, spec.wire_dtype)
        return seconds + topology.tensor_overhead * len(layout.holders(matrix.region))
    size = (matrix.rows, matrix.cols, spec.num_iterations)
    return sum(distributed_seconds(topology, layout.mesh, strategy, size, spec.wire_dtype))


@dataclass(frozen=True, slots=True)
class TeamOption:
    """A strategy of the matrices of one size, with the seconds of one matrix on its ranks."""

    strategy: Strategy
    seconds: float

    @property
    def num_ranks(self) -> int:
        return self.strategy.team_size if isinstance(self.strategy, Distributed) else 1


def team_options(spec: ParamSpec, matrix: Matrix, options: PlanOptions) -> list[TeamOption]:
    """Return how one rank or a team can orthogonalize a matrix, the fastest way for each size."""
    owned = spec.strategies(matrix.region)[0]
    fastest = {1: TeamOption(owned, team_seconds(spec, matrix, None, options))}
    for strategy in distributed_strategies(spec, matrix):
        option = TeamOption(strategy, team_seconds(spec, matrix, strategy, options))
        best = fastest.get(option.num_ranks)
        if best is None or option.seconds < best.seconds:
            fastest[option.num_ranks] = option
    return list(fastest.values())


def allot(sizes: Sequence[tuple[int, Sequence[TeamOption]]], num_ranks: int) -> list[TeamOption]:
    """Return the option of each size of matrix that makes the step shortest.

    For each limit on the seconds of a matrix, every size takes the option within the limit that
    costs the least seconds of all its ranks; the best limit has the smallest makespan (Turek, Wolf
    & Yu 1992, "Approximate algorithms for scheduling parallelizable tasks", SPAA, section 3).

    `sizes`: (number of matrices, options) of each.
    """
    best: list[TeamOption] = []
    best_seconds = math.inf
    limits = sorted({option.seconds for _, options in sizes for option in options}, reverse=True)
    for limit in limits:
        chosen = []
        for _, options in sizes:
            possible = [o for o in options if o.seconds <= limit and o.num_ranks <= num_ranks]
            if possible:
                chosen.append(min(possible, key=lambda o: (o.num_ranks * o.seconds, o.num_ranks)))
        if len(chosen) < len(sizes):
            break
        tasks = [(count, option) for (count, _), option in zip(sizes, chosen, strict=True)]
        if (seconds := _makespan(tasks, num_ranks)) < best_seconds:
            best, best_seconds = chosen, seconds
    return best


def _makespan(tasks: Sequence[tuple[int, TeamOption]], num_ranks: int) -> float:
    """Return the seconds in which ranks finish (count, option) tasks, the longest tasks first."""
    free = {0.0: num_ranks}  # seconds of work so far -> number of ranks
    for count, option in sorted(tasks, key=lambda task: -task[1].seconds):
        while count:
            load = min(free)
            num_placed = min(count, free[load] // option.num_ranks)
            busy = num_placed * option.num_ranks
            rest = free.pop(load) - busy
            if num_placed:
                later = load + option.seconds
                free[later] = free.get(later, 0) + busy
                count -= num_placed
            if rest:  # too few for a team: they wait for others
                waits = min(free, default=load) if rest < option.num_ranks else load
                free[waits] = free.get(waits, 0) + rest
    return max(free)


def with_teams(
    params: Sequence[ParamSpec],
    groups: Mapping[GroupKey, list[Candidate]],
    options: PlanOptions,
) -> dict[GroupKey, list[Candidate]]:
    """Return the groups of one set of ranks, with `Distributed` strategies of allotted team sizes.

    Matrices of a group that get different teams, or none, are in groups of their own afterwards.
    With strategy="distributed" every matrix gets the fastest team.
    """
    options_by_table: dict[tuple[int, ...], list[TeamOption]] = {}
    split: dict[tuple[GroupKey, tuple[TeamOption, ...]], list[Candidate]] = {}
    for key, candidates in groups.items():
        for candidate in candidates:
            spec, matrix = params[candidate.param], candidate.matrix
            holders = id(spec.momentum_layout.holders(matrix.region))
            size = (matrix.rows, matrix.cols, spec.num_iterations)
            table = (holders, *size, spec.can_distribute)
            if key.is_named:
                split.setdefault((key, ()), []).append(candidate)
                continue
            if table not in options_by_table:
                options_by_table[table] = team_options(spec, matrix, options)
            split.setdefault((key, tuple(options_by_table[table])), []).append(candidate)
    sizes = [(len(members), choices) for (_, choices), members in split.items() if choices]
    if options.strategy == "distributed":
        allotted = [min(c[1:] or c, key=lambda option: option.seconds) for _, c in sizes]
    else:
        allotted = allot(sizes, len(next(iter(groups)).mesh.rank_set))
    chosen = iter(allotted)
    result: dict[GroupKey, list[Candidate]] = {}
    for (key, choices), members in split.items():
        strategy = next(chosen).strategy if choices else None
        if isinstance(strategy, Distributed):
            spec, matrix = params[members[0].param], members[0].matrix
            same_team = (
                s
                for s in distributed_strategies(spec, matrix)
                if replace(strategy, hops=s.hops) == s
            )
            key = replace(key, strategies=(*key.strategies, *same_team))
        result.setdefault(key, []).extend(members)
    return result
