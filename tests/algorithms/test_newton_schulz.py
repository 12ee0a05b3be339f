"""The iteration: bitwise torch's, independent of scale, finite where torch's is not."""

import math

import pytest
import torch
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz

from muon_dtensor import Muon
from muon_dtensor.algorithms import newton_schulz
from muon_dtensor.algorithms.newton_schulz import EPS, KELLER_JORDAN, quintic, quintic_in_place
from tests.support.cases import tensors_like

SHAPES = [(8, 8), (64, 48), (48, 64), (1, 9), (9, 1), (1, 1), (7, 130), (33, 17), (200, 3)]


def torch_s(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    return _zeropower_via_newtonschulz(x, KELLER_JORDAN, steps, EPS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-5, 3e4])
def test_bitwise_torch_s(shape, scale):
    x = tensors_like([shape], 7)[0] * scale
    before = x.clone()
    result = newton_schulz(x)
    assert torch.equal(result, torch_s(x))
    assert torch.equal(x, before)
    assert result.dtype == torch.bfloat16


@pytest.mark.parametrize("exponent", [-100, -80, -64, -30, 30, 64, 100, 120])
def test_scale_free(exponent):
    x = tensors_like([(12, 20)], 3)[0].bfloat16().float()
    assert torch.equal(newton_schulz(x * 2.0**exponent), newton_schulz(x))


def test_torch_s_iteration_is_zero_at_these_scales():
    x = tensors_like([(12, 20)], 3)[0]
    assert torch_s(x * 1e-20).abs().max() < 1e-6
    assert torch_s(x * 1e19).abs().max() == 0


def test_zero_and_empty():
    assert torch.equal(newton_schulz(torch.zeros(4, 6)), torch_s(torch.zeros(4, 6)))
    assert newton_schulz(torch.zeros(4, 6)).abs().max() == 0
    assert newton_schulz(torch.zeros(4, 6), eps=0.0).abs().max() == 0
    for shape in [(0, 4), (4, 0), (0, 0), (3, 0, 2)]:
        assert newton_schulz(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("shape", [(3, 8, 12), (2, 2, 9, 5)], ids=str)
def test_batched_against_single(shape):
    x = tensors_like([shape], 1)[0]
    batched = newton_schulz(x, dtype=torch.float32)
    flat = x.flatten(0, -3)
    single = torch.stack([newton_schulz(m, dtype=torch.float32) for m in flat]).view(shape)
    torch.testing.assert_close(batched, single, rtol=1e-5, atol=1e-5)
    batched = newton_schulz(x).flatten(0, -3).float()
    single = torch.stack([newton_schulz(m).float() for m in flat])
    assert (batched - single).norm() / single.norm() < 2e-2


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)], ids=str)
def test_float32_against_float64(shape):
    x = tensors_like([shape], 5)[0]
    wide = newton_schulz(x.double(), dtype=torch.float64)
    narrow = newton_schulz(x, dtype=torch.float32)
    assert (narrow - wide).norm() / wide.norm() < 1e-4


def test_singular_values_are_near_one():
    values = torch.linalg.svdvals(newton_schulz(tensors_like([(64, 256)], 5)[0]).float())
    assert values.max() < 1.22
    assert values.min() > 0.65


def test_vectors_and_float16_raise():
    with pytest.raises(ValueError, match="two dims"):
        newton_schulz(torch.ones(3))
    with pytest.raises(ValueError, match="dtype must be one of"):
        newton_schulz(torch.ones(3, 3), dtype=torch.float16)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (0, 3, 3)], ids=str)
def test_an_empty_parameter_steps(shape):
    param = nn.Parameter(torch.zeros(shape))
    optimizer = Muon([param])
    param.grad = torch.zeros(shape)
    optimizer.step()
    assert param.shape == shape


@pytest.mark.parametrize("exponent", [-84, -66, 63, 100])
def test_a_step_at_extreme_scales_equals_the_unscaled_step(exponent):
    grad = tensors_like([(6, 10)], 2)[0]
    results = []
    for factor in (1.0, 2.0**exponent):
        param = nn.Parameter(torch.zeros(6, 10))
        optimizer = Muon([param], lr=1.0)
        param.grad = grad * factor
        optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)


def test_bf16_momentum_without_nesterov_is_not_scaled():
    param = nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))
    optimizer = Muon([param], nesterov=False, momentum=0.5)
    param.grad = torch.full_like(param, 64.0)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.full_like(param, 32.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_element_changes_nothing(value):
    param = nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([param], nonfinite="skip")
    param.grad = torch.ones(4, 6)
    param.grad[1, 2] = value
    optimizer.step()
    assert torch.equal(param, torch.ones(4, 6))
    assert optimizer.state[param]["momentum_buffer"].abs().max() == 0


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("shape", [(40, 33), (33, 40), (9, 8)], ids=str)
def test_bf16_parameters_with_few_iterations(shape, steps):
    weight, grad = (t.bfloat16() for t in tensors_like([shape, shape], 4))
    param, expected = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    param.grad, expected.grad = grad, grad.clone()
    Muon([param], lr=0.1, ns_steps=steps).step()
    torch.optim.Muon([expected], lr=0.1, ns_steps=steps).step()
    assert torch.equal(param, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(4, 4), (7, 5), (5, 7), (1, 8), (8, 1), (129, 48), (3, 20, 30), (3, 30, 20)]
)
def test_the_iteration_in_place_is_the_same(shape, dtype):
    """Equal bits and strides, also if the first product reads a transposed matrix."""
    x = tensors_like([shape], 0)[0].to(dtype)
    x /= x.norm()
    x = x.mT if shape[-2] > shape[-1] else x
    expected = quintic(x, [KELLER_JORDAN] * 3)
    result = quintic_in_place(x.clone(), [KELLER_JORDAN] * 3)
    assert torch.equal(result, expected)
    assert result.stride() == expected.stride()


def test_an_input_is_overwritten_only_if_allowed():
    x = tensors_like([(6, 9)], 0)[0].bfloat16()
    before = x.clone()
    expected = newton_schulz(x)
    assert torch.equal(x, before)
    assert torch.equal(newton_schulz(x, body=quintic_in_place, overwrite=True), expected)
    assert not torch.equal(x, before)


def test_an_iteration_can_be_differentiated():
    x = tensors_like([(5, 4)], 0)[0].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: newton_schulz(t, dtype=torch.float64), x)
    newton_schulz(x, dtype=torch.float32).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
