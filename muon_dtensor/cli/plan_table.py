"""Plans as tables for a terminal. Plans nothing."""

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from muon_dtensor.planning.ir import Gram, Local, Plan
from muon_dtensor.planning.render import (
    collective_text,
    dims_text,
    duration,
    instead,
    quantity,
    strategy_text,
)


def console() -> Console:
    """Where tables go; a file or a pipe has no width of its own."""
    return Console(width=None if sys.stdout.isatty() else 150)


def show(made: Plan) -> None:
    """The plan as a table, and its totals against the lower bounds."""
    cost, prediction = made.cost, made.prediction
    table = Table(title=", ".join(f"mesh {mesh}" for mesh in made.meshes))
    for name in ("bucket", "strategy", "matrices", "collectives"):
        table.add_column(name)
    for name in ("MB/rank", "GFLOP/rank", "predicted ms"):
        table.add_column(name, justify="right")
    for index, priced in enumerate(cost.buckets):
        bucket = priced.bucket
        hops = (*priced.unshard, *priced.reshard)
        lines = [collective_text(bucket, hop.collective) for hop in hops]
        if isinstance(bucket.strategy, Gram):
            lines.append(f"rings over {dims_text(bucket, bucket.strategy.team_dims)}")
        sent = zip(priced.team_nbytes, *(priced.sent_nbytes(hop) for hop in hops), strict=True)
        exchange, compute = prediction.exchange_seconds[index], prediction.compute_seconds[index]
        table.add_row(
            str(index),
            strategy_text(bucket.strategy),
            str(len(bucket.assignments)),
            "\n".join(lines) or "none",
            f"{max(map(sum, sent)) / 1e6:.1f}",
            f"{max(priced.flops) / 1e9:.1f}",
            f"{1e3 * exchange:.2f} sent\n{1e3 * compute:.2f} computed",
        )
    console().print(table, markup=False)
    told = set()
    for index, bucket in enumerate(made.buckets):
        verdict = (bucket.strategy, bucket.seconds, bucket.alternatives)
        if not isinstance(bucket.strategy, Local) and verdict not in told:
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
        f"predicted {duration(prediction.seconds)} a step on {made.options.topology.name}; "
        f"digest {made.digest[:16]}"
    )


def show_compared(plans: Mapping[str, Plan]) -> None:
    """One line for each way of working; ratios to the last."""
    table = Table(title="ways of working, modelled")
    table.add_column("way")
    for name in ("predicted", "x the last", "redundancy", "MB/rank", "TFLOP/rank", "GB held"):
        table.add_column(name, justify="right")
    *_, last = plans.values()
    work = last.cost.model_flops / max(1, len(last.cost.ranks))
    for name, made in plans.items():
        cost = made.cost
        redundancy = sum(cost.flops) / max(1, len(cost.ranks)) / work if work else 1.0
        table.add_row(
            name,
            duration(made.prediction.seconds),
            f"{made.prediction.seconds / last.prediction.seconds:.2f}",
            f"{redundancy:.2f}",
            f"{max(cost.sent_nbytes, default=0) / 1e6:.1f}",
            f"{max(cost.flops, default=0) / 1e12:.2f}",
            f"{max(cost.peak_nbytes, default=0) / 1e9:.2f}",
        )
    console().print(table, markup=False)
