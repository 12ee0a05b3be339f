"""Measures the iteration against the device's roofline, the rate of plain matrix products.

    python -m benchmarks.bench_iteration --json iteration.json

Runs on a GPU or on one core of a host: single matrices, batches, compiled, and symmetric kernels
if they are installed. All rates count the FLOP of plain Newton-Schulz.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import provenance
from muon_dtensor.algorithms import newton_schulz
from muon_dtensor.algorithms.kernels import kernel_of
from muon_dtensor.errors import GroupOptionError
from muon_dtensor.planning.matrix_costs import newton_schulz_flops

GPU_SHAPES = ((1024, 1024), (1024, 4096), (4096, 4096), (4096, 14336), (8192, 8192))
CPU_SHAPES = ((192, 192), (192, 768), (384, 384), (384, 1536), (1024, 1024))


@dataclass(frozen=True)
class Config:
    """Options of the measurement."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    batch: int = 8
    rounds: int = 9
    compile: bool = False
    """Also measure torch.compile, which takes a minute."""
    json: Path | None = None


@dataclass(frozen=True)
class Row:
    """`tflops`: by variant, and of plain products of the same matrices, the upper bound."""

    rows: int
    cols: int
    tflops: dict[str, float]


def seconds_of(body: Callable[[], object], config: Config) -> float:
    """Return the median over the rounds, after two warm-up rounds."""
    seconds = []
    for turn in range(config.rounds + 2):
        _synchronize(config)
        start = time.perf_counter()
        body()
        _synchronize(config)
        if turn >= 2:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _synchronize(config: Config) -> None:
    if config.device != "cpu":
        torch.cuda.synchronize()


def products(x: Tensor) -> Callable[[], object]:
    """Return a function that computes X X^T and its product with X, without other operations."""

    def body() -> Tensor:
        gram = x @ x.mT
        return gram @ x

    return body


def has_symmetric_kernels() -> bool:
    """Whether gram-newton-schulz is installed and supports this GPU."""
    try:
        kernel_of("symmetric", compiles=False)
    except GroupOptionError:
        return False
    return True


def measure(rows: int, cols: int, config: Config) -> Row:
    """Measure all variants on one matrix size."""
    stacked = torch.randn(config.batch, rows, cols, dtype=torch.bfloat16, device=config.device)
    flops = newton_schulz_flops(rows, cols, 5)
    variants: dict[str, tuple[Callable[[], object], float]] = {
        "products": (products(stacked[0]), 4 * min(rows, cols) * rows * cols),
        "products, batched": (products(stacked), config.batch * 4 * min(rows, cols) * rows * cols),
        "each": (lambda: newton_schulz(stacked[0]), flops),
        "batched": (lambda: newton_schulz(stacked), config.batch * flops),
    }
    if config.compile:
        compiled = kernel_of("torch", compiles=True)
        variants["compiled"] = (lambda: newton_schulz(stacked[0], body=compiled), flops)
    if has_symmetric_kernels():
        symmetric = kernel_of("symmetric", compiles=False)
        batch = config.batch * flops
        variants["symmetric, batched"] = (lambda: newton_schulz(stacked, body=symmetric), batch)
    tflops = {
        name: work / seconds_of(body, config) / 1e12 for name, (body, work) in variants.items()
    }
    return Row(rows, cols, tflops)


def main() -> None:
    """Measure all sizes and print a table. With `--json`, also write a file."""
    config = tyro.cli(Config, description=__doc__)
    torch.set_num_threads(1)
    shapes = CPU_SHAPES if config.device == "cpu" else GPU_SHAPES
    name = "one core" if config.device == "cpu" else torch.cuda.get_device_name()
    rows = [measure(*shape, config) for shape in shapes]
    table = Table(title=f"TFLOP/s on {name}, batches of {config.batch}")
    for column in ("matrix", *rows[0].tflops):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(f"{row.rows} x {row.cols}", *(f"{v:.3f}" for v in row.tflops.values()))
    Console(width=110).print(table)
    if config.json:
        figures = {**provenance(), "device": name, "rows": [asdict(row) for row in rows]}
        config.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
