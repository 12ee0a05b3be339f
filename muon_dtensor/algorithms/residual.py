"""How far a matrix is from having orthonormal rows."""

import torch
from torch import Tensor


def orthogonality_residual(polar_factor: Tensor) -> Tensor:
    """Return ||X X^T - I||_F / sqrt(r) in float32, where r is the short side of X [rows, cols].

    0 if all singular values are 1; about 0.3 for Keller Jordan's coefficients, which do not
    converge to 1.
    """
    x = polar_factor.to(torch.float32)
    x = x.mT if x.size(-2) > x.size(-1) else x
    gram = x @ x.mT
    gram.diagonal().sub_(1)
    return gram.square().sum().div(gram.size(-1)).sqrt()
