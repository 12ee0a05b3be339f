"""Updates of bfloat16 weights that do not lose what is smaller than half a rounding step.

A weight in bfloat16 has 8 significant bits: an update below 2^-9 of it rounds away. Stochastic
rounding moves it with the right mean; compensated weights keep what was rounded away.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from muon_dtensor.algorithms.update import MatrixSlice, apply_update

ROUNDINGS = ("nearest", "stochastic", "compensated")
"""Values of a param group's `weight_rounding`."""

_LOW_BITS = (1 << 16) - 1
"""The bits of a float32 that bfloat16 does not have."""

_WORD = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class RandomKey:
    """What the random bits of an element depend on, besides its number in the parameter.

    `stream`: a number of the parameter, equal on every layout.
    """

    seed: int
    step: int
    stream: int


def random_bits(elements: Tensor, key: RandomKey) -> Tensor:
    """Return 16 random bits for each element, int64 in [0, 65536).

    A function of the key and the element alone, so that any rank computes the same bits. Hashes by
    Wellons 2018, "Prospecting for Hash Functions", https://nullprogram.com/blog/2018/07/31/
    (lowbias32), which has a bias below 0.2 % in every output bit.

    Args:
        elements: int64, numbers of elements in the parameter, row-major.
        key: seed, step and stream.
    """
    salt = _hash(torch.tensor([key.seed & _WORD, key.step & _WORD, key.stream & _WORD]))
    first, second, third = salt.tolist()
    bits = _hash((elements & _WORD) ^ first)
    bits = _hash(bits ^ second ^ (elements >> 32))
    return _hash(bits ^ third) & _LOW_BITS


def _hash(words: Tensor) -> Tensor:
    """Return a hash of each 32-bit word in an int64 tensor."""
    words = words ^ (words >> 16)
    words = (words * 0x7FEB352D) & _WORD
    words = words ^ (words >> 15)
    words = (words * 0x846CA68B) & _WORD
    return words ^ (words >> 16)


def stochastically_rounded(values: Tensor, bits: Tensor) -> Tensor:
    """Return float32 values in bfloat16, rounded up with the probability of their distance.

    Adds the bits to those that bfloat16 does not have, and cuts these off (Zamirai et al. 2020,
    "Revisiting BFloat16 Training", arXiv:2010.06192, section 3.1). A value of bfloat16 stays as it
    is, as do NaN and infinities.
    """
    words = values.view(torch.int32).to(torch.int64) & _WORD
    rounded = ((words + bits) & ~_LOW_BITS) & _WORD
    signed = torch.where(rounded > 0x7FFFFFFF, rounded - (1 << 32), rounded)
    result = signed.to(torch.int32).view(torch.float32)
    return torch.where(values.isfinite(), result, values).to(torch.bfloat16)


def apply_rounded(
    param: Tensor,
    polar_factor: Tensor,
    place: MatrixSlice,
    *,
    decay: float | Tensor,
    matrix_lr: float | Tensor,
    cautious: bool = False,
    keep: Tensor | None = None,
    compensation: Tensor | None = None,
    bits: Tensor | None = None,
) -> None:
    """Compute `apply_update` in float32, and round once, in place.

    Args:
        param: a piece of a weight in bfloat16.
        polar_factor: the same piece of the orthogonalized direction, any real dtype.
        place: as for `apply_update`, like the arguments up to `keep`.
        decay: see `apply_update`.
        matrix_lr: see `apply_update`.
        cautious: see `apply_update`.
        keep: see `apply_update`.
        compensation: what was rounded away from the weight, bfloat16, updated in place: weight and
            compensation together have at least 16 significant bits. None: round stochastically.
        bits: of `random_bits`, for stochastic rounding.
    """
    wide = param.float() if compensation is None else param.float().add_(compensation)
    apply_update(
        wide,
        polar_factor.float(),
        place,
        decay=decay,
        matrix_lr=matrix_lr,
        cautious=cautious,
    )
    if compensation is None:
        assert bits is not None, "stochastic rounding needs random bits"
        rounded = stochastically_rounded(wide, bits)
    else:
        rounded = wide.to(param.dtype)
        lost = wide.sub_(rounded).to(compensation.dtype)
        compensation.copy_(lost if keep is None else torch.where(keep, lost, compensation))
    param.copy_(rounded if keep is None else torch.where(keep, rounded, param))
