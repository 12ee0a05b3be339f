"""Parameters in, a Plan out: a pure function of frozen values."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from muon_dtensor.errors import AssignmentError, PlanError, Problem
from muon_dtensor.planning.buckets import BufferBound, OwnedMatrix, deal, owned_matrix
from muon_dtensor.planning.check import wrong_matrices
from muon_dtensor.planning.matrix_costs import ITEMSIZES, WIRE_DTYPES, matrix_flops
from muon_dtensor.planning.owners import Candidate, assign_owners, possible_owners
from muon_dtensor.planning.plan import Action, Assignment, Bucket, ParamSpec, Plan, PlanOptions
from muon_dtensor.planning.schedule import buffer_sequence, live_sets, schedule
from muon_dtensor.planning.search import Choice, GroupKey, Strategies, search
from muon_dtensor.planning.strategies import Strategy, can_own, strategies_for


def plan_update(
    params: Sequence[ParamSpec],
    options: PlanOptions | None = None,
    owners: Mapping[str, int] | None = None,
) -> Plan:
    """Plan one step: who orthogonalizes each matrix, and what moves, in which order.

    The same parameters and options give the same plan, byte for byte, on every rank.

    Args:
        params: what to plan.
        options: of the plan as a whole.
        owners: global ranks that own the matrices of some parameters, by name. All others are
            balanced by flops, and so is, in a parameter of several matrices (experts), each that
            cannot travel to the named rank. A matrix that lies whole on one rank stays there.

    Raises:
        AssignmentError: no matrix of a parameter can travel to the owner that was named for it.
        PlanError: parameters of the same name, with an unknown wire dtype, or with matrices that
            do not hold each of their elements once.
    """
    options = options or PlanOptions()
    params = tuple(params)
    _check_params(params)
    owners = owners or {}
    by_ranks = _groups_by_ranks(params, owners)
    buckets: list[Bucket] = []
    actions: list[Action] = []
    for rank_set in sorted(by_ranks, key=_rank_set_order):
        builder = _Builder(params, by_ranks[rank_set], options, owners)
        choices = search(tuple(by_ranks[rank_set]), options, builder.plan)
        waves = builder.waves(choices, buckets)
        actions += schedule(buckets, waves, options.prefetch_count)
    return Plan(params, tuple(buckets), tuple(actions), options)


def _rank_set_order(rank_set: frozenset[int]) -> tuple[int, list[int]]:
    """Sets of ranks run one after the other, in one order for all.

    So ranks that share one mesh and differ in others still issue its collectives in one order.
    """
    return (-len(rank_set), sorted(rank_set))


Waves = list[list[int]]
"""Buckets by index; those of one wave are orthogonalized at the same time."""


class _Builder:
    """Plans for the matrices on one set of ranks, given a strategy for each group."""

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
        self.owners = self._balance(named_owners)

    def plan(self, strategies: Strategies) -> Plan:
        """The plan of these groups alone."""
        buckets: list[Bucket] = []
        waves = self.waves({key: Choice(s, 0.0, ()) for key, s in strategies.items()}, buckets)
        actions = schedule(buckets, waves, self.options.prefetch_count)
        return Plan(self.params, tuple(buckets), actions, self.options)

    def waves(self, choices: Mapping[GroupKey, Choice], buckets: list[Bucket]) -> Waves:
        """Append the buckets of these groups; returns their waves."""
        waves: Waves = []
        # Exchanges first, the longest compute first; what needs no exchange hides the last one.
        for key in sorted(choices, key=self._order):
            choice = choices[key]
            sequence = buffer_sequence(choice.strategy, key.mesh)
            matrices = [
                owned_matrix(
                    candidate,
                    owner,
                    self.params[candidate.param].layout,
                    strategy=choice.strategy,
                    sequence=sequence,
                    itemsize=ITEMSIZES[key.wire_dtype],
                )
                for candidate, owner in zip(self.groups[key], self.owners[key], strict=True)
            ]
            empty = BufferBound(live_sets(sequence))
            for wave in deal(matrices, empty, self.options.bucket_nbytes):
                waves.append([])
                for matrices_of_bucket in wave:
                    waves[-1].append(len(buckets))
                    buckets.append(_bucket(key, choice, matrices_of_bucket))
        return waves

    def _order(self, key: GroupKey) -> tuple[bool, int, tuple[int, int]]:
        candidates = self.groups[key]
        first = min((candidate.param, candidate.index) for candidate in candidates)
        return key.strategies[0].is_local, -sum(c.flops for c in candidates), first

    def _balance(self, named_owners: Mapping[str, int]) -> dict[GroupKey, list[int]]:
        """Owners of all matrices, as positions: named by the user or balanced together.

        Meshes of exactly the same ranks share loads. Others do not: their ranks cannot see each
        other's plans.
        """
        work: list[tuple[Candidate, tuple[int, ...]]] = []
        ranks_by_table: dict[int, tuple[int, ...]] = {}
        for key, candidates in self.groups.items():
            for candidate in candidates:
                spec = self.params[candidate.param]
                if key.is_named:
                    work.append((candidate, (named_owners[spec.fqn],)))
                    continue
                region = candidate.matrix.region
                table = id(spec.layout.holders(region))
                if table not in ranks_by_table:
                    positions = possible_owners(spec.layout, region)
                    ranks_by_table[table] = tuple(key.mesh.ranks[p] for p in positions)
                work.append((candidate, ranks_by_table[table]))
        owners = iter(assign_owners(work))
        return {
            key: [key.mesh.position_of(next(owners)) for _ in candidates]
            for key, candidates in self.groups.items()
        }


def _bucket(key: GroupKey, choice: Choice, matrices: Sequence[OwnedMatrix]) -> Bucket:
    places = sorted((m.candidate.param, m.candidate.index, m.owner) for m in matrices)
    return Bucket(
        mesh=key.mesh,
        strategy=choice.strategy,
        wire_dtype=key.wire_dtype,
        assignments=tuple(Assignment(*place) for place in places),
        seconds=choice.seconds,
        alternatives=choice.alternatives,
    )


def _check_params(params: tuple[ParamSpec, ...]) -> None:
    seen: set[str] = set()
    problems = []
    for spec in params:
        if spec.fqn in seen:
            problems.append(
                Problem(
                    spec.fqn,
                    str(list(spec.shape)),
                    "Another parameter has this name.",
                    "Pass names that differ.",
                )
            )
        seen.add(spec.fqn)
        if spec.wire_dtype not in WIRE_DTYPES:
            problems.append(
                Problem(
                    spec.fqn,
                    f"{list(spec.shape)} to be iterated in {spec.wire_dtype}",
                    "This dtype is not known to the planner.",
                    f"Use one of {', '.join(WIRE_DTYPES)}.",
                )
            )
        if wrong := wrong_matrices(spec):
            problems.append(
                Problem(
                    spec.fqn,
                    str(list(spec.shape)),
                    wrong,
                    "See matrices.matrices_of and patterns.Declaration.",
                )
            )
    if problems:
        raise PlanError(problems, num_params=len(params))


def _owned_by(spec: ParamSpec, rank: int) -> set[int]:
    """Which matrices of a parameter travel to a rank that was named.

    Not those that lie whole on one rank: they stay there. Raises AssignmentError if the others
    cannot come.
    """
    layout = spec.layout
    held = {i: possible_owners(layout, m.region) for i, m in enumerate(spec.matrices) if m.numel}
    movable = {index for index, positions in held.items() if len(positions) > 1}
    owned: set[int] = set()
    if layout.mesh.holds(rank):
        position = layout.mesh.position_of(rank)
        owned = {i for i in movable if can_own(layout, spec.matrices[i].region, position)}
    if movable and not owned:
        near = sorted({layout.mesh.ranks[p] for i in movable for p in held[i]})
        raise AssignmentError(
            f"{spec.fqn} is assigned to rank {rank}, where none of its matrices can be brought: "
            f"it lies on ranks {near} of mesh {layout.mesh}. Assign it to one of them."
        )
    return owned


def _groups_by_ranks(
    params: tuple[ParamSpec, ...], named_owners: Mapping[str, int]
) -> dict[frozenset[int], dict[GroupKey, list[Candidate]]]:
    """All matrices by the set of ranks that hold them, and by what they have in common."""
    by_ranks: dict[frozenset[int], dict[GroupKey, list[Candidate]]] = {}
    strategies_by_table: dict[int, tuple[Strategy, ...]] = {}
    keys: dict[tuple[object, ...], GroupKey] = {}
    for param, spec in enumerate(params):
        layout = spec.layout
        named = _owned_by(spec, named_owners[spec.fqn]) if spec.fqn in named_owners else set()
        for index, matrix in enumerate(spec.matrices):
            if matrix.numel == 0:
                continue
            table = id(layout.holders(matrix.region))
            if table not in strategies_by_table:
                strategies_by_table[table] = strategies_for(layout, matrix.region)
            fields = (layout.mesh, spec.wire_dtype, strategies_by_table[table], index in named)
            if fields not in keys:
                keys[fields] = GroupKey(*fields)
            candidate = Candidate(
                param, index, matrix, matrix_flops(matrix, spec.num_iterations), (spec.fqn, index)
            )
            groups = by_ranks.setdefault(layout.mesh.rank_set, {})
            groups.setdefault(keys[fields], []).append(candidate)
    return by_ranks


def restrict(plan: Plan, rank_set: frozenset[int]) -> Plan:
    """The part of a plan on meshes of exactly these ranks: what those ranks must agree on.

    It does not depend on what else the ranks hold; see `_rank_set_order`.
    """
    params = [i for i, spec in enumerate(plan.params) if spec.layout.mesh.rank_set == rank_set]
    new_param = {old: new for new, old in enumerate(params)}
    kept = [i for i, bucket in enumerate(plan.buckets) if bucket.mesh.rank_set == rank_set]
    new_bucket = {old: new for new, old in enumerate(kept)}
    buckets = tuple(
        replace(
            plan.buckets[index],
            assignments=tuple(
                Assignment(new_param[a.param], a.matrix, a.owner)
                for a in plan.buckets[index].assignments
            ),
        )
        for index in kept
    )
    actions = tuple(
        Action(a.phase, new_bucket[a.bucket]) for a in plan.schedule if a.bucket in new_bucket
    )
    return Plan(tuple(plan.params[i] for i in params), buckets, actions, plan.options)
