"""Prints plans and comparisons of methods as tables."""

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from muon_dtensor.cli.baseline_costs import MethodCost
from muon_dtensor.planning.memory import state_nbytes
from muon_dtensor.planning.render import (
    adamw_text,
    collective_text,
    duration,
    instead,
    machine,
    offload_text,
    quantity,
    ranges,
)
from muon_dtensor.planning.report import PlanReport
from muon_dtensor.planning.traffic import link_nbytes


def console() -> Console:
    """Return the console of the tables; 150 columns wide where stdout is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 150)


def print_plan(report: PlanReport, training_seconds: float | None = None) -> None:
    """Print a plan as a table, and its totals relative to the lower bounds.

    `training_seconds`: of a training step, with which the predicted one is compared.
    """
    cost, prediction = report.cost, report.prediction
    table = Table(title=", ".join(f"mesh {mesh}" for mesh in report.meshes))
    for name in ("bucket", "strategy", "matrices", "collectives"):
        table.add_column(name)
    for name in ("MB/rank", "GFLOP/rank", "predicted ms"):
        table.add_column(name, justify="right")
    rows: dict[tuple[str, ...], list[int]] = {}
    for index, traffic in enumerate(cost.buckets):
        bucket = traffic.bucket
        hops = traffic.sequence.hops
        lines = [collective_text(bucket, hop.collective) for hop in hops]
        zeros = [0] * bucket.mesh.num_ranks
        sent = zip(zeros, *(traffic.sent_nbytes(hop) for hop in hops), strict=True)
        exchange, compute = prediction.exchange_seconds[index], prediction.compute_seconds[index]
        row = (
            bucket.strategy.text,
            str(bucket.num_matrices),
            "\n".join(lines) or "none",
            f"{max(map(sum, sent)) / 1e6:.1f}",
            f"{max(traffic.flops) / 1e9:.1f}",
            f"{1e3 * exchange:.2f} sent\n{1e3 * compute:.2f} computed",
        )
        rows.setdefault(row, []).append(index)
    for cells, indices in rows.items():
        table.add_row(ranges(indices), *cells)
    console().print(table, markup=False)
    if report.adamw_numels:
        print(adamw_text(report.adamw_numels))
    printed_choices = set()
    for index, bucket in enumerate(report.buckets):
        choice = (bucket.strategy, bucket.seconds, bucket.alternatives)
        if not bucket.strategy.is_local and choice not in printed_choices:
            printed_choices.add(choice)
            print(f"bucket {index}: {duration(bucket.seconds)} for all matrices exchanged this way")
            for line in instead(bucket):
                print(f"  {line}")
    ranks, bound = len(cost.ranks), cost.bound_nbytes
    over = f", {cost.total_nbytes / bound:.3f} x the bound" if bound else ""
    efficiency = 1 / cost.makespan if cost.makespan else 1.0
    links = link_nbytes(report.plan)
    print(
        f"{ranks} ranks, {cost.num_matrices} matrices: "
        f"{quantity(cost.total_nbytes, 'B')} sent a step{over}\n"
        f"redundancy {cost.redundancy:.2f}, makespan efficiency {efficiency:.0%} "
        f"(all ranks busy would be 100%), "
        f"peak memory {quantity(max(cost.peak_nbytes, default=0), 'B')} a rank, "
        f"momenta {quantity(state_nbytes(report.plan), 'B')}\n"
        f"sent within nodes {quantity(links.within_nodes, 'B')}, between nodes "
        f"{quantity(links.between_nodes, 'B')}\n"
        f"predicted {duration(prediction.seconds)} a step on {machine(report.options.topology)}; "
        f"digest {report.digest[:16]}"
    )
    if any(spec.is_offloaded for spec in report.params):
        print(offload_text(report.plan, report.traffic))
    if training_seconds is not None:
        print(
            f"a training step takes {duration(training_seconds)}, the optimizer's "
            f"{prediction.seconds / training_seconds:.1%} of that"
        )


def print_sweep(
    reports: Mapping[str, PlanReport], training_seconds: Mapping[str, float | None]
) -> None:
    """Print one row per mesh; by mesh the plan, and the seconds of a training step."""
    table = Table(title="one plan per mesh")
    table.add_column("mesh")
    for name in ("ranks", "predicted", "GB sent", "MB/rank", "momenta GB", "peak GB", "of a step"):
        table.add_column(name, justify="right")
    for mesh, report in reports.items():
        cost, seconds = report.cost, training_seconds[mesh]
        table.add_row(
            mesh,
            str(len(cost.ranks)),
            duration(report.prediction.seconds),
            f"{cost.total_nbytes / 1e9:.1f}",
            f"{max(cost.sent_nbytes, default=0) / 1e6:.1f}",
            f"{state_nbytes(report.plan) / 1e9:.2f}",
            f"{max(cost.peak_nbytes, default=0) / 1e9:.2f}",
            "" if seconds is None else f"{report.prediction.seconds / seconds:.1%}",
        )
    console().print(table, markup=False)


def print_comparison(costs: Mapping[str, MethodCost]) -> None:
    """Print one row per method, with ratios to the last one."""
    table = Table(title="predicted costs by method")
    table.add_column("method")
    for name in ("predicted", "x the last", "redundancy", "MB/rank", "TFLOP/rank", "peak GB"):
        table.add_column(name, justify="right")
    *_, last = costs.values()
    for name, cost in costs.items():
        redundancy = cost.mean_flops / last.mean_flops if last.mean_flops else 1.0
        table.add_row(
            name,
            duration(cost.seconds),
            f"{cost.seconds / last.seconds:.2f}",
            f"{redundancy:.2f}",
            f"{cost.sent_nbytes / 1e6:.1f}",
            f"{cost.flops / 1e12:.2f}",
            f"{cost.peak_nbytes / 1e9:.2f}",
        )
    console().print(table, markup=False)
