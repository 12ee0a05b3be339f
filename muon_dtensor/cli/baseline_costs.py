"""What a step costs as today's packages work, predicted for the same parameters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.planning.matrix_costs import ITEMSIZES, matrix_flops
from muon_dtensor.planning.plan import ParamSpec, PlanOptions
from muon_dtensor.planning.report import PlanReport, plan_report
from muon_dtensor.planning.simulate import orthogonalize_seconds
from muon_dtensor.planning.strategies import strategies_for

WAYS = ("naive", "1d-owner", "ours")


@dataclass(frozen=True, slots=True)
class WayCost:
    """Seconds of a step; bytes sent, FLOP and peak bytes of the busiest rank; mean FLOP."""

    seconds: float
    sent_nbytes: int
    flops: int
    mean_flops: float
    peak_nbytes: int

    @classmethod
    def of(cls, report: PlanReport) -> "WayCost":
        """The costs of a plan."""
        cost = report.cost
        return cls(
            report.prediction.seconds,
            max(cost.sent_nbytes, default=0),
            max(cost.flops, default=0),
            sum(cost.flops) / max(1, len(cost.ranks)),
            max(cost.peak_nbytes, default=0),
        )


def cost_of_way(way: str, specs: Sequence[ParamSpec], options: PlanOptions) -> WayCost:
    """The costs of one way of working.

    naive: every rank gathers and orthogonalizes every matrix it holds a part of, one after the
    other, as `full_tensor()` in a loop does. 1d-owner: an owner for each matrix among the ranks
    that hold one copy of it, and every replica does the same again, as optimizers of one 1-D mesh
    do (microsoft/dion, torchtitan's DistMuon); they refuse most matrices that several mesh dims
    cut, and the model takes those dims for one. ours: the plan.

    Raises ValueError for another way.
    """
    match way:
        case "naive":
            return _naive(specs, options)
        case "1d-owner":
            first = {layout: _first_replica(layout) for layout in {s.layout for s in specs}}
            inner = [replace(spec, layout=first[spec.layout]) for spec in specs]
            return WayCost.of(plan_report(inner, replace(options, strategy="owned")))
        case "ours":
            return WayCost.of(plan_report(specs, options))
        case _:
            raise ValueError(f"--compare takes {', '.join(WAYS)}, got {way!r}")


def _naive(specs: Sequence[ParamSpec], options: PlanOptions) -> WayCost:
    """Costs of the rank that holds most. Momentum and update are left out."""
    topology = options.topology
    ranks: dict[int, list[float]] = {}
    known: dict[tuple[object, ...], tuple[float, int, int, int]] = {}
    for spec in specs:
        mesh, itemsize = spec.layout.mesh, ITEMSIZES[spec.wire_dtype]
        for matrix in spec.matrices:
            if not matrix.numel:
                continue
            holders = spec.layout.holders(matrix.region)
            key = (id(holders), matrix.rows, matrix.cols, spec.num_iterations, spec.wire_dtype)
            if key not in known:
                dims = strategies_for(spec.layout, matrix.region)[0].unshard_dims
                piece = spec.layout.largest_part(matrix.region)
                sent = itemsize * (len(holders) - 1) * piece
                seconds = topology.all_to_all_seconds(mesh, dims, sent)
                seconds += topology.tensor_overhead + topology.collective_overhead * bool(dims)
                seconds += orthogonalize_seconds(
                    topology, matrix, spec.num_iterations, spec.wire_dtype
                )
                short = min(matrix.rows, matrix.cols)
                held = itemsize * (3 * matrix.numel + 2 * short * short)
                flops = matrix_flops(matrix, spec.num_iterations)
                known[key] = (seconds, sent, flops, held)
            seconds, sent, flops, held = known[key]
            for home in holders:
                for offset in spec.layout.replica_offsets:
                    totals = ranks.setdefault(mesh.ranks[home + offset], [0.0, 0, 0, 0])
                    for index, value in enumerate((seconds, sent, flops)):
                        totals[index] += value
                    totals[3] = max(totals[3], held)
    if not ranks:
        return WayCost(topology.step_overhead, 0, 0, 0.0, 0)
    seconds, sent, flops, held = (max(column) for column in zip(*ranks.values(), strict=True))
    mean_flops = sum(totals[2] for totals in ranks.values()) / len(ranks)
    seconds += topology.step_overhead
    return WayCost(seconds, int(sent), int(flops), mean_flops, int(held))


def _first_replica(layout: Layout) -> Layout:
    """The same layout on the ranks of the first replica alone."""
    mesh, dropped = layout.mesh, layout.replica_dims
    names = tuple(name for name in mesh.dim_names if name not in dropped)
    ranks = tuple(rank for p, rank in enumerate(mesh.ranks) if mesh.index_along(p, dropped) == 0)
    inner = MeshSpec(names, tuple(mesh.sizes[name] for name in names), ranks)
    return replace(layout, mesh=inner)
