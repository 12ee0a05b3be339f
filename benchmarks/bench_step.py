"""One optimizer step, ours against everyone-gathers and the floor, layout by layout.

    torchrun --nproc-per-node 4 -m benchmarks.bench_step --json benchmarks/results/step.json

All run in one process group, in turns, on the same gradients; times are medians and only their
ratios mean anything on a shared machine. Bytes are counted where they are handed to torch.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from benchmarks.common import provenance, seeded
from muon_dtensor import Muon
from muon_dtensor.cli.baselines import everyone_gathers
from muon_dtensor.cli.calibrate_worker import median_seconds
from muon_dtensor.cli.leaving import leave
from muon_dtensor.orthogonalize import newton_schulz

R, S0, S1 = Replicate(), Shard(0), Shard(1)
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "ddp": ((4,), (R,)),
    "fsdp": ((4,), (S0,)),
    "tp1": ((4,), (S1,)),
    "hsdp": ((2, 2), (R, S0)),
    "fsdp_tp": ((2, 2), (S0, S1)),
    "fsdp_tp_same": ((2, 2), (S0, S0)),
}


@dataclass(frozen=True)
class Config:
    """What to measure."""

    layouts: tuple[str, ...] = tuple(LAYOUTS)
    layers: int = 4
    dim: int = 192
    rounds: int = 9
    json: Path | None = None
    """Where to write the figures, with versions and hardware."""


@dataclass(frozen=True)
class Cell:
    """One layout. `relative_to_naive`: time over everyone-gathers; bytes are means over ranks."""

    layout: str
    is_exact: bool
    work: float
    sent_nbytes: float
    planned_nbytes: float
    naive_ms: float
    floor_ms: float
    ours_ms: float
    relative_to_naive: float
    relative_to_floor: float


def shapes_of(config: Config) -> list[tuple[int, int]]:
    """The anchors' workload: {qkv, proj, fc, out} per layer."""
    d = config.dim
    return [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)] * config.layers


def sent_by(step: Callable[[], Any]) -> float:
    """Bytes that a step hands to exchanges for other ranks, mean over ranks."""
    sent = 0
    original = dist.all_to_all_single

    def counted(
        recv: Tensor, send: Tensor, there: list[int], here: list[int], **kwargs: Any
    ) -> Any:
        nonlocal sent
        own = here[dist.get_rank(kwargs["group"])]
        sent += (sum(here) - own) * send.element_size()
        return original(recv, send, there, here, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", counted):
        step()
    total = torch.tensor(float(sent))
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def measure(name: str, config: Config) -> Cell:
    """One row of the table, on all ranks."""
    mesh_shape, placements = LAYOUTS[name]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=tuple("ab"[: len(mesh_shape)]))
    shapes = shapes_of(config)

    def spread(full: Tensor) -> Tensor:
        return distribute_tensor(full, mesh, placements, src_data_rank=None)

    weights, grads = seeded(shapes, 0), seeded(shapes, 1)
    params = [nn.Parameter(spread(weight)) for weight in weights]
    for param, grad in zip(params, grads, strict=True):
        param.grad = spread(grad)
    optimizer = Muon(params)
    oracle_params = [nn.Parameter(weight) for weight in weights]
    for param, grad in zip(oracle_params, grads, strict=True):
        param.grad = grad
    oracle = torch.optim.Muon(oracle_params)
    for _ in range(2):
        optimizer.step()
        oracle.step()
    exact = all(
        torch.equal(ours.to_local(), spread(theirs.detach()).to_local())
        for ours, theirs in zip(params, oracle_params, strict=True)
    )
    momenta = [torch.zeros_like(param, requires_grad=False) for param in params]
    share = [
        torch.randn(plan_shape)
        for bucket in optimizer.plan.buckets
        for a in bucket.assignments
        if bucket.mesh.ranks[a.owner] == dist.get_rank()
        for plan_shape in [optimizer.plan.matrix(a).region.shape]
    ]
    seconds = median_seconds(
        {
            "ours": optimizer.step,
            "naive": lambda: everyone_gathers(params, momenta, lr=0.0),
            "floor": lambda: [newton_schulz(matrix) for matrix in share],
        },
        torch.device("cpu"),
        config.rounds,
    )
    ms = {name: 1e3 * value for name, value in seconds.items()}
    cost = optimizer.plan.cost
    return Cell(
        layout=name,
        is_exact=exact,
        work=cost.imbalance,
        sent_nbytes=sent_by(optimizer.step),
        planned_nbytes=cost.total_nbytes / len(cost.ranks),
        naive_ms=ms["naive"],
        floor_ms=ms["floor"],
        ours_ms=ms["ours"],
        relative_to_naive=ms["ours"] / ms["naive"],
        relative_to_floor=ms["ours"] / ms["floor"],
    )


def main() -> None:
    """Measure all layouts; rank 0 prints, and writes if asked to."""
    config = tyro.cli(Config, description=__doc__)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cells = [measure(name, config) for name in config.layouts]
    if dist.get_rank() == 0:
        table = Table(title=f"{config.layers} layers, d = {config.dim}, 4 gloo ranks")
        for column in ("layout", "exact", "work", "MB sent", "planned", "x naive", "x floor"):
            table.add_column(column, justify="right")
        for c in cells:
            sent, planned = c.sent_nbytes / 1e6, c.planned_nbytes / 1e6
            ratios = f"{c.relative_to_naive:.3f}", f"{c.relative_to_floor:.2f}"
            table.add_row(
                c.layout, str(c.is_exact), f"{c.work:.2f}", f"{sent:.2f}", f"{planned:.2f}", *ratios
            )
        Console(width=90).print(table)
        if config.json:
            where = {
                **provenance(),
                "num_ranks": dist.get_world_size(),
                "layers": config.layers,
                "dim": config.dim,
            }
            figures = {**where, "cells": [asdict(cell) for cell in cells]}
            config.json.write_text(json.dumps(figures, indent=1) + "\n")
    leave()


if __name__ == "__main__":
    main()
