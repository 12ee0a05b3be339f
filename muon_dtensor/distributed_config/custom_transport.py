"""A step whose matrices move by functions of the user, for frameworks that torch does not know.

The same arithmetic as the executor's; what moves, and how, is not known here.
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
    """One parameter of the step: this rank's shards as the user keeps them, and its owner.

    `declaration`: which matrices the whole tensor holds.
    """

    name: str
    local: LocalParam
    owner: int
    declaration: Declaration


@dataclass(frozen=True)
class CustomTransport:
    """Gathers, orthogonalizes at the owner, and hands back, parameter by parameter.

    Contract: all ranks call `run` with the same parameters in the same order. Nothing changes
    before every function has returned what it should. What they returned is looked at after the
    last call, so that ranks which are told, and ranks which are not, have made the same calls; but
    an owner without its tensor, and what is no tensor at all, are told at once.
    """

    gather_fn: Callable[[Tensor, int, dict[str, Any]], Tensor | None]
    redistribute_fn: Callable[[Tensor | None, int, dict[str, Any]], Tensor]
    state: dict[str, Any]
    rank: int
    dtype: torch.dtype

    def run(
        self, params: Sequence[FunctionParam], keep: Tensor | None, *, detect_misuse: bool
    ) -> None:
        """One step.

        Args:
            params: those that have a gradient.
            keep: a bool scalar on the device; where it is False nothing changes.
            detect_misuse: whether NaN in a shard means that `redistribute_fn` did not take it
                from the owner; False where gradients may hold NaN themselves.

        Raises:
            RuntimeError: a function returned what it should not. Nothing has changed here; ranks
                whose functions returned what they should have stepped.
        """
        done: list[tuple[FunctionParam, Tensor, Tensor]] = []
        told: list[str] = []
        for param in params:
            options, grad = param.local.options, local_part(param.local.grad)
            momentum = local_part(param.local.momentum_buffer).clone()
            update_momentum([momentum], [grad], options.momentum, keep)
            direction = direction_of(momentum, grad, options.momentum, options.nesterov)
            shard, was_gathered, fault = self._move(param, with_shard(param.local.grad, direction))
            told.append(fault or self._misuse(param, shard, was_gathered and detect_misuse))
            done.append((param, momentum, shard))
        if misuse := next(filter(None, told), ""):
            raise RuntimeError(misuse)
        for param, momentum, shard in done:
            local_part(param.local.momentum_buffer).copy_(momentum)
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
        """This rank's shard of the update of one parameter, scaled for `lr`.

        And whether `gather_fn` returned a tensor here, and what was wrong with that.
        """
        fault = ""
        whole = self.gather_fn(direction, param.owner, self.state)
        was_gathered = whole is not None
        if self.rank == param.owner:
            if whole is None:
                raise RuntimeError(
                    f"gather_fn returned None for {param.name} on its owner, rank {param.owner}. "
                    "It must return the whole tensor there."
                )
            try:
                whole = self._scaled_polar_factor(whole, param)
            except RefusalError as refusal:
                fault = (
                    f"gather_fn returned a tensor of shape {list(whole.shape)} for {param.name} on "
                    f"its owner, rank {param.owner}. {refusal}"
                )
                whole = torch.full_like(whole, torch.nan)
        elif whole is not None:
            whole = torch.full_like(whole, torch.nan)
        shard = self.redistribute_fn(whole, param.owner, self.state)
        if not isinstance(shard, Tensor):
            raise RuntimeError(
                f"redistribute_fn returned {shard!r} for {param.name} on rank {self.rank}. It must "
                "return this rank's shard."
            )
        return local_part(shard), was_gathered, fault

    def _misuse(self, param: FunctionParam, shard: Tensor, look_for_nan: bool) -> str:
        """What is wrong with the shard that `redistribute_fn` returned; empty if nothing is."""
        expected = local_part(param.local.param).shape
        if shard.shape != expected:
            return (
                f"redistribute_fn returned {list(shard.shape)} for {param.name} on rank "
                f"{self.rank}, whose shard is {list(expected)}."
            )
        if look_for_nan and not shard.isfinite().all():
            return (
                f"redistribute_fn returned NaN or Inf for {param.name} on rank {self.rank}. It "
                f"must hand out what rank {param.owner}, the owner, passes to it; other ranks "
                "pass NaN."
            )
        return ""

    def _scaled_polar_factor(self, whole: Tensor, param: FunctionParam) -> Tensor:
        """Of every matrix, times the factor of its learning rate: only the owner knows its size."""
        options = param.local.options
        matrices = param.declaration.matrices(tuple(whole.shape))
        direction, result = whole.to(self.dtype), torch.empty_like(whole)
        for matrix in matrices:
            box = box_of(matrix.region, Region.whole(tuple(whole.shape)))
            x = to_matrix(view_box(direction, box).contiguous(), matrix)
            polar_factor = options.polar_factor(x, self.dtype).to(whole.dtype)
            scale = adjusted_lr(1.0, options.adjust_lr_fn, matrix.rows, matrix.cols)
            view_box(result, box).copy_(from_matrix(polar_factor * scale, matrix))
        return result
