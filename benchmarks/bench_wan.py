"""Trains on islands with a slow link between them: gradients in every step against DiLoCo.

    sudo python -m benchmarks.bench_wan --rate 10mbit --json wan.json

Each island is a network namespace with one rank, whose link has a limited rate. Needs root and
iproute2; without them it prints the reason and measures nothing. The model predicts characters of
Python's documentation.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from benchmarks.common import provenance
from benchmarks.namespaces import launch, sent_nbytes
from muon_dtensor import Muon, create_dtensor_config
from muon_dtensor.cli.shutdown import destroy_process_group
from muon_dtensor.islands import DiLoCo
from tests.support import text_islands
from tests.support.text_islands import Model, batch, tokens


@dataclass(frozen=True)
class Config:
    """Options of the measurement."""

    rate: str = "10mbit"
    """Rate of each island's link, in tc's notation."""
    islands: int = 2
    hidden: int = 384
    """Width of the model's hidden layers."""
    sync_every: int = 30
    steps: int = 60
    """Inner steps after which "equal tokens" is read."""
    seconds: float = 20.0
    """Time after which "equal seconds" is read."""
    slow: float = 1.0
    """How many times as long a step of the last island takes."""
    only: str = ""
    """Run the methods with this text in their names."""
    json: Path | None = None
    worker: bool = False
    """Set by the launcher for each rank."""


@dataclass(frozen=True)
class Row:
    """Results of one method, of island 0.

    `megabytes`: that it sent over its link until `steps`; `planned`: of that, by the plan.
    `tokens_per_second`, `compute_share`: until `seconds`. `loss_tokens`, `loss_seconds`: validation
    loss in nats after equal tokens and after equal seconds.
    """

    method: str
    megabytes: float
    planned: float
    seconds_per_step: float
    compute_share: float
    tokens_per_second: float
    loss_tokens: float
    loss_seconds: float


METHODS: dict[str, dict[str, Any] | None] = {
    "every step": None,
    "DiLoCo float32": {},
    "DiLoCo int8": {"wire": "int8"},
    "DiLoCo int4": {"wire": "int4"},
    "DiLoCo top-k 1 %": {"wire": "topk:0.01", "momentum": 0.0, "lr": 1.0},
    "DiLoCo float32, delay": {"delay": -1},
    "DiLoCo int8, clock": {"wire": "int8", "sync_every": timedelta(seconds=1)},
}
"""Options of `DiLoCo` by method; None: the mean of the gradients of every step. A delay of -1 is
half of `sync_every`."""

BATCH = 64


def run(method: str, mesh: DeviceMesh, config: Config) -> Row:
    """Train by one method, on all islands, until both readings are taken."""
    options = METHODS[method]
    text, validation, _ = tokens()
    model = Model(0)
    hidden = [model.first.weight, model.second.weight]
    others = [model.embed.weight, model.head.weight]
    groups = [{"params": hidden}, {"params": others, "algorithm": "adamw", "lr": 3e-3}]
    optimizer = Muon(
        groups, lr=0.02, ns_dtype=torch.float32, distributed_config=create_dtensor_config()
    )
    outer = None
    if options is not None:
        options = {**options, "delay": config.sync_every // 2 if "delay" in options else 0}
        defaults = {"sync_every": config.sync_every, "lr": 0.8, "momentum": 0.6}
        outer = DiLoCo(optimizer, mesh["island"], **{**defaults, **options})
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    is_slow = rank == config.islands - 1 and config.slow > 1
    dist.barrier()
    start, waited, first_sent = time.monotonic(), 0.0, sent_nbytes()
    readings: dict[str, tuple[float, float, int]] = {}
    steps, num_rounds, share, rate = 0, 0.0, 0.0, 0.0
    while True:
        begun = time.monotonic()
        x, y = batch(text, generator, BATCH)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if is_slow:
            time.sleep((config.slow - 1) * (time.monotonic() - begun))
        if outer is None:
            before = time.monotonic()
            average_gradients(model, config.islands)
            waited += time.monotonic() - before
        optimizer.step()
        steps += 1
        elapsed = time.monotonic() - start
        if "tokens" not in readings and steps >= config.steps:
            readings["tokens"] = (loss(model, validation), elapsed, sent_nbytes() - first_sent)
        if outer is not None:
            waited = outer.metrics()["seconds_waited"]
            if outer.metrics()["rounds"] == num_rounds:
                continue
            num_rounds = outer.metrics()["rounds"]
        # after a round all islands are here, also those that have done fewer steps
        done = torch.tensor([float(elapsed >= config.seconds), float(steps >= config.steps)])
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        if bool(done[0]) and "seconds" not in readings:
            readings["seconds"] = (loss(model, validation), elapsed, steps)
            share, rate = 1 - waited / elapsed, BATCH * steps / elapsed
        if bool(done.all()):
            break
    if outer is not None:
        outer.finish()
    planned = _planned(outer, model, config)
    loss_tokens, seconds_tokens, nbytes = readings["tokens"]
    return Row(
        method,
        nbytes / 1e6,
        planned / 1e6,
        seconds_tokens / config.steps,
        share,
        rate,
        loss_tokens,
        readings["seconds"][0],
    )


def average_gradients(model: nn.Module, islands: int) -> None:
    """Average all gradients over the islands by one all-reduce."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.view(-1) for grad in grads])
    dist.all_reduce(flat)
    parts = torch.split(flat / islands, [grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))


def _planned(outer: DiLoCo | None, model: nn.Module, config: Config) -> float:
    """Return the planned bytes of island 0 in its first steps."""
    if outer is None:
        numel = sum(p.numel() for p in model.parameters())
        return 2 * 4 * numel * (config.islands - 1) / config.islands * config.steps
    if not outer.plan.sync_every:
        return float("nan")
    due = [outer.plan.at(step) for step in range(1, config.steps + 1)]
    return sum(outer.plan.sent_nbytes(f, 0) for f in due if f is not None)


def loss(model: nn.Module, text: torch.Tensor) -> float:
    """Return the validation loss in nats."""
    with torch.no_grad():
        x, y = batch(text, torch.Generator().manual_seed(5), 4096)
        return float(F.cross_entropy(model(x), y))


def work(config: Config) -> None:
    """Measure all methods on one rank, and print them on rank 0."""
    torch.set_num_threads(1)
    text_islands.HIDDEN = config.hidden
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (config.islands,), mesh_dim_names=("island",))
    rows = [run(method, mesh, config) for method in METHODS if config.only in method]
    if dist.get_rank() == 0:
        show(rows, config)
    destroy_process_group()


def show(rows: list[Row], config: Config) -> None:
    """Print a table. With `--json`, also write a file."""
    slow = f", the last {config.slow:g} times as slow" if config.slow > 1 else ""
    table = Table(title=f"{config.islands} islands, links of {config.rate}{slow}")
    for column in (
        *("method", "MB sent", "MB planned", "s a step", "computes", "tokens/s"),
        *(f"loss at {config.steps} steps", f"loss at {config.seconds:g} s"),
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.method,
            f"{row.megabytes:.2f}",
            f"{row.planned:.2f}",
            f"{row.seconds_per_step:.3f}",
            f"{100 * row.compute_share:.0f} %",
            f"{row.tokens_per_second:,.0f}",
            f"{row.loss_tokens:.3f}",
            f"{row.loss_seconds:.3f}",
        )
    Console(width=130).print(table)
    if config.json:
        settings = {k: v for k, v in asdict(config).items() if k not in ("json", "worker", "only")}
        figures = {**provenance(), **settings, "rows": [asdict(row) for row in rows]}
        config.json.write_text(json.dumps(figures, indent=1) + "\n")


def main() -> None:
    """Launch the islands, or run one."""
    config = tyro.cli(Config, description=__doc__)
    if config.worker:
        work(config)
        return
    sys.exit(launch("benchmarks.bench_wan", config.rate, config.islands, 1, 1200))


if __name__ == "__main__":
    main()
