"""Sums over shards; each element counts once, however many ranks hold it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.runtime.collectives import all_reduce_max, all_reduce_sum
from muon_dtensor.runtime.process_groups import Groups


def sharded_sum(
    values: Sequence[tuple[Layout, Tensor]],
    groups: Groups,
    rank: int,
    *,
    take_largest: bool = False,
) -> Tensor:
    """Return the sum of the shards' values, or the elementwise maximum; equal on all ranks.

    A collective of all ranks of the meshes: one reduction over each dim of each mesh, by groups
    that exist already. Of replicas the first one's value counts.

    Args:
        values: per tensor its layout and a value of this rank's shard: float tensors of one shape.
            All ranks of a mesh pass the same tensors of it.
        groups: process groups of the meshes.
        rank: the global rank of this process.
        take_largest: return the maximum.
    """
    sums: dict[MeshSpec, list[Tensor]] = {}
    for layout, value in values:
        mesh = layout.mesh
        if not mesh.holds(rank):
            continue
        is_first = mesh.index_along(mesh.position_of(rank), layout.replica_dims) == 0
        sums.setdefault(mesh, []).append(value if is_first else torch.zeros_like(value))
    if not sums:
        return torch.zeros((), dtype=torch.float64)
    by_mesh = []
    for mesh in sorted(sums, key=lambda m: (m.num_ranks, sorted(m.ranks), m.dim_names, m.shape)):
        local = torch.stack(sums[mesh])
        value = local.amax(0) if take_largest else local.sum(0)
        if mesh.dim_names:
            value = groups.on_device(mesh, value)
            for group in groups.along_each_dim(mesh):
                (all_reduce_max if take_largest else all_reduce_sum)(value, group)
        by_mesh.append(value)
    totals = torch.stack([value.to(by_mesh[0].device) for value in by_mesh])
    return totals.amax(0) if take_largest else totals.sum(0)
