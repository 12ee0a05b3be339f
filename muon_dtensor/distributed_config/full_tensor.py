"""Gather and scatter of single tensors, for config functions that users call directly.

A step does not use them: it executes its plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Work
from torch.distributed.tensor import DTensor

from muon_dtensor.layout import Layout, MeshSpec, Region
from muon_dtensor.runtime.collectives import all_to_all, gather_from_mesh
from muon_dtensor.runtime.dtensors import describe_layout, describe_mesh, from_shard
from muon_dtensor.runtime.packing import box_of, view_box
from muon_dtensor.runtime.process_groups import Groups
from muon_dtensor.runtime.torch_private import local_part, this_rank


@dataclass
class GatherHandle:
    """An asynchronous gather. `wait()` fills `result`; it is None on ranks that get no tensor."""

    result: Tensor | None
    layout: Layout
    peers: tuple[int, ...]
    received: Tensor
    sending: Tensor
    work: Work | None

    def wait(self) -> None:
        """Wait for the pieces, and copy them into `result`."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        if self.result is None:
            return
        offset, origin = 0, Region.of_shape(self.layout.shape)
        for peer in self.peers:
            region = self.layout.region(peer)
            piece = self.received[offset : offset + region.numel].view(region.shape)
            view_box(self.result, box_of(region, origin)).copy_(piece)
            offset += region.numel


def start_gather(
    shard: Tensor, layout: Layout, groups: Groups, dst_rank: int | None
) -> GatherHandle:
    """Start to gather a tensor's shards on `dst_rank`, or on every rank if it is None.

    A collective among the ranks of one replica: that of `dst_rank`, or each replica separately.

    Raises:
        ValueError: the mesh of the tensor does not hold `dst_rank`.
    """
    mesh, rank = layout.mesh, this_rank()
    if dst_rank is not None and not mesh.holds(dst_rank):
        raise ValueError(f"rank {dst_rank} is not on mesh {mesh} with ranks {list(mesh.ranks)}")
    position = mesh.position_of(rank)
    destination = position if dst_rank is None else mesh.position_of(dst_rank)
    result = None
    if dst_rank in (None, rank):
        result = torch.empty(layout.shape, dtype=shard.dtype, device=shard.device)
    flat = shard.detach().reshape(-1)
    if not layout.cut_dims or layout.replica_offset(position) != layout.replica_offset(destination):
        received = flat if result is not None else flat[:0]
        return GatherHandle(result, layout, (position,), received, flat, None)
    peers = mesh.peers(position, layout.cut_dims)
    targets = [dst_rank is None or mesh.ranks[peer] == dst_rank for peer in peers]
    flat = groups.on_device(mesh, flat)
    send = torch.cat([flat] * sum(targets)) if any(targets) else flat[:0]
    sizes = [layout.region(peer).numel if result is not None else 0 for peer in peers]
    received = flat.new_empty(sum(sizes))
    sent = [flat.numel() if target else 0 for target in targets]
    work = all_to_all(send, received, sent, sizes, groups.over(mesh, layout.cut_dims))
    return GatherHandle(result, layout, peers, received, send, work)


def local_shard(full_tensor: Tensor, layout: Layout) -> Tensor:
    """Return this rank's shard of a full tensor."""
    region = layout.region(layout.mesh.position_of(this_rank()))
    return view_box(full_tensor, box_of(region, Region.of_shape(layout.shape))).contiguous()


def cut_like(full_tensor: Tensor, param: DTensor) -> DTensor:
    """Return this rank's shard of a full tensor as a DTensor, cut like `param`.

    distribute_tensor does the same, except for uneven strided shards, which it cuts differently
    from fully_shard (torch 2.13).
    """
    layout = describe_layout(param, describe_mesh(param.device_mesh))
    shard = local_shard(full_tensor, layout).to(local_part(param).device)
    return from_shard(shard, param.device_mesh, param.placements, param.shape)


def with_offsets(tensor: DTensor) -> Tensor:
    """Return this rank's shard as a plain tensor on the same memory, with its offsets.

    It has the attributes of `torch.distributed.checkpoint.CheckpointableTensor` (torch 2.14). They
    are empty on ranks outside of the mesh, and on ranks that hold no element.
    """
    regions = _stored_regions(tensor)
    shard: Any = local_part(tensor).detach()
    shard.global_shape = tuple(tensor.shape)
    shard.global_offsets = tuple(region.start for region in regions)
    shard.local_offsets = tuple((0,) * tensor.ndim for _ in regions)
    shard.local_sizes = tuple(region.shape for region in regions)
    with_attributes: Tensor = shard
    return with_attributes


def pass_offsets(tensor: DTensor) -> None:
    """Let torch.distributed.checkpoint save and load this shard at its true offsets.

    A DTensor asks its local tensor for the offsets of its shard, if that has these methods (torch
    2.13 to 2.15). Copies of the tensor, such as those of `dcp.async_save`, do not have them.
    """
    regions = _stored_regions(tensor)
    shard: Any = local_part(tensor)
    shard.__create_write_items__ = partial(_write_items, regions)
    shard.__create_chunk_list__ = partial(_chunks, regions)


def _stored_regions(tensor: DTensor) -> list[Region]:
    """Return the box of this rank's shard; none outside of the mesh, or if it has no element."""
    layout, rank = describe_layout(tensor, describe_mesh(tensor.device_mesh)), this_rank()
    region = layout.region(layout.mesh.position_of(rank)) if layout.mesh.holds(rank) else None
    return [region] if region is not None and region.numel else []


def _chunks(regions: Sequence[Region]) -> list[Any]:
    """Return what DTensor.__create_chunk_list__ does."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata  # takes half a second

    return [ChunkStorageMetadata(torch.Size(r.start), torch.Size(r.shape)) for r in regions]


def _write_items(regions: Sequence[Region], fqn: str, tensor: DTensor) -> list[Any]:
    """Return what DTensor.__create_write_items__ does."""
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    properties = TensorProperties.create_from_tensor(local_part(tensor))
    return [
        WriteItem(
            index=MetadataIndex(fqn, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, properties, tensor.size()),
        )
        for chunk in _chunks(regions)
    ]


def scatter(full_tensor: Tensor, layout: Layout, groups: Groups, src_rank: int) -> Tensor:
    """Send each rank its shard of the full tensor on `src_rank`. A collective of the mesh.

    `full_tensor`: on other ranks a tensor of the same shape and dtype, see `broadcast_meta`.
    """
    mesh = layout.mesh
    position = mesh.position_of(this_rank())
    peers = mesh.peers(position, mesh.dim_names)
    region = layout.region(position)
    pieces = [full_tensor.new_empty(0)] * len(peers)
    if this_rank() == src_rank:
        origin = Region.of_shape(layout.shape)
        pieces = [
            view_box(full_tensor.detach(), box_of(layout.region(p), origin)).reshape(-1)
            for p in peers
        ]
    send, sent = groups.on_device(mesh, torch.cat(pieces)), [piece.numel() for piece in pieces]
    shard = send.new_empty(region.numel)
    sizes = [shard.numel() if mesh.ranks[peer] == src_rank else 0 for peer in peers]
    all_to_all(send, shard, sent, sizes, groups.over(mesh, mesh.dim_names)).wait()
    return shard.view(region.shape).to(full_tensor.device)


def broadcast_meta(
    full_tensor: Tensor | None, mesh: MeshSpec, groups: Groups, src_rank: int
) -> Tensor:
    """Return the full tensor on `src_rank`, and an empty tensor of its shape and dtype elsewhere.

    Raises:
        ValueError: the mesh does not hold `src_rank`, or that rank passed None. On every rank.
    """
    if not mesh.holds(src_rank):
        raise ValueError(f"rank {src_rank} is not on mesh {mesh} with ranks {list(mesh.ranks)}")
    meta = None if full_tensor is None else (tuple(full_tensor.shape), full_tensor.dtype)
    source_meta = gather_from_mesh(meta, groups.along_each_dim(mesh), this_rank())[src_rank]
    if source_meta is None:
        raise ValueError(f"rank {src_rank} has no tensor to redistribute: it passed None")
    shape, dtype = source_meta
    if full_tensor is not None and this_rank() == src_rank:
        return full_tensor
    return torch.empty(shape, dtype=dtype, device=groups.device(mesh))
