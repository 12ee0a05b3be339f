"""One tensor by hand: its shards to whole tensors, and whole tensors to shards.

For the functions of a config that people call themselves. A step does not come here: it moves
what its plan says.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Work
from torch.distributed.tensor import DTensor

from muon_dtensor.layout import Layout, MeshSpec, Region
from muon_dtensor.runtime.collectives import all_to_all, gather_from_mesh
from muon_dtensor.runtime.dtensors import describe_layout, describe_mesh
from muon_dtensor.runtime.packing import box_of, view_box
from muon_dtensor.runtime.process_groups import Groups
from muon_dtensor.runtime.torch_private import local_part, this_rank


@dataclass
class Gathering:
    """A gather on its way. `wait()` fills `whole`, which is None where none is wanted."""

    whole: Tensor | None
    layout: Layout
    peers: tuple[int, ...]
    received: Tensor
    sending: Tensor
    work: Work | None

    def wait(self) -> None:
        """Wait for the pieces and put them in their places."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        if self.whole is None:
            return
        offset, origin = 0, Region.whole(self.layout.shape)
        for peer in self.peers:
            region = self.layout.region(peer)
            piece = self.received[offset : offset + region.numel].view(region.shape)
            view_box(self.whole, box_of(region, origin)).copy_(piece)
            offset += region.numel


def start_gather(shard: Tensor, layout: Layout, groups: Groups, dst_rank: int | None) -> Gathering:
    """Bring the shards of one tensor together, on `dst_rank` or, if it is None, everywhere.

    A collective among the ranks of one replica: that of `dst_rank`, or each by itself.

    Raises:
        ValueError: the mesh of the tensor does not hold `dst_rank`.
    """
    mesh, rank = layout.mesh, this_rank()
    if dst_rank is not None and not mesh.holds(dst_rank):
        raise ValueError(f"rank {dst_rank} is not on mesh {mesh} with ranks {list(mesh.ranks)}")
    here = mesh.position_of(rank)
    wanted = here if dst_rank is None else mesh.position_of(dst_rank)
    whole = None
    if dst_rank in (None, rank):
        whole = torch.empty(layout.shape, dtype=shard.dtype, device=shard.device)
    flat = shard.detach().reshape(-1)
    if not layout.cut_dims or layout.replica_offset(here) != layout.replica_offset(wanted):
        everything = flat if whole is not None else flat[:0]
        return Gathering(whole, layout, (here,), everything, flat, None)
    peers = mesh.peers(here, layout.cut_dims)
    targets = [dst_rank is None or mesh.ranks[peer] == dst_rank for peer in peers]
    send = torch.cat([flat] * sum(targets)) if any(targets) else flat[:0]
    sizes = [layout.region(peer).numel if whole is not None else 0 for peer in peers]
    received = torch.empty(sum(sizes), dtype=shard.dtype, device=shard.device)
    sent = [flat.numel() if target else 0 for target in targets]
    work = all_to_all(send, received, sent, sizes, groups.over(mesh, layout.cut_dims))
    return Gathering(whole, layout, peers, received, send, work)


def cut_out(whole: Tensor, layout: Layout) -> Tensor:
    """This rank's shard of a tensor that it holds whole."""
    region = layout.region(layout.mesh.position_of(this_rank()))
    return view_box(whole, box_of(region, Region.whole(layout.shape))).contiguous()


def cut_like(whole: Tensor, param: DTensor) -> DTensor:
    """This rank's shard of a whole tensor as a DTensor, cut as `param` really is.

    distribute_tensor does the same but for uneven strided shards, which it cuts otherwise than
    fully_shard (torch 2.13).
    """
    layout = describe_layout(param, describe_mesh(param.device_mesh))
    shard: DTensor = DTensor.from_local(
        cut_out(whole, layout).to(local_part(param).device),
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=torch.empty(param.shape, device="meta").stride(),
    )
    return shard


def with_its_place(tensor: DTensor) -> Tensor:
    """This rank's shard, a plain tensor on the same memory that says where in the whole it lies.

    By the attributes of `torch.distributed.checkpoint.CheckpointableTensor` (torch 2.14); none of
    the whole lies on a rank outside of the mesh, or on one that holds no element.
    """
    layout, rank = describe_layout(tensor, describe_mesh(tensor.device_mesh)), this_rank()
    region = layout.region(layout.mesh.position_of(rank)) if layout.mesh.holds(rank) else None
    held = [region] if region is not None and region.numel else []
    shard: Any = local_part(tensor).detach()
    shard.global_shape = layout.shape
    shard.global_offsets = tuple(region.start for region in held)
    shard.local_offsets = tuple((0,) * tensor.ndim for _ in held)
    shard.local_sizes = tuple(region.shape for region in held)
    placed: Tensor = shard
    return placed


def scatter(whole: Tensor, layout: Layout, groups: Groups, src_rank: int) -> Tensor:
    """Every rank's shard of a tensor that `src_rank` holds whole; a collective of the mesh.

    `whole`: on `src_rank` the tensor; elsewhere one of its dtype; see `learn_whole`.
    """
    mesh = layout.mesh
    here = mesh.position_of(this_rank())
    peers = mesh.peers(here, mesh.dim_names)
    region = layout.region(here)
    shard = torch.empty(region.numel, dtype=whole.dtype, device=whole.device)
    pieces = [shard[:0]] * len(peers)
    if this_rank() == src_rank:
        origin = Region.whole(layout.shape)
        pieces = [
            view_box(whole.detach(), box_of(layout.region(p), origin)).reshape(-1) for p in peers
        ]
    send, sent = torch.cat(pieces), [piece.numel() for piece in pieces]
    sizes = [shard.numel() if mesh.ranks[peer] == src_rank else 0 for peer in peers]
    all_to_all(send, shard, sent, sizes, groups.over(mesh, mesh.dim_names)).wait()
    return shard.view(region.shape)


def learn_whole(whole: Tensor | None, mesh: MeshSpec, groups: Groups, src_rank: int) -> Tensor:
    """On every rank a tensor of the shape and dtype that `src_rank` holds; there, that one.

    Raises:
        ValueError: the mesh does not hold `src_rank`, or it holds no tensor. On every rank.
    """
    if not mesh.holds(src_rank):
        raise ValueError(f"rank {src_rank} is not on mesh {mesh} with ranks {list(mesh.ranks)}")
    mine = None if whole is None else (tuple(whole.shape), whole.dtype)
    told = gather_from_mesh(mine, groups.along_each_dim(mesh), this_rank())[src_rank]
    if told is None:
        raise ValueError(f"rank {src_rank} has no tensor to redistribute: it passed None")
    shape, dtype = told
    if whole is not None and this_rank() == src_rank:
        return whole
    return torch.empty(shape, dtype=dtype, device=groups.device(mesh))
