"""The distance of a matrix from the nearest one with orthonormal rows."""

import torch
from torch import Tensor


def orthogonality_residual(polar_factor: Tensor) -> Tensor:
    """||X X^T - I||_F / sqrt(r) of [rows, cols] on its short side of r, in float32.

    0 where all singular values are 1; about 0.3 for Keller Jordan's coefficients, which do not
    converge to 1.
    """
    x = polar_factor.to(torch.float32)
    x = x.mT if x.size(-2) > x.size(-1) else x
    gram = x @ x.mT
    gram.diagonal().sub_(1)
    return gram.square().sum().div(gram.size(-1)).sqrt()
