"""The options of a param group that a step reads, as one value, and its orthogonalizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muon_dtensor.algorithms.distributed_newton_schulz import Team, distributed_newton_schulz
from muon_dtensor.algorithms.newton_schulz import Coefficients, IterationKernel, iterate
from muon_dtensor.algorithms.normuon import normalize_rows
from muon_dtensor.algorithms.presets import PRESETS
from muon_dtensor.algorithms.update import adjusted_lr
from muon_dtensor.errors import GroupOptionError

Orthogonalizer = Callable[[Tensor], Tensor]
"""A user's function from [*batch, rows, cols] to the same shape."""


def check_orthogonalizer(
    function: Orthogonalizer, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise GroupOptionError unless a user's function keeps the shape of matrices of this dtype.

    Every rank calls this at construction, with matrices on the device of parameters: in a step only
    the owner would raise.
    """
    for shape in ((2, 3), (3, 2), (1, 2, 3)):
        try:
            eye = torch.eye(*shape[-2:], dtype=dtype, device=device)
            result = function(eye.expand(shape).contiguous())
        except Exception as error:
            raise GroupOptionError(
                f"the orthogonalizer fails on {list(shape)} of {dtype} on {device}: {error!r}"
            ) from error
        if not isinstance(result, Tensor) or result.shape != shape:
            returned = list(result.shape) if isinstance(result, Tensor) else repr(result)
            raise GroupOptionError(
                f"the orthogonalizer must keep the shape: it returned {returned} for {list(shape)}"
            )


@dataclass(frozen=True, slots=True, eq=False)
class MuonOptions:
    """The options of a param group that a step reads, with the meaning of torch.

    `decay` is 1 - lr weight_decay; `custom` the user's orthogonalizer, if the group uses it; `body`
    computes the iterations; `cautious` concerns weight decay. `seed` and `step` are those of
    stochastic rounding. If `capturable`, a tensor lr and the
    values computed from it stay tensors, so that the host does not wait for them.
    """

    lr: float | Tensor
    decay: float | Tensor
    momentum: float
    nesterov: bool
    ns_coefficients: tuple[float, float, float]
    eps: float
    ns_steps: int
    adjust_lr_fn: str | None
    orthogonalizer: str
    custom: Orthogonalizer | None
    body: IterationKernel
    capturable: bool
    normuon_beta: float | None
    cautious: bool
    weight_rounding: str
    seed: int
    step: int

    @classmethod
    def of(
        cls, group: Mapping[str, Any], custom: Orthogonalizer | None, body: IterationKernel
    ) -> "MuonOptions":
        """Return the options of a param group."""
        decay = 1 - group["lr"] * group["weight_decay"]
        return cls(
            lr=group["lr"],
            decay=decay if group["capturable"] else float(decay),
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            ns_coefficients=tuple(group["ns_coefficients"]),
            eps=group["eps"],
            ns_steps=group["ns_steps"],
            adjust_lr_fn=group["adjust_lr_fn"],
            orthogonalizer=group["orthogonalizer"],
            custom=custom if group["orthogonalizer"] == "custom" else None,
            body=body,
            capturable=group["capturable"],
            normuon_beta=group["normuon_beta"],
            cautious=group["cautious_weight_decay"],
            weight_rounding=group["weight_rounding"],
            seed=group["rounding_seed"],
            step=group["rounding_step"],
        )

    def matrix_lr(self, rows: int, cols: int) -> float | Tensor:
        """Return the learning rate of a matrix of this size; see `update.adjusted_lr`."""
        scaled = adjusted_lr(self.lr, self.adjust_lr_fn, rows, cols)
        return scaled if self.capturable else float(scaled)

    def normalized(self, polar_factor: Tensor, moments: Tensor, keep: Tensor | None) -> Tensor:
        """Return a polar factor [rows, cols] after NorMuon; see `algorithms.normuon`."""
        assert self.normuon_beta is not None, "only NorMuon keeps moments"
        return normalize_rows(
            polar_factor, moments, beta=self.normuon_beta, eps=self.eps, keep=keep
        )

    @property
    def _coefficients(self) -> tuple[Coefficients, ...]:
        """The (a, b, c) of each iteration."""
        if preset := PRESETS.get(self.orthogonalizer):
            return preset.rows(self.ns_steps)
        return (self.ns_coefficients,) * self.ns_steps

    def polar_factor(self, x: Tensor, dtype: torch.dtype, *, overwrite: bool = False) -> Tensor:
        """Return the approximate polar factor of every matrix of `x` [*batch, rows, cols].

        The result is in `dtype`. With `overwrite` it may use the memory of `x`.

        Raises RuntimeError if the user's orthogonalizer returns another shape.
        """
        if self.custom is not None:
            result = self.custom(x)
            if result.shape != x.shape:
                raise RuntimeError(
                    f"the orthogonalizer returned {list(result.shape)} for {list(x.shape)}"
                )
            return result.to(dtype)
        preset = PRESETS.get(self.orthogonalizer)
        return iterate(
            x,
            self._coefficients,
            eps=self.eps,
            dtype=dtype,
            body=self.body,
            overwrite=overwrite,
            is_preconditioned=preset is not None and preset.is_preconditioned,
        )

    def polar_slab(
        self, x: Tensor, team: Team, rows: Sequence[range], shares_polynomial: bool
    ) -> Tensor:
        """Return this member's slab of a polar factor; see `distributed_newton_schulz`."""
        return distributed_newton_schulz(
            x,
            self._coefficients,
            team=team,
            rows=rows,
            shares_polynomial=shares_polynomial,
            eps=self.eps,
        )
