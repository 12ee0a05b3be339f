"""State of torch.optim.AdamW and torch.optim.Muon, of one job or of a pair, for our Muon.

By names: `convert_state_dict`. From a sharded checkpoint on disk: `load_checkpoint`.
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
"""What torch's optimizers keep of a parameter, by the algorithm that can go on with it."""

SHARED_OPTIONS = {
    "muon": (
        *("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps"),
        "adjust_lr_fn",
    ),
    "adamw": ("lr", "betas", "eps", "weight_decay"),
}
"""Options that mean the same here and there."""


def convert_state_dict(
    optimizer: Muon, *saved: Mapping[str, Any], names: Sequence[str] | None = None
) -> dict[str, Any]:
    """State dicts of torch's AdamW and Muon as one that `optimizer.load_state_dict` takes.

    A parameter goes on with the state that its algorithm knows: of a job that AdamW stepped alone,
    embeddings and norms go on, and matrices that Muon steps now start with no momentum, as they do
    with no state at all; of a pair of optimizers everything goes on. Options that mean the same
    (`lr`, `betas`, ...) and `initial_lr` are taken from the saved group of the same algorithm that
    holds the first parameter of a group; all others stay.

    Args:
        optimizer: made of `model.named_parameters()`, or of `group_parameters(model)`.
        saved: of each optimizer one: by names, as `torch.distributed.checkpoint.state_dict.
            get_optimizer_state_dict` makes it (also flattened); or `optimizer.state_dict()` of one
            made of named parameters. Tensors are whole, or placed as the optimizer's are.
        names: of the parameters of `saved` in their order, where it has numbers and no names.

    Returns:
        A new state dict; tensors without a change are shared.

    Raises:
        CheckpointError: parameters without names, here or there; tensors of other shapes.
    """
    state: dict[str, Mapping[str, Any]] = {}
    groups: list[tuple[list[str], Mapping[str, Any]]] = []
    for each in saved:
        by_name, named_groups = _by_names(each, names)
        state.update(by_name)
        groups += named_groups
    return _merged(optimizer, state, groups)


def load_checkpoint(optimizer: Muon, checkpoint_id: str | Path, *, key: str = "optimizer") -> None:
    """Load what `torch.distributed.checkpoint` has saved of torch's AdamW or Muon, or of a pair.

    A collective of all ranks. Reads `{key}.state.{name}.{momentum_buffer, exp_avg, ...}`, on
    whatever layout it was saved, and no more than the algorithms of this optimizer know; see
    `convert_state_dict`. Param groups stay as they are.

    Args:
        optimizer: made of `model.named_parameters()`, or of `group_parameters(model)`.
        checkpoint_id: folder of the checkpoint.
        key: under which the optimizers' state was saved; of a pair that was saved apart, call once
            for each.

    Raises:
        CheckpointError: parameters without names, or a checkpoint with no state under `key` of any.
    """
    metadata = FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
    template: dict[str, dict[str, Any]] = {}
    for name, param, algorithm in _named(optimizer):
        prefix = f"{key}.state.{name}."
        found = {k: optimizer.state[param][k] for k in KEYS[algorithm] if prefix + k in metadata}
        if found.keys() == set(KEYS[algorithm]):
            template[name] = {k: torch.empty_like(value) for k, value in found.items()}
    if not template:
        raise CheckpointError(
            f"{checkpoint_id} has no state under {key!r} that this optimizer could go on with; its "
            f"keys look like {shortened(sorted(map(str, metadata)))}"
        )
    nested: dict[str, Any] = {key: {"state": template}}
    load(nested, checkpoint_id=checkpoint_id)
    loaded: dict[str, Mapping[str, Any]] = nested[key]["state"]
    before = {
        name: dict(optimizer.state[param])
        for name, param, _ in _named(optimizer)
        if name not in loaded and optimizer.state.get(param)
    }
    optimizer.load_state_dict(_merged(optimizer, {**before, **loaded}, []))


def _named(optimizer: Muon) -> Iterator[tuple[str, Tensor, str]]:
    """Name, parameter and algorithm of all that can train. Raises CheckpointError without names."""
    for index, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or []
        if len(names) != len(group["params"]):
            raise CheckpointError(
                f"param group {index} of the optimizer has no names: make it of "
                "model.named_parameters() or group_parameters(model)"
            )
        for name, param in zip(names, group["params"], strict=True):
            if optimizer.state.get(param):
                yield name, param, group["algorithm"]


def _by_names(
    saved: Mapping[str, Any], names: Sequence[str] | None
) -> tuple[dict[str, Mapping[str, Any]], list[tuple[list[str], Mapping[str, Any]]]]:
    """State by name, and param groups with the names that they hold."""
    if "state" not in saved:
        return _unflattened(saved, "state."), [
            ([name], group) for name, group in _unflattened(saved, "param_groups.").items()
        ]
    groups = []
    name_of: dict[object, str] = {}
    for group in saved["param_groups"]:
        numbers = group["params"]
        if all(isinstance(number, str) for number in numbers):
            called = list(numbers)
        elif "param_names" in group:
            called = list(group["param_names"])
        elif names is not None:
            called = [names[number] for number in numbers]
        else:
            raise CheckpointError(
                "the saved state numbers its parameters: pass names=[name for name, _ in "
                "model.named_parameters()], in the order in which its optimizer was given them"
            )
        name_of.update(zip(numbers, called, strict=True))
        groups.append((called, group))
    return {name_of[number]: values for number, values in saved["state"].items()}, groups


def _unflattened(saved: Mapping[str, Any], prefix: str) -> dict[str, Mapping[str, Any]]:
    """By name what keys like `state.layers.0.weight.exp_avg` hold, of those with this prefix."""
    by_name: dict[str, Mapping[str, Any]] = {}
    for key, value in saved.items():
        if key.startswith(prefix):
            name, _, kept = key.removeprefix(prefix).rpartition(".")
            by_name[name] = {**by_name.get(name, {}), kept: value}
    if not by_name:
        raise CheckpointError(f"no state of an optimizer: its keys are {shortened([*saved])}")
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
        numbers.update({name: first + place for place, name in enumerate(names)})
        new = {**group, "params": list(range(first, first + len(group["params"])))}
        del new["format_version"]  # such state may lack what ours has
        new_groups.append({**new, **_options(group, names, groups)})
    new_state: dict[int, dict[str, Any]] = {}
    fresh = []
    for name, param, algorithm in _named(optimizer):
        kept, live = state.get(name, {}), optimizer.state[param]
        if kept.keys() >= set(KEYS[algorithm]):
            new_state[numbers[name]] = {
                key: _placed(f"{key} of {name}", kept[key], live.get(key))
                for key in kept
                if key in KEYS[algorithm] or key in live
            }
        else:
            fresh.append(name)
    if fresh:
        logger.log(
            warning_level(param for _, param, _ in _named(optimizer)),
            "%d parameters start without state, for none of their algorithm was saved: %s",
            len(fresh),
            shortened(fresh),
        )
    return {"state": new_state, "param_groups": new_groups}


def _options(
    group: Mapping[str, Any],
    names: Sequence[str],
    groups: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
) -> dict[str, Any]:
    """What the saved group of the same algorithm says that holds the first of these names."""
    of_torch = "betas" if group["algorithm"] == "adamw" else "ns_steps"
    for called, saved in groups:
        if names and names[0] in called and of_torch in saved:
            shared = (*SHARED_OPTIONS[group["algorithm"]], "initial_lr")
            return {option: saved[option] for option in shared if option in saved}
    return {}


def _placed(name: str, value: Any, live: Any) -> Any:
    """A saved value as the live one is placed."""
    if not isinstance(value, Tensor) or not isinstance(live, Tensor) or not value.ndim:
        return value
    if value.shape != live.shape:
        raise CheckpointError(f"{name} is {list(value.shape)}, here it is {list(live.shape)}")
    if isinstance(live, DTensor) and not isinstance(value, DTensor):
        return cut_like(value, live)
    return value
