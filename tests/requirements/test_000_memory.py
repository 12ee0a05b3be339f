"""000, "Memory Overhead" and "Regression Tests"."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from muon_dtensor import Muon, create_auto_config
from tests.requirements.models import TinyTransformer, batch, differences, full_params
from tests.support.meter import LiveStorages, workspace_nbytes
from tests.support.pool import run_processes


def wrapped(dim: int, layers: int) -> tuple[nn.Module, Muon]:
    model = FullyShardedDataParallel(
        TinyTransformer(dim, layers), use_orig_params=True, device_id=torch.device("cpu")
    )
    config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    return model, Muon(model.named_parameters(), lr=1e-3, distributed_config=config, bucket_mb=0.05)


def step_memory() -> tuple[int, int, int, int]:
    """Return bytes allocated by a step, of the plan's buffers, of a matrix, of all parameters."""
    model, optimizer = wrapped(64, 6)
    model(batch(0, 2, 8, 64)).sum().backward()
    optimizer.step()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    with LiveStorages() as meter:
        meter.ignore(*model.parameters(), *grads, *momenta)
        optimizer.step()
    cost = optimizer.plan.cost
    params_nbytes = sum(2 * spec.matrices[0].numel for spec in optimizer.plan.params)
    return (
        meter.peak_nbytes,
        cost.buffer_nbytes[dist.get_rank()],
        workspace_nbytes(192, 64),
        params_nbytes,
    )


class TestMemory:
    @pytest.mark.P0
    def test_memory_bounded(self):
        """The peak is the plan's buffers and the work space of one matrix, for any layers."""
        for peak, buffers, workspace, params_nbytes in run_processes(4, step_memory):
            assert 0 < peak <= buffers + workspace + 4096
            assert peak < params_nbytes


class TestBackwardCompatibility:
    @pytest.mark.P0
    def test_no_distributed_config_works(self):
        model, torch_model = TinyTransformer(), TinyTransformer()
        optimizer: Any = Muon(model.parameters(), lr=1e-3)
        reference = torch.optim.Muon(torch_model.parameters(), lr=1e-3)
        for net, opt in ((model, optimizer), (torch_model, reference)):
            opt.zero_grad()
            net(batch(0, 8, 12, 16)).sum().backward()
            opt.step()
        assert differences(full_params(model), full_params(torch_model), 0) == []


def hundred_steps() -> tuple[bool, list[str]]:
    """Train like torch.optim.Muon on one process; all ranks have the same data."""
    torch.manual_seed(0)
    model, optimizer = wrapped(16, 2)
    torch.manual_seed(0)
    torch_model = TinyTransformer(16, 2)
    reference = torch.optim.Muon(torch_model.parameters(), lr=1e-3)
    data = batch(0, 8, 12, 16)
    pairs: list[tuple[nn.Module, Any]] = [(model, optimizer), (torch_model, reference)]
    for _ in range(100):
        for net, opt in pairs:
            opt.zero_grad()
            net(data).sum().backward()
            opt.step()
    with FullyShardedDataParallel.summon_full_params(model):
        params = full_params(model)
    finite = all(bool(value.isfinite().all()) for value in params.values())
    return finite, differences(params, full_params(torch_model), 0.0)


class TestNumericalPrecision:
    @pytest.mark.P0
    def test_orthogonalization_preserves_precision(self):
        for finite, different in run_processes(4, hundred_steps):
            assert finite
            assert different == []
