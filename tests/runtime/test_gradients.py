"""Which gradients a step uses, on one rank: missing, non-finite, and such that no step can use."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muon_dtensor import Muon, NonFiniteGradientError
from muon_dtensor.runtime.gradients import GradientCheck

CPU = torch.device("cpu")


def check_of(param: nn.Parameter, **options: Any) -> GradientCheck:
    agreement = Muon([("w", nn.Parameter(torch.ones(2, 3)))])._planned_step.agreement
    defaults: dict[str, Any] = {"device": CPU, "missing_grad": "raise", "nonfinite": "raise"}
    return GradientCheck({"w": param}, agreement, **{**defaults, **options})


def parameter(grad: Tensor | None) -> nn.Parameter:
    param = nn.Parameter(torch.ones(2, 3))
    param.grad_dtype = None
    param.grad = grad
    return param


OPTIONS = ("param group 0",)


def test_a_gradient_is_returned_as_it_is():
    param = parameter(torch.ones(2, 3))
    grads, steps = check_of(param).check(OPTIONS)
    assert grads["w"] is param.grad
    assert steps is True


def test_a_parameter_without_a_gradient_is_left_out():
    for missing_grad in ("raise", "zero"):
        grads, steps = check_of(parameter(None), missing_grad=missing_grad).check(OPTIONS)
        assert (grads, steps) == ({}, True)


def test_a_parameter_without_elements_has_zeros():
    param = nn.Parameter(torch.ones(0, 3))
    grads, steps = check_of(param).check(OPTIONS)
    assert (grads["w"].shape, steps) == ((0, 3), True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_elements_raise_skip_or_propagate(value):
    param = parameter(torch.ones(2, 3))
    assert param.grad is not None
    param.grad[1, 2] = value
    with pytest.raises(NonFiniteGradientError, match="on this rank in w"):
        check_of(param).check(OPTIONS)
    assert check_of(param, nonfinite="skip").check(OPTIONS)[1] is False
    assert check_of(param, nonfinite="propagate").check(OPTIONS)[1] is True


@pytest.mark.parametrize(
    ("grad", "words"),
    [
        (torch.ones(2, 3).to_sparse(), "sparse gradient"),
        (torch.ones(2, 3, dtype=torch.complex64), "complex|Cast the gradient"),
        (torch.ones(2, 3, dtype=torch.int64), "Cast the gradient to a floating dtype"),
    ],
    ids=["sparse", "complex", "integer"],
)
def test_gradients_that_no_step_can_use_raise(grad, words):
    param = nn.Parameter(torch.ones(2, 3))
    param.grad_dtype = None
    param.grad = grad
    with pytest.raises(RuntimeError, match=words):
        check_of(param).check(OPTIONS)


def test_a_gradient_of_another_dtype_raises_only_for_adamw():
    param = nn.Parameter(torch.ones(2, 3).bfloat16())
    param.grad_dtype = None
    param.grad = torch.ones(2, 3)
    assert check_of(param).check(OPTIONS)[1] is True
    with pytest.raises(RuntimeError, match="torch's AdamW needs equal dtypes"):
        check_of(param, same_dtype_params=["w"]).check(OPTIONS)


def test_a_parameter_that_was_resized_raises():
    param = parameter(torch.ones(2, 3))
    check = check_of(param)
    param.data = torch.ones(4, 3)
    param.grad = torch.ones(4, 3)
    with pytest.raises(RuntimeError, match=r"stored \[2, 3\] on this rank"):
        check.check(OPTIONS)


def test_a_deferred_check_masks_the_step_and_raises_in_the_next():
    param = parameter(torch.ones(2, 3))
    check = check_of(param, deferred_checks=True)
    assert check.check(OPTIONS)[1] is True, "the first step waits"
    assert param.grad is not None
    param.grad[0, 0] = math.nan
    _, keep = check.check(OPTIONS)
    assert isinstance(keep, Tensor)
    assert not keep
    with pytest.raises(NonFiniteGradientError, match="an earlier step"):
        check.raise_deferred(forget=False)
    with pytest.raises(NonFiniteGradientError, match="an earlier step"):
        check.raise_deferred()
    check.raise_deferred()
    param.grad[0, 0] = 1.0
    _, keep = check.check(OPTIONS)
    assert keep
    check.raise_deferred()


def test_pending_results_follow_to_a_new_check_or_are_dropped():
    param = parameter(torch.ones(2, 3))
    first = check_of(param, deferred_checks=True)
    first.check(OPTIONS)
    assert param.grad is not None
    param.grad[0, 0] = math.inf
    first.check(OPTIONS)
    second = check_of(param, deferred_checks=True)
    second.copy_deferred(first)
    with pytest.raises(NonFiniteGradientError):
        second.raise_deferred()
    first.drop_deferred()
    first.raise_deferred()
