"""AdamW on local shards, by torch's own functional code.

For embeddings, heads, norms and biases. Elementwise, so it knows no mesh.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


@dataclass(frozen=True, slots=True)
class AdamWLocal:
    """One rank's shards of one parameter, its gradient and its state: plain tensors."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


def step_tensor(param: Tensor) -> Tensor:
    """Return a step count of 0 on the parameter's device, as torch's fused AdamW needs it."""
    return torch.zeros((), dtype=torch.float32, device=param.device)


def adamw_step(
    params: Sequence[AdamWLocal], group: Mapping[str, Any], found_inf: Tensor | None = None
) -> None:
    """Take one step of `torch.optim.AdamW`, in place.

    Args:
        params: the local shards of one param group.
        group: `lr`, `betas`, `eps`, `weight_decay` and `capturable`, as in torch.
        found_inf: float32 scalar on the device; if it is 1, nothing changes.
    """
    if not params:
        return
    on_host = params[0].param.device.type == "cpu"
    adamw(
        [p.param for p in params],
        [p.grad for p in params],
        [p.exp_avg for p in params],
        [p.exp_avg_sq for p in params],
        [],
        [p.step for p in params],
        foreach=False,
        # the default of torch.optim.AdamW on the host; the only one with a mask on devices
        fused=not on_host or found_inf is not None,
        found_inf=found_inf,
        amsgrad=False,
        capturable=group["capturable"] and not on_host,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
