"""Which process group carries a collective over some mesh dims.

Finds what exists, makes what is missing. Issues nothing.
"""

from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from muon_dtensor.layout import MeshSpec
from muon_dtensor.runtime.describe import patience_of

_made: dict[tuple[ProcessGroup, tuple[int, ...]], ProcessGroup] = {}


class Groups:
    """Process groups by mesh and mesh dims, seen from one rank.

    The ranks of a group ascend, as `MeshSpec.peers` orders them. Making one that does not exist
    is a collective among its own ranks only, so pipeline stages need not know of each other.
    """

    def __init__(self, device_meshes: Mapping[MeshSpec, DeviceMesh], rank: int) -> None:
        self._device_meshes = device_meshes
        self._rank = rank
        self._patience: dict[ProcessGroup, timedelta | None] = {}
        self._known: dict[tuple[MeshSpec, tuple[str, ...]], ProcessGroup] = {}

    def along_each_dim(self, mesh: MeshSpec) -> list[ProcessGroup]:
        """The groups of the mesh's own dims, which exist already."""
        device_mesh = self._device_meshes[mesh]
        return [device_mesh.get_group(index) for index in range(device_mesh.ndim)]

    def device(self, mesh: MeshSpec) -> torch.device:
        """Where tensors of a mesh live."""
        return torch.device(self._device_meshes[mesh].device_type)

    def patience(self, group: ProcessGroup) -> timedelta | None:
        """How long to wait for a group; see `describe.patience_of`, which this remembers."""
        if group not in self._patience:
            self._patience[group] = patience_of(group)
        return self._patience[group]

    def over(self, mesh: MeshSpec, mesh_dims: tuple[str, ...]) -> ProcessGroup:
        """The group of all ranks that differ from this one along `mesh_dims` only."""
        key = (mesh, mesh_dims)
        group = self._known.get(key)
        if group is None:
            group = self._known[key] = self._find(mesh, mesh_dims)
        return group

    def _find(self, mesh: MeshSpec, mesh_dims: tuple[str, ...]) -> ProcessGroup:
        position = mesh.position_of(self._rank)
        ranks = tuple(mesh.ranks[peer] for peer in mesh.peers(position, mesh_dims))
        world = dist.group.WORLD
        assert world is not None, "a DeviceMesh exists, so a default process group does"
        candidates = [world]
        if len(mesh_dims) == 1:
            index = mesh.dim_names.index(mesh_dims[0])
            candidates.insert(0, self._device_meshes[mesh].get_group(index))
        for group in candidates:
            if tuple(dist.get_process_group_ranks(group)) == ranks:
                return group
        made = _made.get((world, ranks))
        if made is None:
            made = dist.new_group(
                list(ranks), timeout=patience_of(world), use_local_synchronization=True
            )
            _made[world, ranks] = made
        return made
