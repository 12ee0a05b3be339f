"""Long runs: memory and the numbers of file handles, threads and process groups do not grow."""

import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from muon_dtensor import Muon
from muon_dtensor.runtime import process_groups as groups
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.deadlines import Deadline
from tests.support.pool import run_processes
from tests.support.torchrun import run_example

pytestmark = pytest.mark.P1

R, S0 = Replicate(), Shard(0)
SHAPES = [(8, 6), (6, 12), (5, 5), (7, 3)]


def held() -> dict[str, int]:
    """Return the counts of what this process holds."""
    gc.collect()
    kinds = (torch.Tensor, nn.Parameter, DTensor)
    tensors = [o for o in gc.get_objects() if type(o) in kinds]
    status = Path("/proc/self/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return {
        "file handles": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "Python threads": threading.active_count(),
        "tensors": len(tensors),
        "groups of torch": len(dist.distributed_c10d._world.pg_map),
        "groups of ours": sum(map(len, groups._own.values())),
        "kB resident": int(resident.split()[1]),
    }


def growth_since(before: dict[str, int]) -> dict[str, int]:
    """Return by how much the counts have grown.

    gloo's threads free what was sent last once they run, so the counts are read repeatedly.
    """
    deadline = Deadline(10)
    while True:
        current = held()
        growth = {name: current[name] - before[name] for name in before}
        counted = [value for name, value in growth.items() if name != "kB resident"]
        if not any(counted) or not deadline.patience():
            return growth
        time.sleep(0.1)


def settled() -> dict[str, int]:
    """Return the counts once gloo's threads have freed what was sent: three equal readings."""
    deadline, readings = Deadline(10), [held()]
    while deadline.patience():
        time.sleep(0.1)
        readings.append(held())
        last_readings = [
            {k: v for k, v in reading.items() if k != "kB resident"} for reading in readings[-3:]
        ]
        if len(last_readings) == 3 and last_readings[0] == last_readings[1] == last_readings[2]:
            break
    return readings[-1]


def optimizer_on(mesh: Any) -> tuple[list[nn.Parameter], Muon]:
    params = [nn.Parameter(spread(w, mesh, (R, S0))) for w in tensors_like(SHAPES, 0)]
    muon = {"params": params[:3], "normuon_beta": 0.9}
    return params, Muon([muon, {"params": params[3:], "algorithm": "adamw"}], bucket_mb=1e-3)


def step(mesh: Any, params: list[nn.Parameter], optimizer: Muon, grads: list[Any]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()


def growth_over(num_steps: int) -> dict[str, int]:
    mesh = mesh_of((2, 2))
    params, optimizer = optimizer_on(mesh)
    grads = [spread(g, mesh, (R, S0)) for g in tensors_like(SHAPES, 1)]
    for _ in range(2 * num_steps):  # until the heap has its final size
        step(mesh, params, optimizer, grads)
    before = settled()
    for _ in range(num_steps):
        step(mesh, params, optimizer, grads)
    return growth_since(before)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_five_thousand_steps_leak_nothing():
    # A job of the pool has a deadline: twice 2,550 steps, of which the last 850 are measured.
    jobs = [run_processes(4, growth_over, 850) for _ in range(2)]
    for growths in zip(*jobs, strict=True):
        resident = min(growth.pop("kB resident") for growth in growths)
        assert not any(value for growth in growths for value in growth.values()), growths
        assert resident < 800, "kB: growth of 1 kB in each step of both runs is a leak"


def growth_over_optimizers(num: int) -> dict[str, int]:
    """Construct, step and delete optimizers; return the growth."""
    mesh = mesh_of((2, 2))
    grads = [spread(g, mesh, (R, S0)) for g in tensors_like(SHAPES, 1)]

    def some(count: int) -> None:
        for _ in range(count):
            params, optimizer = optimizer_on(mesh)
            step(mesh, params, optimizer, grads)
            del params, optimizer

    some(num // 10)
    before = settled()
    some(num)
    return growth_since(before)


def test_two_hundred_optimizers_are_freed():
    for growth in run_processes(4, growth_over_optimizers, 200):
        resident = growth.pop("kB resident")
        assert not any(growth.values()), growth
        assert resident < 20_000, "kB: less than 100 each; an optimizer holds 200"


def test_a_step_under_torch_s_debugging_wrapper():
    """TORCH_DISTRIBUTED_DEBUG=DETAIL compares the collectives of all ranks, shapes and all."""
    run_example("tp_fsdp", 4, TORCH_DISTRIBUTED_DEBUG="DETAIL")
