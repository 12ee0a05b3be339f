"""Steps run while torch's asynchronous checkpoint uses the default process group."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muon_dtensor import Muon, group_parameters
from muon_dtensor.runtime import process_groups as groups
from tests.support.pool import run_processes

NUM_SAVES = 4


def model_on(mesh: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.LayerNorm(16))
    return fully_shard(model, mesh=mesh)


def steps_while_saving(folder: str, sizes: tuple[int, ...]) -> bool:
    mesh = init_device_mesh(
        "cpu", sizes, mesh_dim_names=("replicate", "shard", "third")[-len(sizes) :]
    )
    model, oracle = model_on(mesh), model_on(mesh)
    optimizer = Muon(group_parameters(model), lr=0.1, strategy="owned")
    undisturbed = Muon(group_parameters(oracle), lr=0.1, strategy="owned")
    for save in range(NUM_SAVES):
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        saving = dcp.async_save(state, checkpoint_id=f"{folder}/{save}")
        for step in range(6):
            generator = torch.Generator().manual_seed(save * 100 + step)
            x = torch.randn(8, 16, generator=generator)
            for net, stepper in ((model, optimizer), (oracle, undisturbed)):
                net(x).square().mean().backward()
                stepper.step()
                stepper.zero_grad()
        saving.result()
    names = [Path(folder, str(save), ".metadata").exists() for save in range(NUM_SAVES)]
    same = [
        torch.equal(a.to_local(), b.to_local())
        for a, b in zip(model.parameters(), oracle.parameters(), strict=True)
    ]
    dist.barrier()
    return all(names) and all(same)


def test_steps_on_two_mesh_dims_run_while_a_checkpoint_is_saved():
    with tempfile.TemporaryDirectory() as folder:
        assert all(run_processes(4, steps_while_saving, folder, (2, 2)))


def groups_of_a_step(sizes: tuple[int, ...]) -> tuple[bool, int]:
    """Return whether a step used the default group, and how many groups it has connected."""
    names = ("a", "b", "c")[: len(sizes)]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    model = model_on(mesh["a", "b"]) if len(sizes) > 1 else model_on(mesh)
    optimizer = Muon(group_parameters(model), lr=0.1, strategy="owned")
    model(torch.ones(2, 16)).sum().backward()
    before = len(groups._warm)
    optimizer.step()
    process_groups = optimizer._planned_step._process_groups
    used = list(process_groups._known.values())
    assert used
    mesh_groups = [
        mesh.get_group(dim) for dim in range(mesh.ndim)
    ]  # torch's FSDP2 uses these as well
    uses_default = any(group is dist.group.WORLD and group not in mesh_groups for group in used)
    return uses_default, len(groups._warm) - before


@pytest.mark.parametrize("sizes", [(2, 2), (1, 4), (4, 1)], ids=str)
def test_a_step_over_several_mesh_dims_does_not_use_the_default_group(sizes):
    for uses_default, num_connected in run_processes(4, groups_of_a_step, sizes):
        assert not uses_default
        assert num_connected > 0


def connected_twice() -> list[int]:
    """Count all-to-alls without splits of two optimizers: only the first one connects groups."""
    counts = []
    original = dist.all_to_all_single
    sent_numels: list[int] = []

    def counted(output: Any, send: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and send.dtype == torch.float32:
            sent_numels.append(send.numel())
        return original(output, send, *args, **kwargs)

    dist.all_to_all_single = counted
    try:
        for _ in range(2):
            sent_numels.clear()
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
            model = model_on(mesh)
            optimizer = Muon(group_parameters(model), lr=0.1, strategy="owned")
            model(torch.ones(2, 16)).sum().backward()
            optimizer.step()
            optimizer.step()
            counts.append(len(sent_numels))
    finally:
        dist.all_to_all_single = original
    return counts


def test_groups_are_connected_once_before_they_are_used():
    for first, second in run_processes(4, connected_twice):
        assert first > 0
        assert second <= first
