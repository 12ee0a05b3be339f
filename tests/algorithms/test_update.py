"""The elementwise part: as torch.optim.Muon on full matrices, and the same on any piece."""

import itertools
import math

import pytest
import torch

from muon_dtensor.algorithms.update import (
    MatrixSlice,
    adjusted_lr,
    apply_update,
    apply_updates,
    direction_of,
    update_momentum,
)

SHAPES = [(13, 7), (7, 13), (1, 1), (1, 40), (40, 1), (33, 33), (6, 64), (64, 6), (2, 31), (5, 129)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("update_dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pieces_round_as_the_full_matrix(shape, dtype, update_dtype):
    generator = torch.Generator().manual_seed(3)
    rows, cols = shape
    weight = torch.randn(shape, generator=generator).to(dtype)
    update = torch.randn(shape, generator=generator).to(update_dtype)
    if rows > cols:  # as Newton-Schulz stores it
        update = update.T.contiguous().T
    expected = weight.clone().mul_(1 - 0.02 * 0.1).add_(update, alpha=-0.0137)
    row_cuts = sorted({0, rows // 3, rows // 2, rows})
    col_cuts = sorted({0, cols // 2, cols - 1, cols})
    result = weight.clone()
    for (a, b), (c, d) in itertools.product(
        itertools.pairwise(row_cuts), itertools.pairwise(col_cuts)
    ):
        apply_update(
            result[a:b, c:d],
            update[a:b, c:d].contiguous(),
            MatrixSlice(rows, cols, a * cols + c, rows > cols),
            decay=1 - 0.02 * 0.1,
            matrix_lr=0.0137,
        )
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("update_dtype", [torch.bfloat16, torch.float32])
def test_several_pieces_round_as_single_pieces(dtype, update_dtype):
    """Also beside a piece of another dtype, which takes another code path."""
    generator = torch.Generator().manual_seed(5)
    weights, updates = torch.randn(2, 4, 16, 24, generator=generator).unbind()
    dtypes = [dtype, dtype, torch.bfloat16, dtype]
    params = [w.to(d) for w, d in zip(weights, dtypes, strict=True)]
    polar_factors = list(updates.to(update_dtype))
    expected = [p.clone().mul_(0.99) for p in params]
    for weight, update in zip(expected, polar_factors, strict=True):
        weight.add_(update, alpha=-0.123)
    places, options = [MatrixSlice(16, 24, 0, False)] * 4, {"decay": 0.99, "matrix_lr": 0.123}
    same_dtype = [p.clone() for p in params]
    apply_updates(params, polar_factors, places, **options)
    apply_updates(same_dtype[:2], polar_factors[:2], places[:2], **options)
    assert all(map(torch.equal, params, expected))
    assert all(map(torch.equal, same_dtype[:2], expected[:2]))


@pytest.mark.parametrize("applies", [True, False])
def test_a_mask_applies_or_skips_the_step(applies):
    keep = torch.tensor(applies)
    weight, grad, momentum, update = torch.randn(4, 6, 5).unbind()
    masked_weight, masked_momentum = weight.clone(), momentum.clone()
    bad = grad if applies else torch.full_like(grad, math.nan)
    update_momentum([masked_momentum], [bad], 0.9, keep)
    options = {"decay": 0.97, "matrix_lr": 0.2}
    apply_update(
        masked_weight, update * bad / grad, MatrixSlice(6, 5, 0, True), **options, keep=keep
    )
    if applies:
        update_momentum([momentum], [grad], 0.9)
        apply_update(weight, update, MatrixSlice(6, 5, 0, True), **options)
    assert torch.equal(masked_momentum, momentum)
    torch.testing.assert_close(masked_weight, weight, rtol=1e-6, atol=1e-6)


def test_direction():
    grad, momentum = torch.randn(2, 3, 4).unbind()
    assert direction_of(momentum, grad, 0.9, nesterov=False) is momentum
    nesterov = direction_of(momentum, grad, 0.9, nesterov=True)
    torch.testing.assert_close(nesterov, 0.1 * grad + 0.9 * momentum)


def test_adjusted_lr_formulas():
    assert adjusted_lr(0.5, None, 8, 2) == adjusted_lr(0.5, "original", 8, 2) == 1.0
    assert adjusted_lr(0.5, None, 2, 8) == 0.5
    assert adjusted_lr(0.5, "match_rms_adamw", 2, 25) == pytest.approx(0.5)
    assert adjusted_lr(0.5, "rms_norm", 2, 25) == adjusted_lr(0.5, "match_rms_adamw", 2, 25)
    assert adjusted_lr(0.5, "spectral_norm", 2, 8) == pytest.approx(0.25)
    assert adjusted_lr(0.5, "spectral_norm", 8, 2) == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)], ids=str)
def test_spectral_norm_gives_an_rms_operator_norm_of_lr(shape):
    """arXiv:2310.17813, condition 1: ||W||_2 sqrt(cols / rows) = lr for an exact polar factor."""
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    update = adjusted_lr(0.3, "spectral_norm", *shape) * (u @ v)
    operator_norm = torch.linalg.matrix_norm(update, 2) * math.sqrt(shape[1] / shape[0])
    assert float(operator_norm) == pytest.approx(0.3)
    update = adjusted_lr(0.3, "rms_norm", *shape) * (u @ v)
    assert float(update.square().mean().sqrt()) == pytest.approx(0.3 * 0.2)


def test_cautious_decay_applies_where_the_update_is_zero():
    """O W >= 0 holds where O is zero (eq. 2 of arXiv:2510.12402)."""
    param = torch.tensor([[2.0, -2.0, 2.0, 0.0]])
    polar_factor = torch.tensor([[0.0, 0.0, -1.0, 1.0]])
    place = MatrixSlice(1, 4, 0, is_transposed=False)
    apply_update(param, polar_factor, place, decay=0.5, matrix_lr=0.25, cautious=True)
    assert param.tolist() == [[1.0, -1.0, 2.25, -0.25]]
