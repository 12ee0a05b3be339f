"""Copies between local shards, flat buffers and whole matrices."""

from collections.abc import Sequence

import einops
from torch import Tensor

from muon_dtensor.layout import Matrix, Region
from muon_dtensor.planning.routes import Move, Slot

Box = tuple[slice, ...]

Part = tuple[int, Box | None]
"""One of several views by index, and where it belongs in what they make up."""


def box_of(region: Region, origin: Region) -> Box | None:
    """Indices of a region in a tensor that begins and ends as `origin`; None for all of it."""
    if region == origin:
        return None
    inner = region.relative_to(origin)
    return tuple(slice(a, b) for a, b in zip(inner.start, inner.stop, strict=True))


def view_box(tensor: Tensor, box: Box | None) -> Tensor:
    """The part of a tensor that `box_of` names."""
    return tensor if box is None else tensor[box]


def view_slots(buffer: Tensor, slots: Sequence[Slot]) -> list[Tensor]:
    """The slots of a flat buffer, each in the shape of its region."""
    return [buffer[slot.offset : slot.stop].view(slot.shape) for slot in slots]


def to_matrix(box: Tensor, matrix: Matrix) -> Tensor:
    """[rows, cols], contiguous, from the box of a parameter that holds them."""
    if not matrix.pattern:
        return box.view(matrix.rows, matrix.cols)
    return einops.rearrange(box, matrix.pattern, **dict(matrix.axes)).contiguous()


def from_matrix(result: Tensor, matrix: Matrix) -> Tensor:
    """Inverse of `to_matrix`, of any strides."""
    if not matrix.pattern:
        return result.reshape(matrix.region.shape)
    left, right = matrix.pattern.split(" -> ")
    return einops.rearrange(result, f"{right} -> {left}", **dict(matrix.axes))


def assemble(
    views: Sequence[Tensor], parts: Sequence[Part], shape: tuple[int, ...], like: Tensor
) -> Tensor:
    """A whole contiguous tensor from its parts; a view where it already lies in one.

    `like`: of the dtype and device of a tensor that has no parts.
    """
    if len(parts) == 1 and parts[0][1] is None:
        return views[parts[0][0]]
    whole = like.new_empty(shape)
    fill(whole, views, parts)
    return whole


def fill(whole: Tensor, views: Sequence[Tensor], parts: Sequence[Part]) -> None:
    """Copy the parts of a whole tensor to where they belong in it."""
    for number, box in parts:
        view_box(whole, box).copy_(views[number])


def disassemble(whole: Tensor, views: Sequence[Tensor], parts: Sequence[Part]) -> None:
    """Inverse of `assemble`."""
    if len(parts) > 1:  # torch transposes a whole matrix twice as fast as its parts
        whole = whole.contiguous()
    for number, box in parts:
        views[number].copy_(view_box(whole, box))


def repack(source: Tensor, target: Tensor, moves: Sequence[Move]) -> None:
    """Copy runs of elements from one flat buffer to another."""
    for move in moves:
        target[move.target : move.target + move.numel].copy_(
            source[move.source : move.source + move.numel]
        )
