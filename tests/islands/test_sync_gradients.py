"""Gradients combined over islands in every step, by the hooks of FSDP2 and DDP. Real processes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from muon_dtensor import Muon, PlanMismatchError
from muon_dtensor.islands import Krum, Median, TrimmedMean, sync_gradients
from tests.support.pool import RankError, run_processes


class Net(nn.Module):
    """Three layers; one is used only on request."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 6)
        self.sometimes = nn.Linear(6, 6)

    def forward(self, x: Tensor, *, uses_all: bool = True) -> Tensor:
        y = self.second(self.first(x).tanh())
        return self.sometimes(y) if uses_all else y


def data(rank: int) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(rank))


def loss_of(model: nn.Module, rank: int, **options: Any) -> Tensor:
    return model(data(rank), **options).square().mean()


def sharded(mesh: Any) -> nn.Module:
    model = Net()
    for layer in (model.first, model.second):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp_gradients(num_islands: int, bad: float, options: dict, uses: tuple) -> tuple:
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(
        "cpu", (num_islands, size // num_islands), mesh_dim_names=("island", "dp")
    )
    model = sharded(mesh["dp"])
    island = mesh["island"].get_local_rank()
    sync = sync_gradients(model, mesh["island"], **options)
    loss = loss_of(model, rank, uses_all=uses[island % len(uses)])
    (loss * (bad if island == 0 else 1.0)).backward()
    return {
        name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None
    }, sync.metrics()


def one_process(ranks: list[int], **options: Any) -> dict[str, Tensor]:
    model = Net()
    (sum(loss_of(model, rank, **options) for rank in ranks) / len(ranks)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("wire", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2), ("int8", 1e-2), ("topk:1", 1e-6)]
)
def test_the_mean_is_that_of_all_ranks(wire, tolerance):
    expected = one_process([0, 1, 2, 3])
    largest = max(float(g.abs().max()) for g in expected.values())
    for grads, metrics in run_processes(4, fsdp_gradients, 2, 1.0, {"wire": wire}, (True,)):
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert torch.allclose(grad, expected[name], atol=tolerance * largest)
        assert metrics["exchanges"] == 3  # two layers, and the root with the third
        assert metrics["sent_nbytes"] > 0


@pytest.mark.parametrize("rule", [TrimmedMean(1), Median(), Krum(1)], ids=str)
@pytest.mark.parametrize("bad", [-1000.0, float("nan")])
def test_a_robust_rule_holds_against_a_wrong_island(rule, bad):
    honest = [one_process([rank]) for rank in range(1, 5)]
    results = run_processes(5, fsdp_gradients, 5, bad, {"reduce": rule}, (True,))
    for grads, metrics in results:
        for name, grad in grads.items():
            stacked = torch.stack([g[name] for g in honest])
            span = float(stacked.max() - stacked.min())
            assert ((grad >= stacked.amin(0) - span) & (grad <= stacked.amax(0) + span)).all()
            assert torch.equal(grad, results[0][0][name])
        assert metrics["dropped"] == (3 if bad != bad else 0)


def test_too_many_gradients_that_are_not_finite_become_nan():
    options = {"reduce": TrimmedMean(0)}
    for grads, metrics in run_processes(2, fsdp_gradients, 2, float("nan"), options, (True,)):
        assert all(g.isnan().all() for g in grads.values())
        assert metrics["failed"] == 3


def test_a_layer_that_no_island_uses_has_no_gradient():
    expected = one_process([0, 1], uses_all=False)
    for grads, _ in run_processes(2, fsdp_gradients, 2, 1.0, {}, (False,)):
        assert grads.keys() == expected.keys()


def test_islands_that_use_other_layers_raise():
    with pytest.raises(RankError, match="have gradients of other parameters"):
        run_processes(2, fsdp_gradients, 2, 1.0, {}, (True, False))


def ddp_gradients(num_islands: int, options: dict) -> tuple:
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(
        "cpu", (num_islands, size // num_islands), mesh_dim_names=("island", "dp")
    )
    model = DistributedDataParallel(Net(), process_group=mesh["dp"].get_group())
    sync = sync_gradients(model, mesh["island"], **options)
    loss_of(model, rank).backward()
    return {name: p.grad for name, p in model.module.named_parameters()}, sync.metrics()


@pytest.mark.parametrize("num_islands", [1, 2, 4])
def test_ddp(num_islands):
    expected = one_process([0, 1, 2, 3])
    for grads, metrics in run_processes(4, ddp_gradients, num_islands, {}):
        for name, grad in grads.items():
            assert torch.allclose(grad, expected[name], atol=1e-6)
        assert metrics["exchanges"] >= 1


def trained(rule: Any, bad: float) -> list[float]:
    """Losses of steps on three islands of two ranks; the first multiplies its loss."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("island", "dp"))
    model = sharded(mesh["dp"])
    island = mesh["island"].get_local_rank()
    sync_gradients(model, mesh["island"], reduce=rule, wire="int8")
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "algorithm": "adamw"},
    ]
    optimizer = Muon(groups, lr=0.02)
    losses = []
    for _ in range(8):
        loss = loss_of(model, rank)
        (loss * (bad if island == 0 else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    shards = [p.detach().to_local() for p in model.parameters()]
    return [*losses, float(sum(s.double().sum() for s in shards))]


def test_training_goes_on_while_one_island_lies():
    results = run_processes(6, trained, TrimmedMean(1), -1000.0)
    for rank, result in enumerate(results):
        assert result[7] < result[0]
        assert result[-1] == results[rank % 2][-1], "islands stay equal"


def test_a_model_without_hooks_raises():
    def message(options: dict) -> str:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("island",))
        with pytest.raises(ValueError, match="needs a model after fully_shard") as error:
            sync_gradients(nn.Linear(2, 2), mesh["island"], **options)
        return str(error.value)

    from tests.support.threads import run_threads

    assert "Linear is neither" in run_threads(1, message, {})[0]


def other_options() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("island", "dp"))
    model = sharded(mesh["dp"])
    wire = "int8" if dist.get_rank() else "float32"
    with pytest.raises(PlanMismatchError, match=r"Islands \[1\] of 2"):
        sync_gradients(model, mesh["island"], wire=wire)


def test_islands_with_other_options_raise():
    run_processes(2, other_options)
