"""Parameters in, a Plan out: a pure function of frozen values.

Chooses transports and calls those who choose owners and buckets. Never sees a tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from muon_dtensor.errors import AssignmentError, PlanError, Problem
from muon_dtensor.layout import Matrix, MeshSpec, ParamSpec
from muon_dtensor.planning.buckets import Footprint, Parcel, deal, schedule
from muon_dtensor.planning.check import wrong_matrices
from muon_dtensor.planning.cost import ITEMSIZES, matrix_flops
from muon_dtensor.planning.ir import (
    Action,
    Assignment,
    Bucket,
    Local,
    Owned,
    Plan,
    PlanOptions,
    Strategy,
)
from muon_dtensor.planning.owners import Work, assign_owners, candidates_for
from muon_dtensor.planning.strategies import (
    DIRECT_SLACK,
    MOST_DIRECT_RANKS,
    can_own,
    reshard_collectives,
    strategies_for,
    unshard_collectives,
)


@dataclass(frozen=True, slots=True)
class _Item:
    """One matrix on its way through the planner."""

    param: int
    index: int
    matrix: Matrix
    owner: int


@dataclass(frozen=True)
class _Transport:
    """What all matrices of a bucket share."""

    mesh: MeshSpec
    wire_dtype: str
    strategies: tuple[Strategy, ...]


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
    by_ranks: dict[frozenset[int], dict[_Transport, list[_Item]]] = {}
    for transport, items in _by_transport(params, _owners(params, owners or {})).items():
        by_ranks.setdefault(transport.mesh.rank_set, {})[transport] = items
    buckets: list[Bucket] = []
    actions: list[Action] = []
    for rank_set in sorted(by_ranks, key=_rank_set_order):
        waves = _deal_transports(params, by_ranks[rank_set], options, buckets)
        actions += schedule(buckets, waves, options.prefetch_count)
    return Plan(params, tuple(buckets), tuple(actions), options)


def _rank_set_order(rank_set: frozenset[int]) -> tuple[int, list[int]]:
    """Sets of ranks run one after the other, in one order for all.

    So ranks that share one mesh and differ in others still issue its collectives alike.
    """
    return (-len(rank_set), sorted(rank_set))


def _deal_transports(
    params: tuple[ParamSpec, ...],
    transports: dict[_Transport, list[_Item]],
    options: PlanOptions,
    buckets: list[Bucket],
) -> list[list[int]]:
    """Append the buckets of one set of ranks; returns them as waves of indices."""
    waves: list[list[int]] = []
    # Exchanges first, the longest compute first; what needs no exchange hides the last one.
    for transport, items in sorted(
        transports.items(), key=lambda pair: _order(params, pair[0], pair[1])
    ):
        strategy, empty, parcels = _choose(params, transport, items)
        for wave in deal(parcels, empty, options.bucket_nbytes):
            waves.append([])
            for parcels_of_bucket in wave:
                chosen = sorted((items[p.index] for p in parcels_of_bucket), key=_model_order)
                waves[-1].append(len(buckets))
                buckets.append(
                    Bucket(
                        mesh=transport.mesh,
                        strategy=strategy,
                        wire_dtype=transport.wire_dtype,
                        assignments=tuple(Assignment(i.param, i.index, i.owner) for i in chosen),
                        unshard=unshard_collectives(strategy),
                        reshard=reshard_collectives(strategy, transport.mesh.dim_names),
                    )
                )
    return waves


def _model_order(item: _Item) -> tuple[int, int]:
    return (item.param, item.index)


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
        if spec.wire_dtype not in ITEMSIZES:
            problems.append(
                Problem(
                    spec.fqn,
                    f"{list(spec.shape)} to be iterated in {spec.wire_dtype}",
                    "This dtype is not known to the planner.",
                    f"Use one of {', '.join(ITEMSIZES)}.",
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


def _owners(params: tuple[ParamSpec, ...], named: Mapping[str, int]) -> list[_Item]:
    """Owners of all matrices; `named` by the user or chosen.

    Meshes of exactly the same ranks share loads. Others do not: their ranks cannot see each
    other's plans.
    """
    work: dict[frozenset[int], list[tuple[int, int, Matrix, Work]]] = {}
    candidates: dict[int, tuple[int, ...]] = {}
    for param, spec in enumerate(params):
        mesh = spec.layout.mesh
        owned = _owned_by(spec, named[spec.fqn]) if spec.fqn in named else set()
        for index, matrix in enumerate(spec.matrices):
            if matrix.numel == 0:
                continue
            table = spec.layout.holders(matrix.region)
            ranks = candidates.get(id(table))
            if ranks is None:
                ranks = candidates[id(table)] = tuple(
                    mesh.ranks[position] for position in candidates_for(spec.layout, matrix.region)
                )
            if index in owned:
                ranks = (named[spec.fqn],)
            flops = max(matrix_flops(matrix, spec.num_iterations), matrix.numel)
            work.setdefault(mesh.rank_set, []).append(
                (param, index, matrix, Work(flops, (spec.fqn, index), ranks))
            )
    items = []
    for entries in work.values():
        owners = assign_owners([w for *_, w in entries])
        for (param, index, matrix, _), rank in zip(entries, owners, strict=True):
            owner = params[param].layout.mesh.position_of(rank)
            items.append(_Item(param, index, matrix, owner))
    return items


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


def _by_transport(
    params: tuple[ParamSpec, ...], items: Sequence[_Item]
) -> dict[_Transport, list[_Item]]:
    transports: dict[_Transport, list[_Item]] = {}
    known: dict[int, tuple[Strategy, ...]] = {}
    for item in items:
        spec = params[item.param]
        table = id(spec.layout.holders(item.matrix.region))
        strategies = known.get(table)
        if strategies is None:
            strategies = known[table] = strategies_for(spec.layout, item.matrix.region)
        transport = _Transport(spec.layout.mesh, spec.wire_dtype, strategies)
        transports.setdefault(transport, []).append(item)
    return transports


def _order(
    params: tuple[ParamSpec, ...], transport: _Transport, items: Sequence[_Item]
) -> tuple[bool, int, tuple[int, int]]:
    flops = sum(matrix_flops(i.matrix, params[i.param].num_iterations) for i in items)
    first = min(_model_order(item) for item in items)
    return (isinstance(transport.strategies[0], Local), -flops, first)


def _choose(
    params: tuple[ParamSpec, ...], transport: _Transport, items: Sequence[_Item]
) -> tuple[Strategy, Footprint, list[Parcel]]:
    """The strategy of one transport, and its matrices as parcels."""
    itemsize = ITEMSIZES[transport.wire_dtype]
    parcels = []
    for index, item in enumerate(items):
        layout = params[item.param].layout
        holders = layout.holders(item.matrix.region)
        parcels.append(
            Parcel(
                index=index,
                owner=item.owner,
                replica=layout.replica_offset(item.owner),
                home=0 if len(holders) > 1 else layout.home(item.owner),
                nbytes=itemsize * item.matrix.numel,
                piece_nbytes=itemsize * max(piece.numel for piece in holders.values()),
                flops=matrix_flops(item.matrix, params[item.param].num_iterations),
                name=(params[item.param].fqn, item.index),
            )
        )
    strategy = transport.strategies[0]
    if len(transport.strategies) > 1 and not _direct_is_cheap(transport, parcels):
        strategy = transport.strategies[1]
    match strategy:
        case Local():
            return strategy, Footprint(1, 0, gathers=False), parcels
        case Owned(unshard_dims=apart, replica_dims=same, hops=hops):
            copies = transport.mesh.num_ranks_along(same)
            return strategy, Footprint(copies, hops, gathers=bool(apart)), parcels


def _direct_is_cheap(transport: _Transport, parcels: Sequence[Parcel]) -> bool:
    """Whether one hop from owners to all holders beats two; see MOST_DIRECT_RANKS."""
    direct = transport.strategies[0]
    assert isinstance(direct, Owned)
    copies = transport.mesh.num_ranks_along(direct.replica_dims)
    if transport.mesh.num_ranks_along(direct.unshard_dims) * copies > MOST_DIRECT_RANKS:
        return False
    total = Footprint(copies, 1, gathers=True).of(parcels)
    wholes, pieces = max(total.wholes.values()), max(total.pieces.values())
    return copies * wholes <= DIRECT_SLACK * (wholes + (copies - 1) * pieces)


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
