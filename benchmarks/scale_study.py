"""Predicts strong and weak scaling of published models on 8 to 16,384 GPUs.

    python -m benchmarks.scale_study --json benchmarks/results/scale.json

Needs no GPU and no process group: every value is a prediction of the cost model on a topology
preset. Strong scaling: a model on a growing number of ranks. Weak scaling: one layer of llama3-70b
per eight ranks.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.common import commit
from muon_dtensor.cli.baseline_costs import method_cost
from muon_dtensor.cli.models import MODELS, specs_of
from muon_dtensor.planning.plan import ParamSpec, Phase, PlanOptions
from muon_dtensor.planning.presets import PRESETS
from muon_dtensor.planning.report import PlanReport, plan_report
from muon_dtensor.planning.simulate import simulate

RANKS = (8, 32, 128, 512, 2048, 8192, 16384)
WEAK = "llama3-70b, a layer for 8 ranks"
WITH_TP = ("llama3-70b", "llama3-405b", WEAK)
WITH_EP = ("deepseek-v3", "kimi-k2")
MAX_SHARDS = 256
"""Maximum size of dp_shard; further ranks are replicas."""


@dataclass(frozen=True)
class Row:
    """Predictions for a model on a number of ranks.

    `seconds` of a step; `orthogonalize_seconds`, `elementwise_seconds` and `exposed_seconds` of the
    busiest rank. `float32_seconds`: with the iteration in float32. `one_replica_seconds`: if every
    replica repeats the work. `in_teams_seconds`: with exact=False.
    """

    model: str
    ranks: int
    mesh: str
    matrices: int
    seconds: float
    orthogonalize_seconds: float
    elementwise_seconds: float
    exposed_seconds: float
    imbalance: float
    sent_nbytes: int
    peak_nbytes: int
    strategies: str
    one_replica_seconds: float
    float32_seconds: float
    in_teams_seconds: float


def mesh_of(model: str, ranks: int) -> dict[str, int]:
    """Return the mesh sizes of a row: innermost tp (8), then shards, then replicas.

    ep (up to 64) is a part of the shards.
    """
    inner = {}
    if model in WITH_TP and ranks >= 64:
        inner = {"tp": 8}
    num_data_ranks = ranks // prod(inner.values())
    shards = min(num_data_ranks, MAX_SHARDS)
    if model in WITH_EP:
        inner = {"ep": min(64, shards)}
    return {"dp_replicate": num_data_ranks // shards, "dp_shard": shards, **inner}


def specs(model: str, ranks: int) -> list[ParamSpec]:
    """Return the parameters of a row."""
    mesh = mesh_of(model, ranks)
    if model != WEAK:
        return specs_of(model, mesh)
    layer = [s for s in specs_of("llama3-70b", mesh) if s.fqn.startswith("layers.0.")]
    return [
        replace(spec, fqn=spec.fqn.replace(".0.", f".{index}.", 1))
        for index in range(ranks // 8)
        for spec in layer
    ]


def lanes(plan: PlanReport) -> tuple[float, float]:
    """Return (orthogonalize, elementwise) seconds of the busiest rank's compute lane."""
    cost = plan.cost
    busiest = cost.ranks[max(range(len(cost.ranks)), key=cost.flops.__getitem__)]
    seconds_by_phase = dict.fromkeys(Phase, 0.0)
    for span in simulate(plan.plan, plan.traffic, watch=(busiest,)).spans:
        if span.lane == "compute":
            seconds_by_phase[span.action.phase] += span.stop - span.start
    orthogonalize = seconds_by_phase.pop(Phase.ORTHOGONALIZE)
    return orthogonalize, sum(seconds_by_phase.values())


def row(job: tuple[str, int, str]) -> Row:
    """Plan a (model, number of ranks, topology preset)."""
    gc.disable()  # a plan has no cycles
    model, ranks, topology = job
    options = PlanOptions(topology=PRESETS[topology], batched=True)
    params = specs(model, ranks)
    plan = plan_report(params, options)
    float32_params = [replace(spec, wire_dtype="float32") for spec in params]
    float32 = plan_report(float32_params, options)
    in_teams = plan_report(params, replace(options, exact=False))
    orthogonalize, elementwise = lanes(plan)
    cost, seconds = plan.cost, plan.prediction.seconds
    kinds = {bucket.strategy.kind for bucket in plan.buckets}
    return Row(
        model=model,
        ranks=ranks,
        mesh=", ".join(f"{name}={size}" for name, size in mesh_of(model, ranks).items()),
        matrices=cost.num_matrices,
        seconds=seconds,
        orthogonalize_seconds=orthogonalize,
        elementwise_seconds=elementwise,
        exposed_seconds=seconds - orthogonalize - elementwise,
        imbalance=cost.imbalance,
        sent_nbytes=max(cost.sent_nbytes),
        peak_nbytes=max(cost.peak_nbytes),
        strategies=", ".join(sorted(kinds)),
        one_replica_seconds=method_cost("1d-owner", params, options).seconds,
        float32_seconds=float32.prediction.seconds,
        in_teams_seconds=in_teams.prediction.seconds,
    )


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a table for each model."""
    head = (
        f"{'ranks':>6} {'step ms':>9} {'matmul':>9} {'pointwise':>9} {'exposed':>9} {'slowest':>8} "
        f"{'MB sent':>9} {'peak GB':>8} {'replicas repeat':>15} {'float32':>9} "
        f"{'in teams':>9}"
    )
    for model in dict.fromkeys(r.model for r in rows):
        model_rows = [r for r in rows if r.model == model]
        yield f"\n{model}: {model_rows[-1].matrices} matrices in the last row"
        yield head
        for r in model_rows:
            yield (
                f"{r.ranks:>6} {1e3 * r.seconds:>9.1f} {1e3 * r.orthogonalize_seconds:>9.1f} "
                f"{1e3 * r.elementwise_seconds:>9.1f} {1e3 * r.exposed_seconds:>9.1f} "
                f"{r.imbalance:>7.2f}x {r.sent_nbytes / 1e6:>9.1f} {r.peak_nbytes / 1e9:>8.2f} "
                f"{1e3 * r.one_replica_seconds:>15.1f} "
                f"{1e3 * r.float32_seconds:>9.1f} {1e3 * r.in_teams_seconds:>9.1f}"
            )


def draw(rows: Sequence[Row], topology: str, path: Path) -> None:
    """Plot the step time over ranks, divided into compute, elementwise and exposed time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(r.model for r in rows))
    figure, grid = pyplot.subplots(2, -(-len(models) // 2), figsize=(15, 7.5), layout="constrained")
    axes_of: list[Any] = list(grid.flat)
    for model, axes in zip(models, axes_of, strict=False):
        model_rows = [r for r in rows if r.model == model]
        positions, bottom = range(len(model_rows)), [0.0] * len(model_rows)
        for name, color in (
            ("orthogonalize", "#e45756"),
            ("elementwise", "#f2b949"),
            ("exposed", "#4c78a8"),
        ):
            values = [1e3 * getattr(r, f"{name}_seconds") for r in model_rows]
            label = "exposed exchanges, waiting, host" if name == "exposed" else name
            axes.bar(positions, values, bottom=bottom, color=color, label=label)
            bottom = [a + b for a, b in zip(bottom, values, strict=True)]
        repeat = [1e3 * r.one_replica_seconds for r in model_rows]
        label = "if every replica repeats the work"
        axes.plot(positions, repeat, "k.--", linewidth=0.8, label=label)
        axes.set_xticks(positions, [f"{r.ranks}" for r in model_rows], fontsize=8)
        axes.set_title(model, fontsize=10)
        axes.set_xlabel("ranks", fontsize=8)
        axes.set_ylabel("ms a step", fontsize=8)
    for axes in axes_of[len(models) :]:
        axes.axis("off")
    handles, labels = axes_of[0].get_legend_handles_labels()
    axes_of[-1].legend(handles, labels, loc="center", frameon=False)
    figure.suptitle(f"predicted Muon step on {topology}: time of the busiest rank")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    """Plan and print all rows. With `--json` and `--plot`, also write files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[*MODELS, WEAK])
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--topology", default="h100-ib-400", choices=sorted(PRESETS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    config = parser.parse_args()
    start = time.perf_counter()
    jobs = [(model, ranks, config.topology) for model in config.models for ranks in config.ranks]
    with ProcessPoolExecutor(config.jobs) as pool:
        rows = []
        for new_row in pool.map(row, jobs):
            rows.append(new_row)
            print(f"{new_row.model} on {new_row.ranks} ranks", file=sys.stderr, flush=True)
    print("\n".join(tables(rows)))
    print(f"\n{len(rows)} rows in {time.perf_counter() - start:.0f} s")
    if config.plot:
        draw(rows, config.topology, config.plot)
    if config.json:
        report = {
            "commit": commit(),
            "topology": PRESETS[config.topology].as_values(),
            "rows": [asdict(r) for r in rows],
        }
        config.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
