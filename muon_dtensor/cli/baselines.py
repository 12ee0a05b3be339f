"""Baseline Muon step for the demo and the benchmarks. Not used by the optimizer."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from muon_dtensor.algorithms import newton_schulz
from muon_dtensor.algorithms.update import direction_of, update_momentum
from muon_dtensor.layout import Region
from muon_dtensor.runtime.dtensors import describe_layout, describe_mesh
from muon_dtensor.runtime.packing import box_of, view_box
from muon_dtensor.runtime.torch_private import local_part, this_rank


@torch.no_grad()
def naive_step(
    params: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float,
    momentum: float = 0.95,
    ns_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Do a Muon step in which every rank gathers and orthogonalizes every matrix.

    `params` are 2-D tensors or DTensors with gradients. `ns_dtype` is the dtype of the iteration.
    There is no weight decay.
    """
    grads = []
    for param in params:
        assert param.grad is not None, "naive_step needs a gradient for every parameter"
        grads.append(param.grad)
    buffers = [local_part(m) for m in momenta]
    update_momentum(buffers, [local_part(g) for g in grads], momentum)
    for param, grad, buffer in zip(params, grads, momenta, strict=True):
        local = direction_of(local_part(buffer), local_part(grad), momentum, nesterov=True)
        if not isinstance(param, DTensor):
            param.add_(newton_schulz(local, dtype=ns_dtype), alpha=-lr)
            continue
        direction = DTensor.from_local(
            local,
            param.device_mesh,
            param.placements,
            run_check=False,
            shape=param.shape,
            stride=param.stride(),
        )
        full_update = newton_schulz(direction.full_tensor(), dtype=ns_dtype)
        local_part(param).add_(_local_shard(full_update, param), alpha=-lr)


def _local_shard(full_tensor: Tensor, like: DTensor) -> Tensor:
    """Return this rank's shard of a full tensor, placed as `like`."""
    layout = describe_layout(like, describe_mesh(like.device_mesh))
    region = layout.region(layout.mesh.position_of(this_rank()))
    return view_box(full_tensor, box_of(region, Region.of_shape(layout.shape)))
