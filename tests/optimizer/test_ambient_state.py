"""A step gives the same result under any modes, defaults and contexts of the caller."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from muon_dtensor import Muon, clip_grad_norm_, create_devicemesh_config
from muon_dtensor.algorithms.newton_schulz import KELLER_JORDAN, iterate
from muon_dtensor.runtime.torch_private import local_part
from tests.support.cases import mesh_of, tensors_like
from tests.support.pool import run_processes

SHAPES = [(6, 4), (4, 9), (5,)]


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast-bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast-float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "default-device-meta": lambda: default_device("meta"),
    "device-context": lambda: torch.device("meta"),
    "default-dtype-float64": lambda: default_dtype(torch.float64),
    "default-dtype-bfloat16": lambda: default_dtype(torch.bfloat16),
    "no-grad": torch.no_grad,
    "enable-grad": torch.enable_grad,
    "inference-mode": torch.inference_mode,
    "deterministic": deterministic,
    "anomaly-detection": (lambda: torch.autograd.detect_anomaly(check_nan=True)),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {"ns_dtype": torch.float32},
    "defaults": {},
    "normuon": {"normuon_beta": 0.9, "ns_dtype": torch.float32},
    "polar-express": {"orthogonalizer": "polar_express", "ns_dtype": torch.float32},
    "cautious-tensor-lr": {"cautious_weight_decay": True, "lr": torch.tensor(0.1)},
}


def trained(mode: Any, options: dict[str, Any], *, mesh: Any = None) -> list[Tensor]:
    """Return parameters and state after three steps, with construction and steps under a mode."""
    params = [nn.Parameter(t) for t in tensors_like(SHAPES, 0)]
    config = None if mesh is None else create_devicemesh_config(mesh)
    groups: list[Any] = [{"params": params[:2]}, {"params": params[2:], "algorithm": "adamw"}]
    with mode():
        optimizer = Muon(groups, **{"lr": 0.1, **options}, distributed_config=config)
    for step in range(3):
        for param, grad in zip(params, tensors_like(SHAPES, 1 + step), strict=True):
            param.grad = grad
        with mode():
            clip_grad_norm_(params, 1.0)
            optimizer.step()
        if step == 1:
            with mode():
                optimizer.load_state_dict(optimizer.state_dict())
    values = [value for param in params for value in optimizer.state[param].values()]
    return [value.detach().clone() for value in (*params, *values)]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_a_step_on_one_process_is_independent_of_modes(mode, options):
    expected = trained(contextlib.nullcontext, OPTIONS[options])
    values = trained(MODES[mode], OPTIONS[options])
    assert [v.dtype for v in values] == [v.dtype for v in expected]
    assert [v.device for v in values] == [v.device for v in expected]
    assert all(map(torch.equal, values, expected))


def under_modes(names: list[str]) -> list[str]:
    """Return the modes under which steps of replicas on four ranks give another result."""
    mesh = mesh_of((2, 2))
    expected = trained(contextlib.nullcontext, {}, mesh=mesh)
    return [
        name
        for name in names
        if not all(map(torch.equal, trained(MODES[name], {}, mesh=mesh), expected))
    ]


def test_steps_on_four_ranks_are_independent_of_modes():
    names = [name for name in MODES if name != "anomaly-detection"]
    assert run_processes(4, under_modes, names) == [[]] * 4


def test_a_closure_runs_in_the_caller_s_modes():
    param = nn.Parameter(torch.ones(3, 3))
    param.grad = torch.ones(3, 3)
    modes: list[Any] = []

    def closure() -> float:
        modes.extend([torch.is_autocast_enabled("cpu"), torch.empty(1).device.type])
        modes.append(torch.is_grad_enabled())
        return 1.0

    with torch.autocast("cpu", dtype=torch.bfloat16), default_device("meta"):
        assert Muon([param]).step(closure) == 1.0
    assert modes == [True, "meta", True]


@pytest.mark.parametrize("is_preconditioned", [False, True])
def test_iterations_ignore_autocast(is_preconditioned):
    x = tensors_like([(6, 4)], 0)[0]
    run = partial(
        iterate, x, [KELLER_JORDAN] * 5, dtype=torch.float32, is_preconditioned=is_preconditioned
    )
    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run()
    assert torch.equal(result, expected)


def made_in_inference_mode() -> bool:
    """State that was made or loaded in inference mode can be stepped outside of it."""
    with torch.inference_mode(mode=False):
        model = nn.Sequential(nn.Linear(8, 4, bias=False))
        fully_shard(model, mesh=mesh_of((2,)))
    with torch.inference_mode():
        optimizer = Muon(model.named_parameters())
        saved = {**optimizer.state_dict()}
        saved["state"] = {0: {"momentum_buffer": saved["state"][0]["momentum_buffer"].clone()}}
        optimizer.load_state_dict(saved)
    model(torch.ones(2, 8)).sum().backward()
    before = local_part(model[0].weight.detach()).clone()
    optimizer.step()
    return not torch.equal(before, local_part(model[0].weight.detach()))


def test_state_made_in_inference_mode_is_stepped_outside():
    assert all(run_processes(2, made_in_inference_mode))


def test_a_parameter_made_in_inference_mode_is_an_error_before_anything_changes():
    with torch.inference_mode():
        frozen = torch.ones(3, 3)
    params = [nn.Parameter(torch.ones(3, 3)), frozen]
    params[0].grad, frozen.grad = torch.ones(3, 3), torch.ones(3, 3)
    optimizer = Muon(params)
    with pytest.raises(RuntimeError, match=r"param\.1 was made in torch\.inference_mode"):
        optimizer.step()
    assert torch.equal(params[0], torch.ones(3, 3))
