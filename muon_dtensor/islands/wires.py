"""Formats in which updates travel between islands.

A wire encodes a flat float32 vector as bytes. Integer wires have one scale per matrix row, the
largest absolute value of the whole row: the codes do not depend on how the matrix is cut. What an
encoding loses is added to the next update (error feedback: Seide, Fu, Droppo, Li & Yu 2014, "1-bit
stochastic gradient descent"; Karimireddy, Rebjock, Stich & Jaggi 2019, arXiv:1901.09847).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from muon_dtensor.planning.outer import FLOAT_BITS, INTEGER_BITS, TOP_K_CHUNK, WireCost


@dataclass(frozen=True)
class Wire(ABC):
    """A format. `needs_scales`: whether it needs the largest element of each row.

    `is_elementwise`: whether an element's code depends on this element and its scale only.
    """

    needs_scales: ClassVar[bool] = False
    is_elementwise: ClassVar[bool] = True

    @property
    @abstractmethod
    def text(self) -> str:
        """Its name, as in `wire_of`."""

    @abstractmethod
    def encode(self, values: Tensor, scales: Tensor | None = None) -> Tensor:
        """Return the bytes, uint8 [`WireCost.nbytes`], of float32 [numel].

        `scales`: of each element, float32 [numel].
        """

    @abstractmethod
    def decode(self, codes: Tensor, numel: int, scales: Tensor | None = None) -> Tensor:
        """Return float32 [numel], as near to the encoded vector as the format allows."""


@dataclass(frozen=True)
class Float(Wire):
    """Elements in a floating-point dtype: "float32", "bfloat16" or "float16"."""

    dtype: torch.dtype

    @property
    def text(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def encode(self, values: Tensor, scales: Tensor | None = None) -> Tensor:
        return values.to(self.dtype).view(torch.uint8)

    def decode(self, codes: Tensor, numel: int, scales: Tensor | None = None) -> Tensor:
        return _aligned(codes).view(self.dtype).float()


STEEPNESS = {8: 1.0, 4: 1.0, 2: 0.5}
"""By bits, the largest representable value over the scale of a row. The three levels of int2 are 0
and half of the scale: the largest of many normal elements is far out, and most would become 0."""


@dataclass(frozen=True)
class Integer(Wire):
    """Symmetric integers of 8, 4 or 2 bits, rounded to nearest, with one scale per row."""

    needs_scales: ClassVar[bool] = True
    bits: int

    @property
    def text(self) -> str:
        return f"int{self.bits}"

    @property
    def _per_byte(self) -> int:
        """Elements in a byte."""
        return 8 // self.bits

    @property
    def _num_levels(self) -> int:
        """The largest code: codes are -n to n."""
        return int(2 ** (self.bits - 1)) - 1

    def encode(self, values: Tensor, scales: Tensor | None = None) -> Tensor:
        assert scales is not None, "integer wires need scales"
        n = self._num_levels
        codes = (values / (scales * STEEPNESS[self.bits]) * n).nan_to_num(0).round().clamp(-n, n)
        unsigned = (codes + n).to(torch.uint8)
        packed = torch.nn.functional.pad(unsigned, (0, -len(values) % self._per_byte))
        columns = packed.view(-1, self._per_byte).unbind(1)
        result = columns[0].clone()
        for index, column in enumerate(columns[1:], 1):
            result |= column << (index * self.bits)
        return result

    def decode(self, codes: Tensor, numel: int, scales: Tensor | None = None) -> Tensor:
        assert scales is not None, "integer wires need scales"
        n, mask = self._num_levels, (1 << self.bits) - 1
        columns = [(codes >> (i * self.bits)) & mask for i in range(self._per_byte)]
        signed = torch.stack(columns, dim=1).view(-1)[:numel].float() - n
        return signed * (scales * (STEEPNESS[self.bits] / n))


@dataclass(frozen=True)
class TopK(Wire):
    """The largest elements of each chunk of 4096 of this rank's shard, exact; all others are 0.

    Which elements are sent depends on how the tensors are cut.
    """

    is_elementwise: ClassVar[bool] = False
    ratio: float

    @property
    def text(self) -> str:
        return f"topk:{self.ratio:g}"

    @property
    def per_chunk(self) -> int:
        """Elements that are sent of each chunk."""
        return math.ceil(self.ratio * TOP_K_CHUNK)

    def encode(self, values: Tensor, scales: Tensor | None = None) -> Tensor:
        chunks = torch.nn.functional.pad(values, (0, -len(values) % TOP_K_CHUNK))
        chunks = chunks.view(-1, TOP_K_CHUNK)
        # a NaN is among the largest, so that other ranks see it
        indices = chunks.abs().nan_to_num(math.inf).topk(self.per_chunk, dim=1).indices
        sent = chunks.gather(1, indices).reshape(-1).view(torch.uint8)
        return torch.cat([sent, indices.to(torch.int16).reshape(-1).view(torch.uint8)])

    def decode(self, codes: Tensor, numel: int, scales: Tensor | None = None) -> Tensor:
        num_chunks = -(-numel // TOP_K_CHUNK)
        count = num_chunks * self.per_chunk
        sent = _aligned(codes[: 4 * count]).view(torch.float32).view(num_chunks, self.per_chunk)
        indices = _aligned(codes[4 * count :]).view(torch.int16).view(num_chunks, self.per_chunk)
        chunks = torch.zeros(num_chunks, TOP_K_CHUNK, device=codes.device)
        return chunks.scatter_(1, indices.long(), sent).view(-1)[:numel]


def _aligned(codes: Tensor) -> Tensor:
    """Return bytes that can be viewed as any dtype: at the start of memory of their own."""
    return codes if codes.storage_offset() % 8 == 0 and codes.is_contiguous() else codes.clone()


def wire_of(name: str) -> Wire:
    """Return a wire by its name: float32, bfloat16, float16, int8, int4, int2, or topk:RATIO.

    Raises ValueError for another name, or a ratio that is not above 0 and at most 1.
    """
    WireCost.of(str(name))
    if name in FLOAT_BITS:
        return Float(getattr(torch, name))
    return Integer(INTEGER_BITS[name]) if name in INTEGER_BITS else TopK(float(name[5:]))


def row_maxima(tensor: Tensor) -> Tensor:
    """Return the largest absolute value of each row of a shard, float32 [rows]; NaN is kept.

    A row is a vector along the last tensor dim; a tensor of fewer than two dims is one row. Rows
    without elements on this rank give 0.
    """
    num_rows, num_cols = rows_and_cols(tensor)
    if not tensor.numel():
        return torch.zeros(num_rows, device=tensor.device)
    return tensor.reshape(num_rows, num_cols).abs().amax(1).float()


def rows_and_cols(tensor: Tensor) -> tuple[int, int]:
    """Return the number of rows of a shard, see `row_maxima`, and the elements of each."""
    if tensor.ndim < 2:
        return 1, tensor.numel()
    return math.prod(tensor.shape[:-1]), tensor.size(-1)


def expanded(scales: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Return the scale of each element of the concatenated tensors, float32 [numel]."""
    parts = [
        scale.repeat_interleave(rows_and_cols(tensor)[1])
        for scale, tensor in zip(scales, tensors, strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return the elements of tensors as one float32 vector."""
    return torch.cat([t.reshape(-1).float() for t in tensors]) if tensors else torch.zeros(0)


def unflattened(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Inverse of `flat`: views in the shapes of `tensors`."""
    parts = torch.split(vector, [tensor.numel() for tensor in tensors]) if tensors else ()
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
