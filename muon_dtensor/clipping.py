"""Gradient clipping by norm for parameters on different meshes.

torch's own `clip_grad_norm_` stacks norms. It fails where these live on different meshes, for
example those of a norm layer's weight and of a matrix under TP (torch 2.13).
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.optim import Optimizer

from muon_dtensor.layout import Layout
from muon_dtensor.runtime.collectives import all_reduce_max, all_reduce_sum
from muon_dtensor.runtime.dtensors import LayoutCache, describe_layout
from muon_dtensor.runtime.process_groups import Groups
from muon_dtensor.runtime.torch_private import local_part, ordinary_mode, this_rank, warning_level
from muon_dtensor.runtime.totals import sharded_sum

logger = logging.getLogger("muon_dtensor")

MILD = 1e-3
"""Clipping factors above this are normal, and raise no warning."""

NEAR_EPS = 100.0
"""A gradient norm below this many times eps is near eps."""

EPS = 1e-6
"""Added to the norm before dividing by it, as torch.nn.utils.clip_grad_norm_ does."""


@ordinary_mode()
@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor] | Iterable[dict[str, Any]] | Optimizer,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    algorithm: Literal["muon", "adamw"] | None = None,
    pp_group: ProcessGroup | None = None,
) -> Tensor:
    """Scale all gradients in place so that their norm, taken as one vector, is at most `max_norm`.

    Works as `torch.nn.utils.clip_grad_norm_`, with the same arguments, for parameters on any
    meshes: FSDP, TP and EP, on the same ranks or on different ones. A plain tensor counts once,
    whether it is a replica or this rank's own. A collective of all ranks of the parameters' meshes.
    These ranks must pass the same parameters, with or without gradients.

    Args:
        parameters: the parameters whose gradients are clipped, an optimizer, or its param groups.
        max_norm: upper limit of the norm.
        norm_type: p of the p-norm, above 0; may be inf.
        error_if_nonfinite: raise if the norm is NaN or Inf. Waits for the device.
        foreach: False scales one tensor after the other; otherwise one foreach call scales all.
        algorithm: only the groups of this algorithm are clipped and enter the norm. Needs an
            optimizer or param groups. Muon's update does not depend on the scale of its gradients,
            so only AdamW's groups need clipping. With None, a large gradient of an embedding
            scales Muon's gradients down as well.
        pp_group: the ranks that hold the other pipeline stages, if there are any. The norm is then
            that of all stages.

    Returns:
        The norm before clipping: a plain scalar, in float32 at least, on the first gradient's
        device, the same on every rank. (torch returns a DTensor, in the gradients' dtype.)

    Raises:
        ValueError: norm_type is not above 0; `algorithm` is set without param groups.
        RuntimeError: the norm is NaN or Inf and `error_if_nonfinite` is True. Gradients are
            unchanged.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type must be above 0 or inf, got {norm_type}")
    params, eps_of = _params_of(parameters, algorithm)
    total = _total_norm(params, float(norm_type), pp_group)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients is {float(total)}; nothing was "
            "clipped. Pass error_if_nonfinite=False to scale the gradients by it regardless."
        )
    factor = (max_norm / (total + EPS)).clamp(max=1.0)
    if eps_of and total.device.type == "cpu":
        _warn_near_eps(eps_of, float(factor))
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        if param.grad is not None:
            grad = local_part(param.grad)
            by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
    for (device, dtype), grads in by_kind.items():
        scale = factor.to(device, dtype if dtype == torch.float64 else torch.float32)
        if foreach is False:
            for grad in grads:
                grad.mul_(scale)
        else:
            torch._foreach_mul_(grads, scale)
    return total


def _params_of(
    parameters: Tensor | Iterable[Tensor] | Iterable[dict[str, Any]] | Optimizer,
    algorithm: str | None,
) -> tuple[list[Tensor], list[tuple[Tensor, float]]]:
    """Return the parameters to clip, and Muon's parameters among them with `eps`, if known."""
    items: list[Any]
    if isinstance(parameters, Tensor):
        items = [parameters]
    elif isinstance(parameters, Optimizer):
        items = list(parameters.param_groups)
    else:
        items = list(parameters)
    groups = [group for group in items if isinstance(group, Mapping)]
    if not groups:
        if algorithm is not None:
            raise ValueError(
                f"algorithm={algorithm!r} needs an optimizer or its param_groups: parameters do "
                "not name the algorithm that steps them"
            )
        return items, []
    if algorithm not in (None, "muon", "adamw"):
        raise ValueError(f"algorithm must be 'muon', 'adamw' or None, got {algorithm!r}")
    kinds = [_algorithm_of(group) for group in groups]
    if algorithm is not None and None in kinds:
        raise ValueError(
            f"algorithm={algorithm!r}, but param group {kinds.index(None)} belongs to neither Muon "
            "nor AdamW"
        )
    params: list[Tensor] = []
    eps_of: list[tuple[Tensor, float]] = []
    for group, kind in zip(groups, kinds, strict=True):
        if algorithm in (None, kind):
            group_params = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
            params += group_params
            if kind == "muon" and "eps" in group:
                eps_of += [(param, group["eps"]) for param in group_params]
    return params, eps_of


def _algorithm_of(group: Mapping[str, Any]) -> str | None:
    """Return the algorithm that steps a param group, "muon" or "adamw"; None if unknown."""
    if "algorithm" in group or "ns_steps" in group:
        return str(group.get("algorithm", "muon"))
    return "adamw" if "betas" in group else None


def _warn_near_eps(eps_of: Sequence[tuple[Tensor, float]], factor: float) -> None:
    """Log once if clipping brings all of Muon's gradients near eps. Only for norms on the host.

    torch.optim.Muon's update shrinks there (DeepSpeed#8439). Ours does not, but a narrow dtype
    rounds such gradients to zero.
    """
    if factor > MILD:
        return
    norms = [
        (float(local_part(p.grad).float().norm()), eps) for p, eps in eps_of if p.grad is not None
    ]
    norms = [(norm, eps) for norm, eps in norms if norm]
    if norms and all(norm * factor < NEAR_EPS * eps for norm, eps in norms):
        _log_near_eps(factor)


@cache
def _log_near_eps(factor: float) -> None:
    logger.log(
        warning_level(),
        "clipping scales gradients by %.1e and brings all gradients of Muon near eps, where "
        "torch.optim.Muon's update shrinks and narrow dtypes round to zero. Muon does not need "
        "clipping: clip_grad_norm_(optimizer, max_norm, algorithm='adamw') clips only AdamW's "
        "gradients.",
        factor,
    )


def _total_norm(params: Sequence[Tensor], p: float, pp_group: ProcessGroup | None) -> Tensor:
    layout_cache = LayoutCache()
    values: list[tuple[Layout, Tensor]] = []
    dtype, device = torch.float32, torch.device("cpu")
    for index, param in enumerate(params):
        grad = param.grad
        if isinstance(grad, DTensor) and any(isinstance(q, Partial) for q in grad.placements):
            placements = [Replicate() if isinstance(q, Partial) else q for q in grad.placements]
            grad = grad.redistribute(placements=placements)
        like = param if grad is None else grad
        if isinstance(like, DTensor):
            layout = describe_layout(like, layout_cache.mesh(like.device_mesh))
        else:
            shape = tuple(like.shape)
            layout = Layout(layout_cache.plain_mesh, shape, ((),) * len(shape))
        local = local_part(like)
        device = local.device if index == 0 else device
        wide = torch.float64 if local.dtype == torch.float64 else torch.float32
        dtype = torch.promote_types(dtype, wide)
        if grad is None or not local.numel():
            power = torch.zeros((), dtype=torch.float64, device=local.device)
        else:
            norm = torch.linalg.vector_norm(local, p, dtype=wide).double()
            power = norm if math.isinf(p) else norm**p
        values.append((layout, power))
    groups = Groups(layout_cache.device_meshes, this_rank())
    total = sharded_sum(values, groups, this_rank(), take_largest=math.isinf(p))
    if pp_group is not None:
        (all_reduce_max if math.isinf(p) else all_reduce_sum)(total, pp_group)
    return (total if math.isinf(p) else total ** (1 / p)).to(device, dtype)
