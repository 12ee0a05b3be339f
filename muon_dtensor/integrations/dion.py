"""Converts checkpoints of microsoft/dion's Muon, NorMuon and AdamW for `Muon.load_state_dict`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from muon_dtensor.errors import CheckpointError
from muon_dtensor.optimizer.options import complete

ALGORITHMS = {"muon": "muon", "normuon": "muon", "adamw": "adamw"}


def convert_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of `dion.Muon` or `dion.NorMuon` as one of ours.

    Dion sums gradients, M <- mu M + G, where torch and we average them, so momenta are scaled by
    1 - mu; everything after that is the same for both. Its AdamW keeps `momentum` and `variance`,
    and counts steps by group. NorMuon's `variance_neuron` is of each rank's rows, not of matrices:
    it is left out, and starts anew.

    Args:
        state_dict: of `optimizer.state_dict()`, or of `torch.distributed.checkpoint`'s
            `get_optimizer_state_dict`. Kept as it is.

    Returns:
        A new state dict with the same parameters; tensors without a change are shared.

    Raises:
        CheckpointError: groups of another algorithm (Lion, Dion), or no state dict of Dion's.
    """
    state: dict[Any, dict[str, Any]] = {}
    groups = []
    for group in state_dict["param_groups"]:
        if group.get("algorithm") not in ALGORITHMS:
            raise CheckpointError(
                f"a group's algorithm is {group.get('algorithm')!r}; Dion's "
                f"{', '.join(ALGORITHMS)} can be converted"
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
                    "adjust_lr=None scales no learning rate, which no adjust_lr_fn of ours means; "
                    "set the group's adjust_lr, and lr, before converting"
                )
            if group["algorithm"] == "normuon":
                values["normuon_beta"] = group["muon_beta2"]
        kept = {n: group[n] for n in ("param_names", "initial_lr") if n in group}
        whole = {**complete(values, {}), **kept, "params": list(group["params"])}
        del whole["format_version"]  # such state may lack what ours has
        groups.append(whole)
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
