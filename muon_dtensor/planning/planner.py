"""Plan a step from the parameters: a pure function of frozen values."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from muon_dtensor.errors import AssignmentError, PlanError, Problem
from muon_dtensor.layout import Region
from muon_dtensor.planning.buckets import BufferBound, OwnedMatrix, form_buckets, owned_matrix
from muon_dtensor.planning.check import problem_of_matrices
from muon_dtensor.planning.matrix_costs import ITEMSIZES, WIRE_DTYPES, matrix_flops
from muon_dtensor.planning.owners import (
    Candidate,
    Team,
    Work,
    assign_owners,
    possible_owners,
)
from muon_dtensor.planning.plan import Action, Assignment, Bucket, ParamSpec, Plan, PlanOptions
from muon_dtensor.planning.schedule import buffer_sequence, live_sets, schedule
from muon_dtensor.planning.search import Choice, GroupKey, Strategies, search
from muon_dtensor.planning.strategies import Distributed, Strategy, can_own
from muon_dtensor.planning.teams import team_of, team_seconds, team_slabs, with_teams


def plan_update(
    params: Sequence[ParamSpec],
    options: PlanOptions | None = None,
    owners: Mapping[str, int] | None = None,
) -> Plan:
    """Plan one step: the owner of each matrix, the collectives, and their order.

    Equal parameters and options give the same plan, byte for byte, on every rank.

    Args:
        params: the parameters to plan.
        options: options of the plan as a whole.
        owners: parameter name -> global rank that owns its matrices. All other matrices are
            assigned by flops. In a parameter of several matrices (experts) this includes those that
            cannot be sent to the named rank. A matrix that is stored on one rank stays there.

    Raises:
        AssignmentError: no matrix of a parameter can be sent to the owner named for it.
        PlanError: two parameters have the same name, a wire dtype is unknown, or the matrices of a
            parameter do not cover each of its elements once.
    """
    options = options or PlanOptions()
    params = tuple(params)
    _check_params(params)
    owners = owners or {}
    by_ranks = _groups_by_ranks(params, owners)
    buckets: list[Bucket] = []
    actions: list[Action] = []
    for rank_set in sorted(by_ranks, key=_rank_set_order):
        builder, choices = _search(params, by_ranks[rank_set], options, owners)
        waves = builder.waves(choices, buckets)
        actions += schedule(buckets, waves, options.prefetch_count)
    return Plan(params, tuple(buckets), tuple(actions), options)


def _search(
    params: tuple[ParamSpec, ...],
    groups: Mapping[GroupKey, list[Candidate]],
    options: PlanOptions,
    owners: Mapping[str, int],
) -> tuple["_Builder", Mapping[GroupKey, Choice]]:
    """Return the strategy of each group of matrices on one set of ranks, and their builder.

    Matrices that could be distributed are in groups of their own; unless any of them is in the end,
    all matrices that can share a bucket are in one group.
    """
    if options.can_distribute:
        builder = _Builder(params, with_teams(params, groups, options), options, owners)
        choices = search(tuple(builder.groups), options, builder.plan)
        if any(isinstance(choice.strategy, Distributed) for choice in choices.values()):
            return builder, choices
    builder = _Builder(params, groups, options, owners)
    return builder, search(tuple(groups), options, builder.plan)


def _rank_set_order(rank_set: frozenset[int]) -> tuple[int, list[int]]:
    """Sort key of sets of ranks, whose buckets run one set after the other.

    All ranks use the same order, so ranks that share one mesh but differ in others still issue the
    collectives of the shared mesh in the same order.
    """
    return (-len(rank_set), sorted(rank_set))


Teams = Mapping[GroupKey, Sequence[tuple[int, ...]]]
"""The positions that orthogonalize each matrix of a group; one, unless it is distributed."""

Waves = list[list[int]]
"""Indices of buckets, per wave; the buckets of one wave are orthogonalized at the same time."""


class _Builder:
    """Builds plans for the matrices on one set of ranks, given a strategy for each group."""

    def __init__(
        self,
        params: tuple[ParamSpec, ...],
        groups: Mapping[GroupKey, list[Candidate]],
        options: PlanOptions,
        named_owners: Mapping[str, int],
    ) -> None:
        self.params = params
        self.groups = groups
        self.options = options
        self.named_owners = named_owners
        self._teams: dict[frozenset[GroupKey], Teams] = {}

    def plan(self, strategies: Strategies) -> Plan:
        """Return the plan of these groups alone."""
        buckets: list[Bucket] = []
        waves = self.waves({key: Choice(s, 0.0, ()) for key, s in strategies.items()}, buckets)
        actions = schedule(buckets, waves, self.options.prefetch_count)
        return Plan(self.params, tuple(buckets), actions, self.options)

    def waves(self, choices: Mapping[GroupKey, Choice], buckets: list[Bucket]) -> Waves:
        """Append the buckets of these groups to `buckets`, and return their waves."""
        waves: Waves = []
        teams = self._teams_of({key: choice.strategy for key, choice in choices.items()})
        # Groups with exchanges come first, those with more compute before others. Local groups come
        # last, so that their compute overlaps the last reshard.
        for key in sorted(choices, key=self._order):
            choice = choices[key]
            sequence = buffer_sequence(choice.strategy, key.mesh)
            matrices = [
                owned_matrix(
                    candidate,
                    self._boxes(candidate, team, choice.strategy),
                    self.params[candidate.param],
                    strategy=choice.strategy,
                    sequence=sequence,
                    itemsize=ITEMSIZES[key.wire_dtype],
                )
                for candidate, team in zip(self.groups[key], teams[key], strict=True)
            ]
            empty = BufferBound(live_sets(sequence))
            for wave in form_buckets(matrices, empty, self.options.bucket_nbytes):
                waves.append([])
                for matrices_of_bucket in wave:
                    waves[-1].append(len(buckets))
                    buckets.append(_bucket(key, choice, matrices_of_bucket))
        return waves

    def _order(self, key: GroupKey) -> tuple[bool, int, tuple[int, int]]:
        candidates = self.groups[key]
        first = min((candidate.param, candidate.index) for candidate in candidates)
        return key.strategies[0].is_local, -sum(c.flops for c in candidates), first

    def _teams_of(self, strategies: Strategies) -> Teams:
        """Return the positions that orthogonalize each matrix: named by the user or balanced.

        Meshes of exactly the same ranks share loads. Other meshes do not, because a rank knows only
        the plans of its own meshes. Groups without a strategy count as owned.

        The cost of a matrix is its flops; predicted seconds if matrices are distributed, because
        then a rank may have many small ones where another has one slab of a large one.
        """
        distributed = {k: s for k, s in strategies.items() if isinstance(s, Distributed)}
        teams = self._teams.get(frozenset(distributed))
        if teams is None:
            teams = self._teams[frozenset(distributed)] = self._balance(distributed)
        return teams

    def _balance(self, distributed: Mapping[GroupKey, Distributed]) -> Teams:
        work: list[Work] = []
        teams_by_table: dict[tuple[int, bool], tuple[Team, ...]] = {}
        for key, candidates in self.groups.items():
            strategy = distributed.get(key)
            for candidate in candidates:
                spec = self.params[candidate.param]
                cost = max(candidate.flops, candidate.matrix.numel)
                if distributed:
                    seconds = team_seconds(spec, candidate.matrix, strategy, self.options)
                    cost = round(1e9 * seconds)
                if key.is_named:
                    work.append(Work(candidate, ((self.named_owners[spec.fqn],),), cost))
                    continue
                region = candidate.matrix.region
                layout = spec.momentum_layout
                table = (id(layout.holders(region)), strategy is None)
                if table not in teams_by_table:
                    positions = possible_owners(layout, region)
                    teams = dict.fromkeys(team_of(p, key.mesh, strategy) for p in positions)
                    teams_by_table[table] = tuple(
                        tuple(key.mesh.ranks[p] for p in team) for team in teams
                    )
                work.append(Work(candidate, teams_by_table[table], cost))
        teams_of_work = iter(assign_owners(work))
        return {
            key: [tuple(map(key.mesh.position_of, next(teams_of_work))) for _ in candidates]
            for key, candidates in self.groups.items()
        }

    def _boxes(
        self, candidate: Candidate, team: tuple[int, ...], strategy: Strategy
    ) -> dict[int, Region]:
        """Return the box that each position of a team orthogonalizes."""
        if isinstance(strategy, Distributed):
            layout = self.params[candidate.param].momentum_layout
            return team_slabs(strategy, layout, candidate.matrix, team)
        (owner,) = team
        return {owner: candidate.matrix.region}


def _bucket(key: GroupKey, choice: Choice, matrices: Sequence[OwnedMatrix]) -> Bucket:
    is_distributed = isinstance(choice.strategy, Distributed)
    assignments = [
        Assignment(m.candidate.param, m.candidate.index, owner, box if is_distributed else None)
        for m in matrices
        for owner, box in m.boxes.items()
    ]
    return Bucket(
        mesh=key.mesh,
        strategy=choice.strategy,
        wire_dtype=key.wire_dtype,
        assignments=tuple(sorted(assignments, key=lambda a: (a.param, a.matrix, a.owner))),
        seconds=choice.seconds,
        alternatives=choice.alternatives,
    )


def _check_params(params: tuple[ParamSpec, ...]) -> None:
    fqns: set[str] = set()
    problems = []
    for spec in params:
        if spec.fqn in fqns:
            problems.append(
                Problem(
                    spec.fqn,
                    str(list(spec.shape)),
                    "Another parameter has this name.",
                    "Pass a different name for each parameter.",
                )
            )
        fqns.add(spec.fqn)
        if spec.wire_dtype not in WIRE_DTYPES:
            problems.append(
                Problem(
                    spec.fqn,
                    f"{list(spec.shape)} with wire dtype {spec.wire_dtype}",
                    "The planner does not support this wire dtype.",
                    f"Use one of {', '.join(WIRE_DTYPES)}.",
                )
            )
        if problem := problem_of_matrices(spec):
            problems.append(
                Problem(
                    spec.fqn,
                    str(list(spec.shape)),
                    problem,
                    "See layout.matrices.matrices_of and layout.declarations.Declaration.",
                )
            )
    if problems:
        raise PlanError(problems, num_params=len(params))


def _matrices_for_named_owner(spec: ParamSpec, rank: int) -> set[int]:
    """Return the indices of the matrices of a parameter that its named owner will own.

    Matrices stored on one rank are not among them: they stay there. Raises AssignmentError if there
    are other matrices and none of them can be sent to the named owner.
    """
    layout = spec.momentum_layout
    positions_of = {
        i: possible_owners(layout, m.region) for i, m in enumerate(spec.matrices) if m.numel
    }
    movable = {index for index, positions in positions_of.items() if len(positions) > 1}
    owned: set[int] = set()
    if layout.mesh.holds(rank):
        position = layout.mesh.position_of(rank)
        owned = {i for i in movable if can_own(layout, spec.matrices[i].region, position)}
    if movable and not owned:
        ranks = sorted({layout.mesh.ranks[p] for i in movable for p in positions_of[i]})
        raise AssignmentError(
            f"{spec.fqn} is assigned to rank {rank}, but none of its matrices can be sent there: "
            f"it is stored on ranks {ranks} of mesh {layout.mesh}. Assign it to one of them."
        )
    return owned


def _groups_by_ranks(
    params: tuple[ParamSpec, ...], named_owners: Mapping[str, int]
) -> dict[frozenset[int], dict[GroupKey, list[Candidate]]]:
    """Return all matrices by the rank set of their mesh, then by the key of their group."""
    by_ranks: dict[frozenset[int], dict[GroupKey, list[Candidate]]] = {}
    strategies_by_table: dict[int, tuple[Strategy, ...]] = {}
    keys: dict[tuple[object, ...], GroupKey] = {}
    for param, spec in enumerate(params):
        layout = spec.momentum_layout
        named_matrices: set[int] = set()
        if spec.fqn in named_owners:
            named_matrices = _matrices_for_named_owner(spec, named_owners[spec.fqn])
        for index, matrix in enumerate(spec.matrices):
            if matrix.numel == 0:
                continue
            table = id(layout.holders(matrix.region))
            if table not in strategies_by_table:
                strategies_by_table[table] = spec.strategies(matrix.region)
            strategies = strategies_by_table[table]
            is_named = index in named_matrices
            fields = (layout.mesh, spec.wire_dtype, strategies, is_named, spec.is_offloaded)
            if fields not in keys:
                keys[fields] = GroupKey(*fields)
            candidate = Candidate(
                param, index, matrix, matrix_flops(matrix, spec.num_iterations), (spec.fqn, index)
            )
            groups = by_ranks.setdefault(layout.mesh.rank_set, {})
            groups.setdefault(keys[fields], []).append(candidate)
    return by_ranks


def restrict(plan: Plan, rank_set: frozenset[int]) -> Plan:
    """Return the part of a plan on meshes of exactly these ranks, which they must agree on.

    It does not depend on the other meshes of these ranks; see `_rank_set_order`.
    """
    params = [i for i, spec in enumerate(plan.params) if spec.layout.mesh.rank_set == rank_set]
    new_param = {old: new for new, old in enumerate(params)}
    indices = [i for i, bucket in enumerate(plan.buckets) if bucket.mesh.rank_set == rank_set]
    new_bucket = {old: new for new, old in enumerate(indices)}
    buckets = tuple(
        replace(
            plan.buckets[index],
            assignments=tuple(
                replace(a, param=new_param[a.param]) for a in plan.buckets[index].assignments
            ),
        )
        for index in indices
    )
    actions = tuple(
        Action(a.phase, new_bucket[a.bucket]) for a in plan.schedule if a.bucket in new_bucket
    )
    return Plan(tuple(plan.params[i] for i in params), buckets, actions, plan.options)
