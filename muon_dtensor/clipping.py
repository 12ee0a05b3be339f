"""Clipping gradients by their norm, whatever meshes they live on.

torch's own `clip_grad_norm_` stacks norms, and fails where they live on different meshes, as those
of a norm's weight and of a matrix under TP do (torch 2.13).
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
from muon_dtensor.runtime.totals import total_of

logger = logging.getLogger("muon_dtensor")

MILD = 1e-3
"""A factor above this is what clipping is for."""

NEAR_EPS = 100.0
"""A gradient's norm is near eps below this many times eps."""

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

    As `torch.nn.utils.clip_grad_norm_`, with its arguments, for parameters on any meshes: FSDP, TP
    and EP on the same ranks or on others, and plain tensors, which count once, as replicas or as
    this rank's own. A collective of all ranks of the parameters' meshes, which must name the same
    parameters, with gradients or without.

    Args:
        parameters: those whose gradients are clipped; or an optimizer, or its param groups.
        max_norm: the most the norm may be.
        norm_type: p of the p-norm, above 0; may be inf.
        error_if_nonfinite: raise where the norm is NaN or Inf. Waits for the device.
        foreach: False for one tensor after the other; else all at once.
        algorithm: clip, and take the norm of, the groups of this algorithm alone; needs an
            optimizer or param groups. Muon's update does not depend on the scale of its gradients,
            so "adamw" is what clipping is about; of all groups, a large gradient of an embedding
            scales Muon's down as well.
        pp_group: the ranks that hold the pipeline's other stages, if the model is one: the norm is
            of all stages.

    Returns:
        The norm before clipping: a plain scalar, in float32 at least, on the first gradient's
        device, the same on every rank. (torch returns a DTensor here, and in the gradients' dtype.)

    Raises:
        ValueError: a norm_type that is 0 or less; an `algorithm` without param groups.
        RuntimeError: a norm of NaN or Inf, with `error_if_nonfinite`; gradients are as they were.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type must be above 0 or inf, got {norm_type}")
    params, eps_of = _params_of(parameters, algorithm)
    total = _total_norm(params, float(norm_type), pp_group)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients is {float(total)}; nothing was "
            "clipped. Pass error_if_nonfinite=False to scale by it all the same."
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
        here = factor.to(device, dtype if dtype == torch.float64 else torch.float32)
        if foreach is False:
            for grad in grads:
                grad.mul_(here)
        else:
            torch._foreach_mul_(grads, here)
    return total


def _params_of(
    parameters: Tensor | Iterable[Tensor] | Iterable[dict[str, Any]] | Optimizer,
    algorithm: str | None,
) -> tuple[list[Tensor], list[tuple[Tensor, float]]]:
    """The parameters to clip, and those of Muon among them with their `eps`, as far as known."""
    given: list[Any]
    if isinstance(parameters, Tensor):
        given = [parameters]
    elif isinstance(parameters, Optimizer):
        given = list(parameters.param_groups)
    else:
        given = list(parameters)
    groups = [group for group in given if isinstance(group, Mapping)]
    if not groups:
        if algorithm is not None:
            raise ValueError(
                f"algorithm={algorithm!r} needs an optimizer, or its param_groups: parameters do "
                "not say what steps them"
            )
        return given, []
    if algorithm not in (None, "muon", "adamw"):
        raise ValueError(f"algorithm must be 'muon', 'adamw' or None, got {algorithm!r}")
    kinds = [_algorithm_of(group) for group in groups]
    if algorithm is not None and None in kinds:
        raise ValueError(
            f"algorithm={algorithm!r}, and param group {kinds.index(None)} does not say what steps "
            "it: neither Muon nor AdamW"
        )
    params: list[Tensor] = []
    eps_of: list[tuple[Tensor, float]] = []
    for group, kind in zip(groups, kinds, strict=True):
        if algorithm in (None, kind):
            own = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
            params += own
            if kind == "muon" and "eps" in group:
                eps_of += [(param, group["eps"]) for param in own]
    return params, eps_of


def _algorithm_of(group: Mapping[str, Any]) -> str | None:
    """The algorithm that steps a param group, "muon" or "adamw"; None if unknown."""
    if "algorithm" in group or "ns_steps" in group:
        return str(group.get("algorithm", "muon"))
    return "adamw" if "betas" in group else None


def _warn_near_eps(eps_of: Sequence[tuple[Tensor, float]], factor: float) -> None:
    """Log once if a factor leaves Muon no gradient well above eps; on the host, where it is known.

    torch.optim.Muon's update shrinks there (DeepSpeed#8439), ours does not, but a narrow dtype
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
        "clipping scales gradients by %.1e, and leaves all of Muon's near eps, where "
        "torch.optim.Muon's update shrinks and narrow dtypes round to zero. Muon does not need "
        "clipping: clip_grad_norm_(optimizer, max_norm, algorithm='adamw') clips the others alone.",
        factor,
    )


def _total_norm(params: Sequence[Tensor], p: float, pp_group: ProcessGroup | None) -> Tensor:
    layout_cache = LayoutCache()
    values: list[tuple[Layout, Tensor]] = []
    dtype, device = torch.float32, torch.device("cpu")
    for index, param in enumerate(params):
        grad = param.grad
        if isinstance(grad, DTensor) and any(isinstance(q, Partial) for q in grad.placements):
            whole = [Replicate() if isinstance(q, Partial) else q for q in grad.placements]
            grad = grad.redistribute(placements=whole)
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
    total = total_of(values, groups, this_rank(), take_largest=math.isinf(p)).to(device)
    if pp_group is not None:
        (all_reduce_max if math.isinf(p) else all_reduce_sum)(total, pp_group)
    return (total if math.isinf(p) else total ** (1 / p)).to(dtype)
