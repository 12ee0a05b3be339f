"""Measures the host's time per parameter in a step: its own CPU time, with all arithmetic left out.

    python -m benchmarks.bench_host --json host.json

Shards are DTensors on a mesh of one rank, so nothing is sent. Checks, packing and applying run as
in any step; the rank owns no matrix, as most ranks of a large job own few.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.common import provenance
from muon_dtensor import Muon
from muon_dtensor.runtime import executor
from muon_dtensor.runtime.executor import Executor


@dataclass(frozen=True)
class Config:
    """Options of the measurement."""

    numbers: tuple[int, ...] = (100, 1000, 20000)
    """Numbers of parameters."""
    rounds: int = 9
    json: Path | None = None


@dataclass(frozen=True)
class Row:
    """CPU time in microseconds per parameter: the median over rounds and the smallest."""

    num_params: int
    deferred_checks: bool
    median_us: float
    min_us: float


@contextmanager
def without_arithmetic() -> Iterator[None]:
    """Replace the elementwise passes and the iteration by nothing."""
    with ExitStack() as stack:
        for name in ("update_momentum", "write_directions", "apply_updates"):
            stack.enter_context(mock.patch.object(executor, name, _nothing))
        stack.enter_context(mock.patch.object(Executor, "_orthogonalize", _nothing))
        yield


def _nothing(*args: object, **options: object) -> None:
    """Take no time, unlike a mock."""


def measure(num_params: int, deferred_checks: bool, rounds: int) -> Row:
    """Measure the steps of parameters of 4 x 4."""
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp_shard",))
    params = [
        (f"w{i}", nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Shard(0)])))
        for i in range(num_params)
    ]
    # gradients are not read, for that is arithmetic: 16 elements take a microsecond
    optimizer = Muon(params, nonfinite="propagate", deferred_checks=deferred_checks)
    for _, param in params:
        param.grad = DTensor.from_local(torch.ones(4, 4), mesh, [Shard(0)])
    steps = max(1, 2000 // num_params)
    seconds = []
    with without_arithmetic():
        for turn in range(rounds + 2):
            start = time.process_time()
            for _ in range(steps):
                optimizer.step()
            if turn >= 2:
                seconds.append((time.process_time() - start) / steps)
    per_param = [1e6 * s / num_params for s in seconds]
    return Row(num_params, deferred_checks, statistics.median(per_param), min(per_param))


def main() -> None:
    """Measure all numbers of parameters and print a table. With `--json`, also write a file."""
    config = tyro.cli(Config, description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        rows = [
            measure(number, deferred, config.rounds)
            for number in config.numbers
            for deferred in (False, True)
        ]
        dist.destroy_process_group()
    table = Table(title="CPU time of the host per parameter")
    for column in ("parameters", "checks", "median us", "smallest us"):
        table.add_column(column, justify="right")
    for row in rows:
        checks = "deferred" if row.deferred_checks else "before the step"
        table.add_row(f"{row.num_params:,}", checks, f"{row.median_us:.2f}", f"{row.min_us:.2f}")
    Console(width=110).print(table)
    if config.json:
        figures = {**provenance(), "rows": [asdict(row) for row in rows]}
        config.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
