"""Plots a plan: timeline of the busiest ranks, load per rank, bytes sent per mesh dims.

Draws the results of `simulate` and `cost`.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from muon_dtensor.planning.plan import Phase
from muon_dtensor.planning.render import dims_text, duration, quantity
from muon_dtensor.planning.report import PlanReport
from muon_dtensor.planning.simulate import simulate

MAX_RANKS = 6
"""Largest number of ranks in the timeline."""
COLORS = {
    Phase.UNSHARD: "#4c78a8",
    Phase.WAIT: "#9ecae9",
    Phase.ORTHOGONALIZE: "#e45756",
    Phase.RESHARD: "#72b7b2",
    Phase.PASS_ON: "#b2dbd5",
    Phase.APPLY: "#f2b949",
}
LABELS = {Phase.APPLY: "apply, with later hops", Phase.WAIT: "wait, with later hops"}


def plot_plan(report: PlanReport, path: Path) -> None:
    """Write the plot in the format of the path's suffix.

    Raises ValueError if the plan has no matrices, matplotlib is missing or does not support the
    suffix.
    """
    if not report.buckets:
        raise ValueError("the plan has no matrices: nothing to plot")
    if not path.suffix or path.is_dir():
        raise ValueError(f"--plot takes a file with a suffix such as .png, got {str(path)!r}")
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'muon_dtensor[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(11, 7), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(3, 2))
    top, bottom = parts
    _timeline(report, top.subplots())
    load, sent = bottom.subplots(1, 2)
    _load(report, load)
    _sent(report, sent)
    figure.suptitle(
        f"{report.cost.num_matrices} matrices on {', '.join(map(str, report.meshes))}: "
        f"{duration(report.prediction.seconds)} a step on {report.options.topology.name}"
    )
    try:
        figure.savefig(path, dpi=120)
    except RuntimeError as error:  # a format whose backend is not installed
        raise ValueError(f"cannot write {path}: {error}") from error
    finally:
        pyplot.close(figure)


def plotted_ranks(report: PlanReport) -> list[int]:
    """Return evenly spaced ranks of all ranks sorted by FLOP, busiest first."""
    cost = report.cost
    order = sorted(range(len(cost.ranks)), key=lambda index: (-cost.flops[index], index))
    count = min(MAX_RANKS, len(order))
    indices = [round(i * (len(order) - 1) / max(1, count - 1)) for i in range(count)]
    return [cost.ranks[order[index]] for index in indices]


def _timeline(report: PlanReport, axes: Any) -> None:
    ranks = plotted_ranks(report)
    rows = {
        (rank, lane): 3 * index + offset
        for index, rank in enumerate(ranks)
        for offset, lane in enumerate(("exchange", "compute"))
    }
    labelled: set[Phase] = set()
    for span in simulate(report.plan, report.traffic, watch=ranks).spans:
        phase = span.action.phase
        axes.barh(
            rows[span.rank, span.lane],
            1e3 * (span.stop - span.start),
            left=1e3 * span.start,
            height=0.85,
            color=COLORS[phase],
            edgecolor="white",
            linewidth=0.3,
            label=None if phase in labelled else LABELS.get(phase, phase.name.lower()),
        )
        labelled.add(phase)
    axes.set_yticks(list(rows.values()), [f"rank {rank}  {lane}" for rank, lane in rows])
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1e3 * report.prediction.seconds)
    axes.set_xlabel("ms from the beginning of the step")
    axes.set_title("timeline of exchange and compute", fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=5, fontsize=8, frameon=False)


def _load(report: PlanReport, axes: Any) -> None:
    factor, unit = (1e12, "TFLOP") if max(report.cost.flops) >= 1e13 else (1e9, "GFLOP")
    loads = [flops / factor for flops in sorted(report.cost.flops, reverse=True)]
    mean = sum(loads) / len(loads)
    axes.fill_between(range(len(loads) + 1), [*loads, loads[-1]], step="post", color="#e45756")
    axes.axhline(mean, color="black", linewidth=0.8, linestyle="--")
    axes.annotate(f"mean {mean:.3g}", (0, mean), ha="left", va="bottom", fontsize=8)
    axes.set_xlim(0, len(loads))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("ranks, busiest first")
    axes.set_ylabel(unit)
    axes.set_title("load per rank", fontsize=10)


def _sent(report: PlanReport, axes: Any) -> None:
    nbytes: dict[str, int] = defaultdict(int)
    for cost in report.cost.buckets:
        for hop in cost.sequence.hops:
            nbytes[dims_text(cost.bucket, hop.collective.mesh_dims)] += sum(cost.sent_nbytes(hop))
    names = sorted(nbytes, key=nbytes.__getitem__)
    values = [nbytes[name] / 1e9 for name in names]
    bars = axes.barh(names, values, color="#4c78a8", height=0.6)
    axes.bar_label(bars, [quantity(nbytes[name], "B") for name in names], padding=3, fontsize=8)
    axes.set_xlim(0, 1.25 * max(values, default=0) or 1)
    axes.set_xlabel("GB sent by all ranks")
    axes.set_title("bytes per mesh dims" if names else "nothing is sent", fontsize=10)
