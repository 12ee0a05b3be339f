"""Clipping gradients by their norm, whatever meshes they live on.

torch's own `clip_grad_norm_` stacks norms, and fails where they live on different meshes, as those
of a norm's weight and of a matrix under TP do (torch 2.13). Changes gradients only.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial, Replicate

from muon_dtensor.layout import Layout
from muon_dtensor.runtime.collectives import all_reduce_max, all_reduce_sum
from muon_dtensor.runtime.describe import Describer, describe_layout, local_part, this_rank
from muon_dtensor.runtime.groups import Groups
from muon_dtensor.runtime.totals import total_of

EPS = 1e-6
"""Added to the norm before dividing by it, as torch.nn.utils.clip_grad_norm_ does."""


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    pp_group: ProcessGroup | None = None,
) -> Tensor:
    """Scale all gradients in place so that their norm, taken as one vector, is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_`, with its arguments, for parameters on any meshes: FSDP, TP
    and EP on the same ranks or on others, and plain tensors, which count once, as replicas or as
    this rank's own. A collective of all ranks of the parameters' meshes, which must name the same
    parameters, with gradients or without.

    Args:
        parameters: those whose gradients are clipped.
        max_norm: the most the norm may be.
        norm_type: p of the p-norm, above 0; may be inf.
        error_if_nonfinite: raise where the norm is NaN or Inf. Waits for the device.
        foreach: False for one tensor after the other; else all at once.
        pp_group: the ranks that hold the pipeline's other stages, if the model is one: the norm is
            of all stages.

    Returns:
        The norm before clipping: a plain scalar, in float32 at least, on the first gradient's
        device, the same on every rank. (torch returns a DTensor here, and in the gradients' dtype.)

    Raises:
        ValueError: a norm_type that is none.
        RuntimeError: a norm of NaN or Inf, with `error_if_nonfinite`; gradients are as they were.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type must be above 0 or inf, got {norm_type}")
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    total = _total_norm(params, float(norm_type), pp_group)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients is {float(total)}; nothing was "
            "clipped. Pass error_if_nonfinite=False to scale by it all the same."
        )
    factor = (max_norm / (total + EPS)).clamp(max=1.0)
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


def _total_norm(params: Sequence[Tensor], p: float, pp_group: ProcessGroup | None) -> Tensor:
    describer = Describer()
    values: list[tuple[Layout, Tensor]] = []
    dtype, device = torch.float32, torch.device("cpu")
    for index, param in enumerate(params):
        grad = param.grad
        if isinstance(grad, DTensor) and any(isinstance(q, Partial) for q in grad.placements):
            whole = [Replicate() if isinstance(q, Partial) else q for q in grad.placements]
            grad = grad.redistribute(placements=whole)
        like = param if grad is None else grad
        if isinstance(like, DTensor):
            layout = describe_layout(like, describer.mesh(like.device_mesh))
        else:
            shape = tuple(like.shape)
            layout = Layout(describer.plain_mesh, shape, ((),) * len(shape))
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
    groups = Groups(describer.device_meshes, this_rank())
    total = total_of(values, groups, this_rank(), take_largest=math.isinf(p)).to(device)
    if pp_group is not None:
        (all_reduce_max if math.isinf(p) else all_reduce_sum)(total, pp_group)
    return (total if math.isinf(p) else total ** (1 / p)).to(dtype)
