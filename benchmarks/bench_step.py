"""Compares an optimizer step with baselines, by layout.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 -m benchmarks.bench_step --json step.json

All steps run alternately in one process group on the same gradients. Times are medians; on a shared
machine only their ratios are meaningful. Bytes are counted at torch's collectives and on the
kernel's loopback device.
"""

import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from benchmarks.common import layered, provenance, seeded
from muon_dtensor import Muon
from muon_dtensor.algorithms import newton_schulz
from muon_dtensor.cli.baselines import naive_step
from muon_dtensor.cli.calibrate_worker import readings_in_turns
from muon_dtensor.cli.shutdown import destroy_process_group
from muon_dtensor.distributed_config.full_tensor import cut_like
from muon_dtensor.planning.report import PlanReport
from muon_dtensor.runtime import consistency, executor
from muon_dtensor.runtime.hyperparameters import MuonOptions
from muon_dtensor.runtime.torch_private import local_part
from tests.support.meter import counting, installed, peak_nbytes_of

R, S0, S1 = Replicate(), Shard(0), Shard(1)
Shape = tuple[int, ...]

LAYOUTS: dict[str, tuple[Shape, tuple[Placement, ...]]] = {
    "ddp": ((4,), (R,)),
    "fsdp": ((4,), (S0,)),
    "fsdp_uneven": ((4,), (S0,)),
    "fsdp_empty": ((4,), (S0,)),
    "tp1": ((4,), (S1,)),
    "hsdp": ((2, 2), (R, S0)),
    "fsdp_tp": ((2, 2), (S0, S1)),
    "fsdp_tp_same": ((2, 2), (S0, S0)),
    "experts": ((4,), (S0,)),
    "three_d": ((1, 2, 2), (R, S0, S1)),
    "experts_batched": ((4,), (S0,)),
}
"""Mesh shape and placements. fsdp_tp_same uses torch's ColwiseParallel and fully_shard;
experts_batched is experts with `batched=True`, which rounds differently."""

MAY_REJECT = ("torch", "muonium")
"""Baselines that may reject a layout."""

TINY = 8
"""`dim` of the matrices on which host overhead is timed."""


@dataclass(frozen=True)
class Config:
    """Options of the measurement."""

    layouts: tuple[str, ...] = tuple(LAYOUTS)
    baselines: tuple[str, ...] = ("naive", "floor", "needed")
    """naive (every rank gathers and orthogonalizes every matrix), floor (only each rank's share of
    the iteration), needed (see the function), torch (torch.optim.Muon on DTensors), muonium (if
    installed), adamw, shard_momentum (our step with this option)."""
    layers: int = 4
    dim: int = 192
    rounds: int = 9
    json: Path | None = None
    """File for the results, with versions and hardware."""
    plot: Path | None = None
    """Image file for the results."""


@dataclass(frozen=True)
class Cell:
    """Results of one layout. Bytes are means over ranks, peaks are maxima.

    `ratios` and `spreads`: our time divided by each baseline's, median and interquartile range
    over the rounds. `host_us`: maximum over ranks of the function `host_us`.
    """

    layout: str
    is_exact: bool
    work: float
    sent_nbytes: float
    planned_nbytes: float
    loopback_nbytes: float
    num_collectives: int
    peak_nbytes: int
    host_us: float
    ours_ms: float
    baselines_ms: dict[str, float]
    ratios: dict[str, float]
    spreads: dict[str, float]
    refused: dict[str, str] = field(default_factory=dict)


def shapes_of(layout: str, layers: int, d: int) -> list[Shape]:
    """Return the shapes of a layout: by default {qkv, proj, fc, out} per layer."""
    match layout:
        case "fsdp_uneven":
            return [(3 * d + 1, d), (d + 2, d), (4 * d + 3, d), (d + 1, 4 * d)] * layers
        case "fsdp_empty":
            return [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d), (3, d)] * layers
        case "experts" | "experts_batched":
            return [(8, d, d), (8, d, 2 * d)] * layers
        case _:
            return layered(layers, d)


def parameters(layout: str, shapes: list[Shape]) -> list[nn.Parameter]:
    """Return parameters on a layout; values and gradients do not depend on the layout."""
    mesh_shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("a", "b", "c")[: len(mesh_shape)])
    weights, grads = seeded(shapes, 0), seeded(shapes, 1)
    if layout == "fsdp_tp_same":
        modules = [nn.Linear(cols, rows, bias=False) for rows, cols in shapes]
        model = nn.Sequential(*modules)
        parallelize_module(model, mesh["b"], {str(i): ColwiseParallel() for i in range(len(model))})
        fully_shard(model, mesh=mesh["a"])
        params = list(model.parameters())
    else:
        params = [
            nn.Parameter(distribute_tensor(w, mesh, placements, src_data_rank=None))
            for w in weights
        ]
    for param, weight, grad in zip(params, weights, grads, strict=True):
        local_part(param.detach()).copy_(local_part(cut_like(weight, param)))
        param.grad = cut_like(grad, param)
    return params


def is_exact(layout: str, shapes: list[Shape]) -> bool:
    """Whether two steps are bitwise equal to torch.optim.Muon on full matrices."""
    params = parameters(layout, shapes)
    optimizer = Muon(params, batched=layout == "experts_batched")
    full_matrices = [[nn.Parameter(w.clone()) for w in _matrices(t)] for t in seeded(shapes, 0)]
    for matrices, grad in zip(full_matrices, seeded(shapes, 1), strict=True):
        for matrix, part in zip(matrices, _matrices(grad), strict=True):
            matrix.grad = part.clone()
    oracle = torch.optim.Muon([matrix for matrices in full_matrices for matrix in matrices])
    for _ in range(2):
        optimizer.step()
        oracle.step()
    expected = [
        torch.stack([m.detach() for m in matrices]).view(shape)
        for matrices, shape in zip(full_matrices, shapes, strict=True)
    ]
    same = all(
        torch.equal(local_part(p.detach()), local_part(cut_like(full_tensor, p)))
        for p, full_tensor in zip(params, expected, strict=True)
    )
    return bool(_reduced(float(same), dist.ReduceOp.MIN))


def _matrices(tensor: Tensor) -> list[Tensor]:
    return list(tensor.unbind()) if tensor.ndim == 3 else [tensor]


def _reduced(value: float, op: dist.ReduceOp.RedOpType) -> float:
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=op)
    return tensor.item()


def steps_of(name: str, layout: str, shapes: list[Shape], plan: PlanReport) -> Callable[[], Any]:
    """Return the step of a baseline on new parameters. Raises the errors of the baseline."""
    if name == "floor":
        share = share_of(plan)
        return lambda: [newton_schulz(matrix) for matrix in share]
    params = parameters(layout, shapes)
    if name == "needed":
        return needed(params, plan)
    if name == "naive":
        momenta = [torch.zeros_like(param, requires_grad=False) for param in params]
        return lambda: naive_step(params, momenta, lr=0.0)
    optimizer: torch.optim.Optimizer
    if name == "torch":
        optimizer = torch.optim.Muon(params, lr=0.0)
    elif name == "adamw":
        optimizer = torch.optim.AdamW(params, lr=0.0, foreach=True)
    elif name == "shard_momentum":
        optimizer = Muon(params, lr=0.0, shard_momentum=True)
    elif name == "muonium":
        from muonium import Muon as Muonium

        optimizer = Muonium(
            params, lr=0.0, orthogonalization_strategy="newton_schulz", foreach=True
        )
    else:
        raise ValueError(f"no baseline {name!r}")
    optimizer.step()
    return optimizer.step


def share_of(plan: PlanReport) -> list[Tensor]:
    """Return random matrices of the sizes that this rank owns."""
    return [
        torch.randn(matrix.rows, matrix.cols)
        for bucket in plan.buckets
        for a in bucket.assignments
        if bucket.mesh.ranks[a.owner] == dist.get_rank()
        for matrix in [plan.matrix(a)]
    ]


def needed(params: list[nn.Parameter], plan: PlanReport) -> Callable[[], Any]:
    """Return a step with only the operations that every exact step needs, on existing buffers.

    Each rank's share of the iteration, momentum, direction and cast, the plan's bytes in the same
    number of even exchanges, decay and update. It has no packing, no consistency check, no planning
    and little Python.
    """
    weights = [local_part(param.detach()) for param in params]
    grads = [local_part(param.grad) for param in params if param.grad is not None]
    momenta = [torch.zeros_like(grad) for grad in grads]
    wire = [torch.empty(grad.shape, dtype=torch.bfloat16) for grad in grads]
    share, size, rank = share_of(plan), dist.get_world_size(), dist.get_rank()
    costs = plan.traffic
    to_pack = sum(cost.pieces[cost.bucket.mesh.position_of(rank)] for cost in costs)
    num_packed = 0
    while num_packed < len(wire) and to_pack > 0:
        to_pack -= wire[num_packed].numel()
        num_packed += 1
    exchanges = []
    for cost in costs:
        for hop in cost.sequence.hops:
            numel = max(cost.sent_nbytes(hop)) // (2 * max(1, size - 1))
            exchanges.append(torch.zeros(2, size, numel, dtype=torch.bfloat16).unbind())

    def step() -> None:
        torch._foreach_lerp_(momenta, grads, 0.05)
        directions = torch._foreach_lerp(grads[:num_packed], momenta[:num_packed], 0.95)
        torch._foreach_copy_(wire[:num_packed], directions)
        for received, sent in exchanges:
            dist.all_to_all_single(received, sent)
        for matrix in share:
            newton_schulz(matrix)
        torch._foreach_mul_(weights, 1.0)
        torch._foreach_add_(weights, wire, alpha=0.0)

    return step


def sent_by(step: Callable[[], Any]) -> tuple[float, int]:
    """Return (bytes that a step sends to other ranks, mean over ranks; number of exchanges)."""
    issue = mock.Mock(wraps=executor.issue)
    with installed(), counting() as count, mock.patch.object(executor, "issue", issue):
        step()
    sent = _reduced(count.sent_nbytes, dist.ReduceOp.SUM) / dist.get_world_size()
    return sent, issue.call_count


def loopback_by(step: Callable[[], Any], repeats: int = 20) -> float:
    """Return the bytes that a step sends on the loopback device with TCP headers, rank mean."""
    counter = Path("/proc/net/dev")
    if not counter.exists():
        return float("nan")

    def sent() -> int:
        line = next(x for x in counter.read_text().splitlines() if x.strip().startswith("lo:"))
        return int(line.split(":")[1].split()[8])

    dist.barrier()
    before = sent()
    for _ in range(repeats):
        step()
    dist.barrier()
    return (sent() - before) / repeats / dist.get_world_size()


def host_us(layout: str, layers: int, repeats: int = 20) -> float:
    """Return microseconds of this thread per parameter without orthogonalization and collectives.

    The minimum over several steps on tiny matrices. Counts CPU time of the thread, not waiting.
    """
    shapes = shapes_of(layout, layers, TINY)
    params = parameters(layout, shapes)
    optimizer = Muon(params, lr=1e-3, strategy="owned")
    optimizer.step()
    excluded = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def body(*args: Any, **kwargs: Any) -> Any:
            nonlocal excluded
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                excluded += time.thread_time() - start

        return body

    seconds = []
    with (
        mock.patch.object(MuonOptions, "polar_factor", timed(MuonOptions.polar_factor)),
        mock.patch.object(executor, "issue", timed(executor.issue)),
        mock.patch.object(consistency, "maximum_of_all", timed(consistency.maximum_of_all)),
    ):
        for _ in range(repeats):
            before, excluded = time.thread_time(), 0.0
            optimizer.step()
            seconds.append(time.thread_time() - before - excluded)
    return 1e6 * min(seconds) / len(params)


def measure(layout: str, config: Config) -> Cell:
    """Measure one row of the table, on all ranks."""
    shapes = shapes_of(layout, config.layers, config.dim)
    params = parameters(layout, shapes)
    optimizer = Muon(params, lr=0.0, batched=layout == "experts_batched")
    optimizer.step()
    bodies: dict[str, Callable[[], Any]] = {"ours": optimizer.step}
    refused: dict[str, str] = {}
    for name in config.baselines:
        if name == "muonium" and importlib.util.find_spec("muonium") is None:
            refused[name] = "not installed"
            continue
        try:
            bodies[name] = steps_of(name, layout, shapes, optimizer.plan)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            if name not in MAY_REJECT:
                raise
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
    readings = readings_in_turns(bodies, torch.device("cpu"), config.rounds)
    step_seconds = readings["ours"]
    ratios = {
        name: [a / b for a, b in zip(step_seconds, baseline_seconds, strict=True)]
        for name, baseline_seconds in readings.items()
        if name != "ours"
    }
    cost = optimizer.plan.cost
    sent_nbytes, num_collectives = sent_by(optimizer.step)
    return Cell(
        layout=layout,
        is_exact=is_exact(layout, shapes),
        work=cost.imbalance,
        sent_nbytes=sent_nbytes,
        planned_nbytes=cost.total_nbytes / len(cost.ranks),
        loopback_nbytes=loopback_by(optimizer.step),
        num_collectives=num_collectives,
        peak_nbytes=int(_reduced(peak_nbytes_of(optimizer), dist.ReduceOp.MAX)),
        host_us=_reduced(host_us(layout, config.layers), dist.ReduceOp.MAX),
        ours_ms=1e3 * statistics.median(step_seconds),
        baselines_ms={n: 1e3 * statistics.median(v) for n, v in readings.items() if n != "ours"},
        ratios={name: statistics.median(values) for name, values in ratios.items()},
        spreads={name: _spread(values) for name, values in ratios.items()},
        refused=refused,
    )


def _spread(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


def show(cells: list[Cell], config: Config) -> None:
    """Print the table, and the layouts that baselines rejected."""
    table = Table(title=f"{config.layers} layers, d = {config.dim}, {dist.get_world_size()} ranks")
    columns = ("layout", "exact", "work", "MB sent", "planned", "on lo", "exchanges", "peak MB")
    for column in (*columns, "host us", "ours ms", *(f"x {name}" for name in config.baselines)):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for c in cells:
        table.add_row(
            c.layout,
            "yes" if c.is_exact else "NO",
            f"{c.work:.2f}",
            *(f"{n / 1e6:.2f}" for n in (c.sent_nbytes, c.planned_nbytes, c.loopback_nbytes)),
            str(c.num_collectives),
            f"{c.peak_nbytes / 1e6:.2f}",
            f"{c.host_us:.0f}",
            f"{c.ours_ms:.1f}",
            *(
                f"{c.ratios[name]:.3f} +-{c.spreads[name] / 2:.3f}" if name in c.ratios else "-"
                for name in config.baselines
            ),
        )
    Console(width=120 + 16 * len(config.baselines)).print(table)
    for c in cells:
        for name, reason in c.refused.items():
            print(f"{c.layout}, {name}: {reason}")


def draw(cells: list[Cell], path: Path) -> None:
    """Plot our time divided by each baseline's, by layout."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [n for n in dict.fromkeys(n for c in cells for n in c.ratios) if n != "adamw"]
    figure, axes = pyplot.subplots(figsize=(11, 4), layout="constrained")
    width = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        bars = [(position, c) for position, c in enumerate(cells) if name in c.ratios]
        axes.bar(
            [position + index * width for position, _ in bars],
            [c.ratios[name] for _, c in bars],
            width,
            yerr=[c.spreads[name] / 2 for _, c in bars],
            label=f"over {name}",
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks([p + 0.4 - width / 2 for p in range(len(cells))], [c.layout for c in cells])
    axes.set_ylabel("time of our step, relative")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Measure all layouts; rank 0 prints a table and writes the files of `--json` and `--plot`."""
    config = tyro.cli(Config, description=__doc__)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cells = [measure(name, config) for name in config.layouts]
    if dist.get_rank() == 0:
        show(cells, config)
        if config.json:
            environment = {**provenance(), "num_ranks": dist.get_world_size()}
            work = {"layers": config.layers, "dim": config.dim, "rounds": config.rounds}
            report = {**environment, **work, "cells": [asdict(cell) for cell in cells]}
            config.json.write_text(json.dumps(report, indent=1) + "\n")
        if config.plot:
            draw(cells, config.plot)
    dist.barrier()
    destroy_process_group()


if __name__ == "__main__":
    main()
