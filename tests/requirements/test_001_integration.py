"""001, "Integration Tests": equivalence to one process, and combined parallelism."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from muon_dtensor import Muon, create_devicemesh_config, create_processgroup_config
from tests.requirements.models import (
    batch,
    create_dummy_model,
    differences,
    full_params,
    joined,
)
from tests.support.pool import run_processes

LR = 1e-3


def train(model: nn.Module, optimizer: torch.optim.Optimizer, dim: int = 12) -> None:
    for step in range(10):
        model(batch(step, 32, dim)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def baseline(**options: Any) -> dict[str, Tensor]:
    model = create_dummy_model()
    train(model, Muon(model.named_parameters(), lr=LR, momentum=0.95, **options))
    return full_params(model)


def fsdp_equivalence() -> dict[str, Tensor]:
    model = FullyShardedDataParallel(
        create_dummy_model(), use_orig_params=True, device_id=torch.device("cpu")
    )
    config = create_processgroup_config(fsdp_pg=model.process_group)
    optimizer = Muon(model.named_parameters(), lr=LR, momentum=0.95, distributed_config=config)
    train(model, optimizer)
    with FullyShardedDataParallel.summon_full_params(model):
        return full_params(model)


class Reduce(torch.autograd.Function):
    """Sum over the group in forward; identity in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Copy(torch.autograd.Function):
    """Identity in forward; sum over the group in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class Columns(nn.Module):
    """A linear layer of plain tensors whose input features are cut over a group."""

    def __init__(self, weight: Tensor, group: Any, sizes: list[int]) -> None:
        super().__init__()
        index = dist.get_rank(group)
        self.weight = nn.Parameter(weight.split(sizes, 1)[index].clone())
        self.group, self.sizes, self.index = group, sizes, index

    def forward(self, x: Tensor) -> Tensor:
        part = Copy.apply(x, self.group).split(self.sizes, -1)[self.index] @ self.weight.T
        return Reduce.apply(part, self.group)


def plain_tensor_parallel() -> dict[str, Tensor]:
    """Train plain shards of uneven sizes, as in a Megatron-like framework."""
    sizes, group = [5, 1, 6, 0], dist.group.WORLD
    full_model = create_dummy_model()
    model = nn.Sequential(*(Columns(layer.weight.detach(), group, sizes) for layer in full_model))
    config = create_processgroup_config(tp_pg=group, tp_shard_dim=1)
    optimizer = Muon(
        model.named_parameters(), lr=LR, distributed_config=config, ns_dtype=torch.float32
    )
    for step in range(10):
        model(batch(step, 32, 12)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.plan.cost.redundancy == 1.0
    return joined(((n, p, 1) for n, p in model.named_parameters()), group)


class TestDistributedEquivalence:
    @pytest.mark.P0
    def test_fsdp_equivalence(self):
        expected = baseline()
        for params in run_processes(4, fsdp_equivalence):
            assert differences(params, expected, 0) == []

    @pytest.mark.P1
    def test_plain_tensor_parallel_equivalence(self):
        expected = baseline(ns_dtype=torch.float32)
        for params in run_processes(4, plain_tensor_parallel):
            assert differences(params, expected, 1e-5) == []


def fsdp_tp_combined() -> tuple[dict[str, Tensor], float]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = create_dummy_model()
    styles = [
        ColwiseParallel(output_layouts=Replicate()),
        RowwiseParallel(input_layouts=Replicate()),
    ]
    parallelize_module(model, mesh["tp"], {str(i): styles[i % 2] for i in range(4)})
    for layer in model:
        fully_shard(layer, mesh=mesh["dp"])
    config = create_devicemesh_config(mesh, ["dp", "tp"])
    optimizer = Muon(
        model.named_parameters(), lr=LR, distributed_config=config, ns_dtype=torch.float32
    )
    train(model, optimizer)
    return full_params(model), optimizer.plan.cost.redundancy


def hsdp() -> tuple[dict[str, Tensor], float]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = FullyShardedDataParallel(
        create_dummy_model(),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        process_group=(mesh.get_group("shard"), mesh.get_group("replicate")),
        sharding_strategy=torch.distributed.fsdp.ShardingStrategy.HYBRID_SHARD,
    )
    # As in the document, only the shard group is passed: each replica repeats the work.
    config = create_processgroup_config(fsdp_pg=model.process_group)
    optimizer = Muon(
        model.named_parameters(), lr=LR, distributed_config=config, ns_dtype=torch.float32
    )
    train(model, optimizer)
    with FullyShardedDataParallel.summon_full_params(model):
        return full_params(model), optimizer.plan.cost.redundancy


class TestCombinedParallelism:
    @pytest.mark.P1
    @pytest.mark.parametrize("body", [fsdp_tp_combined, hsdp])
    def test_combined(self, body):
        expected = baseline(ns_dtype=torch.float32)
        for params, redundancy in run_processes(4, body):
            assert differences(params, expected, 1e-5) == []
            assert redundancy == 1.0
