"""Differences between releases of torch."""

from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import spmd_types
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from muon_dtensor import Muon, MuonConfig, PlanError, create_processgroup_config
from muon_dtensor.runtime.torch_private import cast, local_part, timeout_of, with_shard, zeros_like
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.pool import run_processes
from tests.support.threads import run_threads

R, S0, S1 = Replicate(), Shard(0), Shard(1)
SHAPES = [(12, 6), (7, 12), (9, 9), (5,)]


class DTensorOperators(TorchDispatchMode):
    """Names of the operators that are dispatched with a DTensor among their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(leaf, DTensor) for leaf in tree_leaves((args, kwargs))):
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "a-bfloat16-momentum": {"momentum_dtype": torch.bfloat16},
    "missing-as-zero": {"missing_grad": "zero"},
    "normuon": {"normuon_beta": 0.9},
    "measured": {"metrics_every": 1},
    "gradients-of-any-dtype": {},
}


def operators(name: str) -> dict[str, set[str]]:
    """Return the dispatched operators of DTensors, by what the optimizer was doing."""
    mesh = mesh_of((2, 2, 2))
    placements = (R, S0, S0)
    params = [nn.Parameter(spread(w, mesh, placements)) for w in tensors_like(SHAPES, 0)]
    grads = [spread(g, mesh, placements) for g in tensors_like(SHAPES, 1)]
    if name == "gradients-of-any-dtype":
        grads = [spread(g.double(), mesh, placements) for g in tensors_like(SHAPES, 1)]
        grads[-1] = spread(tensors_like(SHAPES, 1)[-1], mesh, placements)  # AdamW's
        for param in params:
            param.grad_dtype = None
    groups = [{"params": params[:3]}, {"params": params[3:], "algorithm": "adamw"}]
    modes = {}
    with DTensorOperators() as modes["construction"]:
        optimizer = Muon(groups, **OPTIONS[name])
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    if name == "missing-as-zero":
        params[0].grad = params[0].grad if torch.distributed.get_rank() else None
    for number in range(2):
        with DTensorOperators() as modes[f"step {number}"]:
            optimizer.step()
    saved = optimizer.state_dict()
    with DTensorOperators() as modes["load"]:
        optimizer.load_state_dict(saved)
    modes["load"].names -= {"aten._to_copy.default"}  # torch's own, to the dtype of the parameter
    with DTensorOperators() as modes["step after load"]:
        optimizer.step()
    return {what: operators.names for what, operators in modes.items() if operators.names}


@pytest.mark.parametrize("name", OPTIONS)
def test_no_operator_of_dtensors_is_dispatched(name):
    """Since torch 2.14 each operator takes up to 0.4 s for a new shape on a mesh of three dims."""
    assert run_threads(8, operators, name) == [{}] * 8


def shards_like_torch_s() -> list[str]:
    """Compare `with_shard`, `cast` and `zeros_like` with torch's own operators."""
    mesh = mesh_of((2, 2, 2))
    wrong = []
    for placements in [(R, S0, S0), (S0, S1, R), (R, R, R)]:
        param = nn.Parameter(spread(tensors_like([(7, 5)], 0)[0], mesh, placements))
        pairs = {
            "zeros": (zeros_like(param), torch.zeros_like(param)),
            "wide zeros": (
                zeros_like(param, torch.float64),
                torch.zeros_like(param, dtype=torch.float64),
            ),
            "cast": (cast(param.detach(), torch.bfloat16), param.detach().to(torch.bfloat16)),
            "other shard": (with_shard(param, local_part(param.detach()) + 1), param.detach() + 1),
        }
        for name, (shard, torch_shard) in pairs.items():
            same = (
                shard._spec == torch_shard._spec
                and (shard.shape, shard.stride(), shard.dtype, shard.device, shard.requires_grad)
                == (
                    torch_shard.shape,
                    torch_shard.stride(),
                    torch_shard.dtype,
                    torch_shard.device,
                    False,
                )
                and torch.equal(shard.to_local(), torch_shard.to_local())
            )
            if not same:
                wrong.append(f"{name} {placements}")
        if cast(param, param.dtype) is not param:
            wrong.append(f"a cast to the same dtype {placements}")
    return wrong


def test_new_dtensors_equal_those_of_torch_s_operators():
    assert run_threads(8, shards_like_torch_s) == [[]] * 8


def test_plain_tensors_stay_plain():
    plain = torch.ones(3, 2)
    assert zeros_like(plain, torch.float64).equal(torch.zeros(3, 2, dtype=torch.float64))
    assert with_shard(plain, plain[:1]).shape == (1, 2)
    assert cast(plain, torch.float32) is plain


def test_spectral_unclamped_is_torch_s_name_for_spectral_norm():
    params, other_params = (
        [nn.Parameter(w) for w in tensors_like([(4, 16), (16, 4)], 0)] for _ in range(2)
    )
    optimizer = Muon(params, lr=0.1, adjust_lr_fn="spectral_unclamped")
    for param, other, grad in zip(
        params, other_params, tensors_like([(4, 16), (16, 4)], 1), strict=True
    ):
        param.grad, other.grad = grad.clone(), grad
    Muon(other_params, lr=0.1, adjust_lr_fn="spectral_norm").step()
    optimizer.step()
    assert all(map(torch.equal, params, other_params))
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["adjust_lr_fn"] == "spectral_unclamped"
    loaded = Muon(other_params, lr=0.1)
    loaded.load_state_dict(saved)
    assert loaded.param_groups[0]["adjust_lr_fn"] == "spectral_unclamped"
    config = MuonConfig.from_dict({"optimizer": {"adjust_lr_fn": "spectral_unclamped"}})
    assert config.optimizer.adjust_lr_fn == "spectral_unclamped"


def test_spectral_unclamped_is_bitwise_torch_s():
    params, torch_params = (
        [nn.Parameter(w) for w in tensors_like([(4, 16), (16, 4)], 0)] for _ in range(2)
    )
    options: dict[str, Any] = {"lr": 0.1, "adjust_lr_fn": "spectral_unclamped"}
    try:
        oracle = torch.optim.Muon(torch_params, **options)
    except ValueError:
        pytest.skip("torch 2.14 has it")
    optimizer = Muon(params, **options)
    for step in range(3):
        for a, b, grad in zip(
            params, torch_params, tensors_like([(4, 16), (16, 4)], 1 + step), strict=True
        ):
            a.grad, b.grad = grad.clone(), grad
        optimizer.step()
        oracle.step()
    assert all(map(torch.equal, params, torch_params))
    loaded = Muon(params)
    loaded.load_state_dict(oracle.state_dict())
    assert loaded.param_groups[0]["adjust_lr_fn"] == "spectral_unclamped"


def annotated(kind: str) -> str:
    """Step a plain tensor that spmd_types annotates; return the error."""
    mesh = mesh_of((2, 2))
    a, b = mesh.get_group("a"), mesh.get_group("b")
    shape = (3, 4, 6) if kind in ("experts", "rows of experts") else (4, 6)
    param = nn.Parameter(torch.ones(shape) * (1 + dist.get_rank()))
    param.grad = torch.ones(shape)
    types: dict[str, Any] = {
        "rows": {a: spmd_types.R, b: spmd_types.S(0)},
        "varying": {b: spmd_types.V},
        "replicated": {a: spmd_types.R, b: spmd_types.I},
        "experts": {a: spmd_types.R, b: spmd_types.S(0)},
        "rows of experts": {a: spmd_types.S(0), b: spmd_types.S(1)},
        "declared": {a: spmd_types.R, b: spmd_types.S(0)},
        "adamw": {a: spmd_types.R, b: spmd_types.S(0)},
    }
    if kind != "untyped":
        spmd_types.assert_type(param, types[kind])
    config = None
    if kind == "declared":
        config = create_processgroup_config(tp_pg=b, tp_shard_dim=0)
    group = {"params": [("w", param)], "algorithm": "adamw" if kind == "adamw" else "muon"}
    try:
        Muon([group], check_replicas=False, distributed_config=config).step()
    except PlanError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["rows", "varying", "rows of experts"])
def test_a_part_of_a_matrix_annotated_by_spmd_types_raises(kind):
    for text in run_processes(4, annotated, kind):
        assert "w" in text
        assert "spmd_types says that ranks hold different parts of it" in text
        assert "create_processgroup_config(tp_pg=" in text


@pytest.mark.parametrize("kind", ["replicated", "experts", "declared", "adamw", "untyped"])
def test_full_matrices_annotated_by_spmd_types_are_stepped(kind):
    assert run_processes(4, annotated, kind) == [""] * 4


def set_timeout(seconds: float) -> None:
    """Set the timeout of the default group, as torchtitan does after the first step."""
    name = "set_timeout" if hasattr(dist, "set_timeout") else "_set_pg_timeout"
    getattr(dist.distributed_c10d, name)(timedelta(seconds=seconds), dist.group.WORLD)


def timeouts_after() -> list[timedelta | None]:
    """Return a mesh dim's timeout at first, after the default group's was set, and if a backend
    without options wraps gloo."""
    group = mesh_of((2, 2)).get_group("a")
    timeouts = [timeout_of(group)]
    set_timeout(33)
    timeouts.append(timeout_of(group))
    with mock.patch.object(dist.ProcessGroup, "_get_backend", return_value=object()):
        timeouts.append(timeout_of(group))
        param = nn.Parameter(spread(torch.ones(8, 4), mesh_of((2, 2)), (R, S0)))
        param.grad = spread(torch.ones(8, 4), mesh_of((2, 2)), (R, S0))
        Muon([param], strategy="owned").step()
    return timeouts


def test_a_step_has_the_timeout_of_the_default_group():
    for first, second, third in run_processes(4, timeouts_after):
        assert first is not None
        assert first.total_seconds() >= 40
        assert (second, third) == (timedelta(seconds=33), None)


def sharded_with_grad_dtype() -> tuple[torch.dtype, bool]:
    """Step bfloat16 weights with grad_dtype float32 under FSDP2.

    Returns the dtype of the gradients, and whether values and momenta equal torch.optim.Muon's.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 8, bias=False)).bfloat16()
    torch_params = [nn.Parameter(param.detach().clone()) for param in model.parameters()]
    for param in (*model.parameters(), *torch_params):
        param.grad_dtype = torch.float32
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    params = list(model.parameters())
    optimizer, oracle = Muon(params, lr=0.1), torch.optim.Muon(torch_params, lr=0.1)
    same = True
    for step in range(3):
        model(tensors_like([(5, 8)], step, torch.bfloat16)[0]).square().mean().backward()
        for param, other in zip(params, torch_params, strict=True):
            other.grad_dtype = None
            other.grad = param.grad.full_tensor()
        dtype = params[0].grad.dtype
        optimizer.step()
        oracle.step()
        optimizer.zero_grad()
        for param, other in zip(params, torch_params, strict=True):
            pairs = {param.detach(): other.detach()}
            pairs[optimizer.state[param]["momentum_buffer"]] = oracle.state[other][
                "momentum_buffer"
            ]
            same &= all(torch.equal(sharded.full_tensor(), full) for sharded, full in pairs.items())
    return dtype, same


def test_gradients_of_fsdp2_have_the_grad_dtype_of_weights():
    """From torch 2.15 on; before, they have the dtype of the weights."""
    is_wide = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)
    expected = torch.float32 if is_wide else torch.bfloat16
    assert run_processes(2, sharded_with_grad_dtype) == [(expected, True)] * 2
