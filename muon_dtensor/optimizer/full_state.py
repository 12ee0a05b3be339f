"""Checkpoints of shards that `torch.distributed.checkpoint` misplaces, and full state dicts.

See `Muon.check_saveable`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from muon_dtensor.distributed_config.full_tensor import cut_like, pass_offsets, with_offsets
from muon_dtensor.errors import CheckpointError, RefusalError
from muon_dtensor.optimizer.muon import Muon
from muon_dtensor.optimizer.state import MOMENTS, SHARDED_LIKE_PARAM
from muon_dtensor.runtime.dtensors import LayoutCache, can_place_shards
from muon_dtensor.runtime.torch_private import local_part, with_shard


def clone_state(state_dict: dict[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """Return a copy of a state dict whose tensors share no memory with it. No collective.

    DTensors keep mesh and placements. `copy.deepcopy` and torch's stagers for asynchronous saves
    raise for DTensors whose shard does not begin its storage (transformers makes such; torch 2.13).

    Args:
        state_dict: of model, optimizer, or both: dicts, lists and tuples of tensors and of plain
            values, which are not copied.
        device: of the shards of the copy; None: as they are. DTensors with a mesh of GPUs may have
            their shards in host memory.
    """
    copy = _clone(state_dict, device)
    assert isinstance(copy, dict)
    return copy


def _clone(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        shard = local_part(value).detach()
        return with_shard(value, shard.to(device or shard.device, copy=True))
    if isinstance(value, dict):
        return {key: _clone(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_clone(item, device) for item in value)
    return value


@contextmanager
def checkpointable(state_dict: dict[str, Any]) -> Iterator[None]:
    """Let `torch.distributed.checkpoint` save and load shards at their true offsets.

        with checkpointable(state):
            dcp.save(state, checkpoint_id=path)   # or dcp.load, or dcp.async_save

    torch computes wrong offsets for some uneven shards (see `Muon.check_saveable`). From torch 2.14
    on these are plain tensors on the same memory inside the context, with the attributes of torch's
    `CheckpointableTensor`; all other values are unchanged. Afterwards `state_dict` holds its
    DTensors again, with the loaded values. With older versions their shards get the right offsets,
    for `dcp.save` and `dcp.load`, not for `dcp.async_save`. Such checkpoints load into any layout,
    and checkpoints of other layouts load into such shards. No collective.

    Args:
        state_dict: of model, optimizer, or both. Dicts and lists in it are searched, and modified.
    """
    misplaced = list(_misplaced(state_dict, LayoutCache()))
    if not can_place_shards():
        for _, _, tensor in misplaced:
            pass_offsets(tensor)
        yield
        return
    try:
        for container, key, tensor in misplaced:
            container[key] = with_offsets(tensor)
        yield
    finally:
        for container, key, tensor in misplaced:
            container[key] = tensor


def _misplaced(values: Any, layout_cache: LayoutCache) -> Iterator[tuple[Any, Any, DTensor]]:
    """Yield container, key and value of each shard in `values` that torch misplaces."""
    if not isinstance(values, (dict, list)):
        return
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if not isinstance(value, DTensor):
            yield from _misplaced(value, layout_cache)
            continue
        try:
            if layout_cache.is_misplaced(value):
                yield values, key, value
        except RefusalError:  # this package does not support these placements; torch may
            continue


def load_full_state_dict(
    model: nn.Module,
    optimizer: Muon,
    model_state: Mapping[str, Any],
    optimizer_state: Mapping[str, Any],
) -> None:
    """Load the state dicts of torch's `get_*_state_dict(full_state_dict=True)` into any layout.

    If two mesh dims cut a tensor dim that they do not divide, torch's own `set_*_state_dict` cuts
    other shards than `fully_shard` does. This function cuts by the layouts of the live tensors. No
    collective: every rank passes the full state.

    Args:
        model: sharded or not; its parameters and buffers are filled.
        optimizer: made of `model.named_parameters()`, or of `group_parameters(model)`.
        model_state: full tensors by name.
        optimizer_state: `state` and `param_groups`, with parameters by name.

    Raises:
        CheckpointError: names or shapes differ, or `Muon.load_state_dict` raises it. Model and
            optimizer are then unchanged.
    """
    live = get_model_state_dict(model)
    if live.keys() != model_state.keys():
        names = sorted(live.keys() ^ model_state.keys())
        raise CheckpointError(
            f"only in the model or only in its state dict: {', '.join(names[:5])}"
        )
    values = {name: _cut(name, model_state[name], value) for name, value in live.items()}
    optimizer.load_state_dict(_numbered(optimizer, optimizer_state))
    with torch.no_grad():
        for name, value in live.items():
            if isinstance(value, Tensor):
                local_part(value).copy_(local_part(values[name]))


def _numbered(optimizer: Muon, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a state dict by names into one by numbers, with tensors cut like the optimizer's."""
    group_of = {name: group for group in saved["param_groups"] for name in group["params"]}
    state: dict[int, dict[str, Any]] = {}
    groups = []
    first = 0
    for index, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or []
        if len(names) != len(group["params"]) or any(name not in group_of for name in names):
            raise CheckpointError(
                f"param group {index} holds parameters that the state dict does not name: "
                f"{[name for name in names if name not in group_of][:5] or 'unnamed ones'}"
            )
        numbers = range(first, first + len(names))
        for name, param, number in zip(names, group["params"], numbers, strict=True):
            state[number] = {
                key: _cut(f"{key} of {name}", value, _live(optimizer, param, key))
                for key, value in _loadable_state(
                    optimizer, param, saved["state"].get(name, {})
                ).items()
            }
        if names:
            groups.append({**group_of[names[0]], "params": list(numbers), "param_names": names})
        else:
            groups.append({**group, "params": []})
        first += len(names)
    return {"state": state, "param_groups": groups}


def _loadable_state(optimizer: Muon, param: Tensor, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a parameter's saved state that can be loaded.

    Nothing, if it has NorMuon's row moments and the parameter is frozen without state: the plan
    then has no layout for the row moments.
    """
    return {} if MOMENTS in saved and not optimizer.state.get(param) else saved


def _live(optimizer: Muon, param: Tensor, key: str) -> Any:
    """Return the live value of `key`, or for a frozen parameter without state the parameter."""
    live = optimizer.state.get(param, {}).get(key)
    return param if live is None and key in SHARDED_LIKE_PARAM else live


def _cut(name: str, full_value: Any, live: Any) -> Any:
    """Return this rank's part of a full value, placed like the live one."""
    if not isinstance(full_value, Tensor) or not isinstance(live, Tensor):
        return full_value
    if full_value.shape != live.shape:
        raise CheckpointError(
            f"{name} has shape {list(full_value.shape)} in the state dict and {list(live.shape)} "
            "in the model or optimizer"
        )
    if not isinstance(live, DTensor):
        return full_value
    return cut_like(full_value, live)
