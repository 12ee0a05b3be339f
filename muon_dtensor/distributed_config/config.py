"""How parameters that are no DTensors lie, and how exchanges run: the one-liners of the door.

Says where plain tensors are; the planner does the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from muon_dtensor.distributed_config.assignment import AssignFn
from muon_dtensor.distributed_config.manual_transport import (
    MADE_FUNCTIONS,
    assign_by_index,
    gather_to_one,
    scatter_from_one,
)
from muon_dtensor.runtime.plain_tensors import PlainLayoutRule
from muon_dtensor.runtime.torch_private import device_type_of, ordinary_mode, this_rank

TITAN_DIMS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""torchtitan's mesh dims, outermost first."""

GatherFn = Callable[[Tensor, int, dict[str, Any]], Tensor | None]
"""(this rank's shard, global rank of the owner, state) -> the whole tensor, on the owner at least.

On other ranks it may return None. Called for every parameter, in order, on every rank."""

RedistributeFn = Callable[[Tensor | None, int, dict[str, Any]], Tensor]
"""(the whole tensor on the owner, global rank of the owner, state) -> this rank's shard."""


@dataclass
class DistributedConfig:
    """What `Muon(distributed_config=...)` takes.

    Made by a `create_*` function, it says how plain tensors lie, and the planner moves them.
    Written by hand, for a framework of your own, its functions move them: `Muon` then calls
    `assign_fn` once, and per parameter `gather_fn` and `redistribute_fn` on every rank; the owner
    orthogonalizes in between, matrix by matrix as the parameter's group declares them. Other
    ranks hand `redistribute_fn` None, or NaN of the whole shape where their `gather_fn` returned a
    tensor: only what the owner hands over counts.

    A made config whose `assign_fn` is replaced keeps the planner, with those owners. One whose
    `gather_fn` or `redistribute_fn` is replaced is a hand-written one.

    assign_fn: (parameters, state) -> `{index: rank}` or `{rank: [index, ...]}`, the same on every
        rank; ranks are global. Parameters that are cut without being DTensors are shown to it as
        meta tensors of their whole shape.
    gather_fn: see GatherFn.
    redistribute_fn: see RedistributeFn.
    state: handed to all three. `rank` and `world_size` are looked up in it; without them they are
        those of torch.distributed. If hand-written functions leave a DeviceMesh of their ranks in
        `device_mesh`, these agree before every step as under a made config.
    async_gpu_parallelism: False for debugging: ranks orthogonalize one after the other, in rank
        order. The result is the same. Hand-written functions decide that themselves.
    prefetch_count: buckets whose exchange is in flight while another is orthogonalized.

    Fields that change after the optimizer was made take effect at the next step, on all ranks or as
    an error; where plain tensors lie does not change.
    """

    assign_fn: AssignFn
    gather_fn: GatherFn
    redistribute_fn: RedistributeFn
    state: dict[str, Any] = field(default_factory=dict)
    async_gpu_parallelism: bool = True
    prefetch_count: int = 1

    @property
    def uses_custom_transport(self) -> bool:
        """Whether the config's own functions move tensors, rather than a plan."""
        return not (_is_made(self.gather_fn) and _is_made(self.redistribute_fn))

    @property
    def names_owners(self) -> bool:
        """Whether `assign_fn` is the user's."""
        return not _is_made(self.assign_fn)

    @property
    def planned(self) -> tuple[object, ...]:
        """What a plan depends on, as it is now; another value needs another plan."""
        functions = (self.assign_fn, self.gather_fn, self.redistribute_fn)
        return (*functions, self.async_gpu_parallelism, self.prefetch_count)

    @property
    def mesh(self) -> DeviceMesh | None:
        """The mesh it was made for or from; it must hold all parameters."""
        mesh: DeviceMesh | None = self.state.get("device_mesh")
        return mesh

    @property
    def plain_rule(self) -> PlainLayoutRule | None:
        """How plain tensors lie; None: they are each rank's own."""
        rule: PlainLayoutRule | None = self.state.get("plain_rule")
        if self.uses_custom_transport:
            mesh = self.mesh if rule is None else rule.mesh
            return None if mesh is None else PlainLayoutRule(mesh)
        return rule

    def __getstate__(self) -> dict[str, Any]:
        """For pickles and copies: all but process groups, which live in one process."""
        kept = {k: v for k, v in self.state.items() if not isinstance(v, dist.ProcessGroup)}
        return {**self.__dict__, "state": kept}


def _is_made(function: object) -> bool:
    return any(function is made for made in MADE_FUNCTIONS)


def base_state(rule: PlainLayoutRule | None) -> dict[str, Any]:
    """What is in the state of every made config."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    ranks = None if rule is None else sorted(rule.mesh.mesh.flatten().tolist())
    return {
        "rank": this_rank(),
        "world_size": world_size,
        "ranks": ranks or list(range(world_size)),
        "plain_rule": rule,
    }


@ordinary_mode()
def create_devicemesh_config(
    mesh: DeviceMesh | None = None,
    mesh_dim_names: Sequence[str] | None = None,
    *,
    async_gpu_parallelism: bool = True,
    prefetch_count: int = 1,
    device_type: str | None = None,
    pp: int | None = None,
    dp_replicate: int | None = None,
    dp_shard: int | None = None,
    cp: int | None = None,
    tp: int | None = None,
) -> DistributedConfig:
    """One line for any mesh: DTensors keep their placements, plain parameters share the work.

    Plain parameters are taken to be replicated over the named mesh dims (DDP, context parallel):
    each matrix is then orthogonalized by one rank instead of by all. So are DTensors on a sub-mesh
    of those dims over the other ones (tensor parallelism under DDP). The functions of the config,
    called by hand, bring a plain tensor or a DTensor to one rank, and a plain one to all.

    Args:
        mesh: a DeviceMesh; or leave it out and give sizes, and `config.mesh` is made from them.
        mesh_dim_names: dims over which plain parameters, and DTensors that do not have them, are
            replicated; default: all but `pp` and `ep`, whose ranks hold different parameters.
        async_gpu_parallelism: see DistributedConfig.
        prefetch_count: see DistributedConfig.
        device_type: of a mesh made from sizes; default: that of the default process group.
        pp, dp_replicate, dp_shard, cp, tp: sizes by torchtitan's names, outermost first; one may
            be -1, for what the world size leaves. Only those given become mesh dims.

    Raises:
        ValueError: neither or both of mesh and sizes, sizes that do not make the world size,
            names that are not on the mesh.
    """
    given = {"pp": pp, "dp_replicate": dp_replicate, "dp_shard": dp_shard, "cp": cp, "tp": tp}
    sizes = {name: size for name in TITAN_DIMS if (size := given[name]) is not None}
    if (mesh is None) == (not sizes):
        raise ValueError("give a DeviceMesh or sizes like dp_shard=4, and not both")
    if mesh is None:
        sizes = _fill_in(sizes, dist.get_world_size())
        assert dist.group.WORLD is not None, "it has a world size"
        device_type = device_type or device_type_of(dist.group.WORLD)
        mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    names = mesh.mesh_dim_names
    if mesh_dim_names is None:
        wanted = None if names is None else tuple(n for n in names if n not in ("pp", "ep"))
    else:
        if unknown := [name for name in mesh_dim_names if name not in (names or ())]:
            raise ValueError(f"mesh dims {unknown} are not on the mesh, which has {names}")
        wanted = tuple(name for name in names or () if name in mesh_dim_names)
    plain_mesh: DeviceMesh | None = mesh
    if wanted is not None and wanted != names:
        plain_mesh = mesh[wanted] if wanted else None
    rule = None if plain_mesh is None else PlainLayoutRule(plain_mesh)
    return DistributedConfig(
        assign_by_index,
        gather_to_one,
        scatter_from_one,
        {**base_state(rule), "device_mesh": mesh},
        async_gpu_parallelism,
        prefetch_count,
    )


def _fill_in(sizes: dict[str, int], world_size: int) -> dict[str, int]:
    """Sizes with the -1 replaced. Raises ValueError unless they make the world size."""
    text = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh sizes must be 1 or more, or -1 for one of them, got {text}")
    open_dims = [name for name, size in sizes.items() if size == -1]
    fixed = prod(size for size in sizes.values() if size != -1)
    if len(open_dims) > 1:
        raise ValueError(f"only one mesh size may be -1, got {text}")
    if world_size % fixed or (not open_dims and fixed != world_size):
        raise ValueError(f"{text} does not make the world size of {world_size}")
    return {name: world_size // fixed if size == -1 else size for name, size in sizes.items()}


def create_dtensor_config(
    *, async_gpu_parallelism: bool = True, prefetch_count: int = 1
) -> DistributedConfig:
    """For models of DTensors alone: their placements say everything. See DistributedConfig."""
    return DistributedConfig(
        assign_by_index,
        gather_to_one,
        scatter_from_one,
        base_state(None),
        async_gpu_parallelism,
        prefetch_count,
    )
