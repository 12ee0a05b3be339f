"""Ranks compare before a step: any difference raises on every rank, and nothing changes."""

import contextlib
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from muon_dtensor import Muon
from muon_dtensor.errors import NonFiniteGradientError
from muon_dtensor.optimizer.options import READ_BY_ADAMW, READ_BY_MUON
from muon_dtensor.runtime import consistency as agreement
from muon_dtensor.runtime import gradients
from muon_dtensor.runtime import process_groups as groups
from muon_dtensor.runtime.gradients import GradientCheck
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.options import OTHER_VALUES
from tests.support.pool import run_processes

R, S0, S1 = Replicate(), Shard(0), Shard(1)
SHAPES = [(8, 6), (7, 5), (6, 9)]


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def snapshot(optimizer: Muon) -> list[torch.Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [value for p in params for value in optimizer.state[p].values()]
    return [local(t).detach().clone() for t in (*params, *states)]


def try_step(optimizer: Muon, step: Callable[[], Any] | None = None) -> tuple[str, str, bool]:
    """Return error type and text of a step, and whether all values are unchanged."""
    before = snapshot(optimizer)
    try:
        (step or optimizer.step)()
    except Exception as error:
        name, text = type(error).__name__, str(error)
    else:
        name, text = "", ""
    same = all(torch.equal(a, b) for a, b in zip(before, snapshot(optimizer), strict=True))
    return name, text, same


def make_optimizer(
    shape: tuple[int, ...] = (4,), placements: Any = (S0,), adamw: bool = False, **options: Any
) -> tuple[list[nn.Parameter], Muon, Any]:
    mesh = mesh_of(shape)
    params = [nn.Parameter(spread(w, mesh, placements)) for w in tensors_like(SHAPES, 0)]
    named_params = [(f"layers.{i}.weight", p) for i, p in enumerate(params)]
    groups: list[dict[str, Any]] = [{"params": named_params}]
    if adamw:
        norm = nn.Parameter(spread(torch.ones(9), mesh, (R,) * len(shape)))
        params.append(norm)
        groups.append({"params": [("norm.weight", norm)], "algorithm": "adamw"})
    give_gradients(params, mesh, placements)
    return params, Muon(groups, **options), mesh


def give_gradients(params: list[nn.Parameter], mesh: Any, placements: Any, seed: int = 1) -> None:
    for param, grad in zip(params, tensors_like(SHAPES, seed), strict=False):
        param.grad = spread(grad, mesh, placements)
    for param in params[len(SHAPES) :]:
        param.grad = spread(torch.ones(param.shape), mesh, param.placements)


def different_order() -> Any:
    mesh = mesh_of((2, 2))
    params = [nn.Parameter(spread(w, mesh, (S0, S1))) for w in tensors_like(SHAPES, 0)]
    named_params = [(f"layers.{i}.weight", p) for i, p in enumerate(params)]
    if dist.get_rank() == 2:
        named_params[1], named_params[2] = named_params[2], named_params[1]
    give_gradients(params, mesh, (S0, S1))
    outcome = try_step(Muon(named_params))
    return (*outcome, sum(map(len, groups._own.values())))


def test_different_order_of_parameters():
    for name, text, same, num_groups in run_processes(4, different_order):
        assert (name, same) == ("PlanMismatchError", True)
        assert num_groups == 0, "no process group is made for plans that differ"
        assert "from parameter 1 on" in text
        assert "rank 2: layers.2.weight [6, 9]" in text
        assert "3 ranks (0, 1, 3): layers.1.weight [7, 5]" in text


def different_twice() -> Any:
    mesh = mesh_of((2, 2))
    shape = (8, 6) if dist.get_rank() else (8, 5)
    param = nn.Parameter(spread(torch.ones(shape), mesh, (S0, S1)))
    param.grad = spread(torch.ones(shape), mesh, (S0, S1))
    optimizer = Muon([("w", param)])
    return [(*try_step(optimizer), sum(map(len, groups._own.values()))) for _ in range(2)]


def test_different_plans_raise_in_every_step_and_create_no_group():
    for outcomes in run_processes(4, different_twice):
        for name, text, same, num_groups in outcomes:
            assert num_groups == 0
            assert (name, same) == ("PlanMismatchError", True)
            assert "w [8, 5]" in text


def another_dtype(algorithm: str) -> Any:
    mesh = mesh_of((4,))
    dtype = torch.bfloat16 if dist.get_rank() == 3 else torch.float32
    param = nn.Parameter(spread(torch.ones(8, 6, dtype=dtype), mesh, (S0,)))
    param.grad = spread(torch.ones(8, 6, dtype=dtype), mesh, (S0,))
    return try_step(Muon([{"params": [("w", param)], "algorithm": algorithm}]))


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_another_dtype_on_one_rank_raises_on_all(algorithm):
    for name, text, same in run_processes(4, another_dtype, algorithm):
        assert (name, same) == ("PlanMismatchError", True)
        assert "w [8, 6] bfloat16" in text


def different_plan_options() -> Any:
    _, optimizer, _ = make_optimizer(prefetch_count=dist.get_rank() % 2)
    return try_step(optimizer)


def test_different_plan_options():
    for name, text, same in run_processes(4, different_plan_options):
        assert (name, same) == ("PlanMismatchError", True)
        assert "prefetch_count" in text


def different_lr(later: bool) -> Any:
    params, optimizer, mesh = make_optimizer(
        (2, 2), (R, S0), lr=0.1 if dist.get_rank() != 1 or later else 0.2
    )
    if later:
        optimizer.step()
        give_gradients(params, mesh, (R, S0))
        if dist.get_rank() == 1:
            optimizer.param_groups[0]["lr"] = 0.2
    return try_step(optimizer)


@pytest.mark.parametrize("later", [False, True])
def test_different_hyperparameters(later):
    for name, text, same in run_processes(4, different_lr, later):
        assert (name, same) == ("PlanMismatchError", True)
        assert "rank 1: param group 0:" in text
        assert "lr=0.2" in text
        assert "lr=0.1" in text


CHANGED_VALUES = {
    **OTHER_VALUES,
    "algorithm": "adamw",
    "betas": (0.8, 0.99),
    "rounding_step": 3,
}

READ_BY = {
    "muon": CHANGED_VALUES.keys() - {"betas"},
    "adamw": {"algorithm", "lr", "betas", "eps", "weight_decay", "capturable"},
}

OF_GROUPS = [
    *((0, name) for name in sorted(READ_BY["muon"] - {"weight_rounding"})),
    *((1, name) for name in sorted(READ_BY["adamw"] - {"algorithm"})),
]


def with_another_option(index: int, name: str) -> Any:
    params, optimizer, mesh = make_optimizer((2, 2), (R, S0), adamw=True)
    optimizer.step()
    give_gradients(params, mesh, (R, S0), seed=2)
    if dist.get_rank() == 2:
        optimizer.param_groups[index][name] = CHANGED_VALUES[name]
    return try_step(optimizer)


@pytest.mark.parametrize(("index", "name"), OF_GROUPS)
def test_every_option_that_a_step_reads_is_compared(index, name):
    for error, text, same in run_processes(4, with_another_option, index, name):
        assert error == "PlanMismatchError"
        # the rank that changed it has created the state of the other plan
        assert same or name in ("algorithm", "normuon_beta", "momentum_bits")
        assert name in text or name in ("algorithm", "normuon_beta", "orthogonalizer"), text


def test_another_rounding_on_one_rank_raises_on_all():
    """These weights are in float32, so that rank raises its own error."""
    outcomes = run_processes(4, with_another_option, 0, "weight_rounding")
    assert outcomes[2][0] == "GroupOptionError"
    assert all(outcomes[rank][0] for rank in range(4))
    assert all("bfloat16 weights" in text or "rank 2" in text for _, text, _ in outcomes), outcomes


def test_all_options_are_covered_above():
    assert set(READ_BY_MUON) == READ_BY["muon"]
    assert set(READ_BY_ADAMW) == READ_BY["adamw"]


def missing_on(ranks: tuple[int, ...], shape: Any, placements: Any, options: Any) -> Any:
    params, optimizer, mesh = make_optimizer(shape, placements, adamw=True, **options)
    optimizer.step()
    give_gradients(params, mesh, placements, seed=2)
    if dist.get_rank() in ranks:
        params[1].grad = None
        params[3].grad = None
    first = try_step(optimizer)
    give_gradients(params, mesh, placements, seed=3)
    optimizer.step()
    return first, local(params[1]).detach(), local(params[3]).detach()


@pytest.mark.parametrize(
    ("shape", "placements"), [((4,), (S0,)), ((2, 2), (R, S0)), ((2, 2), (S0, S1))], ids=str
)
def test_a_gradient_missing_on_some_ranks_is_named(shape, placements):
    for (name, text, same), *_ in run_processes(4, missing_on, (1, 3), shape, placements, {}):
        assert (name, same) == ("MissingGradientError", True)
        assert "layers.1.weight: no gradient on 2 ranks (1, 3)" in text
        assert "norm.weight: no gradient on 2 ranks (1, 3)" in text
        assert "layers.0" not in text


def missing_everywhere(shape: Any, placements: Any) -> Any:
    params, optimizer, _ = make_optimizer(shape, placements, adamw=True)
    params[1].grad = params[3].grad = None
    before = snapshot(optimizer)
    optimizer.step()
    after = snapshot(optimizer)
    return [torch.equal(a, b) for a, b in zip(before, after, strict=True)]


@pytest.mark.parametrize(("shape", "placements"), [((3,), (S1,)), ((2, 2), (R, S0))], ids=str)
def test_a_gradient_missing_everywhere_does_not_change_the_parameter(shape, placements):
    num_ranks = torch.Size(shape).numel()
    for same in run_processes(num_ranks, missing_everywhere, shape, placements):
        # parameters, then momenta of the first three, then step, exp_avg, exp_avg_sq
        assert same == [False, True, False, True, False, True, False, True, True, True]


def zero_or_zeros(explicit: bool) -> Any:
    params, optimizer, _ = make_optimizer(adamw=True, missing_grad="zero")
    optimizer.step()
    if dist.get_rank() == 2:
        zeros = [
            DTensor.from_local(local(p).detach() * 0, p.device_mesh, p.placements) for p in params
        ]
        params[0].grad = zeros[0] if explicit else None
        params[3].grad = zeros[3] if explicit else None
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("muon_dtensor").addHandler(handler)
    optimizer.step()
    optimizer.step()
    return snapshot(optimizer), [r for r in records if "counted as zero" in r]


def test_a_missing_gradient_may_count_as_zero():
    expected = run_processes(4, zero_or_zeros, True)
    outcomes = run_processes(4, zero_or_zeros, False)
    for (values, _), (expected_values, _) in zip(outcomes, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(values, expected_values, strict=True))
    first, *later_ranks = [warnings for _, warnings in outcomes]
    assert len(first) == 1
    assert "layers.0.weight, norm.weight" in first[0]
    assert later_ranks == [[]] * 3  # with the same message


def non_finite(value: float, mode: str, which: int, shape: Any, placements: Any) -> Any:
    params, optimizer, mesh = make_optimizer(shape, placements, adamw=True, nonfinite=mode)
    optimizer.step()
    if dist.get_rank() == 1:
        local(params[which].grad).view(-1)[0] = value
    first = try_step(optimizer)
    finite_after = all(bool(t.isfinite().all()) for t in snapshot(optimizer))
    give_gradients(params, mesh, placements, seed=3)
    clean = try_step(optimizer)
    return first, finite_after, clean


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 3], ids=["muon", "adamw"])
@pytest.mark.parametrize(("shape", "placements"), [((4,), (S0,)), ((2, 2), (R, S0))], ids=str)
def test_non_finite_gradients(value, which, shape, placements):
    for mode, name in (("raise", "NonFiniteGradientError"), ("skip", "")):
        outcomes = run_processes(4, non_finite, value, mode, which, shape, placements)
        for first, finite_after, clean in outcomes:
            assert first[0] == name
            assert first[2], "nothing changes on any rank"
            assert finite_after
            assert clean[0] == ""
            assert not clean[2], "the next step is an ordinary one"
        if mode == "raise":
            assert "on this rank in" in outcomes[1][0][1]
            assert "on another rank" in outcomes[2][0][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_finite_gradients_whose_sum_overflows_are_finite(dtype):
    """Sums are checked first; if one is not finite, the extremes decide."""
    param = nn.Parameter(torch.ones(16, 16, dtype=dtype))
    param.grad = torch.full((16, 16), torch.finfo(dtype).max, dtype=dtype)
    Muon([param], lr=0.1).step()
    assert not torch.equal(param, torch.ones(16, 16, dtype=dtype))
    param.grad[3, 3] = -math.inf
    with pytest.raises(NonFiniteGradientError):
        Muon([param], lr=0.1).step()


def test_nan_propagates_as_in_torch():
    outcomes = run_processes(4, non_finite, math.nan, "propagate", 0, (4,), (S0,))
    assert all(not finite_after for _, finite_after, _ in outcomes)
    assert [first[0] for first, _, _ in outcomes] == [""] * 4


def nan_on_the_smaller_mesh() -> Any:
    """A router only on dp; its NaN must stop ranks that do not hold the router."""
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dense = nn.Parameter(spread(tensors_like([(8, 8)], 0)[0], world, (S0, S1)))
    router = nn.Parameter(spread(tensors_like([(6, 4)], 0)[0], world["dp"], (S0,)))
    optimizer = Muon([("dense", dense), ("router", router)])
    dense.grad = spread(torch.ones(8, 8), world, (S0, S1))
    router.grad = spread(torch.ones(6, 4), world["dp"], (S0,))
    if dist.get_rank() == 2:
        local(router.grad)[0, 0] = math.nan
    nan = try_step(optimizer)
    router.grad = spread(torch.ones(6, 4), world["dp"], (S0,)) if dist.get_rank() != 2 else None
    return nan, try_step(optimizer)


def test_a_fault_on_a_smaller_mesh_stops_the_larger():
    for nan, missing in run_processes(4, nan_on_the_smaller_mesh):
        assert (nan[0], nan[2]) == ("NonFiniteGradientError", True)
        assert (missing[0], missing[2]) == ("MissingGradientError", True)


def sparse_gradient() -> Any:
    mesh = mesh_of((2,))
    plain = nn.Embedding(6, 4, sparse=True)
    sharded = nn.Parameter(spread(torch.ones(6, 4), mesh, (S0,)))
    optimizer = Muon([("table", plain.weight), ("sharded", sharded)])
    sharded.grad = spread(torch.ones(6, 4), mesh, (S0,))
    if dist.get_rank() == 0:
        plain(torch.tensor([1, 2])).sum().backward()
    return try_step(optimizer)


def test_a_sparse_gradient_on_one_rank_stops_all():
    (name, text, same), (other_name, other_text, other_same) = run_processes(2, sparse_gradient)
    assert (name, same) == ("RuntimeError", True)
    assert "table has a sparse gradient" in text
    assert (other_name, other_same) == ("RuntimeError", True)
    assert "Another rank could not take this step" in other_text


@pytest.mark.parametrize(
    ("device", "shard_device", "deferred_checks", "missing_grad", "is_deferred"),
    [
        ("cpu", "cpu", None, "raise", False),
        ("cpu", "cpu", True, "raise", True),
        ("cuda", "meta", None, "raise", True),
        ("cuda", "meta", False, "raise", False),
        ("cuda", "meta", None, "zero", False),
        ("cuda", "cpu", None, "raise", False),
        ("cuda", "cpu", True, "raise", False),
    ],
    ids=[
        *("host", "requested-on-host", "device", "off-on-device", "zeros-for-missing"),
        *("offloaded", "requested-and-offloaded"),
    ],
)
def test_where_checks_are_deferred(
    device, shard_device, deferred_checks, missing_grad, is_deferred
):
    """By default on a device, unless missing gradients count as zero or weights are offloaded.

    A shard on the meta device stands for one on a GPU.
    """
    agreement = Muon([nn.Parameter(torch.ones(4, 3))])._planned_step.agreement
    gradient_check = GradientCheck(
        {"w": nn.Parameter(torch.ones(4, 3, device=shard_device))},
        agreement,
        device=torch.device(device),
        missing_grad=missing_grad,
        nonfinite="raise",
        deferred_checks=deferred_checks,
    )
    assert gradient_check.is_deferred is is_deferred


def different_checks() -> tuple[str, str, bool]:
    params, optimizer, mesh = make_optimizer(
        (4,), (S0,), deferred_checks=True if dist.get_rank() == 1 else None
    )
    give_gradients(params, mesh, (S0,), seed=2)
    return try_step(optimizer)


def test_different_deferred_checks_raise_on_every_rank():
    for name, text, unchanged in run_processes(4, different_checks):
        assert name == "PlanMismatchError"
        assert "deferred_checks=True" in text
        assert unchanged


def masked(value: float, missing: bool, mode: str) -> Any:
    """The code path of a GPU on the host: results stay unread, and the step is masked."""
    params, optimizer, mesh = make_optimizer(
        (2, 2), (R, S0), adamw=True, nonfinite=mode, deferred_checks=True
    )
    optimizer.step()
    give_gradients(params, mesh, (R, S0), seed=2)
    if dist.get_rank() == 1:
        if missing:
            params[1].grad = None
        local(params[0].grad).view(-1)[0] = value
    first = try_step(optimizer)
    give_gradients(params, mesh, (R, S0), seed=3)
    second = try_step(optimizer)
    third = try_step(optimizer)
    return first, second, third, try_step(optimizer, optimizer.state_dict)


@pytest.mark.parametrize("missing", [False, True])
def test_a_masked_step_changes_nothing_and_raises_later(missing):
    value = 1.0 if missing else math.nan
    name = "MissingGradientError" if missing else "NonFiniteGradientError"
    for first, second, third, saved in run_processes(4, masked, value, missing, "raise"):
        assert first == ("", "", True)
        assert (second[0], second[2]) == (name, True)
        assert "changed nothing" in second[1]
        assert third[0] == saved[0] == ""
        assert not third[2]


def masked_and_saved_on_one_rank(then: str) -> Any:
    params, optimizer, mesh = make_optimizer((2, 2), (R, S0), adamw=True, deferred_checks=True)
    optimizer.step()
    give_gradients(params, mesh, (R, S0), seed=2)
    if dist.get_rank() == 1:
        local(params[0].grad).view(-1)[0] = math.nan
    optimizer.step()
    if then == "save":
        try_step(optimizer, optimizer.state_dict) if dist.get_rank() == 0 else None
    elif then == "add":
        optimizer.add_param_group({"params": [("added", nn.Parameter(torch.ones(3, 3)))]})
    elif then == "load":
        with contextlib.suppress(NonFiniteGradientError):
            optimizer.state_dict()
        optimizer.load_state_dict(torch.optim.Optimizer.state_dict(optimizer))
    give_gradients(params, mesh, (R, S0), seed=3)
    return try_step(optimizer)[0]


@pytest.mark.parametrize(
    ("then", "name"),
    [("save", "NonFiniteGradientError"), ("add", "NonFiniteGradientError"), ("load", "")],
)
def test_the_fault_of_a_masked_step_raises_in_the_next_step_of_every_rank(then, name):
    """Also if one rank alone saves its state, or a group is added; not after loading."""
    assert run_processes(4, masked_and_saved_on_one_rank, then) == [name] * 4


def flag_on_device(grads: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Compute `non_finite_flag` as on a GPU: the host reads nothing."""
    extremes = torch.stack([grad.abs().amax() for grad in grads])
    return (~extremes.isfinite()).any().to(torch.int64)


class HostReads(TorchDispatchMode):
    """Counts operators that make the host wait for a value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "equal"):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("adamw", [False, True])
def test_a_masked_step_reads_only_the_copy_of_the_last_outcome(adamw, monkeypatch):
    """In a plain loop, without a state_dict() before the step, which would empty the queue."""
    monkeypatch.setattr(gradients, "non_finite_flag", flag_on_device)
    params = [nn.Parameter(t) for t in tensors_like([(6, 4), (5, 7)], 0)]
    groups: list[Any] = [{"params": params[:1]}, {"params": params[1:]}]
    groups[1]["algorithm"] = "adamw" if adamw else "muon"
    optimizer = Muon(groups, deferred_checks=True)
    for step in range(3):
        for param, grad in zip(params, tensors_like([(6, 4), (5, 7)], step), strict=True):
            param.grad = grad
        with HostReads() as reads:
            optimizer.step()
        assert (reads.names == []) is (step > 0), step


def test_a_masked_step_may_be_skipped_silently():
    for first, second, _, saved in run_processes(4, masked, math.nan, False, "skip"):
        assert first == ("", "", True)
        assert second[0] == saved[0] == ""
        assert not second[2]


def masked_or_not(deferred_checks: bool) -> Any:
    params, optimizer, mesh = make_optimizer(
        (2, 2), (S0, S1), adamw=True, deferred_checks=deferred_checks
    )
    for step in range(3):
        give_gradients(params, mesh, (S0, S1), seed=step)
        optimizer.step()
    return snapshot(optimizer)


def test_a_masked_good_step_equals_an_unmasked_one():
    for masked_values, expected in zip(
        run_processes(4, masked_or_not, False), run_processes(4, masked_or_not, True), strict=True
    ):
        for a, b in zip(masked_values[:3], expected[:3], strict=True):
            assert torch.equal(a, b)  # Muon: the same operations
        for a, b in zip(masked_values[3:], expected[3:], strict=True):
            torch.testing.assert_close(a, b)  # AdamW: torch's fused kernel


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "normuon": {"normuon_beta": 0.9},
    "cautious": {"cautious_weight_decay": True, "weight_decay": 0.5},
    "bfloat16-momentum": {"momentum_dtype": torch.bfloat16},
    "bfloat16": {},
    "bfloat16-stochastic": {"weight_rounding": "stochastic"},
    "bfloat16-compensated": {"weight_rounding": "compensated"},
}


def skipping(name: str, shape: Any, placements: Any, *, masks: bool) -> list[list[torch.Tensor]]:
    """Return all values after a good step, a bad one that is skipped, and two good ones."""
    mesh = mesh_of(shape)
    dtype = torch.float32
    if name == "bfloat16" or "weight_rounding" in OPTIONS[name]:
        dtype = torch.bfloat16
    shapes = [(12, 8), (8, 12), (7, 5)]
    params = [nn.Parameter(spread(w, mesh, placements)) for w in tensors_like(shapes, 0, dtype)]
    groups = [{"params": params[:2]}, {"params": params[2:], "algorithm": "adamw"}]
    optimizer = Muon(groups, lr=0.1, nonfinite="skip", deferred_checks=masks, **OPTIONS[name])
    history = []
    for step in range(4):
        for param, grad in zip(params, tensors_like(shapes, 1 + step, dtype), strict=True):
            param.grad = spread(grad, mesh, placements)
        if step == 1 and dist.get_rank() == 3:
            local(params[0].grad).view(-1)[0] = math.inf
        optimizer.step()
        state = [optimizer.state[p][key] for p in params for key in sorted(optimizer.state[p])]
        history.append([local(value).clone() for value in (*(p.detach() for p in params), *state)])
    return history


@pytest.mark.parametrize(
    ("shape", "placements"), [((2, 2), (R, S0)), ((2, 2), (S0, S1)), ((4,), (R,))], ids=str
)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_masked_step_leaves_all_state_as_a_skipped_one_does(name, shape, placements):
    masked_ones = run_processes(4, partial(skipping, masks=True), name, shape, placements)
    skipped = run_processes(4, partial(skipping, masks=False), name, shape, placements)
    for history, skipped_history in zip(masked_ones, skipped, strict=True):
        assert all(map(torch.equal, history[0], history[1])), "the bad step changes nothing"
        assert not all(map(torch.equal, history[1], history[2]))
        for values, expected in zip(history, skipped_history, strict=True):
            for a, b in zip(values, expected, strict=True):
                torch.testing.assert_close(a, b)  # AdamW: torch's fused kernel


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_a_single_rank_masks_its_steps_too(mode):
    """The code path of a single GPU, on the host."""
    params = [nn.Parameter(t) for t in tensors_like([(6, 4), (5, 7)], 0)]
    optimizer = Muon(params, nonfinite=mode, deferred_checks=True)
    for param, grad in zip(params, tensors_like([(6, 4), (5, 7)], 1), strict=True):
        param.grad = grad
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert not any(map(torch.equal, before, params))
    before = [param.detach().clone() for param in params]
    params[1].grad[0, 0] = math.inf  # type: ignore[index]
    optimizer.step()
    assert all(map(torch.equal, before, params)), "masked"
    params[1].grad[0, 0] = 1.0  # type: ignore[index]
    if mode == "raise":
        with pytest.raises(NonFiniteGradientError, match="an earlier step"):
            optimizer.step()
    optimizer.step()
    assert not any(map(torch.equal, before, params))


def group_added_later(shape: Any, placements: Any) -> Any:
    params, optimizer, mesh = make_optimizer(shape, placements)
    optimizer.step()
    give_gradients(params, mesh, placements, seed=2)
    if dist.get_rank() == 1:
        more = nn.Parameter(spread(torch.ones(4, 4), mesh, placements))
        optimizer.add_param_group({"params": [("more", more)]})
    return try_step(optimizer)


@pytest.mark.parametrize(("shape", "placements"), [((4,), (S0,)), ((2, 2), (S0, S1))], ids=str)
def test_a_group_added_on_one_rank_raises_on_all(shape, placements):
    for name, text, same in run_processes(4, group_added_later, shape, placements):
        assert (name, same) == ("PlanMismatchError", True)
        assert "rank 1: more [4, 4]" in text
        assert "no further parameter" in text


def different_modes(option: str, value: str) -> Any:
    params, optimizer, _ = make_optimizer(**({option: value} if dist.get_rank() == 2 else {}))
    if dist.get_rank() == 1:
        params[0].grad = None
    return try_step(optimizer)


@pytest.mark.parametrize(("option", "value"), [("missing_grad", "zero"), ("nonfinite", "skip")])
def test_different_gradient_options_raise_on_all(option, value):
    for name, text, same in run_processes(4, different_modes, option, value):
        assert (name, same) == ("PlanMismatchError", True)
        assert "rank 2: optimizer:" in text
        assert f"{option}={value}" in text


def order_over_two_meshes() -> Any:
    mesh = mesh_of((2, 2))
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    named_params = [
        ("dense", nn.Parameter(spread(torch.ones(8, 8), mesh, (S0, S1)))),
        ("expert", nn.Parameter(spread(torch.ones(4, 8), flat, (S0,)))),
    ]
    return try_step(Muon(named_params[::-1] if dist.get_rank() == 2 else named_params))


def test_different_order_over_two_meshes_of_the_same_ranks():
    for name, text, same in run_processes(4, order_over_two_meshes):
        assert (name, same) == ("PlanMismatchError", True)
        assert "rank 2: expert" in text


def crossing_meshes(kind: str) -> Any:
    """One parameter on rows of ranks, one on columns, and none on all ranks."""
    world = mesh_of((2, 2))
    on_a = nn.Parameter(spread(torch.ones(8, 6), world["a"], (S0,)))
    on_b = nn.Parameter(spread(torch.ones(6, 8), world["b"], (S0,)))
    if kind == "shape" and dist.get_rank() == 3:
        on_b = nn.Parameter(spread(torch.ones(7, 8), world["b"], (S0,)))
    optimizer = Muon([("on_a", on_a), ("on_b", on_b)])
    on_a.grad = spread(torch.ones(8, 6), world["a"], (S0,))
    on_b.grad = spread(torch.ones(on_b.shape), world["b"], (S0,))
    if dist.get_rank() == 0:
        if kind == "late":
            on_b.grad = None
        elif kind == "early":
            on_a.grad = None
        elif kind == "nan":
            local(on_b.grad)[0, 0] = math.nan
    return try_step(optimizer)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("late", "MissingGradientError"),
        ("early", "MissingGradientError"),
        ("nan", "NonFiniteGradientError"),
        ("shape", "PlanMismatchError"),
    ],
)
def test_faults_reach_ranks_of_crossing_meshes(kind, error):
    for name, _, same in run_processes(4, crossing_meshes, kind):
        assert (name, same) == (error, True)


def masked_over_meshes(kind: str, meshes: tuple[str, ...]) -> Any:
    """A good step, a masked bad step, and the next one; one parameter on each of these meshes."""
    world = mesh_of((2, 2))
    params = {}
    for name in meshes:
        mesh = world if name == "ab" else world[name]
        placements = (S0,) * mesh.ndim
        params[name] = nn.Parameter(spread(torch.ones(8, 8), mesh, placements))
    optimizer = Muon(params.items(), deferred_checks=True)

    def set_gradients() -> None:
        for param in params.values():
            param.grad = spread(torch.ones(8, 8), param.device_mesh, param.placements)

    set_gradients()
    optimizer.step()
    set_gradients()
    if dist.get_rank() == 0:
        fault, _, name = kind.partition(" on ")
        if fault == "missing":
            params[name].grad = None
        else:
            local(params[name].grad)[0, 0] = math.nan
    first = try_step(optimizer)
    set_gradients()
    return first, try_step(optimizer)


@pytest.mark.parametrize(
    ("kind", "meshes"),
    [
        (f"{fault} on {name}", meshes)
        for meshes in (("a", "b"), ("a", "ab"), ("b", "a", "ab"))
        for name in meshes
        for fault in ("missing", "nan")
    ],
    ids=str,
)
def test_a_masked_fault_of_one_mesh_masks_the_ranks_of_all(kind, meshes):
    """Also ranks that hold no part of the parameter; the next step raises on all."""
    for first, (name, _, same) in run_processes(4, masked_over_meshes, kind, meshes):
        assert first == ("", "", True)
        assert same
        assert name == ("MissingGradientError" if "missing" in kind else "NonFiniteGradientError")


def num_reductions(meshes: tuple[str, ...]) -> int:
    """Return the number of reductions before the second step."""
    world = mesh_of((2, 2))
    params = []
    for name in meshes:
        mesh = world if name == "ab" else world[name]
        params.append(nn.Parameter(spread(torch.ones(8, 8), mesh, (S0,) * mesh.ndim)))
    optimizer = Muon(params)
    numels: list[int] = []
    reduce = agreement.maximum_of_all

    def counted(values: torch.Tensor, group: Any) -> None:
        numels.append(len(values))
        reduce(values, group)

    for _ in range(2):
        for param in params:
            param.grad = spread(torch.ones(8, 8), param.device_mesh, param.placements)
        numels.clear()
        with mock.patch.object(agreement, "maximum_of_all", counted):
            optimizer.step()
    return len(numels)


@pytest.mark.parametrize(
    ("meshes", "count"),
    [(("ab",), 1), (("a", "ab"), 2), (("ab", "a", "b"), 3), (("a", "b"), 4)],
    ids=str,
)
def test_a_step_reduces_once_for_each_set_of_ranks(meshes, count):
    """Twice if none of a rank's sets contains the others: a second sweep carries faults back."""
    assert run_processes(4, num_reductions, meshes) == [count] * 4


def moved_gradients(missing_grad: str, masked_step: bool) -> Any:
    """First only rank 0 has a gradient, a Partial one; then all ranks have a Partial one."""
    params, optimizer, mesh = make_optimizer(
        (4,), (R,), missing_grad=missing_grad, deferred_checks=masked_step
    )
    optimizer.step()

    def partial(param: nn.Parameter) -> DTensor:
        return DTensor.from_local(torch.ones(param.shape), mesh, (Partial(),), run_check=False)

    give_gradients(params, mesh, (R,), seed=2)
    params[0].grad = partial(params[0]) if dist.get_rank() == 0 else None
    first = try_step(optimizer)
    give_gradients(params, mesh, (R,), seed=3)
    params[0].grad = partial(params[0])
    return first, try_step(optimizer), try_step(optimizer)


@pytest.mark.parametrize("missing_grad", ["raise", "zero"])
def test_a_partial_gradient_on_some_ranks_raises_on_all(missing_grad):
    for first, second, third in run_processes(4, moved_gradients, missing_grad, False):
        assert (first[0], first[2]) == ("MissingGradientError", True)
        assert "(Partial(sum),) on rank 0" in first[1]
        assert second[0] == third[0] == ""
        assert not second[2]


def test_a_masked_partial_gradient_on_some_ranks_raises_later():
    for first, second, third in run_processes(4, moved_gradients, "raise", True):
        assert first == ("", "", True)
        assert second[0] == "MissingGradientError"
        assert (third[0], third[2]) == ("", False)


def cut_differently() -> Any:
    """A gradient of the right shape and placements, whose shard on one rank lacks a row."""
    params, optimizer, mesh = make_optimizer()
    if dist.get_rank() == 1:
        grad = local(params[0].grad)[:-1].clone()
        size, stride = params[0].shape, params[0].stride()
        params[0].grad = DTensor.from_local(
            grad, mesh, (S0,), run_check=False, shape=size, stride=stride
        )
    return try_step(optimizer)


def test_a_gradient_cut_differently_on_one_rank_stops_all():
    outcomes = run_processes(4, cut_differently)
    assert [(name, same) for name, _, same in outcomes] == [("RuntimeError", True)] * 4
    assert "layers.0.weight stores" in outcomes[1][1]
    assert "with equal placements" in outcomes[1][1]


def masked_sparse() -> Any:
    mesh = mesh_of((2,))
    plain = nn.Embedding(6, 4, sparse=True)
    sharded = nn.Parameter(spread(torch.ones(6, 4), mesh, (S0,)))
    optimizer = Muon([("table", plain.weight), ("sharded", sharded)], deferred_checks=True)
    sharded.grad = spread(torch.ones(6, 4), mesh, (S0,))
    plain.weight.grad = torch.zeros(6, 4) if dist.get_rank() == 0 else None
    optimizer.step()
    plain.weight.grad = None
    if dist.get_rank() == 0:
        plain(torch.tensor([1, 2])).sum().backward()
    return try_step(optimizer), try_step(optimizer, optimizer.state_dict)


def test_a_masked_sparse_gradient_stops_all_and_raises_later():
    (first, text), (other, other_text) = run_processes(2, masked_sparse)
    assert first == other == ("", "", True)
    assert "table has a sparse gradient" in text[1]
    assert "Another rank could not take this step" in other_text[1]


def stages_and_a_tie(nan_on: int | None) -> Any:
    """Two pipeline stages of two ranks, and a parameter that their first ranks share."""
    rank = dist.get_rank()
    stages = [DeviceMesh("cpu", ranks, mesh_dim_names=("dp",)) for ranks in ([0, 1], [2, 3])]
    tie = DeviceMesh("cpu", [0, 2], mesh_dim_names=("tie",))
    stage = stages[rank // 2]
    params = [("w", nn.Parameter(spread(torch.ones(8, 8), stage, (S0,))))]
    if rank in (0, 2):
        params.append(("tied", nn.Parameter(spread(torch.ones(6, 6), tie, (R,)))))
    optimizer = Muon(params)
    for step in range(2):
        for _, param in params:
            param.grad = spread(torch.ones(param.shape), param.device_mesh, param.placements)
        if step and rank == nan_on:
            local(params[0][1].grad)[0, 0] = math.nan
        outcome = try_step(optimizer)
    return outcome


def test_ranks_may_hold_meshes_that_others_do_not_know():
    assert run_processes(4, stages_and_a_tie, None) == [("", "", False)] * 4


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_fault_crosses_meshes_that_others_do_not_know(rank):
    for name, _, same in run_processes(4, stages_and_a_tie, rank):
        assert (name, same) == ("NonFiniteGradientError", True)


def more_on_some_ranks(kind: str, prefetch_count: int) -> Any:
    """Some ranks hold another parameter: on a smaller mesh, or plain."""
    rank, world = dist.get_rank(), mesh_of((4,))
    half = DeviceMesh("cpu", [0, 1], mesh_dim_names=("x",))
    params = [
        ("a", nn.Parameter(spread(torch.ones(16, 16), world, (S0,)))),
        ("b", nn.Parameter(spread(torch.ones(8, 8), world, (R,)))),
        ("e", nn.Parameter(spread(torch.ones(4, 4, 4), world, (S0,)))),
    ]
    if kind == "mesh" and rank < 2:
        params.append(("c", nn.Parameter(spread(torch.ones(12, 12), half, (S0,)))))
    if kind == "plain" and rank == 0:
        params.append(("c", nn.Parameter(torch.ones(12, 12))))
    groups: list[dict[str, Any]] = [{"params": params[:3]}]
    if len(params) > 3:  # in a separate group, which is the first
        groups.insert(0, {"params": params[3:], "lr": 0.2})
    optimizer = Muon(groups, bucket_mb=1e-3, prefetch_count=prefetch_count)
    for _, param in params:
        param.grad = torch.ones(param.shape)
        if isinstance(param, DTensor):
            param.grad = spread(param.grad, param.device_mesh, param.placements)
    return try_step(optimizer)


@pytest.mark.parametrize("kind", ["mesh", "plain"])
@pytest.mark.parametrize("prefetch_count", [0, 1, 3])
def test_some_ranks_may_hold_more(kind, prefetch_count):
    assert run_processes(4, more_on_some_ranks, kind, prefetch_count) == [("", "", False)] * 4


def outside_the_mesh() -> Any:
    mesh = DeviceMesh("cpu", [0, 1], mesh_dim_names=("x",))
    param = nn.Parameter(spread(torch.ones(12, 12), mesh, (S0,)))
    optimizer = Muon([("p", param)])
    param.grad = spread(torch.ones(12, 12), mesh, (S0,))
    return try_step(optimizer)


def test_ranks_outside_a_mesh_do_nothing():
    inside, outside = [("", "", False)] * 2, [("", "", True)] * 2
    assert run_processes(4, outside_the_mesh) == [*inside, *outside]


def loaded_on_one_rank() -> Any:
    params, optimizer, mesh = make_optimizer()
    optimizer.step()
    if dist.get_rank() == 0:
        optimizer.load_state_dict(optimizer.state_dict())
    give_gradients(params, mesh, (S0,), seed=2)
    return try_step(optimizer)


def test_loading_on_one_rank_alone_is_allowed():
    assert run_processes(4, loaded_on_one_rank) == [("", "", False)] * 4


def loaded_elsewhere() -> Any:
    mesh = mesh_of((2, 2))
    saved, target = (
        Muon([("p", nn.Parameter(spread(torch.ones(8, 8), mesh, placements)))])
        for placements in ((S0, S1), (S1, S0))
    )
    return try_step(target, lambda: target.load_state_dict(saved.state_dict()))


def test_state_of_other_placements_raises():
    for name, text, same in run_processes(4, loaded_elsewhere):
        assert (name, same) == ("CheckpointError", True)
        assert "'momentum_buffer' of p is [8, 8] (Shard(dim=0), Shard(dim=1))" in text
        assert "torch.distributed.checkpoint" in text


def partial_on_a_mesh_of_some(overflows: bool) -> Any:
    """Only ranks 0 and 1 hold a parameter whose gradient must be reduced first."""
    world, half = mesh_of((4,)), DeviceMesh("cpu", [0, 1], mesh_dim_names=("x",))
    shared = nn.Parameter(spread(torch.ones(8, 8), world, (S0,)))
    shared.grad = spread(torch.ones(8, 8), world, (S0,))
    params = [("shared", shared)]
    if dist.get_rank() < 2:
        reduced = nn.Parameter(spread(torch.ones(6, 6), half, (R,)))
        part = torch.full((6, 6), 3e38 if overflows else 1.0)
        reduced.grad = DTensor.from_local(part, half, (Partial(),), run_check=False)
        params.append(("reduced", reduced))
    return try_step(Muon(params))


@pytest.mark.parametrize("overflows", [False, True])
def test_a_partial_gradient_on_a_mesh_of_some_ranks(overflows):
    error = "NonFiniteGradientError" if overflows else ""
    for name, _, same in run_processes(4, partial_on_a_mesh_of_some, overflows):
        assert (name, same) == (error, overflows)


def order_of_tied_meshes() -> Any:
    """Two meshes of one size and one first rank; ranks 0 and 1 share both, in opposite order."""
    rank = dist.get_rank()
    meshes = [DeviceMesh("cpu", ranks, mesh_dim_names=("x",)) for ranks in ([0, 1, 2], [0, 1, 3])]
    params = [
        (f"p{i}", nn.Parameter(spread(torch.ones(9, 6), mesh, (S0,))))
        for i, mesh in enumerate(meshes)
        if rank in mesh.mesh.tolist()
    ]
    for _, param in params:
        param.grad = spread(torch.ones(9, 6), param.device_mesh, (S0,))
    return try_step(Muon(params[::-1] if rank == 1 else params))


def test_meshes_run_in_the_same_order_on_all_ranks():
    assert run_processes(4, order_of_tied_meshes) == [("", "", False)] * 4
