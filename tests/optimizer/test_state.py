"""The state of one parameter: what is made, cast and dropped."""

from typing import Any

import pytest
import torch
from torch import nn

from muon_dtensor import CheckpointError
from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.layout.matrices import matrices_of
from muon_dtensor.optimizer.options import DEFAULTS
from muon_dtensor.optimizer.state import MOMENTS, drop_stale, make_state
from muon_dtensor.planning.plan import ParamSpec

SPEC = ParamSpec(
    "w",
    Layout(MeshSpec.of(), (4, 3), ((), ())),
    "bfloat16",
    matrices_of((4, 3)),
    moment_cuts=(),
)
"""A parameter that NorMuon steps."""


def state_of(algorithm: str, **options: Any) -> dict[str, Any]:
    state: dict[str, Any] = {}
    make_state(state, nn.Parameter(torch.ones(4, 3).bfloat16()), algorithm, **options)
    return state


def test_muon_keeps_a_momentum_like_the_parameter():
    (momentum,) = state_of("muon").values()
    assert (momentum.shape, momentum.dtype) == ((4, 3), torch.bfloat16)
    assert not momentum.any()


def test_the_momentum_has_the_dtype_of_the_option_else_of_the_gradient():
    assert state_of("muon", momentum_dtype=torch.float32)["momentum_buffer"].dtype == torch.float32
    param = nn.Parameter(torch.ones(4, 3).bfloat16())
    param.grad_dtype = torch.float32
    state: dict[str, Any] = {}
    make_state(state, param, "muon")
    assert state["momentum_buffer"].dtype == torch.float32


def test_normuon_keeps_a_float32_moment_for_each_row():
    state = state_of("muon", spec=SPEC)
    assert state.keys() == {"momentum_buffer", MOMENTS}
    assert (state[MOMENTS].shape, state[MOMENTS].dtype) == ((1, 4), torch.float32)


def test_adamw_keeps_a_step_and_two_moments():
    state = state_of("adamw")
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert state["step"] == 0
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (4, 3)


def test_existing_state_stays():
    param = nn.Parameter(torch.ones(4, 3))
    momentum = torch.randn(4, 3)
    state: dict[str, Any] = {"momentum_buffer": momentum}
    make_state(state, param, "muon")
    assert state["momentum_buffer"] is momentum
    make_state(state, param, "muon", torch.bfloat16)
    assert torch.equal(state["momentum_buffer"], momentum.bfloat16())


def test_moments_of_another_layout_raise():
    state: dict[str, Any] = {MOMENTS: torch.zeros(5)}
    with pytest.raises(CheckpointError, match="row moments of a parameter"):
        make_state(state, nn.Parameter(torch.ones(4, 3)), "muon", spec=SPEC)


@pytest.mark.parametrize(
    ("group", "keys"),
    [
        ({}, {"momentum_buffer"}),
        ({"normuon_beta": 0.95}, {"momentum_buffer", MOMENTS}),
        ({"algorithm": "adamw"}, {"step", "exp_avg", "exp_avg_sq"}),
    ],
    ids=["muon", "normuon", "adamw"],
)
def test_state_of_another_algorithm_is_dropped(group, keys):
    state = {**state_of("muon", spec=SPEC), **state_of("adamw"), "of the user": 1}
    drop_stale(state, {**DEFAULTS, **group})
    assert state.keys() == keys | {"of the user"}
