"""Whether replicas of a parameter hold the same values, by a few elements of each.

Note [Replica samples]
    A model that every rank has initialized with a seed of its own trains without an error, and no
    rank can see it alone. Before the first step each rank takes `NUM_SAMPLES` elements of its shard
    of every parameter, evenly spaced, as integers of the same bits (NaN equals NaN), and the
    replicas reduce them and their negatives by MAX: their sum is zero only where all agree.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.runtime.collectives import all_reduce_max
from muon_dtensor.runtime.process_groups import Groups

NUM_SAMPLES = 4

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of so many bytes."""


def differing_replicas(
    shards: Sequence[tuple[str, Layout, Tensor]], groups: Groups, rank: int
) -> list[str]:
    """Names of parameters of which this rank and its replicas sample different values.

    A collective of the parameters' meshes, whose ranks name the same parameters; one reduction per
    mesh dim that replicates any. Waits for the device.

    Args:
        shards: name, layout and this rank's shard of each parameter, any real dtype.
        groups: that know the meshes.
        rank: this one.
    """
    by_replicas: dict[tuple[MeshSpec, tuple[str, ...]], list[tuple[str, Tensor]]] = {}
    for name, layout, shard in shards:
        if layout.replica_dims and layout.mesh.holds(rank):
            key = layout.mesh, layout.replica_dims
            by_replicas.setdefault(key, []).append((name, shard))
    names: list[str] = []
    for mesh, dims in sorted(by_replicas, key=_order):
        named = by_replicas[mesh, dims]
        samples = torch.stack([_sample(shard) for _, shard in named])
        extremes = torch.stack([samples, -samples])
        along = dict(zip(mesh.dim_names, groups.along_each_dim(mesh), strict=True))
        for dim in dims:
            all_reduce_max(extremes, along[dim])
        differs = extremes.sum(0).ne(0).any(1).tolist()
        names += [name for (name, _), differ in zip(named, differs, strict=True) if differ]
    return names


def _order(key: tuple[MeshSpec, tuple[str, ...]]) -> tuple[object, ...]:
    """The same on all ranks of a mesh."""
    mesh, dims = key
    return mesh.num_ranks, sorted(mesh.ranks), mesh.dim_names, mesh.shape, dims


def _sample(shard: Tensor) -> Tensor:
    """int64 [NUM_SAMPLES]; zeros of a shard without elements."""
    if not shard.numel():
        return torch.zeros(NUM_SAMPLES, dtype=torch.int64, device=shard.device)
    indices = torch.linspace(0, shard.numel() - 1, NUM_SAMPLES, dtype=torch.float64).long()
    unraveled = torch.unravel_index(indices.to(shard.device), shard.shape)
    values = shard[unraveled] if shard.ndim else shard.expand(NUM_SAMPLES).contiguous()
    values = values.real.contiguous() if values.is_complex() else values
    return values.view(_BITS[values.element_size()]).to(torch.int64)
