"""From process groups to the DeviceMesh they are the dims of.

Every rank knows its own groups only; what they make together is asked of the others, once.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from muon_dtensor.runtime.collectives import all_gather_values, all_reduce_max
from muon_dtensor.runtime.describe import this_rank


def check_groups(groups: Mapping[str, object]) -> dict[str, ProcessGroup]:
    """The process groups, as they can be dims of one mesh as far as this rank can see.

    Raises:
        ValueError: one is no process group of this rank, or two share other ranks than this one.
    """
    checked: dict[str, ProcessGroup] = {}
    rank = this_rank()
    for name, group in groups.items():
        if not isinstance(group, ProcessGroup):
            raise ValueError(
                f"{name} does not contain rank {rank}: got {group!r}. Each rank passes the group "
                "that it is a member of, e.g. device_mesh.get_group(name)."
            )
        ranks = dist.get_process_group_ranks(group)
        if rank not in ranks:
            raise ValueError(f"{name} has ranks {ranks} and does not contain rank {rank}.")
        for other, known in checked.items():
            shared = sorted(set(ranks) & set(dist.get_process_group_ranks(known)))
            if shared != [rank]:
                raise ValueError(
                    f"{other} and {name} both hold ranks {shared}. They must be orthogonal, like "
                    "rows and columns of a grid: rank "
                    f"{rank} alone in common. Make them from one DeviceMesh."
                )
        checked[name] = group
    return checked


def mesh_of_groups(groups: Mapping[str, ProcessGroup]) -> DeviceMesh:
    """The mesh whose dims are these groups, outermost first; a collective among its ranks.

    Raises:
        ValueError: the groups of all ranks together are no grid. On every rank that sees it, or
            that one of its groups hears of it from.
    """
    dims = list(groups.values())
    device_type = "cuda" if "nccl" in dist.get_backend(dims[0]) else "cpu"
    names = tuple(groups)
    if len(dims) == 1:
        return DeviceMesh.from_group(dims[0], device_type, mesh_dim_names=names)
    grid: object = dist.get_process_group_ranks(dims[-1])
    for group in reversed(dims[:-1]):
        grid = all_gather_values(grid, group)
    mesh = _grid_tensor(grid)
    fault = torch.tensor([int(mesh is None or not _is_grid_of(mesh, dims))])
    for group in dims:
        values = fault.to(device_type)
        all_reduce_max(values, group)
        fault = values.cpu()
    if fault.item() or mesh is None:
        seen = {name: dist.get_process_group_ranks(group) for name, group in groups.items()}
        raise ValueError(
            f"The process groups of all ranks make no grid; those of rank {this_rank()} are "
            f"{seen}. Make them from one DeviceMesh: init_device_mesh(...).get_group(name)."
        )
    return DeviceMesh.from_group(dims, device_type, mesh=mesh, mesh_dim_names=names)


def _grid_tensor(grid: object) -> torch.Tensor | None:
    """Nested lists of ranks as a tensor; None if they are ragged."""
    try:
        return torch.tensor(grid, dtype=torch.int64)
    except ValueError:
        return None


def _is_grid_of(mesh: torch.Tensor, groups: list[ProcessGroup]) -> bool:
    """Whether ranks differ, and this rank's line along every dim is its group."""
    if mesh.ndim != len(groups) or len(set(mesh.flatten().tolist())) != mesh.numel():
        return False
    here = (mesh == this_rank()).nonzero()
    if len(here) != 1:
        return False
    for mesh_dim, group in enumerate(groups):
        line = [slice(None) if d == mesh_dim else int(i) for d, i in enumerate(here[0])]
        if mesh[tuple(line)].tolist() != dist.get_process_group_ranks(group):
            return False
    return True
