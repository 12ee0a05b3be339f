"""NorMuon: divide each row of the update by its running second moment. One matrix at a time."""

import math

import torch
from torch import Tensor


def normalize_rows(
    polar_factor: Tensor,
    second_moments: Tensor,
    *,
    beta: float,
    eps: float,
    keep: Tensor | None = None,
) -> Tensor:
    """Return the polar factor with its rows divided by the root of their second moments.

    With O the polar factor [rows, cols], v the moments [rows] (Li et al. 2025, "NorMuon",
    arXiv:2510.05491, algorithm 1):

        v <- beta v + (1 - beta) mean over cols of O^2
        U  = O / (sqrt(v) + eps),  then  U sqrt(min(rows, cols)) / ||U||_F

    The paper steps by 0.2 lr sqrt(rows cols) U / ||U||_F, which is this result times the learning
    rate of adjust_lr_fn="match_rms_adamw". The result has the norm of an exact polar factor.

    Args:
        polar_factor: [rows, cols], any real dtype; not modified.
        second_moments: [rows], float32; updated in place.
        beta: decay of the moments, 0.95 in the paper.
        eps: added to the root; a zero matrix stays zero.
        keep: a bool scalar on the device; if it is False, the moments do not change.

    Returns:
        [rows, cols] in the dtype of `polar_factor`; computed in float32.
    """
    wide = polar_factor.to(torch.float32, memory_format=torch.contiguous_format)
    averages = second_moments.lerp(wide.square().mean(-1), 1 - beta)
    second_moments.copy_(averages if keep is None else torch.where(keep, averages, second_moments))
    scaled = wide / (averages.sqrt() + eps)[:, None]
    length = torch.linalg.vector_norm(scaled)
    scale = math.sqrt(min(polar_factor.shape)) / torch.where(length == 0, 1.0, length)
    return (scaled * scale).to(polar_factor.dtype)
