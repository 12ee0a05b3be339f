"""`DistributedConfig`, and its factories for DeviceMeshes and DTensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from muon_dtensor.distributed_config.assignment import AssignFn
from muon_dtensor.distributed_config.manual_transport import (
    FACTORY_FUNCTIONS,
    assign_by_index,
    gather_to_one,
    scatter_from_one,
)
from muon_dtensor.runtime.plain_tensors import PlainLayoutRule
from muon_dtensor.runtime.torch_private import device_type_of, ordinary_mode, this_rank

TITAN_DIMS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""torchtitan's mesh dims, outermost first."""

GatherFn = Callable[[Tensor, int, dict[str, Any]], Tensor | None]
"""(this rank's shard, global rank of the owner, state) -> the full tensor on the owner.

On other ranks it may return None. Called for every parameter, in order, on every rank."""

RedistributeFn = Callable[[Tensor | None, int, dict[str, Any]], Tensor]
"""(the full tensor on the owner, global rank of the owner, state) -> this rank's shard."""


@dataclass
class DistributedConfig:
    """Layouts of plain tensors, and how exchanges run; for `Muon(distributed_config=...)`.

    A config of a `create_*` function describes the layouts of plain tensors, and the planner moves
    them. The functions of a hand-written config, for a framework of your own, move tensors
    themselves. `Muon` then calls `assign_fn` once, and for each parameter `gather_fn` and
    `redistribute_fn` on every rank. In between, the owner orthogonalizes the matrices that the
    parameter's group declares. `redistribute_fn` must use only the owner's tensor: other ranks pass
    None, or NaN of the full shape if their `gather_fn` returned a tensor.

    Replacing `assign_fn` of a `create_*` config keeps the planner, with the new owners. Replacing
    `gather_fn` or `redistribute_fn` makes it a hand-written config.

    assign_fn: (parameters, state) -> `{index: rank}` or `{rank: [index, ...]}`, with global ranks,
        the same on every rank. Plain tensors that are shards are passed as meta tensors of their
        full shape.
    gather_fn: see GatherFn.
    redistribute_fn: see RedistributeFn.
    state: passed to all three functions. `rank` and `world_size` are read from it; the defaults are
        those of torch.distributed. If a hand-written config has a DeviceMesh of its ranks in
        `device_mesh`, these ranks compare their state before every step, as in a `create_*` config.
    async_gpu_parallelism: False makes ranks orthogonalize one after the other, in rank order, for
        debugging. The result is the same. It has no effect on hand-written functions.
    prefetch_count: buckets whose exchange is in flight while another is orthogonalized.

    Fields that change after the optimizer was constructed take effect at the next step, on all
    ranks; if ranks differ, it raises. Layouts of plain tensors cannot change.
    """

    assign_fn: AssignFn
    gather_fn: GatherFn
    redistribute_fn: RedistributeFn
    state: dict[str, Any] = field(default_factory=dict)
    async_gpu_parallelism: bool = True
    prefetch_count: int = 1

    @property
    def uses_custom_transport(self) -> bool:
        """Whether the config's own functions move tensors, instead of a plan."""
        return not (_is_factory_fn(self.gather_fn) and _is_factory_fn(self.redistribute_fn))

    @property
    def names_owners(self) -> bool:
        """Whether `assign_fn` is the user's own."""
        return not _is_factory_fn(self.assign_fn)

    @property
    def planned(self) -> tuple[object, ...]:
        """The fields that a plan depends on. If they change, so does the plan."""
        functions = (self.assign_fn, self.gather_fn, self.redistribute_fn)
        return (*functions, self.async_gpu_parallelism, self.prefetch_count)

    @property
    def mesh(self) -> DeviceMesh | None:
        """The mesh of the config, which must hold all parameters; None without one."""
        mesh: DeviceMesh | None = self.state.get("device_mesh")
        return mesh

    @property
    def plain_rule(self) -> PlainLayoutRule | None:
        """The rule for layouts of plain tensors; None if they are each rank's own."""
        rule: PlainLayoutRule | None = self.state.get("plain_rule")
        if self.uses_custom_transport:
            mesh = self.mesh if rule is None else rule.mesh
            return None if mesh is None else PlainLayoutRule(mesh)
        return rule

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields to pickle or copy, without process groups, which cannot be pickled."""
        state = {k: v for k, v in self.state.items() if not isinstance(v, dist.ProcessGroup)}
        return {**self.__dict__, "state": state}


def _is_factory_fn(function: object) -> bool:
    return any(function is factory_fn for factory_fn in FACTORY_FUNCTIONS)


def base_state(rule: PlainLayoutRule | None) -> dict[str, Any]:
    """Return the entries that the state of every `create_*` config has."""
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
    """Return a config for any DeviceMesh. DTensors keep their placements.

    Plain parameters are treated as replicated over the named mesh dims (DDP, context parallel): one
    rank instead of all orthogonalizes each matrix. DTensors on a sub-mesh are treated as replicated
    over the named dims that their mesh does not have (tensor parallelism under DDP). When called
    directly, `gather_fn` collects a plain tensor or a DTensor on one rank, and `redistribute_fn`
    sends a plain tensor to all ranks.

    Args:
        mesh: a DeviceMesh. Or omit it and pass sizes; `config.mesh` is then made from them.
        mesh_dim_names: dims over which plain parameters, and DTensors that do not have them, are
            replicated. Default: all but `pp` and `ep`, whose ranks hold different parameters.
        async_gpu_parallelism: see DistributedConfig.
        prefetch_count: see DistributedConfig.
        device_type: of a mesh made from sizes. Default: that of the default process group.
        pp: size of the outermost mesh dim, pipeline stages. The sizes have torchtitan's names. One
            of them may be -1: it is computed from the world size. None gives no mesh dim.
        dp_replicate: size of the next dim, replicas.
        dp_shard: size of the next dim, shards of FSDP.
        cp: size of the next dim, context parallelism.
        tp: size of the innermost dim, tensor parallelism.

    Raises:
        ValueError: neither or both of mesh and sizes are passed, the product of the sizes is not
            the world size, or a name is not on the mesh.
    """
    all_sizes = {"pp": pp, "dp_replicate": dp_replicate, "dp_shard": dp_shard, "cp": cp, "tp": tp}
    sizes = {name: size for name in TITAN_DIMS if (size := all_sizes[name]) is not None}
    if (mesh is None) == (not sizes):
        raise ValueError("pass either a DeviceMesh or sizes like dp_shard=4, not both")
    if mesh is None:
        sizes = _fill_in(sizes, dist.get_world_size())
        assert dist.group.WORLD is not None, "get_world_size succeeded"
        device_type = device_type or device_type_of(dist.group.WORLD)
        mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    names = mesh.mesh_dim_names
    if mesh_dim_names is None:
        replica_dims = None if names is None else tuple(n for n in names if n not in ("pp", "ep"))
    else:
        if unknown := [name for name in mesh_dim_names if name not in (names or ())]:
            raise ValueError(f"mesh dims {unknown} are not on the mesh, which has {names}")
        replica_dims = tuple(name for name in names or () if name in mesh_dim_names)
    plain_mesh: DeviceMesh | None = mesh
    if replica_dims is not None and replica_dims != names:
        plain_mesh = mesh[replica_dims] if replica_dims else None
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
    """Replace a size of -1. Raises ValueError if the product is not the world size."""
    text = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh sizes must be 1 or more, or -1 for one of them, got {text}")
    open_dims = [name for name, size in sizes.items() if size == -1]
    fixed = prod(size for size in sizes.values() if size != -1)  # product of the other sizes
    if len(open_dims) > 1:
        raise ValueError(f"only one mesh size may be -1, got {text}")
    if world_size % fixed or (not open_dims and fixed != world_size):
        raise ValueError(f"the product of {text} does not match the world size of {world_size}")
    return {name: world_size // fixed if size == -1 else size for name, size in sizes.items()}


def create_dtensor_config(
    *, async_gpu_parallelism: bool = True, prefetch_count: int = 1
) -> DistributedConfig:
    """Return a config for models that consist of DTensors only. See DistributedConfig."""
    return DistributedConfig(
        assign_by_index,
        gather_to_one,
        scatter_from_one,
        base_state(None),
        async_gpu_parallelism,
        prefetch_count,
    )
