"""Copies between local shards, flat buffers and matrices."""

from collections.abc import Sequence

import einops
import torch
from torch import Tensor

from muon_dtensor.layout import Matrix, Region
from muon_dtensor.planning.routes import Move, Slot

Box = tuple[slice, ...]

IndexedBox = tuple[int, Box | None]
"""The index of a tensor in a sequence, and a box: of that tensor, or of the tensor it is part of.
None: all of it."""


def box_of(region: Region, origin: Region) -> Box | None:
    """Indices of a region in a tensor that begins and ends as `origin`; None for all of it."""
    if region == origin:
        return None
    inner = region.relative_to(origin)
    return tuple(slice(a, b) for a, b in zip(inner.start, inner.stop, strict=True))


def view_box(tensor: Tensor, box: Box | None) -> Tensor:
    """A view of the box of a tensor."""
    return tensor if box is None else tensor[box]


def view_slots(buffer: Tensor, slots: Sequence[Slot]) -> list[Tensor]:
    """The slots of a flat buffer, each in the shape of its region."""
    return [buffer[slot.offset : slot.stop].view(slot.shape) for slot in slots]


def to_matrix(box: Tensor, matrix: Matrix) -> Tensor:
    """A contiguous [rows, cols] from the box of a parameter that holds the matrix."""
    if not matrix.pattern:
        return box.view(matrix.rows, matrix.cols)
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
        return views[parts[0][0]]
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
            self.add(view_box(target, box), views[index])

    def disassemble(
        self, source: Tensor, views: Sequence[Tensor], parts: Sequence[IndexedBox]
    ) -> None:
        """Inverse of `fill`: copy each box of `source` to its part."""
        if len(parts) > 1:  # torch transposes a full matrix twice as fast as its parts
            source = source.contiguous()
        for index, box in parts:
            self.add(views[index], view_box(source, box))

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
