"""From process groups to the DeviceMesh they are the dims of.

Every rank knows its own groups only; what they make together is asked of the others, once.

Note [Asking through the store]
    Whether ranks mean the same groups cannot be asked over those groups: a rank that left one out
    would leave the others waiting. So every rank writes its groups, by keyword, to the store of the
    default process group, reads those of its groups' members, and writes what it found; once more
    for each group, so that a fault reaches all who are connected. Nobody waits for longer than
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
"""How long ranks may differ in the time at which they make a config."""


def check_groups(groups: Mapping[str, object]) -> dict[str, ProcessGroup]:
    """The process groups, which all their members pass by the same keywords.

    A collective among all ranks that groups connect; see Note [Asking through the store].

    Raises:
        ValueError: one is no process group of this rank, two share other ranks than this one, or
            some rank passes other groups. On every rank that is connected with the one at fault.
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
        fault = _ask(ranks, fault)
    if fault:
        raise ValueError(fault)
    return {name: group for name, group in groups.items() if isinstance(group, ProcessGroup)}


def _overlap(ranks: Mapping[str, list[int]]) -> str:
    """What is wrong with this rank's groups as far as it can see; empty if nothing is."""
    here = this_rank()
    names = list(ranks)
    for index, name in enumerate(names):
        if here not in ranks[name]:
            return f"{name} has ranks {ranks[name]} and does not contain rank {here}."
        for other in names[:index]:
            shared = sorted(set(ranks[name]) & set(ranks[other]))
            if shared != [here]:
                return (
                    f"{other} and {name} both hold ranks {shared}. They must be orthogonal, like "
                    f"rows and columns of a grid: rank {here} alone in common. Make them from one "
                    "DeviceMesh."
                )
    return ""


def _ask(ranks: Mapping[str, list[int]], fault: str) -> str:
    """The fault of any rank that is connected with this one, by what all write to the store."""
    store, here = default_store(), this_rank()
    turn = store.add(f"muon_dtensor/configs/{here}", 1)
    members = sorted({rank for group in ranks.values() for rank in group} - {here})
    num_rounds = len(ranks) + 1

    def key(number: int, rank: int) -> str:
        return f"muon_dtensor/config/{turn}/{number}/{rank}"

    for number in range(num_rounds):
        if fault:  # those who ask later find it, too
            for later in range(number, num_rounds):
                store.set(key(later, here), json.dumps({"fault": f"Rank {here}: {fault}"}))
            return fault
        store.set(key(number, here), json.dumps({"groups": ranks}))
        keys = [key(number, rank) for rank in members]
        try:
            store.wait(keys, timedelta(seconds=STORE_SECONDS))
        except RuntimeError:
            fault = (
                f"Some of ranks {members} did not make this config within {STORE_SECONDS} s. All "
                "ranks of the groups must make it, and those before it, in one order."
            )
            continue
        for rank, answer in zip(members, store.multi_get(keys) if keys else [], strict=True):
            fault = fault or _difference(ranks, rank, json.loads(answer))
    return fault


def _difference(ranks: Mapping[str, list[int]], rank: int, told: Mapping[str, object]) -> str:
    """In what another rank's groups are not this one's; empty if in nothing."""
    if "fault" in told:
        text = str(told["fault"])
        return text if text.startswith("Rank ") else f"Rank {rank}: {text}"
    theirs = told["groups"]
    assert isinstance(theirs, dict)
    for name, group in ranks.items():
        if rank in group and theirs.get(name) != group:
            passed = theirs.get(name, "none")
            return f"{name} has ranks {group}, and rank {rank} passes {passed} as {name}."
    if theirs.keys() != ranks.keys():
        return f"Rank {rank} passes {', '.join(theirs)}, and this rank {', '.join(ranks)}."
    return ""


def mesh_of_groups(groups: Mapping[str, ProcessGroup]) -> DeviceMesh:
    """The mesh whose dims are these checked groups, outermost first; a collective of its ranks.

    Raises:
        ValueError: the groups of all ranks together are no grid. On every rank that sees it, or
            hears of it from those with whom its groups connect it.
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
    for _ in range(len(dims) + 1):  # each sweep carries it on to those one more dim away
        for group in dims:
            all_reduce_max(fault, group)
    if fault.item() or mesh is None:
        seen = {name: dist.get_process_group_ranks(group) for name, group in groups.items()}
        raise ValueError(
            f"The process groups of all ranks make no grid of ascending ranks; those of rank "
            f"{this_rank()} are {seen}. Make them from one DeviceMesh whose ranks ascend: "
            "init_device_mesh(...).get_group(name)."
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
