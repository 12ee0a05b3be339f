"""Makes a DeviceMesh from process groups, which become its dims.

Every rank knows only its own groups. It exchanges them with the other ranks once.

Note [Comparison through the store]
    Ranks cannot compare their groups by collectives over these groups: if a rank omitted one, the
    other ranks would hang. So every rank writes its groups, by keyword, to the store of the default
    process group, reads those of its groups' members, and writes the first fault. This is repeated
    once for each group, so that a fault reaches all connected ranks. A rank waits for at most
    STORE_SECONDS.
"""

import json
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from muon_dtensor.runtime.collectives import all_gather_values, all_reduce_max
from muon_dtensor.runtime.torch_private import default_store, device_type_of, this_rank

STORE_SECONDS = 120
"""Longest time that a rank waits for other ranks to make the same config."""


def check_groups(groups: Mapping[str, object]) -> dict[str, ProcessGroup]:
    """Return the process groups, after a check that all members pass them by the same keywords.

    A collective among all ranks that groups connect; see Note [Comparison through the store].

    Raises:
        ValueError: a value is not a process group of this rank, two groups share more than this
            rank, or another rank passes other groups. On every rank connected to the one at fault.
    """
    if not groups:
        return {}
    fault, ranks = "", {}
    for name, group in groups.items():
        if not isinstance(group, ProcessGroup):
            fault = fault or (
                f"{name} does not contain rank {this_rank()}: got {group!r}. Each rank passes the "
                "group that it is a member of, e.g. device_mesh.get_group(name)."
            )
            continue
        ranks[name] = dist.get_process_group_ranks(group)
    fault = fault or _overlap(ranks)
    if dist.is_initialized():
        fault = _exchange_faults(ranks, fault)
    if fault:
        raise ValueError(fault)
    return {name: group for name, group in groups.items() if isinstance(group, ProcessGroup)}


def _overlap(ranks: Mapping[str, list[int]]) -> str:
    """Return what is wrong with this rank's own groups; empty if they are correct."""
    rank = this_rank()
    names = list(ranks)
    for index, name in enumerate(names):
        if rank not in ranks[name]:
            return f"{name} has ranks {ranks[name]} and does not contain rank {rank}."
        for other in names[:index]:
            shared = sorted(set(ranks[name]) & set(ranks[other]))
            if shared != [rank]:
                return (
                    f"{other} and {name} both hold ranks {shared}. They must be orthogonal, like "
                    f"rows and columns of a grid, and have only rank {rank} in common. Make them "
                    "from one DeviceMesh."
                )
    return ""


def _exchange_faults(ranks: Mapping[str, list[int]], fault: str) -> str:
    """Exchange groups through the store; return the first fault of any connected rank, or ""."""
    store, own_rank = default_store(), this_rank()
    config_index = store.add(f"muon_dtensor/configs/{own_rank}", 1)
    members = sorted({rank for group in ranks.values() for rank in group} - {own_rank})
    num_rounds = len(ranks) + 1

    def key(number: int, rank: int) -> str:
        return f"muon_dtensor/config/{config_index}/{number}/{rank}"

    for number in range(num_rounds):
        if fault:  # ranks that read later rounds must find it too
            for later_round in range(number, num_rounds):
                store.set(
                    key(later_round, own_rank), json.dumps({"fault": f"Rank {own_rank}: {fault}"})
                )
            return fault
        store.set(key(number, own_rank), json.dumps({"groups": ranks}))
        keys = [key(number, rank) for rank in members]
        try:
            store.wait(keys, timedelta(seconds=STORE_SECONDS))
        except RuntimeError:
            fault = (
                f"Some of ranks {members} did not make this config within {STORE_SECONDS} s. All "
                "ranks of the groups must make the same configs in the same order."
            )
            continue
        for rank, reply in zip(members, store.multi_get(keys) if keys else [], strict=True):
            fault = fault or _difference(ranks, rank, json.loads(reply))
    return fault


def _difference(ranks: Mapping[str, list[int]], rank: int, answer: Mapping[str, object]) -> str:
    """Return how another rank's groups differ from this rank's; empty if they are equal."""
    if "fault" in answer:
        text = str(answer["fault"])
        return text if text.startswith("Rank ") else f"Rank {rank}: {text}"
    peer_groups = answer["groups"]
    assert isinstance(peer_groups, dict)
    for name, group in ranks.items():
        if rank in group and peer_groups.get(name) != group:
            passed = peer_groups.get(name, "none")
            return f"{name} has ranks {group}, and rank {rank} passes {passed} as {name}."
    if peer_groups.keys() != ranks.keys():
        return f"Rank {rank} passes {', '.join(peer_groups)}, and this rank {', '.join(ranks)}."
    return ""


def mesh_of_groups(groups: Mapping[str, ProcessGroup]) -> DeviceMesh:
    """Return the mesh whose dims are these checked groups, outermost first.

    A collective of its ranks.

    Raises:
        ValueError: the groups of all ranks do not form a grid. On every rank that detects it, and
            on every rank that groups connect to one of these.
    """
    dims = list(groups.values())
    device_type = device_type_of(dims[0])
    names = tuple(groups)
    if len(dims) == 1:
        return DeviceMesh.from_group(dims[0], device_type, mesh_dim_names=names)
    grid: object = dist.get_process_group_ranks(dims[-1])
    for group in reversed(dims[:-1]):
        grid = all_gather_values(grid, group)
    mesh = _grid_tensor(grid)
    fault = torch.tensor([int(mesh is None or not _is_grid_of(mesh, dims))], device=device_type)
    for _ in range(len(dims) + 1):  # each sweep extends it by one mesh dim
        for group in dims:
            all_reduce_max(fault, group)
    if fault.item() or mesh is None:
        ranks_by_name = {
            name: dist.get_process_group_ranks(group) for name, group in groups.items()
        }
        raise ValueError(
            f"The process groups of all ranks do not form a grid of ascending ranks; those of rank "
            f"{this_rank()} are {ranks_by_name}. Make them from one DeviceMesh whose ranks ascend: "
            "init_device_mesh(...).get_group(name)."
        )
    return DeviceMesh.from_group(dims, device_type, mesh=mesh, mesh_dim_names=names)


def _grid_tensor(grid: object) -> torch.Tensor | None:
    """Return nested lists of ranks as a tensor; None if they are ragged."""
    try:
        return torch.tensor(grid, dtype=torch.int64)
    except ValueError:
        return None


def _is_grid_of(mesh: torch.Tensor, groups: list[ProcessGroup]) -> bool:
    """Whether ranks are distinct, and this rank's line along every mesh dim is its group."""
    if mesh.ndim != len(groups) or len(set(mesh.flatten().tolist())) != mesh.numel():
        return False
    own_index = (mesh == this_rank()).nonzero()
    if len(own_index) != 1:
        return False
    for mesh_dim, group in enumerate(groups):
        line = [slice(None) if d == mesh_dim else int(i) for d, i in enumerate(own_index[0])]
        if mesh[tuple(line)].tolist() != dist.get_process_group_ranks(group):
            return False
    return True
