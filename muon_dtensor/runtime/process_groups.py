"""Process groups for collectives over some mesh dims.

Note [Own groups]
    `torch.distributed.checkpoint.async_save` runs collectives on the default process group from
    another thread, and two threads that share a group deadlock. So over several mesh dims a step
    uses its own group, created once per set of ranks and default group. Over one mesh dim it uses
    the group of that dim. torch and FSDP2 use the default group for a dim that spans all ranks, so
    such jobs must pass a separate process group to `async_save`.

Note [Warm groups]
    NCCL connects two ranks when they first exchange data, and a first all-to-all in the middle of
    a step has deadlocked other packages (PrimeIntellect-ai/prime-rl#3490). So every group of a plan
    runs one small all-to-all before the first step uses it.
"""

from collections.abc import Mapping
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from muon_dtensor.layout import MeshSpec
from muon_dtensor.runtime.collectives import connect_ranks
from muon_dtensor.runtime.torch_private import is_offloaded, timeout_of

_own: WeakKeyDictionary[ProcessGroup, dict[tuple[int, ...], ProcessGroup]] = WeakKeyDictionary()
"""Groups of this package by default process group and ranks; freed with the default group."""

_warm: WeakSet[ProcessGroup] = WeakSet()
"""Groups whose ranks are connected; see Note [Warm groups]."""


def is_destroyed(group: ProcessGroup) -> bool:
    """Whether `destroy_process_group` has ended this group."""
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, RuntimeError, ValueError):
        return True
    return False


class Groups:
    """Process groups by mesh and mesh dims, seen from one rank.

    The ranks of a group ascend, as in `MeshSpec.peers`. Creating a group is a collective of its own
    ranks only, so pipeline stages need not know of each other.
    """

    def __init__(self, device_meshes: Mapping[MeshSpec, DeviceMesh], rank: int) -> None:
        self._device_meshes = device_meshes
        self._rank = rank
        self._known: dict[tuple[MeshSpec, tuple[str, ...], int | None], ProcessGroup] = {}

    def along_each_dim(self, mesh: MeshSpec) -> list[ProcessGroup]:
        """Return the groups of the mesh's own dims, which exist already."""
        device_mesh = self._device_meshes[mesh]
        return [device_mesh.get_group(index) for index in range(device_mesh.ndim)]

    def device(self, mesh: MeshSpec) -> torch.device:
        """Return the device of a mesh's tensors."""
        return torch.device(self._device_meshes[mesh].device_type)

    def on_device(self, mesh: MeshSpec, tensor: Tensor) -> Tensor:
        """Return a tensor that the groups of a mesh can send: a copy, if it was offloaded."""
        device = self.device(mesh)
        return tensor.to(device) if is_offloaded(tensor.device, device) else tensor

    def over(
        self, mesh: MeshSpec, mesh_dims: tuple[str, ...], team_size: int | None = None
    ) -> ProcessGroup:
        """Return the group of all ranks that differ from this one only along `mesh_dims`.

        With `team_size` only those of its team, see `MeshSpec.team`.
        """
        key = (mesh, mesh_dims, team_size)
        group = self._known.get(key)
        if group is None:
            group = self._known[key] = self._find(mesh, mesh_dims, team_size)
        return group

    def connect(
        self, mesh: MeshSpec, mesh_dims: tuple[str, ...], team_size: int | None = None
    ) -> None:
        """Create this group if it does not exist, and connect its ranks unless they are connected.

        A collective of its ranks; see Note [Warm groups].
        """
        group = self.over(mesh, mesh_dims, team_size)
        if group in _warm:
            return
        connect_ranks(group, self.device(mesh))
        _warm.add(group)

    def _find(
        self, mesh: MeshSpec, mesh_dims: tuple[str, ...], team_size: int | None
    ) -> ProcessGroup:
        """See Note [Own groups]."""
        position = mesh.position_of(self._rank)
        size = team_size or mesh.num_ranks_along(mesh_dims)
        peers = mesh.team(position, mesh_dims, size)
        ranks = tuple(mesh.ranks[peer] for peer in peers)
        long_dims = [name for name in mesh_dims if mesh.sizes[name] > 1] or mesh_dims[:1]
        if len(long_dims) == 1:
            index = mesh.dim_names.index(long_dims[0])
            group = self._device_meshes[mesh].get_group(index)
            if tuple(dist.get_process_group_ranks(group)) == ranks:
                return group
        world = dist.group.WORLD
        assert world is not None, "a DeviceMesh exists, so a default process group does"
        groups = _own.setdefault(world, {})
        if ranks not in groups:
            groups[ranks] = dist.new_group(
                list(ranks), timeout=timeout_of(world), use_local_synchronization=True
            )
        return groups[ranks]
