"""`muon-dtensor plan`: what a step will do on a cluster, before anyone pays for it.

Parses and prints. The planner plans; no process group and no GPU is needed.
"""

import difflib
import sys
from math import prod
from pathlib import Path

from rich.console import Console
from rich.table import Table

from muon_dtensor.cli.models import specs_of
from muon_dtensor.errors import PlanError
from muon_dtensor.layout import MeshSpec
from muon_dtensor.planning.ir import Gram, Local, Plan, PlanOptions
from muon_dtensor.planning.planner import plan_update
from muon_dtensor.planning.presets import topology_of
from muon_dtensor.planning.render import (
    collective_text,
    dims_text,
    duration,
    headline,
    instead,
    quantity,
    strategy_text,
)


def plan(
    model: str = "llama3-8b",
    mesh: str = "dp_shard=8",
    topology: str = "h100-ib-400",
    strategy: str = "auto",
    exact: bool = True,
    bucket_mb: float = 256,
    prefetch_count: int = 1,
    explain: str | None = None,
    json: Path | None = None,
    diff: tuple[Path, Path] | None = None,
) -> int:
    """Show what a Muon step of a model on a mesh does: who computes, what is sent, how long.

    Exit status 2 for a model, mesh or topology that is none.

    Args:
        model: gpt2, llama3-8b, llama3-70b, llama3-405b, deepseek-v3 or kimi-k2.
        mesh: sizes of mesh dims, outermost first: dp_replicate=16,dp_shard=64,tp=8.
        topology: a preset (h100-ib-400, h100-nvlink, h200, a100-ib-200, gloo-local) or a JSON file.
        strategy: auto, or one for all: owned, owned_staged, gathered, gram.
        exact: --no-exact allows gram, which rounds differently.
        bucket_mb: most MiB of exchange buffers of one bucket on a rank.
        prefetch_count: buckets in flight while another is orthogonalized.
        explain: all about the parameter of this name instead of the table.
        json: write the plan to this file.
        diff: two such files to compare instead of planning.
    """
    try:
        if diff is not None:
            return _diff(*diff)
        options = PlanOptions(
            bucket_nbytes=max(1, int(bucket_mb * 2**20)),
            prefetch_count=prefetch_count,
            strategy=strategy,
            exact=exact,
            topology=topology_of(topology),
        )
        made = plan_update(specs_of(model, mesh_of(mesh)), options)
        if explain is not None and explain not in {spec.fqn for spec in made.params}:
            near = difflib.get_close_matches(explain, [spec.fqn for spec in made.params], n=1)
            raise ValueError(f"no parameter {explain!r}" + (f"; is it {near[0]!r}?" * bool(near)))
    except (ValueError, PlanError, OSError, OverflowError) as error:
        print(f"muon-dtensor plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if explain is not None:
        print(made.explain(explain))
    else:
        show(made)
    if json is not None:
        json.write_text(made.to_json())
    return 0


def mesh_of(text: str) -> MeshSpec:
    """The mesh of `dp_shard=8,tp=2`. Raises ValueError for what is none."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if not (name.isidentifier() and size.isdecimal() and int(size) > 0) or name in sizes:
            raise ValueError(f"--mesh is dim=size,dim=size with sizes from 1 on, got {text!r}")
        sizes[name] = int(size)
    if (count := prod(sizes.values())) > MOST_RANKS:
        raise ValueError(f"{text} has {count} ranks; plans are made for up to {MOST_RANKS}")
    return MeshSpec.of(**sizes)


MOST_RANKS = 1 << 17


def show(made: Plan) -> None:
    """The plan as a table, and its totals against the lower bounds."""
    cost, prediction = made.cost, made.prediction
    # a file or a pipe has no width of its own
    console = Console(width=None if sys.stdout.isatty() else 150)
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
        sent = max(map(sum, zip(*(priced.sent_nbytes(h) for h in hops), strict=True)), default=0)
        exchange, compute = prediction.exchange_seconds[index], prediction.compute_seconds[index]
        table.add_row(
            str(index),
            strategy_text(bucket.strategy),
            str(len(bucket.assignments)),
            "\n".join(lines) or "none",
            f"{(sent + max(priced.team_nbytes)) / 1e6:.1f}",
            f"{max(priced.flops) / 1e9:.1f}",
            f"{1e3 * exchange:.2f} sent\n{1e3 * compute:.2f} computed",
        )
    console.print(table, markup=False)
    told = set()
    for index, bucket in enumerate(made.buckets):
        if not isinstance(bucket.strategy, Local) and bucket.alternatives not in told:
            told.add(bucket.alternatives)
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
        f"peak memory {quantity(max(cost.peak_nbytes), 'B')} a rank\n"
        f"predicted {duration(prediction.seconds)} a step on {made.options.topology.name}; "
        f"digest {made.digest[:16]}"
    )


def _diff(first: Path, second: Path) -> int:
    """Print what differs between two plans; 0 if nothing does, else 1."""
    before, after = (
        [headline(made), *str(made).splitlines()]
        for made in (Plan.from_json(path.read_text()) for path in (first, second))
    )
    lines = list(difflib.unified_diff(before, after, str(first), str(second), lineterm="", n=1))
    print("\n".join(lines) or "the plans are equal")
    return 1 if lines else 0
