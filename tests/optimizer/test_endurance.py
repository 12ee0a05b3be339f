"""Long runs: memory, file handles, threads and process groups stay as many as they were."""

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
    """What a process holds."""
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
    """What this process holds more than before, for good.

    gloo's threads let go of what was sent last once they get a core, so a busy machine is asked
    again.
    """
    deadline = Deadline(10)
    while True:
        now = held()
        more = {name: now[name] - before[name] for name in before}
        counted = [value for name, value in more.items() if name != "kB resident"]
        if not any(counted) or not deadline.patience():
            return more
        time.sleep(0.1)


def settled() -> dict[str, int]:
    """What a process holds once gloo's threads have let go: the same three times in a row."""
    deadline, seen = Deadline(10), [held()]
    while deadline.patience():
        time.sleep(0.1)
        seen.append(held())
        kept = [{k: v for k, v in one.items() if k != "kB resident"} for one in seen[-3:]]
        if len(kept) == 3 and kept[0] == kept[1] == kept[2]:
            break
    return seen[-1]


def made(mesh: Any) -> tuple[list[nn.Parameter], Muon]:
    params = [nn.Parameter(spread(w, mesh, (R, S0))) for w in tensors_like(SHAPES, 0)]
    muon = {"params": params[:3], "normuon_beta": 0.9}
    return params, Muon([muon, {"params": params[3:], "algorithm": "adamw"}], bucket_mb=1e-3)


def step(mesh: Any, params: list[nn.Parameter], optimizer: Muon, grads: list[Any]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()


def growth_over(num_steps: int) -> dict[str, int]:
    mesh = mesh_of((2, 2))
    params, optimizer = made(mesh)
    grads = [spread(g, mesh, (R, S0)) for g in tensors_like(SHAPES, 1)]
    for _ in range(2 * num_steps):  # the heap grows to its size
        step(mesh, params, optimizer, grads)
    before = settled()
    for _ in range(num_steps):
        step(mesh, params, optimizer, grads)
    return growth_since(before)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_five_thousand_steps_leave_everything_as_it_was():
    # a job of the pool has a deadline: twice 2,550 steps, of which the last 850 are measured
    jobs = [run_processes(4, growth_over, 850) for _ in range(2)]
    for both in zip(*jobs, strict=True):
        resident = min(more.pop("kB resident") for more in both)
        assert not any(value for more in both for value in more.values()), both
        assert resident < 800, "kB: one a step, in both, would be a leak"


def growth_over_optimizers(num: int) -> dict[str, int]:
    """Optimizers that are made, stepped and dropped."""
    mesh = mesh_of((2, 2))
    grads = [spread(g, mesh, (R, S0)) for g in tensors_like(SHAPES, 1)]

    def some(count: int) -> None:
        for _ in range(count):
            params, optimizer = made(mesh)
            step(mesh, params, optimizer, grads)
            del params, optimizer

    some(num // 10)
    before = settled()
    some(num)
    return growth_since(before)


def test_two_hundred_optimizers_are_let_go():
    for more in run_processes(4, growth_over_optimizers, 200):
        resident = more.pop("kB resident")
        assert not any(more.values()), more
        assert resident < 20_000, "less than 100 kB each, and they hold 200"


def test_a_step_under_torch_s_debugging_wrapper():
    """TORCH_DISTRIBUTED_DEBUG=DETAIL compares the collectives of all ranks, shapes and all."""
    run_example("tp_fsdp", 4, TORCH_DISTRIBUTED_DEBUG="DETAIL")
