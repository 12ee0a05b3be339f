"""Parameters in, a Plan out: a pure function of frozen values.

Chooses transports and calls those who choose owners and buckets. Never sees a tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from muon_dtensor.errors import AssignmentError, PlanError, Problem
from muon_dtensor.layout import ParamSpec
from muon_dtensor.planning.buckets import Parcel, deal, schedule
from muon_dtensor.planning.check import wrong_matrices
from muon_dtensor.planning.choose import Choice, Choices, Item, Transport, Verdict, choose
from muon_dtensor.planning.ir import (
    Action,
    Alternative,
    Assignment,
    Bucket,
    Gathered,
    Gram,
    Local,
    Plan,
    PlanOptions,
    Strategy,
)
from muon_dtensor.planning.luggage import footprint_of, parcel
from muon_dtensor.planning.matrix_costs import ITEMSIZES, WIRE_DTYPES, matrix_flops
from muon_dtensor.planning.owners import Work, assign_owners, candidates_for
from muon_dtensor.planning.strategies import (
    can_own,
    reshard_collectives,
    strategies_for,
    unshard_collectives,
)
from muon_dtensor.planning.teams import can_share

GRAM_GAIN = 1.3
"""How much faster than the best exact plan a step with teams must be, unless it is asked for."""


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
            do not hold each of their elements once, or cannot take the strategy asked for.
    """
    options = options or PlanOptions()
    params = tuple(params)
    _check_params(params)
    owners = owners or {}
    alone = _by_ranks(params, owners, with_teams=False)
    may_share = not (options.exact or options.sequential)
    shared = _by_ranks(params, owners, with_teams=True) if may_share else {}
    buckets: list[Bucket] = []
    actions: list[Action] = []
    for rank_set in sorted(alone, key=_rank_set_order):
        builder = _Builder(params, alone[rank_set], options, owners)
        with_teams = _Builder(params, shared[rank_set], options, owners) if may_share else None
        builder, verdicts = _worth_teams(builder, with_teams)
        waves = builder.waves({t: v.strategy for t, v in verdicts.items()}, buckets, verdicts)
        actions += schedule(buckets, waves, options.prefetch_count)
    return Plan(params, tuple(buckets), tuple(actions), options)


def _rank_set_order(rank_set: frozenset[int]) -> tuple[int, list[int]]:
    """Sets of ranks run one after the other, in one order for all.

    So ranks that share one mesh and differ in others still issue its collectives alike.
    """
    return (-len(rank_set), sorted(rank_set))


def _worth_teams(
    alone: "_Builder", shared: "_Builder | None"
) -> tuple["_Builder", dict[Transport, Verdict]]:
    """The plan with teams if it is GRAM_GAIN times as fast as the best without, else that.

    Teams divide matrices into more transports, so both are planned from the beginning. `shared`:
    None if there may be none.
    """
    options = alone.options
    if options.strategy != "auto":
        builder = shared if options.strategy == "gram" and shared is not None else alone
        return builder, builder.choices().verdicts
    exact = alone.choices()
    if shared is None:
        reason = "rounds differently: allowed by exact=False"
        if options.sequential and not options.exact:
            reason = "shares each matrix, and ranks are to work one after the other"
        return alone, alone.with_teams_told(exact.verdicts, None, reason)
    teams = shared.choices()
    if teams.seconds * GRAM_GAIN <= exact.seconds:
        return shared, teams.verdicts
    ratio = teams.seconds / exact.seconds
    reason = f"{ratio:.2f} times as long for all, to be taken at {1 / GRAM_GAIN:.2f}"
    return alone, alone.with_teams_told(exact.verdicts, teams.seconds, reason)


class _Builder:
    """Plans for one set of ranks, strategy by strategy."""

    def __init__(
        self,
        params: tuple[ParamSpec, ...],
        transports: Mapping[Transport, list[Item]],
        options: PlanOptions,
        named: Mapping[str, int],
    ) -> None:
        self.params = params
        self.transports = transports
        self.options = options
        self.named = named
        self._owners: dict[tuple[object, ...], dict[Transport, list[int]]] = {}

    def choices(self) -> Choices:
        """A strategy for every transport."""
        return choose(self.params, self.transports, self.options, self.plan)

    def with_teams_told(
        self, verdicts: Mapping[Transport, Verdict], seconds: float | None, reason: str
    ) -> dict[Transport, Verdict]:
        """The same verdicts, which also say why teams were not taken, where there could be any.

        `seconds`: of a step of all matrices in which teams share what they may.
        """
        told = dict(verdicts)
        for transport, verdict in verdicts.items():
            first = self.transports[transport][0]
            legal = strategies_for(self.params[first.param], first.matrix)
            teams = [s for s in legal if isinstance(s, Gram)]
            if teams and not transport.is_named:
                other = Alternative(teams[0], seconds, reason)
                told[transport] = replace(verdict, alternatives=(*verdict.alternatives, other))
        return told

    def plan(self, choice: Choice) -> Plan:
        """The plan of these transports alone."""
        buckets: list[Bucket] = []
        waves = self.waves(choice, buckets)
        actions = schedule(buckets, waves, self.options.prefetch_count)
        return Plan(self.params, tuple(buckets), actions, self.options)

    def waves(
        self,
        choice: Choice,
        buckets: list[Bucket],
        verdicts: Mapping[Transport, Verdict] | None = None,
    ) -> list[list[int]]:
        """Append the buckets; returns them as waves of indices."""
        waves: list[list[int]] = []
        owners = self.owners(choice)
        # Exchanges first, the longest compute first; what needs no exchange hides the last one.
        for transport in sorted(choice, key=self._order):
            strategy, items = choice[transport], self.transports[transport]
            copies = transport.mesh.num_ranks_along(getattr(strategy, "replica_dims", ()))
            empty = footprint_of(strategy, copies)
            parcels = self._parcels(transport, strategy, owners[transport])
            verdict = Verdict(strategy, 0.0, ()) if verdicts is None else verdicts[transport]
            for wave in deal(parcels, empty, self.options.bucket_nbytes):
                waves.append([])
                for parcels_of_bucket in wave:
                    chosen = sorted(
                        (items[p.index].param, items[p.index].index, p.owner)
                        for p in parcels_of_bucket
                    )
                    waves[-1].append(len(buckets))
                    buckets.append(
                        Bucket(
                            mesh=transport.mesh,
                            strategy=strategy,
                            wire_dtype=transport.wire_dtype,
                            assignments=tuple(Assignment(*place) for place in chosen),
                            unshard=unshard_collectives(strategy),
                            reshard=reshard_collectives(strategy, transport.mesh.dim_names),
                            seconds=verdict.seconds,
                            alternatives=verdict.alternatives,
                        )
                    )
        return waves

    def _order(self, transport: Transport) -> tuple[bool, int, tuple[int, int]]:
        items = self.transports[transport]
        flops = sum(matrix_flops(i.matrix, self.params[i.param].num_iterations) for i in items)
        first = min((item.param, item.index) for item in items)
        return (isinstance(transport.strategies[0], Local), -flops, first)

    def _parcels(
        self, transport: Transport, strategy: Strategy, owners: Sequence[int]
    ) -> list[Parcel]:
        itemsize = ITEMSIZES[transport.wire_dtype]
        return [
            parcel(
                index,
                strategy,
                self.params[item.param].layout,
                item.matrix,
                owner=owner,
                itemsize=itemsize,
                flops=matrix_flops(item.matrix, self.params[item.param].num_iterations),
                name=(self.params[item.param].fqn, item.index),
            )
            for index, (item, owner) in enumerate(
                zip(self.transports[transport], owners, strict=True)
            )
        ]

    def owners(self, choice: Choice) -> dict[Transport, list[int]]:
        """Owners of all matrices, as positions: named by the user or balanced together.

        A gathered matrix has a first holder, a team a first member.
        """
        who = tuple(
            (t, s.team_dims if isinstance(s, Gram) else isinstance(s, Gathered))
            for t, s in choice.items()
        )
        if who not in self._owners:
            self._owners[who] = self._balance(choice)
        return self._owners[who]

    def _balance(self, choice: Choice) -> dict[Transport, list[int]]:
        """Meshes of exactly the same ranks share loads. Others do not: their ranks cannot see
        each other's plans."""
        work: list[Work] = []
        known: dict[tuple[int, tuple[str, ...]], tuple[int, ...]] = {}
        for transport, strategy in choice.items():
            mesh = transport.mesh
            team_dims = strategy.team_dims if isinstance(strategy, Gram) else ()
            for item in self.transports[transport]:
                spec = self.params[item.param]
                table = (id(spec.layout.holders(item.matrix.region)), team_dims)
                if table not in known:
                    positions = candidates_for(spec.layout, item.matrix.region, strategy)
                    known[table] = tuple(mesh.ranks[p] for p in positions)
                ranks = known[table]
                if transport.is_named:
                    ranks = (self.named[spec.fqn],)
                flops = max(matrix_flops(item.matrix, spec.num_iterations), item.matrix.numel)
                if isinstance(strategy, Gathered):
                    ranks, flops = ranks[:1], 0
                work.append(Work(flops, (spec.fqn, item.index), ranks))
        ranks_of = iter(assign_owners(work))
        return {t: [t.mesh.position_of(next(ranks_of)) for _ in self.transports[t]] for t in choice}


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
    held = {i: candidates_for(layout, m.region) for i, m in enumerate(spec.matrices) if m.numel}
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


def _by_ranks(
    params: tuple[ParamSpec, ...], named: Mapping[str, int], *, with_teams: bool
) -> dict[frozenset[int], dict[Transport, list[Item]]]:
    """All matrices by the set of ranks that hold them, and by what they share."""
    by_ranks: dict[frozenset[int], dict[Transport, list[Item]]] = {}
    known: dict[tuple[object, ...], tuple[Strategy, ...]] = {}
    merged: dict[tuple[object, ...], Transport] = {}
    for param, spec in enumerate(params):
        owned = _owned_by(spec, named[spec.fqn]) if spec.fqn in named else set()
        for index, matrix in enumerate(spec.matrices):
            if matrix.numel == 0:
                continue
            table = id(spec.layout.holders(matrix.region))
            can = (table, can_share(spec, matrix))
            strategies = known.get(can)
            if strategies is None:
                strategies = known[can] = tuple(
                    s for s in strategies_for(spec, matrix) if with_teams or not isinstance(s, Gram)
                )
            key = (spec.layout.mesh, spec.wire_dtype, strategies, index in owned)
            transport = merged.get(key)
            if transport is None:
                transport = merged[key] = Transport(
                    spec.layout.mesh, spec.wire_dtype, strategies, index in owned
                )
            transports = by_ranks.setdefault(transport.mesh.rank_set, {})
            transports.setdefault(transport, []).append(Item(param, index, matrix))
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
