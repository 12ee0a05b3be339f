"""Converts checkpoints of microsoft/dion's Muon, NorMuon and AdamW for `Muon.load_state_dict`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from muon_dtensor.errors import CheckpointError
from muon_dtensor.optimizer.options import complete

ALGORITHMS = {"muon": "muon", "normuon": "muon", "adamw": "adamw"}


def convert_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a state dict of `dion.Muon` or `dion.NorMuon` for `muon_dtensor.Muon`.

    Dion accumulates gradients, M <- mu M + G. torch and this package average them, so momenta are
    scaled by 1 - mu; the update is otherwise the same. Dion's AdamW stores `momentum` and
    `variance`, and counts steps per group. NorMuon's `variance_neuron` belongs to the rows of each
    rank instead of to matrices: it is not converted and starts at zero.

    Args:
        state_dict: from `optimizer.state_dict()`, or from `torch.distributed.checkpoint`'s
            `get_optimizer_state_dict`. It is not modified.

    Returns:
        A new state dict with the same parameters. Unchanged tensors are shared with `state_dict`.

    Raises:
        CheckpointError: a group of another algorithm (Lion, Dion), or a state dict that is not
            Dion's.
    """
    state: dict[Any, dict[str, Any]] = {}
    groups = []
    for group in state_dict["param_groups"]:
        if group.get("algorithm") not in ALGORITHMS:
            raise CheckpointError(
                f"cannot convert a group with algorithm {group.get('algorithm')!r}; groups with "
                f"Dion's {', '.join(ALGORITHMS)} can be converted"
            )
        algorithm = ALGORITHMS[group["algorithm"]]
        values: dict[str, Any] = {
            "algorithm": algorithm,
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "eps": group["epsilon"],
            "betas": (group["beta1"], group["beta2"]),
        }
        if algorithm == "muon":
            values["momentum"] = group["mu"]
            values["nesterov"] = group["nesterov"]
            values["cautious_weight_decay"] = bool(group.get("cautious_wd", False))
            values["adjust_lr_fn"] = group["adjust_lr"]
            if group["adjust_lr"] is None:
                raise CheckpointError(
                    "adjust_lr=None does not scale the learning rate, and adjust_lr_fn has no such "
                    "value; set the group's adjust_lr, and lr, before converting"
                )
            if group["algorithm"] == "normuon":
                values["normuon_beta"] = group["muon_beta2"]
        copied = {n: group[n] for n in ("param_names", "initial_lr") if n in group}
        new_group = {**complete(values, {}), **copied, "params": list(group["params"])}
        del new_group["format_version"]  # without it, keys may be missing in the state
        groups.append(new_group)
        for number in group["params"]:
            if number in state_dict["state"]:
                state[number] = _converted(state_dict["state"][number], group, algorithm)
    return {"state": state, "param_groups": groups}


def _converted(
    state: Mapping[str, Tensor], group: Mapping[str, Any], algorithm: str
) -> dict[str, Any]:
    if algorithm == "muon":
        return {"momentum_buffer": state["momentum"] * (1 - group["mu"])}
    step = torch.tensor(float(group["step"]))
    return {"step": step, "exp_avg": state["momentum"], "exp_avg_sq": state["variance"]}
