"""The elementwise parts of Muon: momentum, Nesterov, learning-rate scale, decay, update.

Works on local shards and on whole tensors. Only a mask can skip a step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

ADJUST_LR_FNS = (
    None,
    "original",
    "match_rms_adamw",
    "spectral_norm",
    "spectral_unclamped",
    "rms_norm",
)


def adjusted_lr(
    lr: float | Tensor, adjust_lr_fn: str | None, rows: int, cols: int
) -> float | Tensor:
    """Return the learning rate of a matrix of this size; a tensor is scaled in its own dtype.

    `None` or "original": lr sqrt(max(1, rows / cols)) (Jordan 2024,
    https://kellerjordan.github.io/posts/muon/). "match_rms_adamw": 0.2 lr sqrt(max(rows, cols))
    (Liu et al. 2025, "Muon is scalable for LLM training", arXiv:2502.16982, eq. 4); "rms_norm" is
    Dion's name for it. "spectral_norm": lr sqrt(rows / cols), an RMS operator norm of lr (Yang,
    Simon & Bernstein 2023, arXiv:2310.17813, condition 1), as in Dion; "spectral_unclamped" is the
    name of torch.optim.Muon (2.14) for it.
    """
    if adjust_lr_fn in ("match_rms_adamw", "rms_norm"):
        return lr * (0.2 * math.sqrt(max(rows, cols)))
    if adjust_lr_fn in ("spectral_norm", "spectral_unclamped"):
        return lr * math.sqrt(rows / cols)
    return lr * math.sqrt(max(1, rows / cols))


def update_momentum(
    momenta: list[Tensor],
    grads: list[Tensor],
    momentum: float,
    keep: Tensor | None = None,
) -> None:
    """Update B <- momentum B + (1 - momentum) G in place, as torch.optim.Muon does.

    Args:
        momenta: momentum buffers of any shapes, all of one dtype. The average is computed in the
            dtype of the gradients and stored in that of the buffers.
        grads: gradients of the same shapes.
        momentum: the factor.
        keep: a bool scalar on the device; if it is False, nothing changes.
    """
    if any(b.dtype != g.dtype for b, g in zip(momenta, grads, strict=True)):
        for buffer, grad in zip(momenta, grads, strict=True):
            average = buffer.to(grad.dtype).lerp(grad, 1 - momentum)
            buffer.copy_(average if keep is None else torch.where(keep, average, buffer))
    elif keep is None:
        torch._foreach_lerp_(momenta, grads, 1 - momentum)
    else:
        _assign_if(keep, momenta, torch._foreach_lerp(momenta, grads, 1 - momentum))


def _assign_if(keep: Tensor, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value to its target of the same shape and dtype where `keep` is True.

    One kernel per tensor: torch has no foreach function that selects, and products with a mask
    propagate NaN.
    """
    for target, value in zip(targets, values, strict=True):
        torch.where(keep, value, target, out=target)


def direction_of(momentum_buffer: Tensor, grad: Tensor, momentum: float, nesterov: bool) -> Tensor:
    """Return the tensor to orthogonalize: the momentum B, or with Nesterov G + momentum (B - G)."""
    return grad.lerp(momentum_buffer.to(grad.dtype), momentum) if nesterov else momentum_buffer


def write_directions(
    targets: list[Tensor],
    momenta: list[Tensor],
    grads: list[Tensor],
    momentum: float,
    nesterov: bool,
) -> None:
    """Write each `direction_of` into its target of the same shape, cast to the target's dtype."""
    if nesterov:
        wide = [b.to(grad.dtype) for b, grad in zip(momenta, grads, strict=True)]
        torch._foreach_copy_(targets, torch._foreach_lerp(grads, wide, momentum))
    else:
        torch._foreach_copy_(targets, momenta)


@dataclass(frozen=True, slots=True)
class MatrixSlice:
    """The position of a piece in a matrix of `rows` x `cols`.

    A piece is a box of the matrix, or an interval of its elements in row-major order, that starts
    at element `start`. For any other piece, `positions` holds the row-major index of each element.
    `is_transposed`: whether torch.optim.Muon stores the polar factor of this matrix transposed (a
    user's orthogonalizer is assumed to do the same).
    """

    rows: int
    cols: int
    start: int
    is_transposed: bool
    positions: Tensor | None = None


def apply_updates(
    params: list[Tensor],
    polar_factors: list[Tensor],
    places: Sequence[MatrixSlice],
    *,
    decay: float | Tensor,
    matrix_lr: float | Tensor,
    cautious: bool = False,
    keep: Tensor | None = None,
) -> None:
    """Call `apply_update` for several pieces with one decay and one learning rate.

    Where `keep` is False the polar factors must be zeros.
    """
    one_by_one = any(map(_rounds_by_place, params, polar_factors))
    if one_by_one or cautious or isinstance(decay, Tensor) or isinstance(matrix_lr, Tensor):
        for param, polar_factor, place in zip(params, polar_factors, places, strict=True):
            apply_update(
                param,
                polar_factor,
                place,
                decay=decay,
                matrix_lr=matrix_lr,
                cautious=cautious,
                keep=keep,
            )
        return
    is_host = params[0].device.type == "cpu"  # its foreach rounds the decay to a narrow dtype first
    dtype = params[0].dtype
    if keep is not None and dtype.itemsize < 4:  # a masked decay is a tensor, which rounds as well
        updated = [p * decay for p in params] if is_host else torch._foreach_mul(params, decay)
        torch._foreach_add_(updated, polar_factors, alpha=-matrix_lr)
        _assign_if(keep, params, updated)
        return
    factor: float | Tensor = decay
    if keep is not None:
        factor = torch.where(keep, decay, torch.ones_like(keep, dtype=dtype))
    if decay != 1 and is_host:
        for param in params:
            param.mul_(factor)
    elif decay != 1:
        torch._foreach_mul_(params, factor)
    torch._foreach_add_(params, polar_factors, alpha=-matrix_lr)


def apply_update(
    param: Tensor,
    polar_factor: Tensor,
    place: MatrixSlice,
    *,
    decay: float | Tensor,
    matrix_lr: float | Tensor,
    cautious: bool = False,
    keep: Tensor | None = None,
) -> None:
    """Update W <- decay W - matrix_lr O in place, as torch.optim.Muon does.

    Args:
        param: a piece of a weight: a box [..., rows, cols], an interval [numel], or any shape.
        polar_factor: the same piece of the orthogonalized direction, any real dtype.
        place: the position of the piece in its matrix.
        decay: 1 - lr weight_decay with the group's lr: decoupled, as in AdamW (Loshchilov & Hutter
            2019, arXiv:1711.05101).
        matrix_lr: `adjusted_lr` of the matrix. If this or `decay` is a tensor, it is on the device
            of the parameter, and the update rounds in the parameter's dtype.
        cautious: decay only elements with O W >= 0: those that the update moves towards zero, and
            zeros of O or W (Chen et al. 2025, "Cautious Weight Decay", arXiv:2510.12402, eq. 2).
        keep: a bool scalar on the device; if it is False, nothing changes.
    """
    updated = param if keep is None else param.clone()
    if cautious:
        # signs, because a product may underflow
        agrees = updated.sign() * polar_factor.sign() >= 0
        updated.copy_(torch.where(agrees, updated * decay, updated))
    elif isinstance(decay, Tensor) or decay != 1:
        updated.mul_(decay)
    if isinstance(matrix_lr, Tensor):
        updated.sub_(polar_factor.to(updated.dtype) * matrix_lr)
    elif _rounds_by_place(updated, polar_factor):
        _add_by_place(updated, polar_factor, -matrix_lr, place)
    else:
        updated.add_(polar_factor, alpha=-matrix_lr)
    if keep is not None:
        param.copy_(torch.where(keep, updated, param))


# Note [Where torch rounds]
#   On the host, torch adds two bfloat16 tensors in blocks with a vector kernel, which rounds once,
#   param + alpha O, and the remainder with a scalar kernel, which also rounds alpha O. Both round
#   alpha to bfloat16 first. Contiguous tensors have blocks from the start and a tail; strided
#   tensors, such as the transposed O of a tall matrix, have no block. So the bits depend on the
#   position of an element in the whole matrix, and a shard must reproduce them. They are not
#   reproduced for parameters that are not stored row-major: 3 to 5 % of their elements differ by
#   one rounding from torch on the same strides. Wider dtypes and GPUs round in one way everywhere.
#   tests/algorithms/test_update.py compares with torch's own add.


def _rounds_by_place(param: Tensor, update: Tensor) -> bool:
    reduced = param.dtype in (torch.bfloat16, torch.float16)
    return reduced and param.dtype == update.dtype and param.device.type == "cpu"


def _add_by_place(param: Tensor, update: Tensor, alpha: float, place: MatrixSlice) -> None:
    """Compute param += alpha update; see Note [Where torch rounds]."""
    alpha = float(torch.tensor(alpha, dtype=param.dtype))
    numel = place.rows * place.cols
    in_blocks = numel - numel % _block_numel(param.dtype)
    if place.is_transposed and place.cols > 1:
        in_blocks = 0
    if in_blocks == 0:
        param.add_(update * alpha)
        return
    rounded_once = param.float().add_(update.float(), alpha=alpha).to(param.dtype)
    if place.positions is not None:
        rounded_twice = param + update * alpha
        param.copy_(torch.where(place.positions < in_blocks, rounded_once, rounded_twice))
        return
    if param.ndim == 1:
        param, rounded_once, update = param[None], rounded_once[None], update[None]
    width, ahead = param.size(-1), in_blocks - place.start
    for row in range(max(0, (ahead - width) // place.cols + 1), param.size(-2)):
        tail = (..., row, slice(max(0, ahead - row * place.cols), None))
        rounded_once[tail] = param[tail] + update[tail] * alpha
    param.copy_(rounded_once)


@cache
def _block_numel(dtype: torch.dtype) -> int:
    """Measure the elements per block of torch's vector kernel on this processor.

    Takes two numbers whose sum the kernels round differently, adds them at 1023 positions (one less
    than a power of two, so that every block size leaves a tail), and counts the vector results.
    Without any, returns a size that no matrix reaches.
    """
    generator = torch.Generator().manual_seed(0)
    base, other = torch.randn(2, 4096, generator=generator).to(dtype)
    alpha = float(torch.tensor(-0.3, dtype=dtype))
    once = base.float().add_(other.float(), alpha=alpha).to(dtype)
    revealing = int((once != base + other * alpha).nonzero()[0])
    addends = other[revealing].repeat(1023)
    sums = base[revealing].repeat(1023).add_(addends, alpha=alpha)
    num_in_blocks = int((sums == once[revealing]).sum())
    return 1024 - num_in_blocks if num_in_blocks else 1 << 62
