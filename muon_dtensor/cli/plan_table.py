"""Plans as tables for a terminal."""

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from muon_dtensor.cli.baseline_costs import WayCost
from muon_dtensor.planning.render import (
    collective_text,
    duration,
    instead,
    machine,
    quantity,
    ranges,
)
from muon_dtensor.planning.report import PlanReport


def console() -> Console:
    """Where tables go; a file or a pipe has no width of its own."""
    return Console(width=None if sys.stdout.isatty() else 150)


def show(made: PlanReport) -> None:
    """The plan as a table, and its totals against the lower bounds."""
    cost, prediction = made.cost, made.prediction
    table = Table(title=", ".join(f"mesh {mesh}" for mesh in made.meshes))
    for name in ("bucket", "strategy", "matrices", "collectives"):
        table.add_column(name)
    for name in ("MB/rank", "GFLOP/rank", "predicted ms"):
        table.add_column(name, justify="right")
    rows: dict[tuple[str, ...], list[int]] = {}
    for index, priced in enumerate(cost.buckets):
        bucket = priced.bucket
        hops = priced.sequence.hops
        lines = [collective_text(bucket, hop.collective) for hop in hops]
        nothing = [0] * bucket.mesh.num_ranks
        sent = zip(nothing, *(priced.sent_nbytes(hop) for hop in hops), strict=True)
        exchange, compute = prediction.exchange_seconds[index], prediction.compute_seconds[index]
        row = (
            bucket.strategy.text,
            str(len(bucket.assignments)),
            "\n".join(lines) or "none",
            f"{max(map(sum, sent)) / 1e6:.1f}",
            f"{max(priced.flops) / 1e9:.1f}",
            f"{1e3 * exchange:.2f} sent\n{1e3 * compute:.2f} computed",
        )
        rows.setdefault(row, []).append(index)
    for cells, indices in rows.items():
        table.add_row(ranges(indices), *cells)
    console().print(table, markup=False)
    told = set()
    for index, bucket in enumerate(made.buckets):
        verdict = (bucket.strategy, bucket.seconds, bucket.alternatives)
        if not bucket.strategy.is_local and verdict not in told:
            told.add(verdict)
            print(f"bucket {index}: {duration(bucket.seconds)} if its like were all")
            for line in instead(bucket):
                print(f"  {line}")
    ranks, bound = len(cost.ranks), cost.bound_nbytes
    over = f", {cost.total_nbytes / bound:.3f} x the bound" if bound else ""
    efficiency = 1 / cost.makespan if cost.makespan else 1.0
    print(
        f"{ranks} ranks, {cost.num_matrices} matrices: "
        f"{quantity(cost.total_nbytes, 'B')} sent a step{over}\n"
        f"redundancy {cost.redundancy:.2f}, makespan efficiency {efficiency:.0%} "
        f"(all ranks busy would be 100%), "
        f"peak memory {quantity(max(cost.peak_nbytes, default=0), 'B')} a rank\n"
        f"predicted {duration(prediction.seconds)} a step on {machine(made.options.topology)}; "
        f"digest {made.digest[:16]}"
    )


def show_compared(costs: Mapping[str, WayCost]) -> None:
    """One line for each way of working; ratios to the last."""
    table = Table(title="ways of working, modelled")
    table.add_column("way")
    for name in ("predicted", "x the last", "redundancy", "MB/rank", "TFLOP/rank", "GB held"):
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
