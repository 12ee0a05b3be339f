"""Compares predicted with measured bytes, flops, peak memory and time of steps.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 -m benchmarks.predicted_vs_measured

Calibrates in the same process group first, unless `--topology` is given. A cell is a layout, a
model and a strategy. The strategies of one layout and model are timed alternately.
"""

import json
import statistics
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from benchmarks.common import provenance, seeded
from muon_dtensor import Muon
from muon_dtensor.cli.calibrate_worker import measured_topology, median_seconds
from muon_dtensor.cli.shutdown import destroy_process_group
from muon_dtensor.planning.presets import topology_of
from muon_dtensor.planning.topology import Topology
from tests.support.meter import counting, counting_flops, installed, peak_nbytes_of

R, S0, S1 = Replicate(), Shard(0), Shard(1)
LAYOUTS: dict[str, tuple[tuple[Placement, ...], bool]] = {
    "fsdp": ((S0,), False),
    "ddp": ((R,), False),
    "hsdp": ((R, S0), True),
    "fsdp_tp": ((S0, S1), True),
}
"""Placements, and whether the mesh is [2, num_ranks / 2] instead of 1-D."""

MODELS: dict[str, list[tuple[int, int]]] = {
    "64 of 48": [(48, 48)] * 64,
    "8 of 97": [(97, 61), (61, 97)] * 4,
    "2 layers of 192": [(576, 192), (192, 192), (768, 192), (192, 768)] * 2,
    "1 layer of 512": [(1536, 512), (512, 512), (2048, 512), (512, 2048)],
    "1 of 1024 x 4096": [(1024, 4096)],
}
LARGEST = {"1 of 1024 x 8192": [(1024, 8192)], "1 of 2048 x 8192": [(2048, 8192)]}
"""Models that are slow in float32."""


@dataclass(frozen=True)
class Config:
    """Options of the measurement."""

    layouts: tuple[str, ...] = tuple(LAYOUTS)
    models: tuple[str, ...] = ()
    """Default: all except the largest."""
    strategies: tuple[str, ...] = ("owned", "owned_staged")
    """auto: the planner chooses; distributed: of the models with fewer matrices than ranks."""
    ns_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    rounds: int = 9
    topology: str = ""
    """A preset or a file; default: calibrate this machine."""
    json: Path | None = None
    """File for the results, with versions and hardware."""


@dataclass(frozen=True)
class Cell:
    """A layout, model and strategy. Bytes and flops are sums, peaks are maxima over ranks."""

    layout: str
    model: str
    strategy: str
    chosen: str
    sent_nbytes: int
    planned_sent_nbytes: int
    flops: int
    planned_flops: int
    peak_nbytes: int
    planned_peak_nbytes: int
    seconds: float
    predicted_seconds: float

    @property
    def error(self) -> float:
        """Return the relative error of the predicted time."""
        return self.predicted_seconds / self.seconds - 1


def reduced(value: int, op: dist.ReduceOp.RedOpType) -> int:
    """Return the reduction of a value over all ranks."""
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, op=op)
    return int(tensor)


def optimizer_of(
    layout: str, model: str, strategy: str, config: Config, topology: Topology
) -> Muon:
    """Return an optimizer whose parameters have gradients."""
    shapes = {**MODELS, **LARGEST}[model]
    placements, is_2d = LAYOUTS[layout]
    size = dist.get_world_size()
    mesh_shape = (2, size // 2) if is_2d else (size,)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("a", "b")[: len(mesh_shape)])

    def spread(full: Tensor) -> Tensor:
        return distribute_tensor(full, mesh, placements, src_data_rank=None)

    params = [nn.Parameter(spread(weight)) for weight in seeded(shapes, 0)]
    for param, grad in zip(params, seeded(shapes, 1), strict=True):
        param.grad = spread(grad)
    return Muon(
        params,
        ns_dtype=getattr(torch, config.ns_dtype),
        strategy=strategy,
        exact=strategy != "distributed",
        topology=topology,
    )


def counted(optimizer: Muon) -> tuple[int, int, int]:
    """Return (bytes sent, flops, peak bytes of live storages) of a step on this rank."""
    with installed(), counting() as count, counting_flops():
        optimizer.step()
    return count.sent_nbytes, count.flops, peak_nbytes_of(optimizer)


def measure(layout: str, model: str, config: Config, topology: Topology) -> list[Cell]:
    """Measure the cells of one layout and model, on all ranks."""
    optimizers: dict[str, Muon] = {}
    for name in config.strategies:
        optimizer = optimizer_of(layout, model, name, config, topology)
        # with one mesh dim there is no second stage
        if name != "owned_staged" or len(optimizer.plan.buckets[0].unshard) > 1:
            optimizers[name] = optimizer
    counts = {name: counted(optimizer) for name, optimizer in optimizers.items()}
    steps = {name: optimizer.step for name, optimizer in optimizers.items()}
    seconds = median_seconds(steps, torch.device("cpu"), config.rounds)
    cells = []
    for name, optimizer in optimizers.items():
        sent, flops, peak = counts[name]
        cost = optimizer.plan.cost
        cells.append(
            Cell(
                layout,
                model,
                name,
                ", ".join(sorted({b.strategy.kind for b in optimizer.plan.buckets})),
                reduced(sent, dist.ReduceOp.SUM),
                sum(cost.sent_nbytes),
                reduced(flops, dist.ReduceOp.SUM),
                sum(cost.flops),
                reduced(peak, dist.ReduceOp.MAX),
                max(cost.peak_nbytes),
                seconds[name],
                optimizer.plan.prediction.seconds,
            )
        )
    return cells


def pairs(cells: list[Cell], ratio: float = 1.3) -> list[tuple[Cell, Cell]]:
    """Return (faster, slower) strategies of one layout and model whose times differ by `ratio`."""
    result = []
    for cell, other in combinations(cells, 2):
        fast, slow = sorted((cell, other), key=lambda c: c.seconds)
        same = (cell.layout, cell.model) == (other.layout, other.model)
        if same and slow.seconds >= ratio * fast.seconds:
            result.append((fast, slow))
    return result


def show(cells: list[Cell]) -> dict[str, float]:
    """Print the table and a summary; return the summary."""
    table = Table(title=f"predicted / measured on {dist.get_world_size()} gloo ranks")
    for name in ("layout", "model", "strategy"):
        table.add_column(name)
    for name in ("MB sent", "bytes", "flops", "peak", "measured ms", "predicted ms", "error"):
        table.add_column(name, justify="right")
    for cell in cells:
        table.add_row(
            cell.layout,
            cell.model,
            cell.strategy if cell.strategy != "auto" else f"auto: {cell.chosen}",
            f"{cell.sent_nbytes / 1e6:.3f}",
            f"{cell.planned_sent_nbytes / max(1, cell.sent_nbytes):.4f}",
            f"{cell.planned_flops / max(1, cell.flops):.4f}",
            f"{cell.planned_peak_nbytes / cell.peak_nbytes:.3f}",
            f"{1e3 * cell.seconds:.2f}",
            f"{1e3 * cell.predicted_seconds:.2f}",
            f"{cell.error:+.0%}",
        )
    Console(width=130).print(table, markup=False)
    compared = pairs(cells)
    num_correct = sum(fast.predicted_seconds < slow.predicted_seconds for fast, slow in compared)
    summary = {
        "cells": len(cells),
        "median_absolute_error": statistics.median(abs(cell.error) for cell in cells),
        "pairs": len(compared),
        "pairs_in_order": num_correct / max(1, len(compared)),
        "bytes_exact": sum(c.sent_nbytes == c.planned_sent_nbytes for c in cells),
        "flops_exact": sum(c.flops == c.planned_flops for c in cells),
        "largest_peak_error": max(abs(c.planned_peak_nbytes / c.peak_nbytes - 1) for c in cells),
    }
    for name, value in summary.items():
        print(f"{name.replace('_', ' ')}: {value:.3g}")
    return summary


def main() -> None:
    """Calibrate and measure on all ranks; rank 0 prints and writes."""
    config = tyro.cli(Config, description=__doc__)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    topology = (
        topology_of(config.topology)
        if config.topology
        else measured_topology("measured", torch.device("cpu"))
    )
    cells = [
        cell
        for layout in config.layouts
        for model in config.models or MODELS
        for cell in measure(layout, model, config, topology)
    ]
    if dist.get_rank() == 0:
        summary = show(cells)
        if config.json:
            environment = {
                **provenance(),
                "ranks": dist.get_world_size(),
                "ns_dtype": config.ns_dtype,
            }
            report = {
                **environment,
                **summary,
                "topology": topology.as_values(),
                "table": [{**asdict(c), "error": c.error} for c in cells],
            }
            config.json.write_text(json.dumps(report, indent=1) + "\n")
    dist.barrier()
    destroy_process_group()


if __name__ == "__main__":
    main()
