"""Checks the gradients of a step: present, finite, at their parameters' placements.

Compares ranks, redistributes gradients, and decides the same on all ranks. Updates nothing.
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from muon_dtensor.errors import NonFiniteGradientError
from muon_dtensor.runtime.consistency import Agreement
from muon_dtensor.runtime.consistency_codec import (
    MISSING,
    NO_ELEMENTS,
    PRESENT,
    LocalStatus,
    non_finite_flag,
    of_dtype,
    raise_faults,
)
from muon_dtensor.runtime.torch_private import (
    HostCopy,
    dtype_name,
    has_same_spec,
    is_capturing,
    local_part,
    warning_level,
    zeros_like,
)

logger = logging.getLogger("muon_dtensor")


STEPPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of parameters whose gradients may have the same dtype."""


class GradientCheck:
    """Returns the gradients of a step, or stops the step on every rank.

    On the host ranks compare before anything changes. With deferred checks, the default on a
    device, `check` does not wait after a first step: it returns a mask, and `raise_deferred` raises
    the error in the next step.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        agreement: Agreement,
        *,
        device: torch.device,
        missing_grad: Literal["raise", "zero"],
        nonfinite: Literal["raise", "skip", "propagate"],
        deferred_checks: bool | None = None,
        same_dtype_params: Collection[str] = (),
    ) -> None:
        """`device`: where reduced statuses live; the buffer device of parameters on a mesh.

        `same_dtype_params`: names of parameters whose gradients must have their dtype.
        """
        is_deferred = device.type != "cpu" if deferred_checks is None else deferred_checks
        self.device = device
        self._params = params
        self._same_dtype_params = frozenset(same_dtype_params)
        self._shapes = {name: local_part(param).shape for name, param in params.items()}
        self._empty_params = [name for name, param in params.items() if _is_empty(param)]
        self._dtypes: dict[str, torch.dtype] = {}
        self._agreement = agreement
        self._missing_grad = missing_grad
        self._nonfinite = nonfinite
        self._deferred_checks = deferred_checks
        # kernels of one device cannot read a mask on another in time
        types = {local_part(param).device.type for param in params.values()} - {"meta"}
        is_mixed = bool(types - {device.type})
        self.is_deferred = is_deferred and not is_mixed and missing_grad != "zero"
        self._past: list[HostCopy] = []
        self._past_fault: Exception | None = None
        self._has_settled = False
        self._has_logged_zeros = False

    def check(
        self,
        options: tuple[str, ...],
        *,
        is_measured: bool = False,
        fault: Exception | None = None,
    ) -> tuple[dict[str, Tensor], Tensor | bool]:
        """Return gradients by name of parameter, and whether to step with them.

        The second value is a bool, or on a device a bool scalar that the host has not read.

        Args:
            options: hyperparameters of each param group as text, which ranks compare.
            is_measured: whether ranks reduce metrics after the step; all ranks must agree.
            fault: why this rank cannot step, apart from its gradients.

        Raises:
            PlanMismatchError, MissingGradientError, NonFiniteGradientError: on every rank.
            RuntimeError: a gradient that cannot be used, on this rank or on another.
            Exception: `fault`; other ranks get a RuntimeError.
        """
        grads = {name: g for name, p in self._params.items() if (g := p.grad) is not None}
        grads |= {name: self._zeros(name) for name in self._empty_params if name not in grads}
        unusual = [name for name, grad in grads.items() if not self._is_ordinary(name, grad)]
        faults = {n: text for n in unusual if (text := self._fault_of(n, grads[n]))}
        self._record_dtypes(grads, unusual, faults)
        options = (*options, f"measured={is_measured}")
        if fault is None and faults:
            fault = RuntimeError(next(iter(faults.values())))
        status = self._status(options, grads, unusual, fault)
        moved = [name for name in unusual if _has_moved(self._params[name], grads[name])]
        flag = self._flag([grad for name, grad in grads.items() if name not in faults])
        if not (self.is_deferred and self._has_settled):
            if is_capturing(self.device):
                raise RuntimeError(
                    "a CUDA graph captures this step, which must wait for the device. Take one "
                    'step outside of the graph, and use neither missing_grad="zero" nor '
                    "deferred_checks=False."
                )
            return grads, self._settle(status, grads, moved, flag)
        grads.update({name: self._zeros(name) for name in faults})
        mask = self._mask(status, grads, moved, flag)
        if any(local_part(self._params[name]).is_meta for name in faults):
            self._past.pop()  # without values there is no masked step: raise now
            self._past_fault = None
            assert fault is not None, "a parameter on the meta device is a fault"
            raise fault
        return grads, mask

    def _is_ordinary(self, name: str, grad: Tensor) -> bool:
        """Whether a gradient has its parameter's type, placements, shape, dtype and device.

        An ordinary gradient has no fault, and needs no redistribution or cast.
        """
        param = self._params[name]
        if isinstance(param, DTensor):
            if not (isinstance(grad, DTensor) and has_same_spec(param, grad)):
                return False
            param, grad = local_part(param), local_part(grad)
        elif isinstance(grad, DTensor):
            return False
        return (
            grad.shape == param.shape == self._shapes[name]
            and grad.dtype is param.dtype
            and param.dtype in STEPPED_DTYPES
            and grad.device == param.device
            and grad.layout is torch.strided
            and not (param.is_meta or param.is_inference())
        )

    def _record_dtypes(
        self, grads: Mapping[str, Tensor], unusual: Collection[str], faults: Collection[str]
    ) -> None:
        """Record dtypes of gradients that may differ from their parameters', for `_zeros`."""
        if self._dtypes:
            ordinary = grads.keys() - set(unusual)
            self._dtypes = {n: d for n, d in self._dtypes.items() if n not in ordinary}
        self._dtypes.update({name: grads[name].dtype for name in unusual if name not in faults})

    def _fault_of(self, name: str, grad: Tensor) -> str:
        """Why this gradient cannot be used; empty if it can."""
        param = self._params[name]
        local = local_part(param)
        if local.shape != self._shapes[name] and not local.is_meta:
            return (
                f"{name} stored {list(self._shapes[name])} on this rank when the optimizer was "
                f"made, and stores {list(local.shape)} now. Construct the optimizer after the "
                "model is wrapped (FSDP1 changes parameters in place) or resized."
            )
        if local.is_inference():
            return (
                f"{name} was made in torch.inference_mode(), so it cannot be updated outside of "
                "that mode. Construct the model outside of it, or clone its parameters there."
            )
        if grad.dtype != param.dtype and name in self._same_dtype_params:
            return (
                f"{name} is {dtype_name(param.dtype)} and its gradient {dtype_name(grad.dtype)}: "
                "torch's AdamW needs equal dtypes. Cast the gradient first, or do not set "
                "grad_dtype."
            )
        return _fault_of(name, param, grad)

    def raise_deferred(self, *, capturable: bool = True, forget: bool = True) -> None:
        """Raise the error of the last masked step, if any; see Note [Status reduction].

        While a CUDA graph is captured the host cannot read it: the error is raised later. Raises
        RuntimeError during a capture unless `capturable`.

        Args:
            capturable: whether a CUDA graph may capture the caller.
            forget: whether to drop the error. False outside of a step, where one rank may call
                this alone: the next step then raises it on every rank.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            if not capturable:
                raise RuntimeError(
                    "a CUDA graph captures this step: construct Muon with capturable=True"
                )
            return
        past, fault = self._past, self._past_fault
        if forget:
            self.drop_deferred()
        if fault is not None:
            raise fault
        for outcomes in past:
            raise_faults(outcomes.tolist(), with_non_finite=self._nonfinite == "raise")

    def copy_deferred(self, before: "GradientCheck") -> None:
        """Copy the pending result of an earlier check, so that all ranks raise the same errors."""
        self._past, self._past_fault = before._past, before._past_fault
        self._has_settled = before._has_settled
        self._has_logged_zeros = before._has_logged_zeros
        self._dtypes = {name: d for name, d in before._dtypes.items() if name in self._params}

    def has_deferred_fault(self) -> bool:
        """Whether ranks reported a fault in the last masked step. Waits for the result."""
        return any(fault for fault, _ in self._past[-1].tolist())

    def _zeros(self, name: str) -> Tensor:
        """Return zeros placed as the parameter, in the dtype of its gradients."""
        param = self._params[name]
        return zeros_like(param, self._dtypes.get(name))

    def drop_deferred(self) -> None:
        """Drop the results of masked steps, after state was loaded."""
        self._past, self._past_fault = [], None

    def _status(
        self,
        options: tuple[str, ...],
        grads: Mapping[str, Tensor],
        unusual: Collection[str],
        fault: Exception | None,
    ) -> LocalStatus:
        """Return this rank's report. `unusual`: names of gradients that are not ordinary."""

        def state(name: str) -> str:
            grad = grads[name]
            if isinstance(grad, DTensor) and _has_moved(self._params[name], grad):
                return str(grad.placements)
            if grad.dtype != self._params[name].dtype:
                return of_dtype(dtype_name(grad.dtype))
            return PRESENT

        states = {name: state(name) for name in unusual}
        states |= dict.fromkeys(self._params.keys() - grads.keys(), MISSING)
        states |= dict.fromkeys(self._empty_params, NO_ELEMENTS)
        presence = tuple(
            tuple(states.get(name, PRESENT) for name in manifest.fqns)
            if states
            else manifest.all_present
            for manifest in self._agreement.manifests
        )
        gradient_options = (
            f"optimizer: missing_grad={self._missing_grad}, nonfinite={self._nonfinite}, "
            f"deferred_checks={self._deferred_checks}, {options[-1]}"
        )
        hyperparameters = tuple(
            (
                *(f"param group {n}: {options[group]}" for n, group in enumerate(manifest.groups)),
                gradient_options,
            )
            for manifest in self._agreement.manifests
        )
        return LocalStatus(hyperparameters, presence, fault)

    def _settle(
        self, status: LocalStatus, grads: dict[str, Tensor], moved: Collection[str], flag: Tensor
    ) -> bool:
        raise_missing = self._missing_grad == "raise"
        comparison = self._agreement.settle(
            status, flag, moved=bool(moved), raise_missing=raise_missing
        )
        self._count_as_zero(comparison.incomplete, grads)
        bad = comparison.non_finite
        if comparison.moved:  # a reduction of finite parts may overflow: all ranks check again
            self._redistribute(moved, grads)
            flag = self._flag([grads[name] for name in moved])
            second = self._agreement.settle(status, flag, moved=True, raise_missing=False)
            bad |= second.non_finite
        self._has_settled = True
        if bad and self._nonfinite == "raise":
            names = [name for name, g in grads.items() if not local_part(g).isfinite().all()]
            where = f"on this rank in {', '.join(names)}" if names else "on another rank"
            raise NonFiniteGradientError(
                f"A gradient holds NaN or Inf, {where}. The step changed nothing on any rank. "
                'Lower the learning rate, clip gradients, or construct Muon with nonfinite="skip" '
                "to skip such steps."
            )
        return not bad

    def _mask(
        self, status: LocalStatus, grads: dict[str, Tensor], moved: Collection[str], flag: Tensor
    ) -> Tensor:
        outcomes = self._agreement.settle_on_device(status, flag)
        keep = outcomes[:, 0].amax() == 0
        if moved and keep.item():  # statuses are equal, so all ranks redistribute the same
            self._redistribute(moved, grads)
        else:
            grads.update({name: self._zeros(name) for name in moved})
        self._past.append(HostCopy(outcomes))
        self._past_fault = status.fault
        return keep & (outcomes[:, 1].amax() == 0)

    def _flag(self, grads: Iterable[Tensor]) -> Tensor:
        if self._nonfinite == "propagate":
            return torch.zeros((), dtype=torch.int64, device=self.device)
        return non_finite_flag([local_part(grad) for grad in grads], self.device)

    def _count_as_zero(self, incomplete: frozenset[str], grads: dict[str, Tensor]) -> None:
        for name in incomplete - grads.keys():
            grads[name] = self._zeros(name)
        if incomplete and not self._has_logged_zeros:
            self._has_logged_zeros = True
            logger.log(
                warning_level(self._params[name] for name in incomplete),
                "no gradient on some ranks, counted as zero there in this step and in all later "
                "ones (logged once): %s",
                ", ".join(sorted(incomplete)),
            )

    def _redistribute(self, names: Collection[str], grads: dict[str, Tensor]) -> None:
        for name in names:
            param, grad = self._params[name], grads[name]
            assert isinstance(param, DTensor), name
            assert isinstance(grad, DTensor), name
            grads[name] = grad.redistribute(placements=param.placements)


def _is_empty(param: Tensor) -> bool:
    """Whether this rank holds no element of a plain tensor, and so perhaps never a gradient."""
    return not isinstance(param, DTensor) and param.numel() == 0


def _has_moved(param: Tensor, grad: Tensor) -> bool:
    """Whether a gradient's placements differ from its parameter's."""
    return (
        isinstance(param, DTensor)
        and isinstance(grad, DTensor)
        and grad.placements != param.placements
    )


def _fault_of(name: str, param: Tensor, grad: Tensor) -> str:
    """Why this gradient cannot be used; empty if it can."""
    if local_part(param).is_meta:
        return (
            f"{name} is on the meta device and has no values. Allocate the model "
            "(model.to_empty(device=...)) and initialize it (init_weights or a checkpoint) before "
            "the step. model.to('meta') discards values: load a checkpoint after it."
        )
    if local_part(param).device != local_part(grad).device:
        return (
            f"{name} is on {local_part(param).device} and its gradient on "
            f"{local_part(grad).device}. Move the model before backward, or clear its gradients "
            "when you move it."
        )
    if grad.layout != torch.strided:
        return (
            f"{name} has a sparse gradient ({grad.layout}); Muon needs a dense one. Construct "
            "the embedding with sparse=False."
        )
    if grad.shape != param.shape:
        return (
            f"{name} is {list(param.shape)} and its gradient {list(grad.shape)}. After a backward "
            "under no_sync() FSDP1's gradients are unsharded: run the last backward outside of it."
        )
    if grad.is_complex():
        return f"{name} is complex; this package steps real parameters. Store its real view."
    if not grad.is_floating_point():
        return (
            f"{name} is {dtype_name(param.dtype)} and its gradient {dtype_name(grad.dtype)}. "
            "Cast the gradient to a floating dtype first."
        )
    if isinstance(param, DTensor) != isinstance(grad, DTensor):
        kinds = ["a DTensor" if isinstance(t, DTensor) else "a plain tensor" for t in (param, grad)]
        return f"{name} is {kinds[0]} and its gradient {kinds[1]}. Give both the same mesh."
    if (
        isinstance(param, DTensor)
        and isinstance(grad, DTensor)
        and grad.device_mesh != param.device_mesh
    ):
        return (
            f"{name} lives on {param.device_mesh} and its gradient on {grad.device_mesh}. "
            "Redistribute the gradient to the parameter's mesh first."
        )
    shard_shape, grad_shape = local_part(param).shape, local_part(grad).shape
    if shard_shape != grad_shape and not _has_moved(param, grad):
        return (
            f"{name} stores {list(shard_shape)} on this rank and its gradient {list(grad_shape)}, "
            "with equal placements. Create the gradient by backward or with DTensor.from_local; "
            "distribute_tensor and fully_shard cut uneven strided shards differently."
        )
    return ""
