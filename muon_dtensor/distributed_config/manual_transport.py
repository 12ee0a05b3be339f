"""The functions of `create_*` configs, for users who call them directly.

Each reads what it needs from the config's `state`. A step of `Muon` does not call them: it executes
a plan, which moves whole buckets.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from muon_dtensor.distributed_config.assignment import by_rank, default_assign_fn, ranks_of
from muon_dtensor.distributed_config.full_tensor import (
    GatherHandle,
    broadcast_meta,
    local_shard,
    scatter,
    start_gather,
)
from muon_dtensor.distributed_config.mesh_from_groups import check_groups, mesh_of_groups
from muon_dtensor.errors import RefusalError
from muon_dtensor.layout import Layout
from muon_dtensor.layout.from_shards import layout_from_shards
from muon_dtensor.runtime.collectives import gather_from_mesh
from muon_dtensor.runtime.dtensors import LayoutCache, describe_layout
from muon_dtensor.runtime.plain_tensors import PlainLayoutRule
from muon_dtensor.runtime.process_groups import Groups, is_destroyed
from muon_dtensor.runtime.torch_private import this_rank

State = dict[str, Any]

_meshes: dict[tuple[tuple[str, int], ...], tuple[State, DeviceMesh]] = {}
"""Groups and meshes of states without a rule, by names and ids of the groups.

The groups are stored so that no other object gets their ids. Entries of destroyed groups are
dropped when a new entry is added.
"""


def assign_by_index(params: Sequence[Tensor], state: Mapping[str, Any]) -> dict[int, int]:
    """Assign round robin, as `{index: rank}`.

    It is not `default_assign_fn` itself: a config with that function has owners that the user
    chose.
    """
    return default_assign_fn(params, state)


def assign_by_rank(params: Sequence[Tensor], state: Mapping[str, Any]) -> dict[int, list[int]]:
    """Assign round robin, as `{rank: [index, ...]}` with every rank."""
    return by_rank(default_assign_fn(params, state), ranks_of(state))


def gather_to_one(shard: Tensor, dst_rank: int, state: State) -> Tensor | None:
    """Return the full tensor on global rank `dst_rank`, None elsewhere. A collective of the mesh.

    Raises:
        ValueError: the shards do not form a tensor, or the mesh does not hold the rank.
    """
    gathering = _start(shard, dst_rank, _rule(state), state)
    gathering.wait()
    return gathering.result


def gather_to_all(shard: Tensor, rank: int, state: State) -> Tensor:
    """Return the full tensor on every rank; `rank` is ignored. A collective of the mesh.

    Raises:
        ValueError: the shards do not form a tensor.
    """
    gathering = _start(shard, None, _with_default_dims(_rule(state)), state)
    gathering.wait()
    assert gathering.result is not None, "with dst_rank None every rank gets the tensor"
    return gathering.result


def gather_fn_async(
    shard: Tensor, dst_rank: int, state: State, async_op: bool = True
) -> tuple[Tensor | None, GatherHandle | None]:
    """Start `gather_to_one`; return its tensor and a handle.

    The tensor is filled when the handle's `wait()` returns. With `async_op=False` it is already
    filled, and the handle is None.
    """
    gathering = _start(shard, dst_rank, _rule(state), state)
    if async_op:
        return gathering.result, gathering
    gathering.wait()
    return gathering.result, None


def scatter_from_one(full_tensor: Tensor | None, src_rank: int, state: State) -> Tensor:
    """Return this rank's shard of the full tensor on global rank `src_rank`; others pass None.

    A collective of the mesh. Shards are those of torch.chunk.

    Raises:
        ValueError: `src_rank` passed None, the mesh does not hold `src_rank`, or the tensor was
            gathered from shards other than those of torch.chunk. On every rank.
    """
    if (rule := _rule(state)) is None:
        if full_tensor is None:
            raise ValueError(
                "without a mesh each rank redistributes its own tensor, but this rank passed None"
            )
        return full_tensor
    layout_cache = LayoutCache(rule.mesh)
    groups = Groups(layout_cache.device_meshes, this_rank())
    source = broadcast_meta(full_tensor, layout_cache.plain_mesh, groups, src_rank)
    _check_chunked(source, state)
    return scatter(source, _chunked_layout(source, rule, layout_cache), groups, src_rank)


def cut_local_shard(full_tensor: Tensor | None, rank: int, state: State) -> Tensor:
    """Return this rank's shard of a full tensor that every rank holds; `rank` is ignored.

    No collective. Shards are those of torch.chunk. Raises ValueError for None, and for a tensor
    that was gathered from other shards.
    """
    if full_tensor is None:
        raise ValueError("every rank must pass the full tensor, but this rank passed None")
    if (rule := _with_default_dims(_rule(state))) is None:
        return full_tensor
    layout_cache = LayoutCache(rule.mesh)
    _check_chunked(full_tensor, state)
    return local_shard(full_tensor, _chunked_layout(full_tensor, rule, layout_cache))


def _rule(state: State) -> PlainLayoutRule | None:
    """Return the config's rule, or make one from a state like {"fsdp_pg": group, "rank": ...}."""
    if "plain_rule" in state:
        rule: PlainLayoutRule | None = state["plain_rule"]
        return rule
    cuts = {"tp_pg": state.get("tp_shard_dim"), "fsdp_pg": state.get("fsdp_shard_dim", 0)}
    names = ("dp_pg", "fsdp_pg", "cp_pg", "tp_pg")
    groups = {name: state[name] for name in names if state.get(name) is not None}
    if not groups:
        return None
    key = tuple((name, id(group)) for name, group in groups.items())
    if key not in _meshes:  # later calls need no collective
        for previous_key, (previous, _) in list(_meshes.items()):
            if any(map(is_destroyed, previous.values())):
                del _meshes[previous_key]
        _meshes[key] = (groups, mesh_of_groups(check_groups(groups)))
    _, mesh = _meshes[key]
    return PlainLayoutRule(mesh, tuple((n, d) for n, d in cuts.items() if n in groups))


def _with_default_dims(rule: PlainLayoutRule | None) -> PlainLayoutRule | None:
    """Return the rule with the last tensor dim where none is given, as in `create_auto_config`."""
    if rule is None:
        return None
    return PlainLayoutRule(
        rule.mesh, tuple((name, -1 if d is None else d) for name, d in rule.cuts)
    )


def _start(
    shard: Tensor, dst_rank: int | None, rule: PlainLayoutRule | None, state: State
) -> GatherHandle:
    layout_cache = LayoutCache(None if rule is None else rule.mesh)
    if isinstance(shard, DTensor):
        mesh = layout_cache.mesh(shard.device_mesh)
        layout, shard = describe_layout(shard, mesh), shard.to_local()
        if (
            dst_rank is not None
            and not mesh.holds(dst_rank)
            and layout_cache.plain_mesh.holds(dst_rank)
        ):
            # The DTensors on the mesh of `dst_rank` are gathered; this mesh has nothing to send.
            return GatherHandle(None, layout, (), shard, shard, None)
    elif rule is None:
        layout = Layout(layout_cache.plain_mesh, tuple(shard.shape), ((),) * shard.ndim)
    else:
        layout = _layout_of_shards(shard, rule, layout_cache)
    if rule is not None:
        numel = prod(layout.shape)
        state.setdefault(NOT_CHUNKED, {})[numel] = _is_not_chunked(layout, rule, layout_cache)
    groups = Groups(layout_cache.device_meshes, this_rank())
    return start_gather(shard, layout, groups, dst_rank)


NOT_CHUNKED = "not_chunked"
"""Key in a config's state. Its value is {numel: whether the last gathered tensor with `numel`
elements had shards other than those of torch.chunk}."""


def _is_not_chunked(layout: Layout, rule: PlainLayoutRule, layout_cache: LayoutCache) -> bool:
    mesh = layout_cache.plain_mesh
    try:
        chunked = Layout(mesh, layout.shape, rule.cuts_of_unnamed(len(layout.shape)))
    except RefusalError:
        return True
    return any(
        layout.region(layout.mesh.position_of(rank)) != chunked.region(mesh.position_of(rank))
        for rank in mesh.ranks
        if layout.mesh.holds(rank)
    )


def _check_chunked(full_tensor: Tensor, state: State) -> None:
    """Raise ValueError if a tensor of this size was gathered from shards not cut by torch.chunk."""
    if state.get(NOT_CHUNKED, {}).get(full_tensor.numel()):
        raise ValueError(
            f"a tensor of {full_tensor.numel()} elements was gathered from shards that are not "
            "those into which redistribute_fn cuts it: uneven ones, slices of FSDP1, or a DTensor "
            "with other placements. Cut it yourself like the shards that you gathered, or let a "
            "plan move it: Muon(..., distributed_config=config)."
        )


def _layout_of_shards(shard: Tensor, rule: PlainLayoutRule, layout_cache: LayoutCache) -> Layout:
    mesh, rank = layout_cache.plain_mesh, this_rank()
    groups = Groups(layout_cache.device_meshes, rank).along_each_dim(mesh)
    shapes_by_rank = gather_from_mesh(tuple(shard.shape), groups, rank)
    shapes = {mesh.position_of(peer): shape for peer, shape in shapes_by_rank.items()}
    return layout_from_shards(mesh, rule.cuts_of_unnamed(shard.ndim), shapes)


def _chunked_layout(
    full_tensor: Tensor, rule: PlainLayoutRule, layout_cache: LayoutCache
) -> Layout:
    shape = tuple(full_tensor.shape)
    return Layout(layout_cache.plain_mesh, shape, rule.cuts_of_unnamed(full_tensor.ndim))


FACTORY_FUNCTIONS = (
    *(assign_by_index, assign_by_rank),
    *(gather_to_one, gather_to_all),
    *(scatter_from_one, cut_local_shard),
)
"""A config with another gather_fn or redistribute_fn is hand-written."""
