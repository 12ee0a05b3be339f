"""How parameters that are no DTensors lie, and how exchanges run: the one-liners of the door.

Says where plain tensors are replicated; the planner does the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

TITAN_DIMS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""torchtitan's mesh dims, outermost first."""


@dataclass
class DistributedConfig:
    """What `Muon(distributed_config=...)` takes; made by a `create_*_config` function.

    mesh: the mesh it was made for or made from.
    plain_mesh: where parameters that are no DTensors are replicated; None: they are each rank's
        own. Must have at most the ranks that really hold equal copies.
    async_gpu_parallelism: False for debugging: ranks orthogonalize one after the other, in rank
        order. The result is the same.
    prefetch_count: buckets whose exchange is in flight while another is orthogonalized.
    """

    mesh: DeviceMesh | None = None
    plain_mesh: DeviceMesh | None = None
    async_gpu_parallelism: bool = True
    prefetch_count: int = 1


def create_devicemesh_config(
    mesh: DeviceMesh | None = None,
    mesh_dim_names: Sequence[str] | None = None,
    *,
    async_gpu_parallelism: bool = True,
    prefetch_count: int = 1,
    device_type: str = "cpu",
    pp: int | None = None,
    dp_replicate: int | None = None,
    dp_shard: int | None = None,
    cp: int | None = None,
    tp: int | None = None,
) -> DistributedConfig:
    """One line for any mesh: DTensors keep their placements, plain parameters share the work.

    Plain parameters are taken to be replicated over the named mesh dims (DDP, context parallel):
    each matrix is then orthogonalized by one rank instead of by all.

    Args:
        mesh: a DeviceMesh; or leave it out and give sizes, and `config.mesh` is made from them.
        mesh_dim_names: dims over which plain parameters are replicated; default: all but `pp`,
            whose stages hold different parameters.
        async_gpu_parallelism: see DistributedConfig.
        prefetch_count: see DistributedConfig.
        device_type: of a mesh made from sizes.
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
        mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    names = mesh.mesh_dim_names
    if mesh_dim_names is None:
        wanted = None if names is None else tuple(name for name in names if name != "pp")
    else:
        wanted = tuple(mesh_dim_names)
        if unknown := [name for name in wanted if name not in (names or ())]:
            raise ValueError(f"mesh dims {unknown} are not on the mesh, which has {names}")
    plain_mesh: DeviceMesh | None = mesh
    if wanted is not None and wanted != names:
        plain_mesh = mesh[wanted] if wanted else None
    return DistributedConfig(mesh, plain_mesh, async_gpu_parallelism, prefetch_count)


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
    return DistributedConfig(None, None, async_gpu_parallelism, prefetch_count)
