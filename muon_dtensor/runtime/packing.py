"""Copies between local shards, flat buffers and matrices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import einops
import torch
from torch import Tensor

from muon_dtensor.layout import Matrix, Region
from muon_dtensor.planning.routes import Move, Slot


@dataclass(frozen=True, slots=True)
class StridedBox:
    """A box of slices, and per dim (length, stride) of the axes that it is viewed with."""

    slices: tuple[slice, ...]
    axes: tuple[tuple[tuple[int, int], ...], ...]


Box = tuple[slice, ...] | StridedBox

IndexedBox = tuple[int, Box | None]
"""The index of a tensor in a sequence, and a box: of that tensor, or of the tensor it is part of.
None: all of it."""


def box_of(region: Region, origin: Region) -> Box | None:
    """Indices of a region in a tensor that begins and ends as `origin`; None for all of it.

    The region is one of its own `strided_parts`.
    """
    if region == origin:
        return None
    inner = region.relative_to(origin)
    slices = []
    for first, last, indices in inner.per_dim:
        if indices is None:
            slices.append(slice(first, last))
        else:
            part = indices.between(first, last)
            step = part.axes[0][1] if len(part.axes) == 1 else 1
            slices.append(slice(part.first, part.last + 1, step))
    if all(len(axes) == 1 for axes in inner.axes):
        return tuple(slices)
    return StridedBox(tuple(slices), inner.axes)


def view_box(tensor: Tensor, box: Box | None) -> Tensor:
    """A view of the box of a tensor."""
    if not isinstance(box, StridedBox):
        return tensor if box is None else tensor[box]
    view = tensor[box.slices]
    sizes, strides = [], []
    for dim_stride, axes in zip(view.stride(), box.axes, strict=True):
        for length, stride in axes:
            sizes.append(length)
            strides.append(dim_stride * (stride if len(axes) > 1 else 1))
    return view.as_strided(sizes, strides)


def element_numbers(region: Region, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the row-major numbers of a region's elements in a tensor of this shape, int64.

    In the shape of a view of the region, which is one of its own `strided_parts`.
    """
    numbers = torch.full((), region.offset_in(shape), dtype=torch.int64, device=device)
    stride = math.prod(shape)
    for size, axes in zip(shape, region.axes, strict=True):
        stride //= size
        for length, step in axes:
            offsets = torch.arange(length, dtype=torch.int64, device=device) * (step * stride)
            numbers = numbers[..., None] + offsets
    return numbers


def view_slots(buffer: Tensor, slots: Sequence[Slot]) -> list[Tensor]:
    """The slots of a flat buffer, each in the shape of its views."""
    return [buffer[slot.offset : slot.stop].view(slot.shape) for slot in slots]


def to_matrix(box: Tensor, matrix: Matrix) -> Tensor:
    """A contiguous [rows, cols] from the contiguous elements of a matrix in its parameter."""
    if not matrix.pattern:
        return box.view(matrix.rows, matrix.cols)
    box = box.view(matrix.region.shape)
    return einops.rearrange(box, matrix.pattern, **dict(matrix.axes)).contiguous()


def from_matrix(result: Tensor, matrix: Matrix) -> Tensor:
    """Inverse of `to_matrix`; the result has any strides."""
    if not matrix.pattern:
        return result.reshape(matrix.region.shape)
    left, right = matrix.pattern.split(" -> ")
    return einops.rearrange(result, f"{right} -> {left}", **dict(matrix.axes))


def assemble(
    views: Sequence[Tensor], parts: Sequence[IndexedBox], shape: tuple[int, ...], like: Tensor
) -> Tensor:
    """A contiguous tensor of this shape from its parts; a view if one part is all of it.

    `like`: gives dtype and device.
    """
    if len(parts) == 1 and parts[0][1] is None:
        return views[parts[0][0]].view(shape)
    target = like.new_empty(shape)
    copies = Copies()
    copies.fill(target, views, parts)
    copies.run()
    return target


class Copies:
    """Copies between tensors that run as one foreach call."""

    def __init__(self) -> None:
        self._targets: list[Tensor] = []
        self._sources: list[Tensor] = []

    def add(self, target: Tensor, source: Tensor) -> None:
        """Copy a tensor to one of the same shape."""
        self._targets.append(target)
        self._sources.append(source)

    def fill(self, target: Tensor, views: Sequence[Tensor], parts: Sequence[IndexedBox]) -> None:
        """Copy each part to its box in `target`."""
        for index, box in parts:
            part = view_box(target, box)
            self.add(part, views[index].view(part.shape))

    def disassemble(
        self, source: Tensor, views: Sequence[Tensor], parts: Sequence[IndexedBox]
    ) -> None:
        """Inverse of `fill`: copy each box of `source` to its part."""
        if len(parts) > 1:  # torch transposes a full matrix twice as fast as its parts
            source = source.contiguous()
        for index, box in parts:
            part = view_box(source, box)
            self.add(views[index].view(part.shape), part)

    def run(self) -> None:
        """Run the copies, and release the tensors."""
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources)
        self._targets, self._sources = [], []


def repack(source: Tensor, target: Tensor, moves: Sequence[Move]) -> None:
    """Copy runs of elements from one flat buffer to another."""
    for move in moves:
        target[move.target : move.target + move.numel].copy_(
            source[move.source : move.source + move.numel]
        )
