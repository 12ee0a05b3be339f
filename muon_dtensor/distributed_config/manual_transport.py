"""What the functions of a made config do when they are called by hand.

Each takes what it needs from the config's `state`. A step of `Muon` does not call them: it obeys
the plan, which moves whole buckets.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from muon_dtensor.distributed_config.assignment import by_rank, default_assign_fn, ranks_of
from muon_dtensor.distributed_config.full_tensor import (
    Gathering,
    cut_out,
    learn_whole,
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
"""Of bare states, by their groups, which are kept so that no other group gets their ids.

Entries of destroyed groups are dropped when another one is made.
"""


def assign_by_index(params: Sequence[Tensor], state: Mapping[str, Any]) -> dict[int, int]:
    """Round robin, as `{index: rank}`.

    Apart from `default_assign_fn`, which in a config is the user's choice of owners.
    """
    return default_assign_fn(params, state)


def assign_by_rank(params: Sequence[Tensor], state: Mapping[str, Any]) -> dict[int, list[int]]:
    """Round robin, as `{rank: [index, ...]}` with every rank."""
    return by_rank(default_assign_fn(params, state), ranks_of(state))


def gather_to_one(shard: Tensor, dst_rank: int, state: State) -> Tensor | None:
    """The whole tensor on global rank `dst_rank`, None elsewhere. A collective of the mesh.

    Raises:
        ValueError: shards that make no tensor together, or a rank that the mesh does not hold.
    """
    gathering = _start(shard, dst_rank, _rule(state), state)
    gathering.wait()
    return gathering.whole


def gather_to_all(shard: Tensor, rank: int, state: State) -> Tensor:
    """The whole tensor on every rank; `rank` is not looked at. A collective of the mesh.

    Raises:
        ValueError: shards that make no tensor together.
    """
    gathering = _start(shard, None, _last_if_unsaid(_rule(state)), state)
    gathering.wait()
    assert gathering.whole is not None, "everyone wants it"
    return gathering.whole


def gather_fn_async(
    shard: Tensor, dst_rank: int, state: State, async_op: bool = True
) -> tuple[Tensor | None, Gathering | None]:
    """As `gather_to_one`, on its way: the tensor is filled in when the second value's `wait()`
    returns. With `async_op=False` it is filled in already, and there is nothing to wait for.
    """
    gathering = _start(shard, dst_rank, _rule(state), state)
    if async_op:
        return gathering.whole, gathering
    gathering.wait()
    return gathering.whole, None


def scatter_from_one(whole: Tensor | None, src_rank: int, state: State) -> Tensor:
    """Every rank's shard of the tensor that global rank `src_rank` holds; others pass None.

    A collective of the mesh. Shards are those of torch.chunk.

    Raises:
        ValueError: `src_rank` passed None, or the mesh does not hold it; or the tensor was gathered
            from other shards than these. On every rank.
    """
    if (rule := _rule(state)) is None:
        if whole is None:
            raise ValueError(
                "no mesh: each rank redistributes its own tensor, and this passed None"
            )
        return whole
    layout_cache = LayoutCache(rule.mesh)
    groups = Groups(layout_cache.device_meshes, this_rank())
    known = learn_whole(whole, layout_cache.plain_mesh, groups, src_rank)
    _must_be_chunked(known, state)
    return scatter(known, _chunked(known, rule, layout_cache), groups, src_rank)


def cut_here(whole: Tensor | None, rank: int, state: State) -> Tensor:
    """This rank's shard of a tensor that every rank holds whole; `rank` is not looked at.

    Sends nothing. Shards are those of torch.chunk. Raises ValueError for None, and for a tensor
    that was gathered from other shards than these.
    """
    if whole is None:
        raise ValueError("every rank cuts its shard out of the whole tensor; this one has None")
    if (rule := _last_if_unsaid(_rule(state))) is None:
        return whole
    layout_cache = LayoutCache(rule.mesh)
    _must_be_chunked(whole, state)
    return cut_out(whole, _chunked(whole, rule, layout_cache))


def _rule(state: State) -> PlainLayoutRule | None:
    """Of the config; for a bare state like {"fsdp_pg": group, "rank": ...}, from its groups."""
    if "plain_rule" in state:
        rule: PlainLayoutRule | None = state["plain_rule"]
        return rule
    cuts = {"tp_pg": state.get("tp_shard_dim"), "fsdp_pg": state.get("fsdp_shard_dim", 0)}
    names = ("dp_pg", "fsdp_pg", "cp_pg", "tp_pg")
    given = {name: state[name] for name in names if state.get(name) is not None}
    if not given:
        return None
    known = tuple((name, id(group)) for name, group in given.items())
    if known not in _meshes:  # made once: later calls need not meet with other ranks for it
        for key, (groups, _) in list(_meshes.items()):
            if any(map(is_destroyed, groups.values())):
                del _meshes[key]
        _meshes[known] = (given, mesh_of_groups(check_groups(given)))
    _, mesh = _meshes[known]
    return PlainLayoutRule(mesh, tuple((n, d) for n, d in cuts.items() if n in given))


def _last_if_unsaid(rule: PlainLayoutRule | None) -> PlainLayoutRule | None:
    """The rule of `create_auto_config`'s functions: what cuts no said dim cuts the last one."""
    if rule is None:
        return None
    return PlainLayoutRule(
        rule.mesh, tuple((name, -1 if d is None else d) for name, d in rule.cuts)
    )


def _start(
    shard: Tensor, dst_rank: int | None, rule: PlainLayoutRule | None, state: State
) -> Gathering:
    layout_cache = LayoutCache(None if rule is None else rule.mesh)
    if isinstance(shard, DTensor):
        mesh = layout_cache.mesh(shard.device_mesh)
        layout, shard = describe_layout(shard, mesh), shard.to_local()
        if (
            dst_rank is not None
            and not mesh.holds(dst_rank)
            and layout_cache.plain_mesh.holds(dst_rank)
        ):
            return Gathering(None, layout, (), shard, shard, None)  # it is gathered elsewhere
    elif rule is None:
        layout = Layout(layout_cache.plain_mesh, tuple(shard.shape), ((),) * shard.ndim)
    else:
        layout = _layout_of_shards(shard, rule, layout_cache)
    if rule is not None:
        numel = prod(layout.shape)
        state.setdefault(CUT_OTHERWISE, {})[numel] = _is_cut_otherwise(layout, rule, layout_cache)
    groups = Groups(layout_cache.device_meshes, this_rank())
    return start_gather(shard, layout, groups, dst_rank)


CUT_OTHERWISE = "cut_otherwise"
"""In a config's state: {numel: whether the last tensor of so many elements that was gathered came
from shards that are not those into which it would be cut again}."""


def _is_cut_otherwise(layout: Layout, rule: PlainLayoutRule, layout_cache: LayoutCache) -> bool:
    mesh = layout_cache.plain_mesh
    try:
        chunked = Layout(mesh, layout.shape, rule.cuts_by_hand(len(layout.shape)))
    except RefusalError:
        return True
    return any(
        layout.region(layout.mesh.position_of(rank)) != chunked.region(mesh.position_of(rank))
        for rank in mesh.ranks
        if layout.mesh.holds(rank)
    )


def _must_be_chunked(whole: Tensor, state: State) -> None:
    """Raise ValueError if a tensor of this size was gathered from shards cut in another way."""
    if state.get(CUT_OTHERWISE, {}).get(whole.numel()):
        raise ValueError(
            f"a tensor of {whole.numel()} elements was gathered from shards that are not those "
            "into which redistribute_fn cuts it: uneven ones, slices of FSDP1, or a DTensor with "
            "other placements. Cut it by the shards that you gathered, or let a plan move it: "
            "Muon(..., distributed_config=config)."
        )


def _layout_of_shards(shard: Tensor, rule: PlainLayoutRule, layout_cache: LayoutCache) -> Layout:
    mesh, rank = layout_cache.plain_mesh, this_rank()
    groups = Groups(layout_cache.device_meshes, rank).along_each_dim(mesh)
    told = gather_from_mesh(tuple(shard.shape), groups, rank)
    shapes = {mesh.position_of(other): shape for other, shape in told.items()}
    return layout_from_shards(mesh, rule.cuts_by_hand(shard.ndim), shapes)


def _chunked(whole: Tensor, rule: PlainLayoutRule, layout_cache: LayoutCache) -> Layout:
    shape = tuple(whole.shape)
    return Layout(layout_cache.plain_mesh, shape, rule.cuts_by_hand(whole.ndim))


MADE_FUNCTIONS = (
    *(assign_by_index, assign_by_rank),
    *(gather_to_one, gather_to_all),
    *(scatter_from_one, cut_here),
)
"""A config that has its own gather_fn or redistribute_fn instead of these is hand-written."""
