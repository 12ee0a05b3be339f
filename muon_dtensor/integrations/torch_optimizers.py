"""Converts state of torch.optim.AdamW and torch.optim.Muon for `muon_dtensor.Muon`.

`convert_state_dict` converts state dicts; `load_checkpoint` reads a sharded checkpoint.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from muon_dtensor.distributed_config.full_tensor import cut_like
from muon_dtensor.errors import CheckpointError, shortened
from muon_dtensor.optimizer.muon import Muon
from muon_dtensor.runtime.torch_private import warning_level

logger = logging.getLogger("muon_dtensor")

KEYS = {"muon": ("momentum_buffer",), "adamw": ("step", "exp_avg", "exp_avg_sq")}
"""Keys of a parameter's state in torch's optimizers, by the algorithm that uses them."""

SHARED_OPTIONS = {
    "muon": (
        *("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps"),
        "adjust_lr_fn",
    ),
    "adamw": ("lr", "betas", "eps", "weight_decay"),
}
"""Options with the same meaning in torch's optimizers and in `muon_dtensor.Muon`."""


def convert_state_dict(
    optimizer: Muon, *saved: Mapping[str, Any], names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Convert state dicts of torch's AdamW and Muon into one for `optimizer.load_state_dict`.

    Each parameter keeps the state that its algorithm uses. After a job with AdamW only, embeddings
    and norms keep their state, and matrices that Muon now steps start with zero momentum. After a
    job with a pair of optimizers, all parameters keep their state. Options with the same meaning
    (`lr`, `betas`, ...) and `initial_lr` come from the saved group of the same algorithm that holds
    the first parameter of a group; all other options stay.

    Args:
        optimizer: built from `model.named_parameters()` or `group_parameters(model)`.
        saved: one state dict per optimizer: by name, from `torch.distributed.checkpoint.state_dict.
            get_optimizer_state_dict` (flattened or not); or from `optimizer.state_dict()` of an
            optimizer with named parameters. Tensors are full, or placed as the optimizer's are.
        names: names of the parameters of `saved` in their order, if `saved` only has numbers.

    Returns:
        A new state dict. Unchanged tensors are shared with `saved`.

    Raises:
        CheckpointError: parameters without names in `optimizer` or `saved`; different shapes.
    """
    state: dict[str, Mapping[str, Any]] = {}
    groups: list[tuple[list[str], Mapping[str, Any]]] = []
    for state_dict in saved:
        by_name, named_groups = _by_names(state_dict, names)
        state.update(by_name)
        groups += named_groups
    return _merged(optimizer, state, groups)


def load_checkpoint(optimizer: Muon, checkpoint_id: str | Path, *, key: str = "optimizer") -> None:
    """Load a checkpoint that `torch.distributed.checkpoint` saved of torch's AdamW and Muon.

    A collective of all ranks. Reads `{key}.state.{name}.{momentum_buffer, exp_avg, ...}`, saved on
    any layout, and only the keys that the algorithms of this optimizer use; see
    `convert_state_dict`. Param groups do not change.

    Args:
        optimizer: built from `model.named_parameters()` or `group_parameters(model)`.
        checkpoint_id: folder of the checkpoint.
        key: key of the optimizer state in the checkpoint. For two optimizers saved under different
            keys, call this function once per key.

    Raises:
        CheckpointError: parameters without names, or no usable state of any parameter under `key`.
    """
    metadata = FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
    template: dict[str, dict[str, Any]] = {}
    for name, param, algorithm in _trainable_params(optimizer):
        prefix = f"{key}.state.{name}."
        saved = {k: optimizer.state[param][k] for k in KEYS[algorithm] if prefix + k in metadata}
        if saved.keys() == set(KEYS[algorithm]):
            template[name] = {k: torch.empty_like(value) for k, value in saved.items()}
    if not template:
        raise CheckpointError(
            f"{checkpoint_id} has no state under {key!r} that this optimizer can use; its keys are "
            f"like {shortened(sorted(map(str, metadata)))}"
        )
    nested: dict[str, Any] = {key: {"state": template}}
    load(nested, checkpoint_id=checkpoint_id)
    loaded: dict[str, Mapping[str, Any]] = nested[key]["state"]
    before = {
        name: dict(optimizer.state[param])
        for name, param, _ in _trainable_params(optimizer)
        if name not in loaded and optimizer.state.get(param)
    }
    optimizer.load_state_dict(_merged(optimizer, {**before, **loaded}, []))


def _trainable_params(optimizer: Muon) -> Iterator[tuple[str, Tensor, str]]:
    """Yield name, parameter and algorithm of all parameters that have state.

    Raises CheckpointError if a group has no names.
    """
    for index, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or []
        if len(names) != len(group["params"]):
            raise CheckpointError(
                f"param group {index} of the optimizer has no names: build the optimizer from "
                "model.named_parameters() or group_parameters(model)"
            )
        for name, param in zip(names, group["params"], strict=True):
            if optimizer.state.get(param):
                yield name, param, group["algorithm"]


def _by_names(
    saved: Mapping[str, Any], names: Sequence[str] | None
) -> tuple[dict[str, Mapping[str, Any]], list[tuple[list[str], Mapping[str, Any]]]]:
    """Return the state by name, and the param groups with the names of their parameters."""
    if "state" not in saved:
        return _unflattened(saved, "state."), [
            ([name], group) for name, group in _unflattened(saved, "param_groups.").items()
        ]
    groups = []
    name_of: dict[object, str] = {}
    for group in saved["param_groups"]:
        numbers = group["params"]
        if all(isinstance(number, str) for number in numbers):
            group_names = list(numbers)
        elif "param_names" in group:
            group_names = list(group["param_names"])
        elif names is not None:
            group_names = [names[number] for number in numbers]
        else:
            raise CheckpointError(
                "the saved state has numbers instead of parameter names: pass names=[name for "
                "name, _ in model.named_parameters()], in the order of the saved optimizer's "
                "parameters"
            )
        name_of.update(zip(numbers, group_names, strict=True))
        groups.append((group_names, group))
    return {name_of[number]: values for number, values in saved["state"].items()}, groups


def _unflattened(saved: Mapping[str, Any], prefix: str) -> dict[str, Mapping[str, Any]]:
    """Return values of flat keys such as `state.layers.0.weight.exp_avg` by parameter name."""
    by_name: dict[str, Mapping[str, Any]] = {}
    for key, value in saved.items():
        if key.startswith(prefix):
            name, _, state_key = key.removeprefix(prefix).rpartition(".")
            by_name[name] = {**by_name.get(name, {}), state_key: value}
    if not by_name:
        raise CheckpointError(
            f"the saved state is not that of an optimizer: its keys are {shortened([*saved])}"
        )
    return by_name


def _merged(
    optimizer: Muon,
    state: Mapping[str, Mapping[str, Any]],
    groups: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
) -> dict[str, Any]:
    numbers: dict[str, int] = {}
    new_groups = []
    for group in optimizer.param_groups:
        names = group.get("param_names") or []
        first = len(numbers)
        numbers.update({name: first + index for index, name in enumerate(names)})
        new = {**group, "params": list(range(first, first + len(group["params"])))}
        del new["format_version"]  # without it, keys may be missing in the state
        new_groups.append({**new, **_saved_options(group, names, groups)})
    new_state: dict[int, dict[str, Any]] = {}
    without_state = []
    for name, param, algorithm in _trainable_params(optimizer):
        saved, live = state.get(name, {}), optimizer.state[param]
        if saved.keys() >= set(KEYS[algorithm]):
            new_state[numbers[name]] = {
                key: _placed(f"{key} of {name}", saved[key], live.get(key))
                for key in saved
                if key in KEYS[algorithm] or key in live
            }
        else:
            without_state.append(name)
    if without_state:
        logger.log(
            warning_level(param for _, param, _ in _trainable_params(optimizer)),
            "%d parameters start without state, because no state of their algorithm was saved: %s",
            len(without_state),
            shortened(without_state),
        )
    return {"state": new_state, "param_groups": new_groups}


def _saved_options(
    group: Mapping[str, Any],
    names: Sequence[str],
    groups: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
) -> dict[str, Any]:
    """Return options of the saved group of the same algorithm that holds the first of `names`."""
    algorithm_key = "betas" if group["algorithm"] == "adamw" else "ns_steps"
    for saved_names, saved in groups:
        if names and names[0] in saved_names and algorithm_key in saved:
            shared = (*SHARED_OPTIONS[group["algorithm"]], "initial_lr")
            return {option: saved[option] for option in shared if option in saved}
    return {}


def _placed(name: str, value: Any, live: Any) -> Any:
    """Return a saved value with the placements of the live one."""
    if not isinstance(value, Tensor) or not isinstance(live, Tensor) or not value.ndim:
        return value
    if value.shape != live.shape:
        raise CheckpointError(
            f"{name} is {list(value.shape)} in the saved state, {list(live.shape)} in the optimizer"
        )
    if isinstance(live, DTensor) and not isinstance(value, DTensor):
        return cut_like(value, live)
    return value
