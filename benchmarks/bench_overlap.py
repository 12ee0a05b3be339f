"""What overlap is worth on a slow link: two nodes of two ranks on this machine.

    sudo python -m benchmarks.bench_overlap --json overlap.json

Needs root and iproute2: each node is a network namespace, and the virtual link between them passes
so many bits a second (`tc ... tbf`). Elsewhere it says so and measures nothing.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard

from benchmarks.common import layered, parameters, provenance
from muon_dtensor import Muon, create_dtensor_config
from muon_dtensor.cli.baselines import everyone_gathers
from muon_dtensor.cli.calibrate_worker import readings_in_turns
from muon_dtensor.cli.shutdown import leave
from muon_dtensor.planning.presets import PRESETS
from muon_dtensor.planning.topology import Link, Topology

R, S0 = Replicate(), Shard(0)
NODES, RANKS_PER_NODE = 2, 2
LINK, ADDRESS = "muonlink{}", "10.77.0.{}"
DEADLINE_SECONDS = 550
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass(frozen=True)
class Config:
    """What to measure."""

    rate: str = "1gbit"
    """Of the link between the nodes, as tc spells it. Two cores that iterate in bfloat16 reach
    about 0.6 TFLOP/s a node; an H100 with 400 Gbit/s has 8,000 FLOP for a byte, which is 600mbit
    here, and more for larger matrices."""
    layers: int = 12
    dim: int = 384
    bucket_mb: float = 4.0
    """Small, so that there are several buckets to overlap."""
    rounds: int = 9
    json: Path | None = None
    worker: bool = False
    """Set by the launcher in each namespace."""


@contextmanager
def nodes(rate: str) -> Iterator[list[str]]:
    """Two network namespaces, by name, and a slow link between them."""
    names = [f"muon-node{i}-{os.getpid()}" for i in range(NODES)]
    with ExitStack() as stack:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
        ends = [f"mdt{os.getpid()}{i}"[-15:] for i in range(NODES)]
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for index, (name, end) in enumerate(zip(names, ends, strict=True)):
            link = LINK.format(index)
            _ip("link", "set", end, "netns", name, "name", link)
            inside = ("-n", name)
            _ip(*inside, "addr", "add", ADDRESS.format(index + 1) + "/24", "dev", link)
            _ip(*inside, "link", "set", link, "up")
            _ip(*inside, "link", "set", "lo", "up")
            limit = ("tbf", "rate", rate, "burst", "256kb", "latency", "100ms")
            command = ["tc", *inside, "qdisc", "add", "dev", link, "root", *limit]
            subprocess.run(command, check=True)
        yield names


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def why_not() -> str:
    """Why this machine cannot make nodes; empty if it can."""
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{', '.join(missing)} of iproute2 not found" if missing else ""


def launch(config: Config) -> int:
    """Run all ranks in their namespaces; 0 if all of them end well."""
    if reason := why_not():
        print(f"skipped: {reason}")
        return 0
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    world_size = NODES * RANKS_PER_NODE
    with nodes(config.rate) as names:
        processes = []
        for rank in range(world_size):
            node = rank // RANKS_PER_NODE
            env = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": ADDRESS.format(1),
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": LINK.format(node),
                "OMP_NUM_THREADS": "1",
            }
            command = ["ip", "netns", "exec", names[node], sys.executable, "-m"]
            command += ["benchmarks.bench_overlap", *sys.argv[1:], "--worker"]
            processes.append(subprocess.Popen(command, env=env))
        try:
            return max(abs(p.wait(DEADLINE_SECONDS)) for p in processes)
        finally:
            for process in processes:
                process.kill()


def naive(params: list[nn.Parameter]) -> Callable[[], Any]:
    """Every rank gathers and orthogonalizes everything."""
    momenta = [torch.zeros_like(param, requires_grad=False) for param in params]
    return lambda: everyone_gathers(params, momenta, lr=0.0)


def crossed(step: Callable[[], Any]) -> float:
    """Megabytes that a step sends over the link, both ways."""
    node = dist.get_rank() // RANKS_PER_NODE
    counter = Path(f"/sys/class/net/{LINK.format(node)}/statistics/tx_bytes")
    dist.barrier()
    before = int(counter.read_text())
    step()
    dist.barrier()
    sent = torch.tensor((int(counter.read_text()) - before) / RANKS_PER_NODE)
    dist.all_reduce(sent)
    return float(sent) / 1e6


def topology(config: Config) -> Topology:
    """This machine, as far as the planner must know it: two nodes, a slow link, a core each."""
    unit = next(u for u in UNITS if config.rate.endswith(u))
    nbytes = float(config.rate.removesuffix(unit)) * UNITS[unit] / 8
    here = PRESETS["gloo-local"]
    return replace(
        here,
        name=f"two nodes, {config.rate}",
        node_size=RANKS_PER_NODE,
        between_nodes=Link(here.within_node.latency, nbytes / RANKS_PER_NODE),
        matmul=tuple((d, tuple((n, r / 2) for n, r in rates)) for d, rates in here.matmul),
        memory_bandwidth=here.memory_bandwidth / 2,
        cores=None,
    )


def ways(config: Config) -> dict[str, dict[str, Callable[[], Any]]]:
    """What is compared with what; the first of each is ours, all of them take turns."""
    shapes, cap = layered(config.layers, config.dim), config.bucket_mb
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("dp_shard",))
    hsdp = init_device_mesh("cpu", (NODES, RANKS_PER_NODE), mesh_dim_names=("replica", "shard"))

    def muon(mesh: DeviceMesh, placements: tuple[Placement, ...], **options: Any) -> Any:
        params = parameters(shapes, mesh, placements)
        optimizer = Muon(params, lr=0.0, bucket_mb=cap, strategy="owned", **options)
        optimizer.step()
        return optimizer.step

    link = topology(config)
    in_turns = create_dtensor_config(async_gpu_parallelism=False)
    table = [(16384, 4 * config.dim)]
    mixed, rest = parameters(shapes, flat, (S0,)), parameters(table, flat, (S0,))
    apart, others = parameters(shapes, flat, (S0,)), parameters(table, flat, (S0,))
    groups = [{"params": mixed}, {"params": rest, "algorithm": "adamw"}]
    together = Muon(groups, lr=0.0, bucket_mb=cap, strategy="owned")
    first = Muon(apart, lr=0.0, bucket_mb=cap, strategy="owned")
    second = Muon([{"params": others, "algorithm": "adamw"}], lr=0.0)
    for optimizer in (together, first, second):
        optimizer.step()

    def one_by_one() -> None:
        first.step()
        second.step()

    return {
        "fsdp over both nodes": {
            "prefetch 1": muon(flat, (S0,), prefetch_count=1),
            "prefetch 0": muon(flat, (S0,), prefetch_count=0),
            "prefetch 2": muon(flat, (S0,), prefetch_count=2),
            "one bucket": _one_bucket(shapes, flat),
            "async_gpu_parallelism=False": muon(flat, (S0,), distributed_config=in_turns),
            "naive": naive(parameters(shapes, flat, (S0,))),
        },
        "hsdp, a replica on each node": {
            "prefetch 1": muon(hsdp, (R, S0), prefetch_count=1),
            "prefetch 0": muon(hsdp, (R, S0), prefetch_count=0),
            "prefetch 1, planned for the link": muon(
                hsdp, (R, S0), prefetch_count=1, topology=link
            ),
            "no replica sharing": muon(hsdp["shard"], (S0,), prefetch_count=1),
            "naive": naive(parameters(shapes, hsdp, (R, S0))),
        },
        "fsdp, and AdamW of an embedding": {
            "while exchanges are in flight": together.step,
            "afterwards": one_by_one,
        },
    }


def _one_bucket(shapes: list[tuple[int, ...]], mesh: DeviceMesh) -> Callable[[], Any]:
    optimizer = Muon(parameters(shapes, mesh, (S0,)), lr=0.0, strategy="owned")
    optimizer.step()
    return optimizer.step


def work(config: Config) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for title, bodies in ways(config).items():
        taken = readings_in_turns(bodies, torch.device("cpu"), config.rounds)
        ours = next(iter(bodies))
        rows = {}
        for name, seconds in taken.items():
            ratios = [a / b for a, b in zip(seconds, taken[ours], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            rows[name] = {
                "ms": 1e3 * statistics.median(seconds),
                "times_ours": middle,
                "spread": high - low,
                "link_mb": crossed(bodies[name]),
            }
        found[title] = rows
        if dist.get_rank() == 0:
            show(title, rows, config)
    if dist.get_rank() == 0 and config.json:
        settings = {
            "rate": config.rate,
            "layers": config.layers,
            "dim": config.dim,
            "bucket_mb": config.bucket_mb,
            "rounds": config.rounds,
        }
        config.json.write_text(json.dumps({**provenance(), **settings, "ways": found}, indent=1))
    dist.barrier()
    leave()


def show(title: str, rows: dict[str, dict[str, float]], config: Config) -> None:
    """One table."""
    work = f"{config.layers} layers, d = {config.dim}, link of {config.rate}"
    table = Table(title=f"{title}; {work}")
    for column in ("", "ms", "x the first", "MB over the link"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        ratio = f"{row['times_ours']:.2f} +-{row['spread'] / 2:.2f}"
        table.add_row(name, f"{row['ms']:.0f}", ratio, f"{row['link_mb']:.1f}")
    Console(width=100).print(table)
    sys.stdout.flush()


def main() -> None:
    """Launch, or be launched."""
    config = tyro.cli(Config, description=__doc__)
    if config.worker:
        work(config)
    else:
        sys.exit(launch(config))


if __name__ == "__main__":
    main()
