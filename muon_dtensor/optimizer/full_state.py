"""Checkpoints of shards that torch's sharded ones misplace: by their true places, or whole.

See `Muon.check_saveable`. Reads no file.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from muon_dtensor.distributed_config.full_tensor import cut_like, with_its_place
from muon_dtensor.errors import CheckpointError, RefusalError
from muon_dtensor.optimizer.muon import Muon
from muon_dtensor.optimizer.state import CUT_AS_THEIR_PARAMETER, MOMENTS
from muon_dtensor.runtime.dtensors import LayoutCache, can_place_shards, misplaced_shards
from muon_dtensor.runtime.torch_private import local_part


@contextmanager
def checkpointable(state_dict: dict[str, Any]) -> Iterator[None]:
    """Let `torch.distributed.checkpoint` save and load shards where they truly lie.

        with checkpointable(state):
            dcp.save(state, checkpoint_id=path)   # or dcp.load, or dcp.async_save

    torch takes some uneven shards for others (see `Muon.check_saveable`). Inside the context these
    are plain tensors on the same memory, with the attributes of torch's `CheckpointableTensor`;
    all other values stay as they are. Afterwards `state_dict` holds its DTensors again, with what
    was loaded. Such checkpoints load into any layout, and others into such shards. No collective.

    Args:
        state_dict: of model, optimizer, or both; dicts and lists in it are searched, and changed.

    Raises:
        CheckpointError: there are such shards, and torch is older than 2.14.
    """
    layout_cache = LayoutCache()
    found = list(_misplaced(state_dict, "", layout_cache))
    if found and not can_place_shards():
        raise CheckpointError(misplaced_shards([name for _, _, name, _ in found]))
    try:
        for container, key, _, tensor in found:
            container[key] = with_its_place(tensor)
        yield
    finally:
        for container, key, _, tensor in found:
            container[key] = tensor


def _misplaced(
    values: Any, name: str, layout_cache: LayoutCache
) -> Iterator[tuple[Any, Any, str, DTensor]]:
    """Container, key, name and value of each shard in it that torch misplaces."""
    if not isinstance(values, (dict, list)):
        return
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        here = f"{name}.{key}" if name else str(key)
        if isinstance(value, DTensor) and _is_misplaced(value, layout_cache):
            yield values, key, here, value
        else:
            yield from _misplaced(value, here, layout_cache)


def _is_misplaced(tensor: DTensor, layout_cache: LayoutCache) -> bool:
    try:
        return layout_cache.is_misplaced(tensor)
    except RefusalError:  # placements that this package does not know are torch's own affair
        return False


def load_full_state_dict(
    model: nn.Module,
    optimizer: Muon,
    model_state: Mapping[str, Any],
    optimizer_state: Mapping[str, Any],
) -> None:
    """Load what torch's `get_*_state_dict(full_state_dict=True)` has made, on any layout.

    torch's own `set_*_state_dict` cuts shards of tensor dims that two mesh dims cut, and do not
    divide, otherwise than `fully_shard` does; here they are cut by the layouts of the live tensors.
    No collective: every rank brings all of the state.

    Args:
        model: sharded or not; its parameters and buffers are filled.
        optimizer: made of `model.named_parameters()`, or of `group_parameters(model)`.
        model_state: whole tensors by name.
        optimizer_state: `state` and `param_groups`, with parameters by name.

    Raises:
        CheckpointError: names or shapes that differ, or what `Muon.load_state_dict` raises of it.
            Nothing has changed then.
    """
    live = get_model_state_dict(model)
    if live.keys() != model_state.keys():
        names = sorted(live.keys() ^ model_state.keys())
        raise CheckpointError(f"in the model or in its state only: {', '.join(names[:5])}")
    values = {name: _cut(name, model_state[name], value) for name, value in live.items()}
    optimizer.load_state_dict(_numbered(optimizer, optimizer_state))
    with torch.no_grad():
        for name, value in live.items():
            if isinstance(value, Tensor):
                local_part(value).copy_(local_part(values[name]))


def _numbered(optimizer: Muon, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict by names as one by numbers, its tensors cut as those of the optimizer are."""
    group_of = {name: group for group in saved["param_groups"] for name in group["params"]}
    state: dict[int, dict[str, Any]] = {}
    groups = []
    number = 0
    for index, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or []
        if len(names) != len(group["params"]) or any(name not in group_of for name in names):
            raise CheckpointError(
                f"param group {index} holds parameters that the state has no name for: "
                f"{[name for name in names if name not in group_of][:5] or 'unnamed ones'}"
            )
        numbers = range(number, number + len(names))
        for name, param, each in zip(names, group["params"], numbers, strict=True):
            state[each] = {
                key: _cut(f"{key} of {name}", value, _live(optimizer, param, key))
                for key, value in _kept(optimizer, param, saved["state"].get(name, {})).items()
            }
        if names:
            groups.append({**group_of[names[0]], "params": list(numbers), "param_names": names})
        else:
            groups.append({**group, "params": []})
        number += len(names)
    return {"state": state, "param_groups": groups}


def _kept(optimizer: Muon, param: Tensor, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """What can be loaded of a parameter's state: nothing of NorMuon's while the parameter is frozen
    and has none, for the plan does not say then how its row moments are cut.
    """
    return {} if MOMENTS in saved and not optimizer.state.get(param) else saved


def _live(optimizer: Muon, param: Tensor, key: str) -> Any:
    """What a value is placed as: the live one, or its parameter if that is frozen and has none."""
    live = optimizer.state.get(param, {}).get(key)
    return param if live is None and key in CUT_AS_THEIR_PARAMETER else live


def _cut(name: str, whole: Any, live: Any) -> Any:
    """This rank's part of a whole value, placed as the live one is."""
    if not isinstance(whole, Tensor) or not isinstance(live, Tensor):
        return whole
    if whole.shape != live.shape:
        raise CheckpointError(f"{name} is {list(whole.shape)}, here it is {list(live.shape)}")
    if not isinstance(live, DTensor):
        return whole
    return cut_like(whole, live)
