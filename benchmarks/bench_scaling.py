"""One optimizer step on 1, 2, 4 and 8 ranks: the same work, and work that grows with the ranks.

    python -m benchmarks.bench_scaling --json scaling.json

Starts torchrun for each number of ranks. Beyond the cores of the machine no step can be faster:
the ideal is the work of one rank divided by the ranks or the cores, whichever are fewer. The CPU
time of the busiest rank measures how well the work is shared, however many cores there are: that
of the thread that steps, without gloo's threads.
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
from muon_dtensor.cli.shutdown import leave

DEADLINE_SECONDS = 300


@dataclass(frozen=True)
class Config:
    """What to measure."""

    ranks: tuple[int, ...] = (1, 2, 4, 8)
    layers: int = 8
    """Of the fixed work; the growing one has this many for every four ranks."""
    dim: int = 256
    rounds: int = 9
    json: Path | None = None
    worker: Path | None = None
    """Set by the launcher: where rank 0 writes what it found."""


def layers_of(config: Config, num_ranks: int, *, grows: bool) -> int:
    """Layers of the model that so many ranks step."""
    return max(1, config.layers * num_ranks // 4) if grows else config.layers


def work(config: Config, found: Path) -> None:
    """One rank of one launch."""
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
        taken = readings_in_turns(bodies, torch.device("cpu"), config.rounds)
        cost = optimizer.plan.cost
        rows["growing" if grows else "fixed"] = {
            "layers": len(shapes) // 4,
            "ms": 1e3 * statistics.median(taken["ours"]),
            "cpu_ms": 1e3 * busiest_seconds(optimizer, config.rounds),
            "floor_ms": 1e3 * statistics.median(taken["floor"]),
            "sent_mb": cost.total_nbytes / size / 1e6,
            "held_mb": max(cost.peak_nbytes) / 1e6,
        }
    if rank == 0:
        found.write_text(json.dumps(rows))
    dist.barrier()
    leave()


def busiest_seconds(optimizer: Muon, rounds: int) -> float:
    """CPU seconds that a step takes the thread of the rank that works most."""
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
    """Figures by number of ranks."""
    results = {}
    with TemporaryDirectory() as folder:
        for num_ranks in config.ranks:
            found = Path(folder) / f"{num_ranks}.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(num_ranks), "-m", "benchmarks.bench_scaling"]
            command += [*sys.argv[1:], "--worker", str(found)]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, timeout=DEADLINE_SECONDS, env=env)
            results[num_ranks] = json.loads(found.read_text())
    return results


def show(results: dict[int, dict[str, dict[str, float]]], cores: int, config: Config) -> None:
    """A table for each kind of work."""
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
            "MB held",
        ):
            table.add_column(column, justify="right")
        alone = results[min(results)][kind]
        for num_ranks, row in ((n, found[kind]) for n, found in results.items()):
            grown = row["layers"] / alone["layers"]
            ideal = alone["ms"] * grown / min(num_ranks, cores)
            table.add_row(
                str(num_ranks),
                str(row["layers"]),
                f"{row['ms']:.1f}",
                f"{row['cpu_ms']:.1f}",
                f"{alone['cpu_ms'] * grown / row['cpu_ms']:.2f}",
                f"{row['floor_ms']:.1f}",
                f"{row['ms'] / ideal:.2f}",
                f"{row['sent_mb']:.2f}",
                f"{row['held_mb']:.2f}",
            )
        Console(width=100).print(table)


def main() -> None:
    """Launch, or be launched."""
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
