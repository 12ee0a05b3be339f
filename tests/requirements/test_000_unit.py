"""000, "Unit Tests": the functions of `create_auto_config`, called directly."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from muon_dtensor import create_auto_config
from tests.requirements.models import batch
from tests.support.pool import run_processes

pytestmark = pytest.mark.P0
WORLD = 4


def same_on_all_ranks(tensor: Tensor) -> bool:
    from_rank_0 = tensor.clone()
    dist.broadcast(from_rank_0, src=0)
    return torch.equal(tensor, from_rank_0)


def fsdp_gather() -> tuple[Any, bool, bool]:
    rank = dist.get_rank()
    full = batch(0, 256, 1024)
    config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    shard = full.chunk(WORLD, dim=1)[rank]
    gathered = config.gather_fn(shard, rank, config.state)
    return tuple(gathered.shape), torch.equal(gathered, full), same_on_all_ranks(gathered)


def tp_gather(tensor_dim: int, sizes: list[int]) -> tuple[bool, bool | str]:
    rank = dist.get_rank()
    shape = [6, 6]
    shape[tensor_dim] = sum(sizes)
    full = batch(0, *shape)
    config = create_auto_config(tp_process_group=dist.group.WORLD, tp_shard_dim=tensor_dim)
    shard = full.split(sizes, tensor_dim)[rank]
    gathered = config.gather_fn(shard, rank, config.state)
    try:
        cut = config.redistribute_fn(gathered, rank, config.state)
    except ValueError as error:
        return torch.equal(gathered, full), str(error)
    return torch.equal(gathered, full), torch.equal(cut, full.tensor_split(WORLD, tensor_dim)[rank])


def hsdp_gather() -> tuple[bool, bool]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    config = create_auto_config(
        shard_process_group=mesh.get_group("shard"),
        replicate_process_group=mesh.get_group("replicate"),
        fsdp_shard_dim=0,
    )
    full = batch(0, 7, 5)
    shard = full.split([4, 3])[mesh.get_local_rank("shard")]
    gathered = config.gather_fn(shard, dist.get_rank(), config.state)
    redistributed = config.redistribute_fn(gathered, dist.get_rank(), config.state)
    return torch.equal(gathered, full), torch.equal(redistributed, shard)


class TestGatherFunction:
    def test_fsdp_gather(self):
        assert run_processes(WORLD, fsdp_gather) == [((256, 1024), True, True)] * WORLD

    @pytest.mark.parametrize("tensor_dim", [0, 1], ids=["dim0", "dim1"])
    def test_tp_gather(self, tensor_dim):
        assert run_processes(WORLD, tp_gather, tensor_dim, [3] * 4) == [(True, True)] * WORLD

    @pytest.mark.parametrize("sizes", [[1, 5, 0, 2], [0, 0, 0, 4]], ids=str)
    def test_uneven_shards_gather(self, sizes):
        """redistribute_fn raises, since it would cut other shards."""
        for is_equal, text in run_processes(WORLD, tp_gather, 0, sizes):
            assert is_equal
            assert "shards that are not those into which redistribute_fn cuts" in text

    def test_hsdp_gather(self):
        assert run_processes(WORLD, hsdp_gather) == [(True, True)] * WORLD


def fsdp_redistribute() -> tuple[Any, bool]:
    rank = dist.get_rank()
    full = batch(0, 256, 1024)
    config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    shard = config.redistribute_fn(full, rank, config.state)
    gathered = config.gather_fn(shard, rank, config.state)
    return tuple(shard.shape), torch.equal(gathered, full)


class TestRedistributeFunction:
    def test_fsdp_redistribute(self):
        assert run_processes(WORLD, fsdp_redistribute) == [((256, 1024 // WORLD), True)] * WORLD


def balanced() -> tuple[list[int], list[int]]:
    params = [torch.randn(100, 100) for _ in range(21)]
    config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    assignments = config.assign_fn(params, config.state)
    every = sorted(index for indices in assignments.values() for index in indices)
    return every, [len(assignments[rank]) for rank in range(dist.get_world_size())]


class TestAssignmentFunction:
    def test_balanced_assignment(self):
        for every, counts in run_processes(WORLD, balanced):
            assert every == list(range(21))
            assert max(counts) - min(counts) <= 1
