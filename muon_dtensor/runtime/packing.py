"""Local shards <-> flat buffers <-> whole matrices.

Copies between places that the routes name. Computes nothing and sends nothing.
"""

from collections.abc import Sequence

import einops
import torch
from torch import Tensor

from muon_dtensor.layout import Matrix, Region
from muon_dtensor.planning.routes import Move, Slot

Box = tuple[slice, ...]


def box_of(region: Region, origin: Region) -> Box | None:
    """Indices of a region in a tensor that begins and ends as `origin`; None for all of it."""
    if region == origin:
        return None
    inner = region.relative_to(origin)
    return tuple(slice(a, b) for a, b in zip(inner.start, inner.stop, strict=True))


def view_box(tensor: Tensor, box: Box | None) -> Tensor:
    """The part of a tensor that `box_of` names."""
    return tensor if box is None else tensor[box]


def view_slot(buffer: Tensor, slot: Slot) -> Tensor:
    """One slot of a flat buffer in the shape of its region."""
    return buffer[slot.offset : slot.stop].view(slot.shape)


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


def assemble(buffer: Tensor, slots: Sequence[Slot], region: Region) -> Tensor:
    """A whole contiguous region from its pieces; a view where it already lies in one piece."""
    if len(slots) == 1:
        return view_slot(buffer, slots[0])
    whole = torch.empty(region.shape, dtype=buffer.dtype, device=buffer.device)
    for slot in slots:
        view_box(whole, box_of(slot.region, region)).copy_(view_slot(buffer, slot))
    return whole


def disassemble(whole: Tensor, buffer: Tensor, slots: Sequence[Slot], region: Region) -> None:
    """Inverse of `assemble`: the pieces of `whole`, of the shape of the region."""
    for slot in slots:
        view_slot(buffer, slot).copy_(view_box(whole, box_of(slot.region, region)))


def repack(source: Tensor, target: Tensor, moves: Sequence[Move]) -> None:
    """Copy runs of elements from one flat buffer to another."""
    for move in moves:
        target[move.target : move.target + move.numel].copy_(
            source[move.source : move.source + move.numel]
        )
