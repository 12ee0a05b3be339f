"""`muon-dtensor plan`: prints the plan of a step on a cluster, without a process group or GPU."""

import difflib
import gc
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path

from muon_dtensor.cli.baseline_costs import MethodCost, method_cost
from muon_dtensor.cli.models import ACTIVE_PARAMETERS, num_ranks_of, specs_of
from muon_dtensor.cli.plan_plot import plot_plan
from muon_dtensor.cli.plan_table import print_comparison, print_plan, print_sweep
from muon_dtensor.planning.outer import (
    OuterPlan,
    WireCost,
    best_route,
    fragments_of,
    outer_params,
)
from muon_dtensor.planning.plan import ParamSpec, PlanOptions
from muon_dtensor.planning.presets import topology_of
from muon_dtensor.planning.report import PlanReport, plan_report


@contextmanager
def _without_collection() -> Iterator[None]:
    """Do not search for cycles among the millions of values of a plan, which has none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_collection()
def plan(
    model: str = "llama3-8b",
    mesh: str = "dp_shard=8",
    topology: str = "h100-ib-400",
    ranks: int | None = None,
    strategy: str = "auto",
    exact: bool = True,
    bucket_mb: float = 256,
    prefetch_count: int = 1,
    shard_momentum: bool = False,
    offload: bool = False,
    recognize: str | None = None,
    islands: int = 1,
    sync_every: int = 30,
    wire: str = "float32",
    robust: bool = False,
    fragments: int = 1,
    delay: int = 0,
    link: str | None = None,
    step_seconds: float | None = None,
    tokens: float | None = None,
    tflops: float | None = None,
    sweep: str | None = None,
    export_topology: Path | None = None,
    explain: str | None = None,
    compare: str | None = None,
    plot: Path | None = None,
    json: Path | None = None,
    diff: tuple[Path, Path] | None = None,
) -> int:
    """Print the plan of a Muon step for a model on a mesh: owners, bytes, predicted time.

    Exit status 2 if no plan can be made, 1 if the plans of --diff differ.

    Args:
        model: gpt2, llama3-8b, llama3-70b, llama3-405b, deepseek-v3, kimi-k2, gpt-oss-20b,
            gpt-oss-120b, or pkg.mod:fn. The function either takes the DeviceMesh and returns a
            model sharded over it, or takes no arguments and returns an unsharded model, which
            fully_shard then shards.
        mesh: sizes of mesh dims, outermost first: dp_replicate=16,dp_shard=64,tp=8. One size may
            be -1: it is computed from --ranks. For models by name, pp makes stages, and ep is a
            part of dp_shard x cp x tp, as in torchtitan.
        topology: a preset (h100-ib-400, h100-nvlink, h200, a100-ib-200, b200, gb200-nvl72,
            gloo-local) or a JSON file, from `muon-dtensor calibrate` or --export-topology.
        ranks: number of ranks; the sizes of the mesh must multiply to it.
        strategy: auto, or one strategy for all matrices: owned, owned_staged, distributed.
        exact: --no-exact allows several ranks to orthogonalize one matrix; rounds differently.
        bucket_mb: maximum MiB of exchange buffers per bucket and rank.
        prefetch_count: number of buckets in flight while another bucket is orthogonalized.
        shard_momentum: cut the momentum over the ranks that replicate its parameter.
        offload: the weights are on the host of each device, as by FSDP2's CPUOffloadPolicy.
        recognize: projections or heads: the matrices of a known model family, see
            `group_parameters`.
        islands: number of islands, each with its own mesh of these sizes. Above 1, also prints the
            plan of their synchronizations (the matrices of Muon only).
        sync_every: inner steps between two synchronizations; see `islands.DiLoCo`.
        wire: float32, bfloat16, float16, int8, int4, int2, or topk:RATIO.
        robust: whether the rule tolerates wrong updates: every rank then receives all of them.
        fragments: parts of the model that are synchronized in turn.
        delay: steps between sending an update and applying the result.
        link: bits per second that an island can send, such as 1gbit or 50mbit.
        step_seconds: of a training step, forward and backward included; see --tokens.
        tokens: of a batch over all ranks. With --tflops, the training step takes 6 FLOP per token
            and active parameter, and the plan says which share of it the optimizer's step is.
        tflops: model TFLOP/s that training reaches on each rank: its peak times the utilization.
        sweep: several meshes with ; between them. Prints one row per mesh instead of a plan.
        export_topology: JSON file for the topology, to edit and pass as --topology.
        explain: name of a parameter; prints its plan instead of the table.
        compare: methods to compare, separated by commas: naive,1d-owner,ours.
        plot: image file for the timeline, loads and bytes.
        json: file for the plan as JSON.
        diff: two JSON plans to compare; nothing is planned.
    """
    try:
        if diff is not None:
            return _diff(*diff)
        if compare is not None and explain is not None:
            raise ValueError("--compare and --explain exclude each other: pass one of them")
        if sweep is not None and any((explain, compare, plot, json, islands > 1)):
            raise ValueError(
                "--sweep prints a table: it excludes --explain, --compare, --plot, --json and "
                "--islands"
            )
        if not 0 < bucket_mb * 2**20 < 2**63:
            raise ValueError(f"--bucket-mb must be above 0 and finite, got {bucket_mb}")
        machine = topology_of(topology)
        options = PlanOptions(
            bucket_nbytes=max(1, int(bucket_mb * 2**20)),
            prefetch_count=prefetch_count,
            # the optimizer's default on GPUs
            batched=machine.cores is None,
            strategy=strategy,
            exact=exact,
            topology=machine,
        )
        if export_topology is not None:
            export_topology.write_text(machine.to_json())

        def report_of(mesh: str) -> PlanReport:
            sizes = sizes_of(mesh, ranks, is_by_name=":" not in model)
            report = _report(
                model, sizes, options, shard_momentum=shard_momentum, recognize=recognize
            )
            return _offloaded(report) if offload else report

        def training_seconds(report: PlanReport) -> float | None:
            return step_seconds or _training_seconds(model, report, tokens, tflops)

        if sweep is not None:
            reports = {text.strip(): report_of(text) for text in sweep.split(";")}
            print_sweep(reports, {name: training_seconds(r) for name, r in reports.items()})
            return 0
        report = report_of(mesh)
        if compare is not None:
            methods = dict.fromkeys(name.strip() for name in compare.split(","))
            baselines = {m: method_cost(m, report.params, options) for m in methods if m != "ours"}
            print_comparison({m: baselines.get(m, MethodCost.of(report)) for m in methods})
        elif explain is None:
            print_plan(report, training_seconds(report))
        elif explain in {spec.fqn for spec in report.params}:
            print(report.explain(explain))
        else:
            fqns = [spec.fqn for spec in report.params]
            similar = difflib.get_close_matches(explain, fqns, n=1)
            hint = f"; did you mean {similar[0]!r}?" if similar else ""
            raise ValueError(f"no parameter {explain!r}{hint}")
        if islands > 1:
            outer = outer_plan(
                report.params,
                islands,
                sync_every=sync_every,
                wire=wire,
                is_robust=robust,
                fragments=fragments,
                delay=delay,
            )
            bits = None if link is None else bits_per_second(link)
            print(f"\n{outer.summary(bits, step_seconds)}")
        if plot is not None:
            plot_plan(report, plot)
        if json is not None:
            json.write_text(report.to_json())
    except (ValueError, OSError, OverflowError) as error:
        print(f"muon-dtensor plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _report(
    model: str,
    sizes: Mapping[str, int],
    options: PlanOptions,
    *,
    shard_momentum: bool,
    recognize: str | None,
) -> PlanReport:
    """Return the plan of a model by name, or of the user's function."""
    if ":" not in model:
        specs = specs_of(model, sizes, shard_momentum=shard_momentum, recognize=recognize)
        return plan_report(specs, options)
    # imported here: it needs torch, which models by name do not
    from muon_dtensor.cli.user_model import plan_of_factory

    return plan_of_factory(
        model, sizes, options, shard_momentum=shard_momentum, recognize=recognize or False
    )


def _offloaded(report: PlanReport) -> PlanReport:
    """Return the plan of the same parameters, on the hosts."""
    specs = [replace(spec, is_offloaded=True) for spec in report.params]
    return plan_report(specs, report.options, None, report.adamw_numels, report.recognized)


def _training_seconds(
    model: str, report: PlanReport, tokens: float | None, tflops: float | None
) -> float | None:
    """Return the seconds of a training step of this many tokens; None without both numbers.

    6 FLOP per token and parameter that it uses: 2 forward, 4 backward (Kaplan et al. 2020,
    arXiv:2001.08361, section 2.1).
    """
    if tokens is None and tflops is None:
        return None
    if tokens is None or tflops is None or tokens <= 0 or tflops <= 0:
        raise ValueError(
            f"--tokens and --tflops are above 0 and given together, got {tokens}, {tflops}"
        )
    total = sum(matrix.numel for spec in report.params for matrix in spec.matrices)
    active = ACTIVE_PARAMETERS.get(model, total)
    return 6 * active * tokens / (len(report.cost.ranks) * tflops * 1e12)


def outer_plan(
    specs: Sequence[ParamSpec],
    islands: int,
    *,
    sync_every: int,
    wire: str,
    is_robust: bool,
    fragments: int,
    delay: int,
) -> OuterPlan:
    """Return the plan of the synchronizations of some islands. Raises ValueError."""
    if sync_every < 1 or not 1 <= fragments <= sync_every or not 0 <= delay < sync_every:
        raise ValueError(
            f"--sync-every is 1 or more, --fragments 1 to it, --delay below it; got {sync_every}, "
            f"{fragments}, {delay}"
        )
    cost = WireCost.of(wire)
    return OuterPlan(
        outer_params([(spec.fqn, spec.layout) for spec in specs]),
        islands,
        fragments_of([spec.fqn for spec in specs], fragments),
        sync_every,
        delay,
        cost,
        best_route(cost, islands, can_spread=not is_robust),
        "a robust rule" if is_robust else "mean",
        copies=3 if wire != "float32" else 2,
    )


def bits_per_second(text: str) -> float:
    """Return the number in a text such as `1gbit` or `50 Mbit/s`. Raises ValueError."""
    match = re.fullmatch(r"([0-9.]+)\s*([kmgt]?)bit(/s|ps)?", text.strip().lower())
    factors = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
    try:
        value = float(match[1]) * factors[match[2]] if match else 0.0
    except ValueError:
        value = 0.0
    if value <= 0:
        raise ValueError(f"--link is a number above 0 with its unit, as in 1gbit; got {text!r}")
    return value


def sizes_of(text: str, ranks: int | None = None, *, is_by_name: bool = True) -> dict[str, int]:
    """Return the mesh sizes in a text such as `dp_shard=8,tp=2`.

    A size of -1 becomes `ranks` divided by the other sizes. For models by name, `ep` is a part of
    the others. Raises ValueError.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        is_size = size == "-1" or (size.isdecimal() and int(size) > 0)
        if not (name.isidentifier() and is_size) or name in sizes:
            raise ValueError(f"--mesh is dim=size,dim=size with sizes of 1 or more, got {text!r}")
        sizes[name] = int(size)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or (free and ranks is None):
        raise ValueError(f"one size of --mesh may be -1, and then --ranks is needed, got {text!r}")
    num_ranks = num_ranks_of if is_by_name else _product
    given_product = num_ranks({name: size for name, size in sizes.items() if size > 0})
    for name in free:
        sizes[name] = max(1, (ranks or 0) // given_product)
    count = num_ranks(sizes)
    if ranks is not None and count != ranks:
        raise ValueError(f"{ranks} ranks do not make a mesh {text}: its sizes multiply to {count}")
    if count > MAX_RANKS:
        raise ValueError(f"{text} has {count} ranks; plans are made for up to {MAX_RANKS}")
    return sizes


def _product(sizes: Mapping[str, int]) -> int:
    return prod(sizes.values())


MAX_RANKS = 1 << 17


def _diff(first: Path, second: Path) -> int:
    """Print the differences between two plans. Returns 0 if they are equal, else 1."""
    before, after = (
        [report.headline(), *str(report).splitlines()]
        for report in (PlanReport.from_json(path.read_text()) for path in (first, second))
    )
    lines = list(difflib.unified_diff(before, after, str(first), str(second), lineterm="", n=1))
    print("\n".join(lines) or "the plans are equal")
    return 1 if lines else 0
