"""Predicted costs of a step for this package and for two baseline methods."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.planning.matrix_costs import ITEMSIZES, matrix_flops
from muon_dtensor.planning.plan import ParamSpec, PlanOptions
from muon_dtensor.planning.report import PlanReport, plan_report
from muon_dtensor.planning.simulate import orthogonalize_seconds
from muon_dtensor.planning.strategies import strategies_for

METHODS = ("naive", "1d-owner", "ours")


@dataclass(frozen=True, slots=True)
class MethodCost:
    """Seconds of a step; bytes sent, FLOP and peak bytes of the busiest rank; mean FLOP."""

    seconds: float
    sent_nbytes: int
    flops: int
    mean_flops: float
    peak_nbytes: int

    @classmethod
    def of(cls, report: PlanReport) -> "MethodCost":
        """Return the costs of a plan."""
        cost = report.cost
        return cls(
            report.prediction.seconds,
            max(cost.sent_nbytes, default=0),
            max(cost.flops, default=0),
            sum(cost.flops) / max(1, len(cost.ranks)),
            max(cost.peak_nbytes, default=0),
        )


def method_cost(method: str, specs: Sequence[ParamSpec], options: PlanOptions) -> MethodCost:
    """Return the predicted costs of one method.

    naive: every rank gathers and orthogonalizes every matrix of which it holds a piece, one after
    the other, as `full_tensor()` in a loop does.
    1d-owner: each matrix has one owner in every replica, so each replica repeats the same work, as
    optimizers on one 1-D mesh do (microsoft/dion, torchtitan's DistMuon). These optimizers reject
    most matrices that several mesh dims cut; the prediction treats those dims as one.
    ours: the plan of this package.

    Raises ValueError for an unknown method.
    """
    match method:
        case "naive":
            return _naive(specs, options)
        case "1d-owner":
            replica_layouts = {
                layout: _first_replica(layout) for layout in {s.layout for s in specs}
            }
            inner = [replace(spec, layout=replica_layouts[spec.layout]) for spec in specs]
            return MethodCost.of(plan_report(inner, replace(options, strategy="owned")))
        case "ours":
            return MethodCost.of(plan_report(specs, options))
        case _:
            raise ValueError(f"--compare takes {', '.join(METHODS)}, got {method!r}")


def _naive(specs: Sequence[ParamSpec], options: PlanOptions) -> MethodCost:
    """Return the maximum over ranks of each cost, without momentum and parameter update."""
    topology = options.topology
    ranks: dict[int, list[float]] = {}
    cost_by_key: dict[tuple[object, ...], tuple[float, int, int, int]] = {}
    for spec in specs:
        mesh, itemsize = spec.layout.mesh, ITEMSIZES[spec.wire_dtype]
        for matrix in spec.matrices:
            if not matrix.numel:
                continue
            holders = spec.layout.holders(matrix.region)
            key = (id(holders), matrix.rows, matrix.cols, spec.num_iterations, spec.wire_dtype)
            if key not in cost_by_key:
                dims = strategies_for(spec.layout, matrix.region)[0].unshard_dims
                piece = spec.layout.largest_part(matrix.region)
                sent = itemsize * (len(holders) - 1) * piece
                seconds = topology.all_to_all_seconds(mesh, dims, sent)
                seconds += topology.tensor_overhead + topology.collective_overhead * bool(dims)
                seconds += orthogonalize_seconds(
                    topology, matrix, spec.num_iterations, spec.wire_dtype
                )
                short = min(matrix.rows, matrix.cols)
                peak = itemsize * (3 * matrix.numel + 2 * short * short)
                flops = matrix_flops(matrix, spec.num_iterations)
                cost_by_key[key] = (seconds, sent, flops, peak)
            seconds, sent, flops, peak = cost_by_key[key]
            for home in holders:
                for offset in spec.layout.replica_offsets:
                    totals = ranks.setdefault(mesh.ranks[home + offset], [0.0, 0, 0, 0])
                    for index, value in enumerate((seconds, sent, flops)):
                        totals[index] += value
                    totals[3] = max(totals[3], peak)
    if not ranks:
        return MethodCost(topology.step_overhead, 0, 0, 0.0, 0)
    seconds, sent, flops, peak = (max(column) for column in zip(*ranks.values(), strict=True))
    mean_flops = sum(totals[2] for totals in ranks.values()) / len(ranks)
    seconds += topology.step_overhead
    return MethodCost(seconds, int(sent), int(flops), mean_flops, int(peak))


def _first_replica(layout: Layout) -> Layout:
    """Return the same layout on only the ranks of the first replica."""
    mesh, dropped = layout.mesh, layout.replica_dims
    names = tuple(name for name in mesh.dim_names if name not in dropped)
    ranks = tuple(rank for p, rank in enumerate(mesh.ranks) if mesh.index_along(p, dropped) == 0)
    inner = MeshSpec(names, tuple(mesh.sizes[name] for name in names), ranks)
    return replace(layout, mesh=inner)
