"""Compares replicas of parameters by a few elements of each.

Note [Replica samples]
    If every rank initializes the model with a different seed, training raises no error, and no rank
    can detect it alone. Before the first step each rank samples `NUM_SAMPLES` evenly spaced
    elements of its shard of every parameter, as integers of the same bits (NaN equals NaN).
    Replicas reduce them and their negatives by MAX: the sum of both is zero only if all agree.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.runtime.collectives import all_reduce_max
from muon_dtensor.runtime.process_groups import Groups

NUM_SAMPLES = 4

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by size in bytes."""


def differing_replicas(
    shards: Sequence[tuple[str, Layout, Tensor]], groups: Groups, rank: int
) -> list[str]:
    """Return the names of parameters whose samples differ between this rank and its replicas.

    A collective of the parameters' meshes: all ranks of a mesh pass the same parameters. One
    reduction per mesh dim that replicates any. Waits for the device.

    Args:
        shards: name, layout and this rank's shard of each parameter, any real dtype.
        groups: process groups of the meshes.
        rank: the global rank of this process.
    """
    by_replicas: dict[tuple[MeshSpec, tuple[str, ...]], list[tuple[str, Tensor]]] = {}
    for name, layout, shard in shards:
        if layout.replica_dims and layout.mesh.holds(rank):
            key = layout.mesh, layout.replica_dims
            by_replicas.setdefault(key, []).append((name, shard))
    names: list[str] = []
    for mesh, dims in sorted(by_replicas, key=_order):
        replicated = by_replicas[mesh, dims]
        samples = torch.stack([_sample(shard) for _, shard in replicated])
        extremes = groups.on_device(mesh, torch.stack([samples, -samples]))
        group_of = dict(zip(mesh.dim_names, groups.along_each_dim(mesh), strict=True))
        for dim in dims:
            all_reduce_max(extremes, group_of[dim])
        differs = extremes.sum(0).ne(0).any(1).tolist()
        names += [name for (name, _), differ in zip(replicated, differs, strict=True) if differ]
    return names


def _order(key: tuple[MeshSpec, tuple[str, ...]]) -> tuple[object, ...]:
    """Return a sort key that is the same on all ranks of a mesh."""
    mesh, dims = key
    return mesh.num_ranks, sorted(mesh.ranks), mesh.dim_names, mesh.shape, dims


def _sample(shard: Tensor) -> Tensor:
    """Return int64 [NUM_SAMPLES]; zeros for an empty shard."""
    if not shard.numel():
        return torch.zeros(NUM_SAMPLES, dtype=torch.int64, device=shard.device)
    indices = torch.linspace(0, shard.numel() - 1, NUM_SAMPLES, dtype=torch.float64).long()
    unraveled = torch.unravel_index(indices.to(shard.device), shard.shape)
    values = shard[unraveled] if shard.ndim else shard.expand(NUM_SAMPLES).contiguous()
    values = values.real.contiguous() if values.is_complex() else values
    return values.view(_BITS[values.element_size()]).to(torch.int64)
