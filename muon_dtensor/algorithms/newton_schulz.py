"""The approximate polar factor by quintic iterations: Newton-Schulz and Polar Express.

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
"""float16 is left out: gradients reach beyond its range before anything can scale them."""


def quintic(x: Tensor, coefficients: Sequence[Coefficients]) -> Tensor:
    """X <- a X + (b A + c A^2) X with A = X X^T for each (a, b, c), on [[batch,] short, long]."""
    addmm = torch.addmm if x.ndim == 2 else torch.baddbmm
    for a, b, c in coefficients:
        gram = x @ x.mT
        polynomial = addmm(gram, gram, gram, beta=b, alpha=c)
        x = addmm(x, polynomial, x, beta=a)
    return x


def quintic_in_place(x: Tensor, coefficients: Sequence[Coefficients]) -> Tensor:
    """Bitwise `quintic`, with `x` overwritten: the fewest bytes, and no gradients.

    Holds `x`, one more of its size and two Gram matrices, whatever the number of iterations. The
    result lies in either of the first two.
    """
    addmm = torch.addmm if x.ndim == 2 else torch.baddbmm
    gram = x.new_empty((*x.shape[:-1], x.size(-2)))
    polynomial, result = torch.empty_like(gram), x.new_empty(x.shape)
    for a, b, c in coefficients:
        torch.matmul(x, x.mT, out=gram)
        addmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        addmm(x, polynomial, x, beta=a, out=result)
        # the first x may be transposed; products round by how their operands lie in memory
        x, result = result, x if x.is_contiguous() else x.mT.reshape(x.shape)
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
    """The approximate polar factor U V^T of every matrix, by equal iterations; see `iterate`."""
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
) -> Tensor:
    """The approximate polar factor U V^T of every matrix, in `dtype`.

    One iteration is X <- a X + (b A + c A^2) X with A = X X^T on the short side (Jordan 2024,
    see KELLER_JORDAN), after a division by max(Frobenius norm, eps). `body` makes them.

    Before that each matrix is scaled by the power of two that brings its largest element to
    [1/2, 1). That is exact, so the result is bitwise torch.optim.Muon's wherever its norm neither
    over- nor underflows nor falls below eps, and it does not depend on the scale anywhere else.
    The host looks at the norm first, and leaves the scaling out where it would change nothing.
    A zero matrix gives zero; an empty one gives an empty one.

    Args:
        x: `[*batch, rows, cols]`, any real floating dtype, contiguous for bitwise results.
        coefficients: the (a, b, c) of each iteration.
        eps: least norm to divide by.
        dtype: of the iteration and of the result, one of DTYPES.
        body: `quintic`, or another of `bodies`.
        overwrite: the memory of x may be used, and may be that of the result.

    Raises:
        ValueError: x has fewer than two dims, or the dtype is another.
    """
    if torch.is_autocast_enabled(x.device.type):  # which would iterate in its own dtype
        with torch.autocast(x.device.type, enabled=False):
            return iterate(x, coefficients, eps=eps, dtype=dtype, body=body, overwrite=overwrite)
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
    if x.device.type == "cpu" and _is_harmless(norm, eps):
        x = x.div_(norm) if overwrite else x / norm
    else:
        # on the host ten times as fast as the norm of order infinity
        scale = power_of_two(x.abs().amax(dim=(-2, -1), keepdim=x.ndim > 2)).to(dtype)
        x = x.mul_(scale) if overwrite else x * scale
        # the norm of anything but zero is at least 1/2 by now; zero stays zero even with eps = 0
        x.div_(frobenius_norm(x).clamp(min=max(eps, 1e-30)))
    batch = x.shape[:-2]
    if len(batch) > 1:
        x = x.flatten(0, -3)
    held = [x]
    del x  # the body's alone, which lets go of it in its first iteration
    x = body(held.pop(), coefficients)
    if len(batch) > 1:
        x = x.view(*batch, *x.shape[-2:])
    return x.mT if tall else x


def frobenius_norm(x: Tensor) -> Tensor:
    """Of every matrix of `x`, of a shape that divides it.

    torch's norms of one whole matrix and of a batch of matrices round differently; a single matrix
    takes the road of torch.optim.Muon.
    """
    norm: Tensor = x.norm() if x.ndim == 2 else x.norm(dim=(-2, -1), keepdim=True)
    return norm


def _is_harmless(norm: Tensor, eps: float) -> bool:
    """Whether no norm comes near eps, nor squares of the size of one near the ends of float32."""
    lowest = max(2 * eps, 2.0**-40)
    norms: list[float] = norm.flatten().tolist()
    return all(lowest < n < 2.0**40 for n in norms)


def power_of_two(largest: Tensor) -> Tensor:
    """2^-e with e the exponent of each largest magnitude, 1 for a zero, in float32."""
    _, exponent = torch.frexp(largest.float())
    # 2^127 and 2^-126 are the ends of the normal float32 and bfloat16 range.
    return torch.ldexp(torch.ones_like(largest, dtype=torch.float32), -exponent.clamp(-126, 126))
