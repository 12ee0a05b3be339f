"""Approximate polar factors by quintic iterations: Newton-Schulz and Polar Express.

The order of operations is that of torch.optim.Muon, so results are bitwise equal.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]
IterationKernel = Callable[[Tensor, Sequence[Coefficients]], Tensor]

# Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024,
# https://kellerjordan.github.io/posts/muon/ : chosen to maximize the slope at zero, not to
# converge to 1. Defaults of torch.optim.Muon (torch/optim/_muon.py).
KELLER_JORDAN = (3.4445, -4.7750, 2.0315)
EPS = 1e-7
NUM_ITERATIONS = 5

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
"""Without float16: gradients exceed its range before anything can scale them."""


def quintic(x: Tensor, coefficients: Sequence[Coefficients]) -> Tensor:
    """Apply X <- a X + (b A + c A^2) X, A = X X^T, per (a, b, c); x: [[batch,] short, long]."""
    addmm = torch.addmm if x.ndim == 2 else torch.baddbmm
    for a, b, c in coefficients:
        gram = x @ x.mT
        polynomial = addmm(gram, gram, gram, beta=b, alpha=c)
        x = addmm(x, polynomial, x, beta=a)
    return x


def quintic_in_place(x: Tensor, coefficients: Sequence[Coefficients]) -> Tensor:
    """Compute `quintic` bitwise, overwriting `x`; least memory, without autograd.

    Holds `x`, one more tensor of its size and two Gram matrices, for any number of iterations. The
    result is one of the first two.
    """
    addmm = torch.addmm if x.ndim == 2 else torch.baddbmm
    gram = x.new_empty((*x.shape[:-1], x.size(-2)))
    polynomial, result = torch.empty_like(gram), x.new_empty(x.shape)
    for a, b, c in coefficients:
        torch.matmul(x, x.mT, out=gram)
        addmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        addmm(x, polynomial, x, beta=a, out=result)
        # the first x may be transposed; the strides of operands change how products round, also
        # those of a single row
        is_like_result = x.stride() == result.stride()
        x, result = result, x if is_like_result else x.mT.reshape(x.shape)
    return x


def newton_schulz(
    x: Tensor,  # [*batch, rows, cols]
    *,
    coefficients: Coefficients = KELLER_JORDAN,
    num_iterations: int = NUM_ITERATIONS,
    eps: float = EPS,
    dtype: torch.dtype = torch.bfloat16,
    body: IterationKernel = quintic,
    overwrite: bool = False,
) -> Tensor:
    """Return the approximate polar factor U V^T of every matrix; see `iterate`.

    All iterations have the same coefficients.
    """
    rows = [coefficients] * num_iterations
    return iterate(x, rows, eps=eps, dtype=dtype, body=body, overwrite=overwrite)


def iterate(
    x: Tensor,  # [*batch, rows, cols]
    coefficients: Sequence[Coefficients],
    *,
    eps: float = EPS,
    dtype: torch.dtype = torch.bfloat16,
    body: IterationKernel = quintic,
    overwrite: bool = False,
    is_preconditioned: bool = False,
) -> Tensor:
    """Return the approximate polar factor U V^T of every matrix, in `dtype`.

    `body` computes the iterations X <- a X + (b A + c A^2) X with A = X X^T on the short side
    (Jordan 2024, see KELLER_JORDAN), after a division by max(Frobenius norm, eps).

    Before the division each matrix is scaled by the power of two that brings its largest element
    to [1/2, 1). The scaling is exact: the result is bitwise torch.optim.Muon's if its norm neither
    overflows nor underflows nor falls below eps, and does not depend on the scale otherwise. The
    host checks the norm first and omits the scaling where it would change nothing.
    A zero matrix gives zero, an empty matrix an empty one.

    Args:
        x: `[*batch, rows, cols]`, any real floating dtype, contiguous for bitwise results.
        coefficients: the (a, b, c) of each iteration.
        eps: the smallest divisor.
        dtype: the dtype of the iteration and of the result, one of DTYPES.
        body: `quintic`, or another body of `kernels.kernel_of`.
        overwrite: whether the iteration, and the result, may use the memory of x.
        is_preconditioned: scale by `almost_orthogonal_scales`, not by the norm.

    Raises:
        ValueError: x has fewer than two dims, or `dtype` is not one of DTYPES.
    """
    if torch.is_autocast_enabled(x.device.type):  # would iterate in its own dtype
        with torch.autocast(x.device.type, enabled=False):
            return iterate(
                x,
                coefficients,
                eps=eps,
                dtype=dtype,
                body=body,
                overwrite=overwrite,
                is_preconditioned=is_preconditioned,
            )
    if x.ndim < 2:
        raise ValueError(f"a matrix has two dims, got a tensor of shape {tuple(x.shape)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if x.numel() == 0:
        return x.to(dtype)
    overwrite = overwrite or (x.dtype != dtype and not x.requires_grad)
    x = x.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    norm = frobenius_norm(x)
    if is_preconditioned:
        scale = power_of_two(x.abs().amax(dim=(-2, -1), keepdim=True)).to(dtype)
        x = x.mul_(scale) if overwrite else x * scale
        x.mul_(almost_orthogonal_scales(x))
    elif x.device.type == "cpu" and _is_harmless(norm, eps):
        x = x.div_(norm) if overwrite else x / norm
    else:
        # ten times as fast on the host as the norm of order infinity
        scale = power_of_two(x.abs().amax(dim=(-2, -1), keepdim=x.ndim > 2)).to(dtype)
        x = x.mul_(scale) if overwrite else x * scale
        # a nonzero matrix has a norm of at least 1/2 by now; zero stays zero even with eps = 0
        x.div_(frobenius_norm(x).clamp(min=max(eps, 1e-30)))
    batch = x.shape[:-2]
    if len(batch) > 1:
        x = x.flatten(0, -3)
    operand = [x]
    del x  # only the body holds it, and frees it in its first iteration
    x = body(operand.pop(), coefficients)
    if len(batch) > 1:
        x = x.view(*batch, *x.shape[-2:])
    return x.mT if tall else x


def almost_orthogonal_scales(x: Tensor) -> Tensor:
    """Return the factor of each row, [*batch, rows, 1], that brings the spectral norm to at most 1.

    Row i is divided by the root of the sum of |x_i x_j| over all rows j (Prach & Lampert 2022,
    "Almost-Orthogonal Layers", arXiv:2208.03160, theorem 1; Turbo-Muon, arXiv:2512.04632, section
    3). The scaled matrix has other singular vectors than x. A zero row stays zero.
    """
    sums = (x @ x.mT).abs().sum(dim=-1, keepdim=True)
    return torch.where(sums > 0, sums.rsqrt(), torch.zeros_like(sums))


def frobenius_norm(x: Tensor) -> Tensor:
    """Return the Frobenius norm of every matrix of `x`, in a shape that broadcasts against `x`.

    torch's norms of one matrix and of a batch of matrices round differently; for a single matrix
    this is the norm that torch.optim.Muon takes.
    """
    norm: Tensor = x.norm() if x.ndim == 2 else x.norm(dim=(-2, -1), keepdim=True)
    return norm


def _is_harmless(norm: Tensor, eps: float) -> bool:
    """Whether all norms are well above eps, and their squares well inside float32's range."""
    lowest = max(2 * eps, 2.0**-40)
    norms: list[float] = norm.flatten().tolist()
    return all(lowest < n < 2.0**40 for n in norms)


def power_of_two(largest: Tensor) -> Tensor:
    """Return 2^-e in float32, with e the exponent of each largest magnitude; 1 for zero."""
    _, exponent = torch.frexp(largest.float())
    # 2^127 and 2^-126 are the ends of the normal float32 and bfloat16 range.
    return torch.ldexp(torch.ones_like(largest, dtype=torch.float32), -exponent.clamp(-126, 126))
