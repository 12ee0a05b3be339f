"""`CustomTransport`: a step whose tensors are moved by the user's own functions.

The arithmetic is that of the executor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muon_dtensor.algorithms.update import (
    MatrixSlice,
    adjusted_lr,
    apply_update,
    direction_of,
    update_momentum,
)
from muon_dtensor.errors import RefusalError
from muon_dtensor.layout import Region
from muon_dtensor.layout.declarations import Declaration
from muon_dtensor.runtime.local_param import LocalParam
from muon_dtensor.runtime.packing import box_of, from_matrix, to_matrix, view_box
from muon_dtensor.runtime.torch_private import local_part, with_shard


@dataclass(frozen=True, slots=True)
class FunctionParam:
    """One parameter of the step: this rank's shards, and its owner.

    `declaration`: the matrices in the full tensor.
    """

    name: str
    local: LocalParam
    owner: int
    declaration: Declaration


@dataclass(frozen=True)
class CustomTransport:
    """Gathers each parameter, orthogonalizes it at its owner, and redistributes it.

    Contract: all ranks call `run` with the same parameters in the same order. Parameters and
    momenta change only after all functions have returned. Most return values are checked after the
    last call, so that all ranks have made the same calls when one of them raises. Two errors are
    raised immediately: `gather_fn` returned None on the owner, or `redistribute_fn` did not return
    a tensor.
    """

    gather_fn: Callable[[Tensor, int, dict[str, Any]], Tensor | None]
    redistribute_fn: Callable[[Tensor | None, int, dict[str, Any]], Tensor]
    state: dict[str, Any]
    rank: int
    dtype: torch.dtype

    def run(
        self, params: Sequence[FunctionParam], keep: Tensor | None, *, detect_misuse: bool
    ) -> None:
        """Run one step.

        Args:
            params: the parameters that have a gradient.
            keep: a bool scalar on the device; if it is False nothing changes.
            detect_misuse: whether NaN in a shard means that `redistribute_fn` did not use the
                owner's tensor. False if gradients may hold NaN themselves.

        Raises:
            RuntimeError: a function returned a wrong value on this rank. Nothing has changed on
                this rank; ranks whose functions returned correct values have stepped.
        """
        results: list[tuple[FunctionParam, Tensor, Tensor]] = []
        faults: list[str] = []
        for param in params:
            options, grad = param.local.options, local_part(param.local.grad)
            momentum = local_part(param.local.dense_momentum).clone()
            update_momentum([momentum], [grad], options.momentum, keep)
            direction = direction_of(momentum, grad, options.momentum, options.nesterov)
            shard, was_gathered, fault = self._move(param, with_shard(param.local.grad, direction))
            faults.append(fault or self._misuse(param, shard, was_gathered and detect_misuse))
            results.append((param, momentum, shard))
        if misuse := next(filter(None, faults), ""):
            raise RuntimeError(misuse)
        for param, momentum, shard in results:
            local_part(param.local.dense_momentum).copy_(momentum)
            target = local_part(param.local.param)
            rows, cols = (*target.shape[-2:], 1)[:2]
            apply_update(
                target,
                shard.to(target.dtype),
                MatrixSlice(rows, cols, 0, is_transposed=True),
                decay=param.local.options.decay,
                matrix_lr=float(param.local.options.lr),
                cautious=param.local.options.cautious,
                keep=keep,
            )

    def _move(self, param: FunctionParam, direction: Tensor) -> tuple[Tensor, bool, str]:
        """Return this rank's shard of the update of one parameter, without the factor `lr`.

        Also returns whether `gather_fn` returned a tensor on this rank, and what was wrong with it.
        """
        fault = ""
        full_tensor = self.gather_fn(direction, param.owner, self.state)
        was_gathered = full_tensor is not None
        if self.rank == param.owner:
            if full_tensor is None:
                raise RuntimeError(
                    f"gather_fn returned None for {param.name} on its owner, rank {param.owner}. "
                    "It must return the full tensor there."
                )
            try:
                full_tensor = self._scaled_polar_factor(full_tensor, param)
            except RefusalError as refusal:
                fault = (
                    f"gather_fn returned a tensor of shape {list(full_tensor.shape)} for "
                    f"{param.name} on its owner, rank {param.owner}. {refusal}"
                )
                full_tensor = torch.full_like(full_tensor, torch.nan)
        elif full_tensor is not None:
            full_tensor = torch.full_like(full_tensor, torch.nan)
        shard = self.redistribute_fn(full_tensor, param.owner, self.state)
        if not isinstance(shard, Tensor):
            raise RuntimeError(
                f"redistribute_fn returned {shard!r} for {param.name} on rank {self.rank}. It must "
                "return this rank's shard."
            )
        return local_part(shard), was_gathered, fault

    def _misuse(self, param: FunctionParam, shard: Tensor, check_finite: bool) -> str:
        """Return what is wrong with the shard that `redistribute_fn` returned; empty if correct."""
        expected = local_part(param.local.param).shape
        if shard.shape != expected:
            return (
                f"redistribute_fn returned shape {list(shard.shape)} for {param.name} on rank "
                f"{self.rank}, whose shard has shape {list(expected)}."
            )
        if check_finite and not shard.isfinite().all():
            return (
                f"redistribute_fn returned NaN or Inf for {param.name} on rank {self.rank}. It "
                f"must return shards of the tensor that rank {param.owner}, the owner, passes to "
                "it; other ranks pass NaN."
            )
        return ""

    def _scaled_polar_factor(self, full_tensor: Tensor, param: FunctionParam) -> Tensor:
        """Return the polar factors of all matrices, each times the scale by `adjust_lr_fn`."""
        options = param.local.options
        matrices = param.declaration.matrices(tuple(full_tensor.shape))
        direction, result = full_tensor.to(self.dtype), torch.empty_like(full_tensor)
        for matrix in matrices:
            box = box_of(matrix.region, Region.of_shape(tuple(full_tensor.shape)))
            x = to_matrix(view_box(direction, box).contiguous(), matrix)
            polar_factor = options.polar_factor(x, self.dtype).to(full_tensor.dtype)
            scale = adjusted_lr(1.0, options.adjust_lr_fn, matrix.rows, matrix.cols)
            target = view_box(result, box)
            target.copy_(from_matrix(polar_factor * scale, matrix).reshape(target.shape))
        return result
