"""The polar factor of a matrix that several ranks hold by slabs of its long side.

The same polynomials as `newton_schulz`, in the Gram matrix of the short side. Does not know the
mesh: a Team adds up and hands round what its members have.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from muon_dtensor.orthogonalize.newton_schulz import EPS, Coefficients, power_of_two


class Team(Protocol):
    """The ranks that hold one matrix together; all of them make the same calls in one order."""

    num_members: int
    index: int

    def add_up(self, x: Tensor) -> None:
        """The sum over the team, in place."""

    def take_largest(self, x: Tensor) -> None:
        """The elementwise maximum over the team, in place."""

    def gather_rows(self, rows: Tensor, num_rows: int) -> Tensor:
        """All `num_rows` rows of a matrix of which every member has those of `own_rows`."""


def own_rows(num_rows: int, num_members: int, index: int) -> tuple[int, int]:
    """First and last row (exclusive) of one member's share: that of torch.chunk."""
    rows_each = -(-num_rows // num_members)
    return min(index * rows_each, num_rows), min((index + 1) * rows_each, num_rows)


def gram_polar_factor(
    slab: Tensor,  # [short, own part of long]
    coefficients: Sequence[Coefficients],
    segments: Sequence[int],
    team: Team,
    *,
    eps: float = EPS,
) -> Tensor:
    """This member's slab of the polar factor, in float32.

    With A = X X^T, an iteration X <- (a I + b A + c A^2) X = P X turns A into P A P, so the
    iterations of a segment are one matrix Q, a polynomial in A, and one product Q X at its end.
    After each segment A is computed anew: without that, errors in small eigenvalues grow (Amsel et
    al. 2025, arXiv:2505.16932, appendix F, has both, for one rank). Every member adds its slab's
    part of A, and of each product of short x short computes its own rows.

    Args:
        slab: the member's columns, or, of a tall matrix, its rows transposed; may be empty.
        coefficients: the (a, b, c) of each iteration.
        segments: how many iterations each segment has; they add up to those of `coefficients`.
        team: the members.
        eps: least Frobenius norm to divide by.
    """
    assert sum(segments) == len(coefficients), "segments hold all iterations"
    largest = slab.abs().amax() if slab.numel() else slab.new_zeros(())
    largest = largest.float().reshape(1)
    team.take_largest(largest)
    x = slab.float() * power_of_two(largest)
    least = max(eps, 1e-30)
    if not segments:
        total = x.square().sum().reshape(1)
        team.add_up(total)
        return x.div_(total.sqrt().clamp(min=least))
    done = 0
    for length in segments:
        gram = x @ x.mT
        team.add_up(gram)
        if done == 0:
            norm = gram.trace().sqrt().clamp(min=least)
            x.div_(norm)
            gram.div_(norm.square())
        given = [gram]
        del gram
        rows = _product_rows(given, coefficients[done : done + length], team)
        x = team.gather_rows(rows, x.size(0)) @ x
        del rows
        done += length
    return x


def _product_rows(given: list[Tensor], coefficients: Sequence[Coefficients], team: Team) -> Tensor:
    """This member's rows of the product of all polynomials of a segment.

    Takes the Gram matrix out of `given`, to let go of it as early as it can. `planning.workspace`
    counts what lives here.
    """
    gram = given.pop()
    short = gram.size(0)
    low, high = own_rows(short, team.num_members, team.index)
    own = gram[low:high]
    product: Tensor | None = None
    for a, b, c in coefficients[:-1]:
        rows = torch.addmm(own, own, gram, beta=b, alpha=c)
        rows.diagonal(low).add_(a)
        polynomial = team.gather_rows(rows, short)
        own = own @ polynomial @ polynomial
        product = rows if product is None else product @ polynomial
        del gram, polynomial, rows
        gram = team.gather_rows(own, short)
    a, b, c = coefficients[-1]
    # the last polynomial is applied to the product without ever being whole
    once = own if product is None else product @ gram
    rows = torch.addmm(once, once, gram, beta=b, alpha=c)
    if product is None:
        rows.diagonal(low).add_(a)
    else:
        rows.add_(product, alpha=a)
    return rows
