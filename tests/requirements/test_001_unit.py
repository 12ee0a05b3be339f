"""001, "Unit Tests": assign, gather, redistribute, and the factories of configs."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from muon_dtensor import (
    DistributedConfig,
    _default_assign_fn,
    _gather_fn_async,
    _load_balanced_assign_fn,
    create_devicemesh_config,
    create_dtensor_config,
    create_processgroup_config,
)
from muon_dtensor.runtime.torch_private import num_ranks
from tests.requirements.models import batch
from tests.support.pool import run_processes

pytestmark = pytest.mark.P0
WORLD, WORLDS = 4, [1, 2, 3, 4, 6, 8]


class TestAssignFunction:
    def test_round_robin_assignment(self):
        params = [torch.randn(10, 10) for _ in range(8)]
        assignments = _default_assign_fn(params, {"world_size": 4})
        assert assignments == {0: 0, 1: 1, 2: 2, 3: 3, 4: 0, 5: 1, 6: 2, 7: 3}

    def test_assignment_with_one_rank(self):
        params = [torch.randn(10, 10) for _ in range(4)]
        assert set(_default_assign_fn(params, {"world_size": 1}).values()) == {0}

    def test_assignment_more_ranks_than_params(self):
        params = [torch.randn(10, 10) for _ in range(2)]
        assert _default_assign_fn(params, {"world_size": 8}) == {0: 0, 1: 1}

    def test_load_balanced_assignment(self):
        params = [torch.randn(n, n) for n in (100, 10, 50, 200)]
        assignments = _load_balanced_assign_fn(params, {"world_size": 2})
        assert assignments[3] != assignments[0]
        loads = [sum(params[i].numel() for i in range(4) if assignments[i] == r) for r in (0, 1)]
        assert sorted(loads) == [12600, 40000]


def fsdp_gather(dst_rank: int) -> tuple[bool, bool]:
    """Return whether this rank got a tensor, and whether it is correct."""
    full = batch(0, 64 * num_ranks(), 32)
    config = create_processgroup_config(fsdp_pg=dist.group.WORLD)
    result = config.gather_fn(full.chunk(num_ranks())[dist.get_rank()], dst_rank, config.state)
    return result is not None, result is None or torch.equal(result, full)


def ddp_gather(dst_rank: int) -> tuple[bool, bool]:
    tensor = batch(0, 128, 64)
    config = create_processgroup_config(dp_pg=dist.group.WORLD)
    result = config.gather_fn(tensor, dst_rank, config.state)
    return result is not None, result is None or torch.equal(result, tensor)


def fsdp_tp_gather(dst_rank: int) -> tuple[bool, bool]:
    """Gather rows cut over tp, then unevenly over fsdp, and replicated over dp."""
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp", "fsdp", "tp"))
    config = create_processgroup_config(
        **{f"{name}_pg": mesh.get_group(name) for name in mesh.mesh_dim_names}, tp_shard_dim=0
    )
    full = batch(0, 11, 3)
    half = full.split([6, 5])[mesh.get_local_rank("tp")]
    shard = half.split([len(half) - 2, 2])[mesh.get_local_rank("fsdp")]
    result = config.gather_fn(shard, dst_rank, config.state)
    return result is not None, result is None or torch.equal(result, full)


def dtensor_gather(dst_rank: int) -> tuple[bool, bool]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    full = batch(0, 13, 7)
    shard = distribute_tensor(full, mesh, [Shard(0), Shard(0)])
    config = create_devicemesh_config(mesh)
    result = config.gather_fn(shard, dst_rank, config.state)
    return result is not None, result is None or torch.equal(result, full)


def gather_async() -> tuple[bool, bool]:
    shard = batch(dist.get_rank(), 64, 32)
    state = {
        "rank": dist.get_rank(),
        "world_size": num_ranks(),
        "fsdp_pg": dist.group.WORLD,
    }
    result, work = _gather_fn_async(shard, dst_rank=0, state=state, async_op=True)
    assert work is not None
    work.wait()
    if result is None:
        return False, True
    return True, torch.equal(result, torch.cat([batch(r, 64, 32) for r in range(num_ranks())]))


def gather_blocking() -> tuple[bool, bool]:
    state = {
        "rank": dist.get_rank(),
        "world_size": num_ranks(),
        "fsdp_pg": dist.group.WORLD,
    }
    result, work = _gather_fn_async(batch(0, 2, 3), 1, state, async_op=False)
    assert work is None
    return result is not None, result is None or torch.equal(
        result, batch(0, 2, 3).repeat(num_ranks(), 1)
    )


class TestGatherFunction:
    @pytest.mark.parametrize("world", WORLDS)
    @pytest.mark.parametrize("body", [fsdp_gather, ddp_gather])
    def test_gather(self, body, world):
        for dst_rank in {0, world - 1}:
            expected = [(rank == dst_rank, True) for rank in range(world)]
            assert run_processes(world, body, dst_rank) == expected

    @pytest.mark.parametrize("dst_rank", [0, 3])
    def test_dtensor_gather(self, dst_rank):
        expected = [(rank == dst_rank, True) for rank in range(WORLD)]
        assert run_processes(WORLD, dtensor_gather, dst_rank) == expected

    @pytest.mark.parametrize("dst_rank", [0, 5])
    def test_fsdp_tp_gather(self, dst_rank):
        expected = [(rank == dst_rank, True) for rank in range(8)]
        assert run_processes(8, fsdp_tp_gather, dst_rank) == expected

    @pytest.mark.parametrize("world", WORLDS)
    def test_gather_async(self, world):
        assert run_processes(world, gather_async) == [(rank == 0, True) for rank in range(world)]

    @pytest.mark.parametrize("world", WORLDS[1:])
    def test_gather_without_waiting(self, world):
        expected = [(rank == 1, True) for rank in range(world)]
        assert run_processes(world, gather_blocking) == expected


def fsdp_redistribute(rows: int) -> tuple[Any, bool]:
    config = create_processgroup_config(fsdp_pg=dist.group.WORLD)
    full = batch(0, rows, 32)
    source_tensor = full if dist.get_rank() == 0 else None
    shard = config.redistribute_fn(source_tensor, src_rank=0, state=config.state)
    rows_per_rank = -(-rows // num_ranks())  # as in torch.chunk, with empty shards
    expected = full[dist.get_rank() * rows_per_rank : (dist.get_rank() + 1) * rows_per_rank]
    return tuple(shard.shape), torch.equal(shard, expected)


def ddp_redistribute() -> tuple[Any, bool]:
    config = create_processgroup_config(dp_pg=dist.group.WORLD)
    full = batch(0, 128, 64)
    last = num_ranks() - 1
    source_tensor = full if dist.get_rank() == last else None
    result = config.redistribute_fn(source_tensor, src_rank=last, state=config.state)
    is_first = dist.get_rank() == 0
    gathered = [torch.empty_like(result) for _ in range(last + 1)] if is_first else None
    dist.gather(result, gathered, dst=0)
    same = all(torch.equal(gathered[0], other) for other in gathered or [])
    return tuple(result.shape), same and torch.equal(result, full)


def error_without_a_tensor() -> str:
    config = create_processgroup_config(fsdp_pg=dist.group.WORLD)
    with pytest.raises(ValueError, match="rank 0") as caught:
        config.redistribute_fn(None, 0, config.state)
    return str(caught.value)


class TestRedistributeFunction:
    @pytest.mark.parametrize("world", WORLDS)
    def test_fsdp_redistribute(self, world):
        expected = [((240 // world, 32), True)] * world
        assert run_processes(world, fsdp_redistribute, 240) == expected

    def test_fsdp_redistribute_uneven(self):
        shapes = [(3, 32), (3, 32), (3, 32), (1, 32)]
        assert run_processes(WORLD, fsdp_redistribute, 10) == [(s, True) for s in shapes]

    @pytest.mark.parametrize("world", WORLDS)
    def test_ddp_redistribute(self, world):
        assert run_processes(world, ddp_redistribute) == [((128, 64), True)] * world

    def test_a_source_without_a_tensor_raises_on_every_rank(self):
        for text in run_processes(WORLD, error_without_a_tensor):
            assert text == "rank 0 has no tensor to redistribute: it passed None"


def all_callable(config: DistributedConfig) -> bool:
    functions = (config.assign_fn, config.gather_fn, config.redistribute_fn)
    return all(callable(function) for function in functions)


def processgroup_config() -> tuple[int, bool, bool, bool]:
    config = create_processgroup_config(
        fsdp_pg=dist.new_group(), prefetch_count=2, async_gpu_parallelism=False
    )
    return (
        config.prefetch_count,
        config.async_gpu_parallelism,
        "fsdp_pg" in config.state,
        all_callable(config),
    )


def devicemesh_config() -> tuple[bool, bool]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    config = create_devicemesh_config(mesh, ["dp", "tp"])
    return config.state["device_mesh"] is mesh, all_callable(config)


class TestHelperFunctions:
    def test_create_processgroup_config_fsdp(self):
        assert run_processes(WORLD, processgroup_config) == [(2, False, True, True)] * WORLD

    def test_create_devicemesh_config(self):
        assert run_processes(WORLD, devicemesh_config) == [(True, True)] * WORLD

    def test_create_dtensor_config(self):
        config = create_dtensor_config(prefetch_count=1, async_gpu_parallelism=True)
        assert config.prefetch_count == 1
        assert config.async_gpu_parallelism
        assert all_callable(config)

    def test_a_config_s_fields_in_order(self):
        def empty(*_: object) -> Tensor:
            return torch.empty(0)

        config = DistributedConfig(lambda params, state: {}, empty, empty, {"rank": 0})
        assert config.async_gpu_parallelism
        assert config.prefetch_count == 1
        assert config.uses_custom_transport
        assert config.names_owners
