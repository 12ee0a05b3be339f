"""Momentum in 8 or 4 bits: codes relative to the largest magnitude of each block.

A block is `BLOCK` consecutive elements of the last tensor dim, counted from its start, so that the
codes are the same on every layout whose shards begin at blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
"""Elements per block: 4 bytes of scale add half a bit per element."""

BITS = (None, 8, 4)
"""Values of a param group's `momentum_bits`."""

_LEVELS = {8: 127, 4: 7}


def num_blocks(size: int) -> int:
    """Return the blocks of a tensor dim of this size; the last may have fewer elements."""
    return -(-size // BLOCK)


def num_codes(size: int, bits: int) -> int:
    """Return the bytes of the codes of a tensor dim of this size."""
    return size if bits == 8 else -(-size // 2)


@dataclass(frozen=True)
class QuantizedMomentum:
    """A momentum [*lead, size] as codes [*lead, num_codes] and scales [*lead, num_blocks].

    8 bits: int8, value = code / 127 scale, linear. 4 bits: two codes per byte, the first in the low
    half; a code is sign and k in 0..7, value = (k / 7)^2 scale, because most elements of a momentum
    are small. A scale is the largest magnitude of its block, in float32. Encoding a decoded value
    gives the same codes. Linear 8-bit momenta of Muon: Gupta et al. 2025, "Effective Quantization
    of Muon Optimizer States", arXiv:2509.23106.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    size: int

    def decoded(self) -> Tensor:
        """Return the momentum in float32."""
        codes = self.codes
        if self.bits == 4:
            pairs = torch.stack([codes & 15, codes >> 4], dim=-1)
            codes = pairs.flatten(-2)[..., : self.size]
            magnitude = ((codes & 7).float() / _LEVELS[4]).square()
            values = torch.where(codes > 7, -magnitude, magnitude)
        else:
            values = codes.float() / _LEVELS[8]
        return values * self._per_element()

    def store(self, values: Tensor) -> None:
        """Encode a momentum of the same shape in place."""
        lead = values.shape[:-1]
        num = self.scales.size(-1)
        padded = torch.nn.functional.pad(values.float(), (0, num * BLOCK - self.size))
        blocks = padded.view(*lead, num, BLOCK)
        self.scales.copy_(blocks.abs().amax(dim=-1))
        scales = self._per_element()
        relative = torch.where(scales > 0, values.float() / scales, torch.zeros_like(scales))
        if self.bits == 8:
            self.codes.copy_((relative * _LEVELS[8]).round())
            return
        codes = (relative.abs().sqrt() * _LEVELS[4]).round().to(torch.uint8)
        is_negative = (relative < 0) & (codes > 0)  # zero has one code
        codes = codes | is_negative.to(torch.uint8) << 3
        padded = torch.nn.functional.pad(codes, (0, self.size % 2))
        pairs = padded.view(*lead, self.codes.size(-1), 2)
        self.codes.copy_(pairs[..., 0] | pairs[..., 1] << 4)

    def _per_element(self) -> Tensor:
        return self.scales.repeat_interleave(BLOCK, dim=-1)[..., : self.size]


def code_dtype(bits: int) -> torch.dtype:
    """Return the dtype of codes."""
    return torch.int8 if bits == 8 else torch.uint8
