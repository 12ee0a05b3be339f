"""`muon-dtensor plan`: shows what a step will do on a cluster, without a process group or GPU."""

import difflib
import sys
from math import prod
from pathlib import Path

from muon_dtensor.cli.baseline_costs import WayCost, cost_of_way
from muon_dtensor.cli.models import specs_of
from muon_dtensor.cli.plan_plot import plot as draw
from muon_dtensor.cli.plan_table import show, show_compared
from muon_dtensor.layout import MeshSpec
from muon_dtensor.planning.plan import PlanOptions
from muon_dtensor.planning.presets import topology_of
from muon_dtensor.planning.report import PlanReport, plan_report


def plan(
    model: str = "llama3-8b",
    mesh: str = "dp_shard=8",
    topology: str = "h100-ib-400",
    ranks: int | None = None,
    strategy: str = "auto",
    exact: bool = True,
    bucket_mb: float = 256,
    prefetch_count: int = 1,
    explain: str | None = None,
    compare: str | None = None,
    plot: Path | None = None,
    json: Path | None = None,
    diff: tuple[Path, Path] | None = None,
) -> int:
    """Show what a Muon step of a model on a mesh does: who computes, what is sent, how long.

    Exit status 2 for what cannot be planned, 1 for a --diff of plans that differ.

    Args:
        model: gpt2, llama3-8b, llama3-70b, llama3-405b, deepseek-v3 or kimi-k2; or pkg.mod:fn,
            which takes the DeviceMesh and returns a model sharded over it, or takes nothing and
            returns a bare one for fully_shard.
        mesh: sizes of mesh dims, outermost first: dp_replicate=16,dp_shard=64,tp=8. One may be
            -1: what --ranks leaves.
        topology: a preset (h100-ib-400, h100-nvlink, h200, a100-ib-200, gloo-local) or a JSON file
            of `muon-dtensor calibrate`.
        ranks: how many there are; the mesh must have as many.
        strategy: auto, or one for all: owned, owned_staged.
        exact: --no-exact allows strategies that round differently.
        bucket_mb: most MiB of exchange buffers of one bucket on a rank.
        prefetch_count: buckets in flight while another is orthogonalized.
        explain: all about the parameter of this name instead of the table.
        compare: ways of working to set side by side: naive,1d-owner,ours.
        plot: draw timeline, loads and bytes to this file.
        json: write the plan to this file.
        diff: two such files to compare instead of planning.
    """
    try:
        if diff is not None:
            return _diff(*diff)
        if compare is not None and explain is not None:
            raise ValueError("--compare and --explain are two questions: ask one")
        if not 0 < bucket_mb * 2**20 < 2**63:
            raise ValueError(f"--bucket-mb must be above 0 and finite, got {bucket_mb}")
        machine = topology_of(topology)
        options = PlanOptions(
            bucket_nbytes=max(1, int(bucket_mb * 2**20)),
            prefetch_count=prefetch_count,
            # as the optimizer does by default on GPUs
            batched=machine.cores is None,
            strategy=strategy,
            exact=exact,
            topology=machine,
        )
        sizes = sizes_of(mesh, ranks)
        if ":" in model:
            # needs torch, which the presets do not
            from muon_dtensor.cli.user_model import plan_of_factory

            made = plan_of_factory(model, sizes, options)
        else:
            made = plan_report(specs_of(model, MeshSpec.of(**sizes)), options)
        if compare is not None:
            ways = dict.fromkeys(name.strip() for name in compare.split(","))
            others = {w: cost_of_way(w, made.params, options) for w in ways if w != "ours"}
            show_compared({way: others.get(way, WayCost.of(made)) for way in ways})
        elif explain is None:
            show(made)
        elif explain in {spec.fqn for spec in made.params}:
            print(made.explain(explain))
        else:
            near = difflib.get_close_matches(explain, [spec.fqn for spec in made.params], n=1)
            hint = f"; is it {near[0]!r}?" if near else ""
            raise ValueError(f"no parameter {explain!r}{hint}")
        if plot is not None:
            draw(made, plot)
        if json is not None:
            json.write_text(made.to_json())
    except (ValueError, OSError, OverflowError) as error:
        print(f"muon-dtensor plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def sizes_of(text: str, ranks: int | None = None) -> dict[str, int]:
    """The sizes of `dp_shard=8,tp=2`; a -1 becomes what `ranks` leaves. Raises ValueError."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        is_size = size == "-1" or (size.isdecimal() and int(size) > 0)
        if not (name.isidentifier() and is_size) or name in sizes:
            raise ValueError(f"--mesh is dim=size,dim=size with sizes from 1 on, got {text!r}")
        sizes[name] = int(size)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or (free and ranks is None):
        raise ValueError(f"one size of --mesh may be -1, and then --ranks is needed, got {text!r}")
    known = prod(size for size in sizes.values() if size > 0)
    for name in free:
        sizes[name] = max(1, (ranks or 0) // known)
    count = prod(sizes.values())
    if ranks is not None and count != ranks:
        raise ValueError(f"{ranks} ranks do not make a mesh {text}: its sizes multiply to {count}")
    if count > MOST_RANKS:
        raise ValueError(f"{text} has {count} ranks; plans are made for up to {MOST_RANKS}")
    return sizes


MOST_RANKS = 1 << 17


def _diff(first: Path, second: Path) -> int:
    """Print what differs between two plans; 0 if nothing does, else 1."""
    before, after = (
        [made.headline(), *str(made).splitlines()]
        for made in (PlanReport.from_json(path.read_text()) for path in (first, second))
    )
    lines = list(difflib.unified_diff(before, after, str(first), str(second), lineterm="", n=1))
    print("\n".join(lines) or "the plans are equal")
    return 1 if lines else 0
