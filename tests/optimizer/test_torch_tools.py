"""torch's tools around an optimizer: schedulers, scalers, hooks, compilers."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim import lr_scheduler as schedulers

from muon_dtensor import CheckpointError, Muon
from muon_dtensor.runtime.torch_private import local_part
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.pool import run_processes
from tests.support.threads import run_threads

SHAPES = [(6, 4), (4, 8), (5,)]


def pair(kind: str = "ours", lr: float = 0.1) -> tuple[list[nn.Parameter], Any]:
    """Return two matrices and a vector with an optimizer; torch's has only the matrices."""
    params = [nn.Parameter(w) for w in tensors_like(SHAPES, 0)]
    if kind == "torch":
        return params, torch.optim.Muon(params[:2], lr=lr)
    groups: list[Any] = [{"params": params[:2]}, {"params": params[2:], "algorithm": "adamw"}]
    return params, Muon(groups, lr=lr)


def set_grads(params: list[nn.Parameter], step: int) -> None:
    for param, grad in zip(params, tensors_like(SHAPES, 1 + step), strict=True):
        param.grad = grad


SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.5, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.2, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.3, total_steps=9),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_torch_works_as_with_torch_s_muon(name):
    results = []
    for kind in ("ours", "torch"):
        params, optimizer = pair(kind)
        scheduler = SCHEDULERS[name](optimizer)
        values = []
        for step in range(6):
            set_grads(params, step)
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            group = optimizer.param_groups[0]
            values.append((group["lr"], group["momentum"]))
        results.append((values, [p.detach() for p in params[:2]]))
    assert results[0][0] == results[1][0]
    assert len({lr for lr, _ in results[0][0]}) > 1
    assert all(map(torch.equal, results[0][1], results[1][1]))


def test_swa_averages_and_its_scheduler():
    params, optimizer = pair()
    model = nn.ParameterList(params)
    average = torch.optim.swa_utils.AveragedModel(model)
    scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05)
    history = []
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
        scheduler.step()
        average.update_parameters(model)
        history.append([p.detach().clone() for p in params])
    for mean, *values in zip(average.parameters(), *history, strict=True):
        torch.testing.assert_close(mean.detach(), torch.stack(values).mean(0))
    assert optimizer.param_groups[0]["swa_lr"] == 0.05


def scaled(bad_step: int) -> tuple[list[float], bool]:
    """Return the scales of three steps, and whether the result equals that without a scaler."""
    mesh = mesh_of((4,))
    shapes = SHAPES[:2]

    def fresh() -> tuple[list[nn.Parameter], Muon]:
        params = [nn.Parameter(spread(w, mesh, (Shard(0),))) for w in tensors_like(shapes, 0)]
        return params, Muon(params, lr=0.1)

    params, optimizer = fresh()
    plain, oracle = fresh()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scales = []
    for step in range(3):
        scaler.scale(torch.ones(()))
        grads = tensors_like(shapes, 1 + step)
        for param, other, grad in zip(params, plain, grads, strict=True):
            scaled_grad = grad * scaler.get_scale()
            if step == bad_step:
                scaled_grad[3, 0] = torch.inf  # on one rank's shard
            param.grad = spread(scaled_grad, mesh, (Shard(0),))
            other.grad = spread(grad, mesh, (Shard(0),))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step != bad_step:
            oracle.step()
        scales.append(scaler.get_scale())
    same = all(
        torch.equal(local_part(a), local_part(b)) for a, b in zip(params, plain, strict=True)
    )
    return scales, same


@pytest.mark.parametrize(("bad_step", "scales"), [(-1, [8.0, 8.0, 8.0]), (1, [8.0, 4.0, 4.0])])
def test_a_grad_scaler_skips_overflows_on_all_ranks(bad_step, scales):
    assert run_processes(4, scaled, bad_step) == [(scales, True)] * 4


def test_hooks_closures_and_zero_grad():
    params, optimizer = pair()
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    set_grads(params, 0)
    optimizer.step()
    optimizer.state_dict()
    assert calls == ["before", "after", "saved"]
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in params)
    before = [p.detach().clone() for p in params[:2]]
    optimizer.step()
    assert not any(map(torch.equal, before, params[:2])), "the momentum still moves them"
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_a_group_added_later_is_stepped_saved_and_loaded():
    params, optimizer = pair()
    extra = nn.Parameter(torch.ones(3, 5))
    optimizer.add_param_group({"params": [extra], "lr": 0.5, "normuon_beta": 0.9})
    set_grads(params, 0)
    extra.grad = torch.randn(3, 5)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    fresh_params, fresh = pair()
    with pytest.raises(CheckpointError, match=r"\[2, 1, 1\] parameters, the optimizer of \[2, 1\]"):
        fresh.load_state_dict(saved)
    other = nn.Parameter(torch.ones(3, 5))
    fresh.add_param_group({"params": [other]})
    fresh.load_state_dict(saved)
    assert fresh.param_groups[2]["normuon_beta"] == 0.9
    for target, source in zip([*fresh_params, other], [*params, extra], strict=True):
        target.data.copy_(source)
    for group in (params, fresh_params):
        set_grads(group, 1)
    other.grad = extra.grad.clone()
    optimizer.step()
    fresh.step()
    assert all(map(torch.equal, [*fresh_params, other], [*params, extra]))


def test_copies_and_pickles_step_like_the_original():
    params, optimizer = pair()
    set_grads(params, 0)
    optimizer.step()
    twins = [pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)]
    results = []
    for stepper in (optimizer, *twins):
        params = [p for group in stepper.param_groups for p in group["params"]]
        set_grads(params, 1)
        stepper.step()
        results.append(params)
    for stepped in results[1:]:
        assert all(map(torch.equal, stepped, results[0]))


def test_a_compiled_step_is_the_eager_one():
    """torch.compile must not compile the step, which must round as torch.optim.Muon."""
    results = []
    for compiles in (False, True):
        params, optimizer = pair()
        step = torch.compile(optimizer.step) if compiles else optimizer.step
        for index in range(2):
            set_grads(params, index)
            step()
        results.append(params)
    assert all(map(torch.equal, *results))


def sharded_after_the_optimizer(steps_before: int) -> str:
    """Replace parameters of the groups by shards, as Accelerate does."""
    mesh = mesh_of((4,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Linear(12, 4, bias=False))
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer = Muon(model.named_parameters(), lr=0.1)
    for _ in range(steps_before):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    fully_shard(model, mesh=mesh)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    grads = tensors_like([tuple(w.shape) for w in weights], 1)
    for param, grad in zip(model.parameters(), grads, strict=True):
        param.grad = spread(grad, mesh, (Shard(0),))
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    oracle_params = [nn.Parameter(w) for w in weights]
    oracle = torch.optim.Muon(oracle_params, lr=0.1)
    for param, grad in zip(oracle_params, grads, strict=True):
        param.grad = grad
    oracle.step()
    same = all(
        torch.equal(local_part(p.detach()), local_part(spread(q.detach(), mesh, (Shard(0),))))
        for p, q in zip(model.parameters(), oracle_params, strict=True)
    )
    assert all(isinstance(v["momentum_buffer"], DTensor) for v in optimizer.state.values())
    return "same" if same else "different"


def test_parameters_can_be_replaced_before_the_first_step():
    assert run_threads(4, sharded_after_the_optimizer, 0) == ["same"] * 4


def test_parameters_replaced_after_a_step_raise():
    for text in run_threads(4, sharded_after_the_optimizer, 1):
        assert "parameters were replaced after the optimizer had stepped" in text


@pytest.mark.parametrize("hints", [{"fused": True}, {"foreach": False}, {"fused": None}], ids=str)
def test_implementation_flags_are_accepted_and_removed(hints):
    params = [nn.Parameter(w) for w in tensors_like(SHAPES, 0)]
    optimizer = Muon([{"params": params[:2], **hints}])
    assert not hints.keys() & optimizer.param_groups[0].keys()
