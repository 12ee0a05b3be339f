"""A plan as a picture: when ranks do what, how loads are spread, what travels over which dims.

Draws what `simulate` and `cost` compute.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from muon_dtensor.planning.plan import Phase
from muon_dtensor.planning.render import dims_text, duration, quantity
from muon_dtensor.planning.report import PlanReport
from muon_dtensor.planning.simulate import simulate

MOST_LANES = 6
COLORS = {
    Phase.UNSHARD: "#4c78a8",
    Phase.WAIT: "#9ecae9",
    Phase.ORTHOGONALIZE: "#e45756",
    Phase.RESHARD: "#72b7b2",
    Phase.APPLY: "#f2b949",
}
LABELS = {Phase.APPLY: "apply, with later hops", Phase.WAIT: "wait, with later hops"}


def plot(made: PlanReport, path: Path) -> None:
    """Write the picture; its format is that of the ending of the path.

    Raises ValueError for a plan of nothing, without matplotlib, or for an ending it does not know.
    """
    if not made.buckets:
        raise ValueError("the plan has no matrices: nothing to plot")
    if not path.suffix or path.is_dir():
        raise ValueError(f"--plot takes a file with an ending such as .png, got {str(path)!r}")
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'muon_dtensor[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(11, 7), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(3, 2))
    top, bottom = parts
    _timeline(made, top.subplots())
    load, sent = bottom.subplots(1, 2)
    _load(made, load)
    _sent(made, sent)
    figure.suptitle(
        f"{made.cost.num_matrices} matrices on {', '.join(map(str, made.meshes))}: "
        f"{duration(made.prediction.seconds)} a step on {made.options.topology.name}"
    )
    try:
        figure.savefig(path, dpi=120)
    except RuntimeError as error:  # a format that needs what is not installed
        raise ValueError(f"cannot write {path}: {error}") from error
    finally:
        pyplot.close(figure)


def watched(made: PlanReport) -> list[int]:
    """Ranks worth looking at: from the one that computes most to the one that computes least."""
    cost = made.cost
    order = sorted(range(len(cost.ranks)), key=lambda index: (-cost.flops[index], index))
    count = min(MOST_LANES, len(order))
    places = [round(i * (len(order) - 1) / max(1, count - 1)) for i in range(count)]
    return [cost.ranks[order[place]] for place in places]


def _timeline(made: PlanReport, axes: Any) -> None:
    ranks = watched(made)
    rows = {
        (rank, lane): 3 * place + offset
        for place, rank in enumerate(ranks)
        for offset, lane in enumerate(("exchange", "compute"))
    }
    drawn: set[Phase] = set()
    for span in simulate(made.plan, made.traffic, watch=ranks).spans:
        phase = span.action.phase
        axes.barh(
            rows[span.rank, span.lane],
            1e3 * (span.stop - span.start),
            left=1e3 * span.start,
            height=0.85,
            color=COLORS[phase],
            edgecolor="white",
            linewidth=0.3,
            label=None if phase in drawn else LABELS.get(phase, phase.name.lower()),
        )
        drawn.add(phase)
    axes.set_yticks(list(rows.values()), [f"rank {rank}  {lane}" for rank, lane in rows])
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1e3 * made.prediction.seconds)
    axes.set_xlabel("ms from the beginning of the step")
    axes.set_title("when ranks exchange and compute", fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=5, fontsize=8, frameon=False)


def _load(made: PlanReport, axes: Any) -> None:
    factor, unit = (1e12, "TFLOP") if max(made.cost.flops) >= 1e13 else (1e9, "GFLOP")
    loads = [flops / factor for flops in sorted(made.cost.flops, reverse=True)]
    mean = sum(loads) / len(loads)
    axes.fill_between(range(len(loads) + 1), [*loads, loads[-1]], step="post", color="#e45756")
    axes.axhline(mean, color="black", linewidth=0.8, linestyle="--")
    axes.annotate(f"mean {mean:.3g}", (0, mean), ha="left", va="bottom", fontsize=8)
    axes.set_xlim(0, len(loads))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("ranks, busiest first")
    axes.set_ylabel(unit)
    axes.set_title("load per rank", fontsize=10)


def _sent(made: PlanReport, axes: Any) -> None:
    nbytes: dict[str, int] = defaultdict(int)
    for cost in made.cost.buckets:
        for hop in cost.sequence.hops:
            nbytes[dims_text(cost.bucket, hop.collective.mesh_dims)] += sum(cost.sent_nbytes(hop))
    names = sorted(nbytes, key=nbytes.__getitem__)
    values = [nbytes[name] / 1e9 for name in names]
    bars = axes.barh(names, values, color="#4c78a8", height=0.6)
    axes.bar_label(bars, [quantity(nbytes[name], "B") for name in names], padding=3, fontsize=8)
    axes.set_xlim(0, 1.25 * max(values, default=0) or 1)
    axes.set_xlabel("GB sent by all ranks")
    axes.set_title("bytes per mesh dims" if names else "nothing is sent", fontsize=10)
