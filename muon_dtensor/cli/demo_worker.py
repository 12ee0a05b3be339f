"""One rank of `muon-dtensor demo`: trains examples/train_gpt.py twice and times optimizer steps.

Only rank 0 prints and writes files.
"""

import importlib.util
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from muon_dtensor import Muon
from muon_dtensor.cli.baselines import naive_step
from muon_dtensor.cli.shutdown import destroy_process_group
from muon_dtensor.planning.render import quantity

TIMED_ROUNDS = 7


def load_script(path: str) -> ModuleType:
    """Import a Python file as a module named after the file."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def train_with_bar(script: ModuleType, config: Any, mesh: Any, console: Console) -> Any:
    """Train one configuration with a progress bar. Prints the plan before a Muon run."""
    columns = (
        TextColumn(f"{config.optimizer:>5}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=config.steps, loss=float("nan"), rate=0.0)

        def on_step(step: int, loss: float, rate: float) -> None:
            progress.update(task, completed=step, loss=loss, rate=rate)
            if not console.is_terminal and step % 20 == 0:
                console.print(f"{config.optimizer} step {step}  loss {loss:.3f}")

        def on_start(result: Any) -> None:
            if config.optimizer == "muon":
                plan = str(result.optimizer.plan)
                console.print(plan, highlight=False, soft_wrap=True, markup=False)

        return script.train(config, mesh, on_start, on_step)


def time_steps(optimizer: Muon, ns_dtype: torch.dtype) -> dict[str, float]:
    """Return the median seconds of a step of `optimizer` and of `naive_step`, timed alternately.

    Both orthogonalize the same gradients in `ns_dtype`. AdamW's parameters are not stepped.
    """
    for group in optimizer.param_groups:
        if group["algorithm"] == "adamw":
            for param in group["params"]:
                param.grad = None
    muon = [p for g in optimizer.param_groups if g["algorithm"] == "muon" for p in g["params"]]
    momenta = [torch.zeros_like(param, requires_grad=False) for param in muon]
    seconds: dict[str, list[float]] = {"muon_dtensor": [], "everyone_gathers": []}
    for turn in range(TIMED_ROUNDS + 1):
        for name, values in seconds.items():
            dist.barrier()
            start = time.perf_counter()
            if name == "muon_dtensor":
                optimizer.step()
            else:
                naive_step(muon, momenta, lr=0.0, ns_dtype=ns_dtype)
            dist.barrier()
            if turn:
                values.append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(
    settings: dict[str, Any], runs: dict[str, Any], seconds: dict[str, float]
) -> dict[str, Any]:
    """Return the contents of demo.json. Bytes and orthogonalizations are those of the plan."""
    plan = runs["muon"].optimizer.plan
    orthogonalized = dict.fromkeys(plan.cost.ranks, 0)
    for bucket in plan.buckets:
        for assignment in bucket.assignments:
            orthogonalized[bucket.mesh.ranks[assignment.owner]] += 1
    return {
        "val_loss": {name: run.val_loss for name, run in runs.items()},
        "steps": settings["steps"],
        "mesh": {name: settings[name] for name in ("dp_replicate", "dp_shard", "tp")},
        "losses": {name: run.losses for name, run in runs.items()},
        "optimizer_seconds_per_step": {
            **seconds,
            "adamw": statistics.median(runs["adamw"].optimizer_seconds),
        },
        "sent_nbytes_per_step": {
            "total": plan.cost.total_nbytes,
            "busiest_rank": max(plan.cost.sent_nbytes),
            "lower_bound_total": plan.cost.bound_nbytes,
        },
        "orthogonalizations_per_rank": list(orthogonalized.values()),
        "plan_digest": plan.digest,
        "torch": torch.__version__,
    }


def result_table(summary: dict[str, Any]) -> Table:
    """Return the report as a table."""
    table = Table(title=f"after {summary['steps']} steps")
    for column in ("", "muon_dtensor", "all ranks gather", "AdamW only"):
        table.add_column(column, justify="left" if not column else "right")
    losses, seconds = summary["val_loss"], summary["optimizer_seconds_per_step"]
    counts = summary["orthogonalizations_per_rank"]
    table.add_row("validation loss", f"{losses['muon']:.4f}", "", f"{losses['adamw']:.4f}")
    planned, naive = seconds["muon_dtensor"], seconds["everyone_gathers"]
    table.add_row(
        "optimizer, ms per step",
        f"{1e3 * planned:.1f} ({planned / naive:.2f} x)",
        f"{1e3 * naive:.1f}",
        f"{1e3 * seconds['adamw']:.1f}",
    )
    table.add_row(
        "sent per step", quantity(summary["sent_nbytes_per_step"]["total"], "B"), "", "0 B"
    )
    planned_counts = "/".join(map(str, counts))
    naive_counts = "/".join([str(sum(counts))] * len(counts))
    table.add_row("orthogonalizations per rank", planned_counts, naive_counts, "0")
    return table


def plot_losses(losses: dict[str, list[float]], path: Path) -> str:
    """Write the training losses as a PNG and return a message for the user."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: pip install 'muon_dtensor[plot]'"
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    for name, label in (("muon", "Muon (hidden matrices) + AdamW"), ("adamw", "AdamW only")):
        axes.plot(range(1, len(losses[name]) + 1), losses[name], label=label, linewidth=1.5)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per byte")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return f"losses plotted in {path}"


def main() -> None:
    """Entry point of a rank under torch.distributed.run."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    # the baseline's full_tensor uses several collectives, and torch warns of that at every call
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    script = load_script(settings["script"])
    sizes = {name: settings[name] for name in ("dp_replicate", "dp_shard", "tp")}
    mesh = script.make_mesh(script.Config(**sizes), "cpu")
    is_rank_0 = dist.get_rank() == 0
    console = Console(quiet=not is_rank_0)
    console.print(f"mesh {sizes} on {dist.get_world_size()} gloo processes", highlight=False)
    runs = {}
    for name in ("muon", "adamw"):
        config = script.Config(optimizer=name, steps=settings["steps"], **sizes)
        runs[name] = train_with_bar(script, config, mesh, console)
    text = script.Text(script.Config(**sizes), mesh)
    script.loss_of(runs["muon"].model, text.batch(text.train, seed=0)).backward()
    ns_dtype = script.iteration_dtype(torch.device("cpu"))
    seconds = time_steps(runs["muon"].optimizer, ns_dtype)
    if is_rank_0:
        out = Path(settings["out"])
        summary = report(settings, runs, seconds)
        (out / "demo.json").write_text(json.dumps(summary, indent=1))
        console.print(result_table(summary))
        message = plot_losses(summary["losses"], out / "losses.png")
        console.print(message, soft_wrap=True, markup=False)
        console.print(f"results written to {out / 'demo.json'}", soft_wrap=True)
    destroy_process_group()


if __name__ == "__main__":
    main()
