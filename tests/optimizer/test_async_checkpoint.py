"""Steps go on while torch's asynchronous checkpoint saves with the default process group."""

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
            for each, by in ((model, optimizer), (oracle, undisturbed)):
                each(x).square().mean().backward()
                by.step()
                by.zero_grad()
        saving.result()
    names = [Path(folder, str(save), ".metadata").exists() for save in range(NUM_SAVES)]
    same = [
        torch.equal(a.to_local(), b.to_local())
        for a, b in zip(model.parameters(), oracle.parameters(), strict=True)
    ]
    dist.barrier()
    return all(names) and all(same)


def test_steps_on_two_mesh_dims_go_on_while_a_checkpoint_is_saved():
    with tempfile.TemporaryDirectory() as folder:
        assert all(run_processes(4, steps_while_saving, folder, (2, 2)))


def groups_of_a_step(sizes: tuple[int, ...]) -> tuple[bool, int]:
    """Whether a step borrowed the default group; and how many groups it has connected."""
    names = ("a", "b", "c")[: len(sizes)]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    model = model_on(mesh["a", "b"]) if len(sizes) > 1 else model_on(mesh)
    optimizer = Muon(group_parameters(model), lr=0.1, strategy="owned")
    model(torch.ones(2, 16)).sum().backward()
    before = len(groups._warm)
    optimizer.step()
    process_groups = optimizer._ready._process_groups
    used = list(process_groups._known.values())
    assert used
    own = [mesh.get_group(dim) for dim in range(mesh.ndim)]  # torch's FSDP2 uses these as well
    borrowed = any(group is dist.group.WORLD and group not in own for group in used)
    return borrowed, len(groups._warm) - before


@pytest.mark.parametrize("sizes", [(2, 2), (1, 4), (4, 1)], ids=str)
def test_a_step_over_several_mesh_dims_never_borrows_the_default_group(sizes):
    for borrowed, num_connected in run_processes(4, groups_of_a_step, sizes):
        assert not borrowed
        assert num_connected > 0


def connected_twice() -> list[int]:
    """All-to-alls without splits, of two optimizers' first steps: only the first one connects."""
    counts = []
    original = dist.all_to_all_single
    seen: list[int] = []

    def counted(output: Any, send: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and send.dtype == torch.float32:
            seen.append(send.numel())
        return original(output, send, *args, **kwargs)

    dist.all_to_all_single = counted
    try:
        for _ in range(2):
            seen.clear()
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
            model = model_on(mesh)
            optimizer = Muon(group_parameters(model), lr=0.1, strategy="owned")
            model(torch.ones(2, 16)).sum().backward()
            optimizer.step()
            optimizer.step()
            counts.append(len(seen))
    finally:
        dist.all_to_all_single = original
    return counts


def test_groups_are_connected_by_data_once_before_they_are_used():
    for first, second in run_processes(4, connected_twice):
        assert first > 0
        assert second <= first
