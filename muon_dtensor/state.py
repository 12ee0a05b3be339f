"""What the optimizer keeps of a parameter between steps, and which saved state fits it.

Knows tensors and their placements. Does not step, and does not plan.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from muon_dtensor.adamw import step_tensor
from muon_dtensor.options import complete_loaded, validate
from muon_dtensor.runtime.describe import on_host, placed


def make_state(
    state: dict[str, Any],
    param: Tensor,
    algorithm: str,
    momentum_dtype: torch.dtype | None = None,
    *,
    offload_momentum: bool = False,
) -> None:
    """Fill in what is missing of a parameter's state; made at once, so all ranks hold its keys.

    Muon keeps `momentum_buffer`, AdamW `step`, `exp_avg` and `exp_avg_sq`: tensors of the
    parameter's shape, dtype and placements. A momentum of another dtype, or one to be kept on the
    host, is brought there; torch's `load_state_dict` gives it back as the parameter is.
    """
    if algorithm == "muon":
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param, requires_grad=False)
        if momentum_dtype is not None:
            state["momentum_buffer"] = state["momentum_buffer"].to(momentum_dtype)
        if offload_momentum:
            state["momentum_buffer"] = on_host(state["momentum_buffer"])
    elif "exp_avg" not in state:
        state["step"] = step_tensor(param)
        state["exp_avg"] = torch.zeros_like(param, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(param, requires_grad=False)


def check_loaded(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise for a state dict that does not fit these param groups, before anything is loaded.

    Raises:
        GroupOptionError: an option out of its range.
        ValueError: state whose shape or placements are not those of its parameter.
    """
    for group, saved in zip(groups, state_dict["param_groups"], strict=False):
        loaded = dict(saved)
        complete_loaded(loaded, group)
        validate(loaded)
        for param, number in zip(group["params"], saved["params"], strict=False):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.ndim and not _is_placed_as(value, param):
                    raise ValueError(
                        f"'{key}' of parameter {number} is {placed(value)}, the parameter "
                        f"{placed(param)}. Load with torch.distributed.checkpoint, which reshards."
                    )


def _is_placed_as(value: Tensor, param: Tensor) -> bool:
    """Whether a state tensor is cut exactly as its parameter."""
    same = value.shape == param.shape
    for name in ("placements", "device_mesh"):
        same = same and getattr(value, name, None) == getattr(param, name, None)
    return same
