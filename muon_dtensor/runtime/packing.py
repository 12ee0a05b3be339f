"""Local shards <-> flat buffers <-> whole matrices.

Copies between places that the routes name. Computes nothing and sends nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muon_dtensor.layout import Region
from muon_dtensor.planning.routes import Packing, Slot


def view_region(tensor: Tensor, region: Region, origin: Region) -> Tensor:
    """The part of a tensor that is a box, given where the tensor itself begins and ends."""
    if region == origin:
        return tensor
    inner = region.relative_to(origin)
    return tensor[tuple(slice(a, b) for a, b in zip(inner.start, inner.stop, strict=True))]


def view_slot(buffer: Tensor, slot: Slot) -> Tensor:
    """One slot of a flat buffer in the shape of its region."""
    return buffer[slot.offset : slot.stop].view(slot.region.shape)


def assemble(buffer: Tensor, slots: Sequence[Slot], matrix: Region) -> Tensor:
    """A whole contiguous matrix from its pieces; a view where it already lies in one piece."""
    if len(slots) == 1:
        return view_slot(buffer, slots[0])
    whole = torch.empty(matrix.shape, dtype=buffer.dtype, device=buffer.device)
    for slot in slots:
        view_region(whole, slot.region, matrix).copy_(view_slot(buffer, slot))
    return whole


def scatter(result: Tensor, buffer: Tensor, slots: Sequence[Slot], matrix: Region) -> None:
    """Inverse of `assemble`: the pieces of `result` [rows, cols] into the slots of its matrix."""
    whole = result[(None,) * (len(matrix.shape) - result.ndim)]
    for slot in slots:
        view_slot(buffer, slot).copy_(view_region(whole, slot.region, matrix))


@dataclass(frozen=True, slots=True)
class Move:
    """A run of elements from one flat buffer to another."""

    source: int
    target: int
    numel: int


def moves(source: Packing, target: Packing) -> tuple[Move, ...]:
    """How to fill `target` with slots that `source` holds; adjacent runs are merged."""
    places = {(slot.assignment, slot.region): slot.offset for slot in source.slots}
    merged: list[Move] = []
    for slot in target.slots:
        offset = places[slot.assignment, slot.region]
        last = merged[-1] if merged else None
        if last and (last.source + last.numel, last.target + last.numel) == (offset, slot.offset):
            merged[-1] = Move(last.source, last.target, last.numel + slot.numel)
        else:
            merged.append(Move(offset, slot.offset, slot.numel))
    return tuple(merged)


def repack(source: Tensor, target: Tensor, runs: Sequence[Move]) -> None:
    """Carry out `moves`."""
    for run in runs:
        target[run.target : run.target + run.numel].copy_(
            source[run.source : run.source + run.numel]
        )
