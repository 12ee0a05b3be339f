"""000, "Integration Tests", AMP and torch.compile. Accumulation is in `test_000_correctness`."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel

from muon_dtensor import Muon, create_auto_config, create_devicemesh_config
from tests.requirements.models import (
    TinyTransformer,
    batch,
    differences,
    full_params,
)
from tests.support.pool import run_processes
from tests.support.torchrun import forked_torchrun

DIM = 32


def memorized(wrap: str) -> tuple[float, float]:
    """Return the mean loss over a small data set in the first and in the last epoch."""
    model: nn.Module = TinyTransformer(DIM, layers=2)
    if wrap == "fsdp1":
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    else:
        model = fully_shard(model)
    config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    optimizer = Muon(model.named_parameters(), lr=1e-2, distributed_config=config)
    dataset = [(batch(i, 2, 8, DIM), batch(100 + i, 2, 8, DIM)) for i in range(4)]
    means = []
    for _ in range(100):
        total = 0.0
        for x, target in dataset:
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            total += loss.item()
        means.append(total / len(dataset))
    return means[0], means[-1]


def memorized_as_written() -> tuple[float, float]:
    """Train the document's task at its sizes: ten batches of 16 x 64 x 128, ten epochs."""
    model = FullyShardedDataParallel(
        TinyTransformer(dim=128, layers=4), use_orig_params=True, device_id=torch.device("cpu")
    )
    config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    optimizer = Muon(model.parameters(), lr=1e-2, distributed_config=config)
    torch.manual_seed(42)
    dataset = [torch.randn(16, 64, 128) for _ in range(10)]
    losses = []
    for _ in range(10):
        for x in dataset:
            optimizer.zero_grad()
            loss = (model(x) - x).pow(2).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses[:10]) / 10, sum(losses[-10:]) / 10


class TestEndToEndTraining:
    @pytest.mark.P2
    def test_fsdp_training_converges_as_written(self):
        for initial, final in run_processes(2, memorized_as_written):
            assert final < 0.1 * initial

    @pytest.mark.P0
    @pytest.mark.parametrize("wrap", ["fsdp1", "fsdp2"])
    def test_fsdp_training_converges(self, wrap):
        for initial, final in run_processes(2, memorized, wrap):
            assert final < 0.1 * initial


SCRIPT = """
import sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from muon_dtensor import Muon, create_devicemesh_config
from tests.requirements.models import TinyTransformer, batch, full_params

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
model = fully_shard(TinyTransformer(), mesh=mesh)
optimizer = Muon(model.named_parameters(), distributed_config=create_devicemesh_config(mesh))
for step in range(3):
    model(batch(step, 2, 6, 16)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
params = full_params(model)
if dist.get_rank() == 0:
    torch.save(params, sys.argv[1])
dist.destroy_process_group()
"""


class TestMultiNode:
    @pytest.mark.P1
    def test_hsdp_across_nodes(self, tmp_path):
        """Two torchrun agents, as on two nodes, rendezvous and train with HSDP."""
        script = tmp_path / "train.py"
        script.write_text(SCRIPT)
        forked_torchrun(script, 2, str(tmp_path / "params.pt"), num_nodes=2)
        model = TinyTransformer()
        optimizer = torch.optim.Muon(model.parameters())
        for step in range(3):
            model(batch(step, 2, 6, 16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        params = torch.load(tmp_path / "params.pt")
        assert differences(params, full_params(model), 0) == []


def scaled(break_step: int | None) -> tuple[list[float], dict[str, Tensor], list[float]]:
    """Train with AMP in bfloat16 and a gradient scaler; one step can overflow on one rank only."""
    model = FullyShardedDataParallel(
        TinyTransformer(), use_orig_params=True, device_id=torch.device("cpu")
    )
    config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    optimizer = Muon(model.named_parameters(), lr=1e-3, distributed_config=config, nonfinite="skip")
    scaler = ShardedGradScaler(device="cpu", init_scale=2.0**10, growth_interval=100)
    losses, scales = [], []
    for step in range(5):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(batch(0, 2, 6, 16)).square().mean()
        scaler.scale(loss).backward()
        if step == break_step and dist.get_rank() == 1:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    with FullyShardedDataParallel.summon_full_params(model):
        return losses, full_params(model), scales


class TestGradScaler:
    @pytest.mark.P1
    def test_amp_trains(self):
        ranks = run_processes(2, scaled, None)
        for losses, params, scales in ranks:
            assert losses[-1] < losses[0]
            assert scales == [2.0**10] * 5
            assert differences(params, ranks[0][1], 0) == []

    @pytest.mark.P1
    def test_an_overflow_skips_the_step_on_all_ranks(self):
        ranks = run_processes(2, scaled, 2)
        for losses, params, scales in ranks:
            assert scales[1:3] == [2.0**10, 2.0**9]
            assert losses[3] == losses[2]
            assert losses[4] < losses[3]
            assert differences(params, ranks[0][1], 0) == []


def compiled() -> tuple[list[str], float, float]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    wrapped = DistributedDataParallel(TinyTransformer(layers=1))
    fast: Any = torch.compile(wrapped)
    optimizer = Muon(
        fast.named_parameters(),
        lr=1e-3,
        ns_dtype=torch.float32,
        distributed_config=create_devicemesh_config(mesh),
    )
    model = TinyTransformer(layers=1)
    reference = Muon(model.named_parameters(), lr=1e-3, ns_dtype=torch.float32)
    losses = []
    for _ in range(3):
        for net, opt in ((fast, optimizer), (model, reference)):
            loss = net(batch(0, 2, 6, 16)).square().mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
        losses.append(loss.item())
    return differences(full_params(wrapped), full_params(model), 1e-5), losses[0], losses[-1]


@pytest.mark.slow
@pytest.mark.P1
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model():
    for differing, first, last in run_processes(2, compiled):
        assert differing == []
        assert last < first
