"""Gradients of another dtype than their parameters (`grad_dtype`) give the steps of torch."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from muon_dtensor import Muon
from muon_dtensor.runtime.torch_private import local_part
from tests.support.cases import OVERWRITES_MOMENTA, mesh_of, spread, tensors_like
from tests.support.pool import run_processes
from tests.support.threads import run_threads

R, S0, S1 = Replicate(), Shard(0), Shard(1)
SHAPES = [(8, 6), (7, 12), (9, 9)]
DTYPES = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
]
OPTIONS: list[dict[str, Any]] = [{}, {"nesterov": False}, {"momentum": 0.0}]

CASES = [
    (dtypes, options)
    for dtypes in DTYPES
    for options in OPTIONS
    if not (
        OVERWRITES_MOMENTA and dtypes[1] == torch.bfloat16 and not options.get("nesterov", True)
    )
]


def weights_of(
    dtype: torch.dtype, grad_dtype: torch.dtype | None, place: Any
) -> list[nn.Parameter]:
    params = [nn.Parameter(place(w)) for w in tensors_like(SHAPES, 0, dtype)]
    for param in params:
        param.grad_dtype = grad_dtype
    return params


def stepped(
    layout: Any, dtype: torch.dtype, grad_dtype: torch.dtype, options: dict[str, Any], when: str
) -> list[str]:
    """Take steps and those of the oracle; return names of parameters and momenta that differ."""
    mesh = mesh_of(layout[0])

    def place(tensor: Tensor) -> Tensor:
        return spread(tensor, mesh, layout[1])

    early = grad_dtype if when == "before" else None
    params = weights_of(dtype, early, place)
    oracle_params = weights_of(dtype, None, lambda tensor: tensor)
    if when == "after":  # only the first gradient defines the dtype
        for param in params:
            param.grad_dtype = None
    optimizer = Muon(params, lr=0.1, strategy="owned", **options)
    oracle = torch.optim.Muon(oracle_params, lr=0.1, **options)
    for step in range(3):
        for a, b, grad in zip(params, oracle_params, tensors_like(SHAPES, 1 + step), strict=True):
            a.grad, b.grad = place(grad.to(grad_dtype)), grad.to(grad_dtype)
        optimizer.step()
        oracle.step()
        if step == 1:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer.load_state_dict(saved)
    wrong = []
    for index, (a, b) in enumerate(zip(params, oracle_params, strict=True)):
        momentum = optimizer.state[a]["momentum_buffer"]
        expected = oracle.state[b]["momentum_buffer"]
        assert momentum.dtype == expected.dtype == grad_dtype
        pairs = {"parameter": (a.detach(), b.detach()), "momentum": (momentum, expected)}
        wrong += [
            f"{name} {index}"
            for name, (sharded, full) in pairs.items()
            if not torch.equal(local_part(sharded), local_part(place(full)))
        ]
    return wrong


LAYOUTS = [((1,), (S0,)), ((4,), (S0,)), ((2, 2), (R, S1)), ((2, 2), (S0, S1)), ((4,), (R,))]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("dtypes", "options"), CASES, ids=str)
def test_steps_are_bitwise_torch_s(dtypes, options, when):
    for layout in LAYOUTS:
        num_ranks = torch.Size(layout[0]).numel()
        differences = run_threads(num_ranks, stepped, layout, *dtypes, options, when)
        assert differences == [[]] * num_ranks, layout


def other_dtype_on_one_rank() -> tuple[str, str, bool]:
    mesh = mesh_of((2,))
    param = nn.Parameter(spread(torch.ones(4, 4, dtype=torch.bfloat16), mesh, (S0,)))
    param.grad_dtype = None
    optimizer = Muon([("w", param)])
    dtype = torch.float32 if dist.get_rank() else torch.bfloat16
    param.grad = spread(torch.ones(4, 4, dtype=dtype), mesh, (S0,))
    before = local_part(param.detach()).clone()
    try:
        optimizer.step()
    except Exception as error:
        same = torch.equal(before, local_part(param.detach()))
        return type(error).__name__, str(error), same
    return "", "", False


def test_another_dtype_on_one_rank_is_an_error_on_all():
    for name, text, same in run_processes(2, other_dtype_on_one_rank):
        assert (name, same) == ("MissingGradientError", True)
        assert "a float32 gradient on rank 1" in text


def test_adamw_refuses_what_torch_s_adamw_refuses():
    param = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    param.grad_dtype = torch.float32
    param.grad = torch.ones(4)
    with pytest.raises(RuntimeError):
        torch.optim.AdamW([param]).step()
    optimizer = Muon([{"params": [("w", param)], "algorithm": "adamw"}])
    with pytest.raises(RuntimeError, match="w is bfloat16 and its gradient float32: torch's AdamW"):
        optimizer.step()
    assert torch.equal(param, torch.ones(4, dtype=torch.bfloat16))


def masked_fault() -> tuple[bool, bool]:
    """A step that is masked on all ranks leaves momenta in their dtype, bit for bit."""
    mesh = mesh_of((2,))
    param = nn.Parameter(spread(torch.ones(16, 8).bfloat16(), mesh, (S0,)))
    param.grad_dtype = None
    optimizer = Muon([("w", param)], lr=0.1, deferred_checks=True)
    param.grad = spread(tensors_like([(16, 8)], 1)[0], mesh, (S0,))
    optimizer.step()
    before = local_part(optimizer.state[param]["momentum_buffer"]).clone()
    placements = (R,) if dist.get_rank() == 0 else (S0,)
    param.grad = spread(tensors_like([(16, 8)], 2)[0], mesh, placements)
    optimizer.step()
    after = local_part(optimizer.state[param]["momentum_buffer"])
    return after.dtype == torch.float32, torch.equal(before, after)


def test_a_masked_step_leaves_the_dtype_of_momenta():
    assert run_processes(2, masked_fault) == [(True, True)] * 2


def missing_on_one_rank() -> tuple[torch.dtype, bool]:
    """The gradient counts as zero, in the dtype of the gradients."""
    mesh = mesh_of((2,))
    params = [nn.Parameter(spread(torch.ones(16, 8).bfloat16(), mesh, (S0,))) for _ in range(2)]
    optimizers = []
    for explicit, param in enumerate(params):
        param.grad_dtype = None
        optimizers.append(Muon([("w", param)], lr=0.1, missing_grad="zero"))
        for step in range(2):
            grad = spread(tensors_like([(16, 8)], step)[0], mesh, (S0,))
            param.grad = grad
            if step and dist.get_rank():
                param.grad = torch.zeros_like(grad) if explicit else None
            optimizers[-1].step()
    momenta = [
        local_part(o.state[p]["momentum_buffer"]) for o, p in zip(optimizers, params, strict=True)
    ]
    same = torch.equal(*momenta) and torch.equal(*(local_part(p.detach()) for p in params))
    return momenta[0].dtype, same


def test_a_missing_gradient_counts_as_zero_in_any_dtype():
    assert run_processes(2, missing_on_one_rank) == [(torch.float32, True)] * 2
