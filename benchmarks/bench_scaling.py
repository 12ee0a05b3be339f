"""Measures strong and weak scaling of an optimizer step on 1, 2, 4 and 8 ranks.

    python -m benchmarks.bench_scaling --json scaling.json

Starts torchrun for each number of ranks. The ideal is the time of one rank divided by the smaller
of the number of ranks and the number of cores. The CPU time of the busiest rank (of the thread that
steps, without gloo's threads) measures the work balance independently of the number of cores.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from benchmarks.common import layered, parameters, provenance
from muon_dtensor import Muon
from muon_dtensor.algorithms import newton_schulz
from muon_dtensor.cli.calibrate_worker import readings_in_turns
from muon_dtensor.cli.shutdown import destroy_process_group

DEADLINE_SECONDS = 300


@dataclass(frozen=True)
class Config:
    """Options of the measurement."""

    ranks: tuple[int, ...] = (1, 2, 4, 8)
    layers: int = 8
    """Number of layers of the fixed work, and per four ranks of the growing work."""
    dim: int = 256
    rounds: int = 9
    json: Path | None = None
    worker: Path | None = None
    """Set by the launcher: file for the results of rank 0."""


def layers_of(config: Config, num_ranks: int, *, grows: bool) -> int:
    """Return the number of layers for a number of ranks."""
    return max(1, config.layers * num_ranks // 4) if grows else config.layers


def work(config: Config, out: Path) -> None:
    """Measure on one rank of a launch; rank 0 writes the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))
    rows = {}
    for grows in (False, True):
        shapes = layered(layers_of(config, size, grows=grows), config.dim)
        optimizer = Muon(parameters(shapes, mesh, [Shard(0)]), lr=0.0)
        optimizer.step()
        share = [torch.randn(*shape) for shape in shapes[rank::size]]
        bodies = {"ours": optimizer.step, "floor": lambda s=share: [newton_schulz(m) for m in s]}
        readings = readings_in_turns(bodies, torch.device("cpu"), config.rounds)
        cost = optimizer.plan.cost
        rows["growing" if grows else "fixed"] = {
            "layers": len(shapes) // 4,
            "ms": 1e3 * statistics.median(readings["ours"]),
            "cpu_ms": 1e3 * busiest_seconds(optimizer, config.rounds),
            "floor_ms": 1e3 * statistics.median(readings["floor"]),
            "sent_mb": cost.total_nbytes / size / 1e6,
            "held_mb": max(cost.peak_nbytes) / 1e6,
        }
    if rank == 0:
        out.write_text(json.dumps(rows))
    dist.barrier()
    destroy_process_group()


def busiest_seconds(optimizer: Muon, rounds: int) -> float:
    """Return the CPU seconds of a step on the busiest rank, of the thread that steps."""
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        start = time.thread_time()
        optimizer.step()
        seconds.append(time.thread_time() - start)
    busiest = torch.tensor(statistics.median(seconds))
    dist.all_reduce(busiest, op=dist.ReduceOp.MAX)
    return float(busiest)


def launch(config: Config) -> dict[int, dict[str, dict[str, float]]]:
    """Start torchrun for each number of ranks; return the results by number of ranks."""
    results = {}
    with TemporaryDirectory() as folder:
        for num_ranks in config.ranks:
            out = Path(folder) / f"{num_ranks}.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(num_ranks), "-m", "benchmarks.bench_scaling"]
            command += [*sys.argv[1:], "--worker", str(out)]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, timeout=DEADLINE_SECONDS, env=env)
            results[num_ranks] = json.loads(out.read_text())
    return results


def show(results: dict[int, dict[str, dict[str, float]]], cores: int, config: Config) -> None:
    """Print a table for each kind of work."""
    for kind in ("fixed", "growing"):
        table = Table(title=f"{kind} work, d = {config.dim}, {cores} cores")
        for column in (
            "ranks",
            "layers",
            "ms",
            "CPU ms",
            "split",
            "floor ms",
            "x ideal",
            "MB sent",
            "peak MB",
        ):
            table.add_column(column, justify="right")
        baseline = results[min(results)][kind]
        for num_ranks, row in ((n, by_kind[kind]) for n, by_kind in results.items()):
            growth = row["layers"] / baseline["layers"]
            ideal = baseline["ms"] * growth / min(num_ranks, cores)
            table.add_row(
                str(num_ranks),
                str(row["layers"]),
                f"{row['ms']:.1f}",
                f"{row['cpu_ms']:.1f}",
                f"{baseline['cpu_ms'] * growth / row['cpu_ms']:.2f}",
                f"{row['floor_ms']:.1f}",
                f"{row['ms'] / ideal:.2f}",
                f"{row['sent_mb']:.2f}",
                f"{row['held_mb']:.2f}",
            )
        Console(width=100).print(table)


def main() -> None:
    """Start the ranks; with `--worker`, run as one of them."""
    config = tyro.cli(Config, description=__doc__)
    if config.worker is not None:
        work(config, config.worker)
        return
    cores = len(os.sched_getaffinity(0))
    results = launch(config)
    show(results, cores, config)
    if config.json:
        settings = {"dim": config.dim, "rounds": config.rounds, "cores": cores}
        figures = {**provenance(), **settings, "ranks": results}
        config.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
