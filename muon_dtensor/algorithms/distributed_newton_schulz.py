"""Newton-Schulz on one matrix that several ranks hold together, a slab of its long side each.

Note [Sum in float32]
    Every member multiplies its slab with its transpose, and the Gram matrix is the sum of these
    products. Rounded to bfloat16 before the sum, they add an error of up to a tenth to that of the
    iteration (4 shapes on 2, 4 and 8 ranks); in float32 they add none. So the products are
    computed and summed in float32, in the order of the members, and the sum is rounded once. Each
    row of the sum is computed by one member and sent to the others, so all of them hold the same
    Gram matrix.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from muon_dtensor.algorithms.newton_schulz import EPS, Coefficients, power_of_two


class Team(Protocol):
    """The ranks that hold one matrix together, seen from one of them."""

    @property
    def index(self) -> int:
        """The index of this member."""

    @property
    def size(self) -> int:
        """The number of members."""

    def exchange(self, send: Tensor, send_rows: Sequence[int], recv_rows: Sequence[int]) -> Tensor:
        """Send rows of `send` to each member, in order, and return the rows received from each."""


def distributed_newton_schulz(
    x: Tensor,  # [short, slab]
    coefficients: Sequence[Coefficients],
    *,
    team: Team,
    rows: Sequence[range],
    shares_polynomial: bool,
    eps: float = EPS,
) -> Tensor:
    """Return this member's slab of the approximate polar factor.

    Overwrites `x`; the result may be `x`. The iterations are those of `newton_schulz.iterate`, with
    the same scaling and the same norm. The result differs from that of one rank by the rounding of
    other sums; its error is the same, see Note [Sum in float32]. All members call this with slabs
    of one matrix.

    Args:
        x: `[short, slab]`, the columns of this member; it may have none. Its dtype is that of the
            iteration and of the result.
        coefficients: the (a, b, c) of each iteration.
        team: exchanges with the other members.
        rows: the rows of the Gram matrix that each member sums.
        shares_polynomial: each member computes the polynomial for its rows and sends them to the
            others; otherwise every member computes all rows.
        eps: the smallest divisor.
    """
    if torch.is_autocast_enabled(x.device.type):  # would iterate in its own dtype
        with torch.autocast(x.device.type, enabled=False):
            return distributed_newton_schulz(
                x,
                coefficients,
                team=team,
                rows=rows,
                shares_polynomial=shares_polynomial,
                eps=eps,
            )
    _normalize(x, team, eps)
    result = torch.empty_like(x)
    own = slice(rows[team.index].start, rows[team.index].stop)
    for a, b, c in coefficients:
        gram = _gathered(_summed_rows(x, team, rows), team, rows)
        if shares_polynomial:
            polynomial = torch.addmm(gram[own], gram[own], gram, beta=b, alpha=c)
            del gram
            polynomial = _gathered(polynomial, team, rows)
        else:
            polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            del gram
        torch.addmm(x, polynomial, x, beta=a, out=result)
        del polynomial
        x, result = result, x
    return x


def _normalize(x: Tensor, team: Team, eps: float) -> None:
    """Divide the matrix by its Frobenius norm; see `newton_schulz.iterate`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    largest = x.abs().amax().to(wide) if x.numel() else x.new_zeros((), dtype=wide)
    own_scale = power_of_two(largest).to(wide)
    x.mul_(own_scale.to(x.dtype))
    square = torch.linalg.vector_norm(x, dtype=wide).square()
    sums = torch.stack([largest, square]).expand(team.size, 2)
    largest_of_each, squares = team.exchange(sums, [1] * team.size, [1] * team.size).unbind(1)
    scale = power_of_two(largest_of_each.amax()).to(wide)
    # a zero slab has scale 1, which may be far below that of the matrix; its sum is 0 all the same
    ratios = (scale / power_of_two(largest_of_each).to(wide)).clamp(max=1)
    norm = (squares * ratios.square()).sum().sqrt().to(x.dtype)
    x.mul_(ratios[team.index].to(x.dtype)).div_(norm.clamp(min=max(eps, 1e-30)))


def _summed_rows(x: Tensor, team: Team, rows: Sequence[range]) -> Tensor:
    """Return this member's rows of the Gram matrix of the whole matrix, in the dtype of `x`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    own = len(rows[team.index])
    received = team.exchange(_gram(x, wide), [len(part) for part in rows], [own] * team.size)
    return received.view(team.size, own, x.size(0)).sum(0).to(x.dtype)


def _gram(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return X X^T in `dtype`; on CUDA devices without a copy of X in that dtype."""
    if x.dtype != dtype and x.device.type == "cuda":
        return torch.mm(x, x.mT, out_dtype=dtype)
    x = x.to(dtype)
    return x @ x.mT


def _gathered(own: Tensor, team: Team, rows: Sequence[range]) -> Tensor:
    """Return the rows of all members."""
    send = own.repeat(team.size, 1)
    return team.exchange(send, [len(own)] * team.size, [len(part) for part in rows])
