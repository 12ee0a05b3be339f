"""Encodes what a rank reports before a step as integers, and decodes the reduced integers.

Note [Status reduction]
    A rank reports nine int64, which are reduced by MAX over every set of ranks of a mesh, smaller
    sets first. A value and its negative show any difference: their maxima sum to zero only if all
    values agree. The last three entries carry the results of smaller sets to larger ones, so ranks
    of a larger set that have no fault themselves stop with the others. If a rank's last set does
    not contain its other sets (one mesh of rows, one of columns), a second sweep over all sets of
    such a rank carries late results back. Ranks decide on second sweeps when they compare plans.
    A rank may hold no element of a parameter, and so perhaps never a gradient (slices of FSDP1's
    flat parameters). Such a parameter has a pair after the nine entries, where that rank reports
    values below all others, which do not affect the maxima.
    On a device the reduced values stay there and mask the step. They are copied to pinned host
    memory within the step, and all ranks read them in their next step. The copy is queued before
    the next forward and backward, so the host does not wait for those.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from muon_dtensor.errors import MissingGradientError, NonFiniteGradientError, PlanMismatchError
from muon_dtensor.layout import MeshSpec
from muon_dtensor.runtime.torch_private import is_accelerator, is_capturing

NUM_CACHED_TENSORS = 64
"""Encoded statuses that stay on the device: enough for steps with equal hyperparameters, and for a
few learning rates."""


class Entry(IntEnum):
    """Indices of an encoded status; a negative follows each of the first three values."""

    PLAN = 0
    HYPERPARAMETERS = 2
    PRESENCE = 4
    NON_FINITE = 6
    MOVED = 7
    FAULT = 8
    PAIRS = 9


MISSING, PRESENT, NO_ELEMENTS = "", "yes", "no elements"
"""States of a gradient in `LocalStatus.presence`; NO_ELEMENTS agrees with every other."""

OF_DTYPE = " gradient"


def of_dtype(name: str) -> str:
    """Return the state in `LocalStatus.presence` of a gradient that differs in dtype."""
    return f"a {name}{OF_DTYPE}"


PAIR_OF = {PRESENT: (1, -1), MISSING: (0, 0), NO_ELEMENTS: (-2, -2)}


class Fault(IntEnum):
    """Why a rank cannot take this step; ranks report the greatest."""

    NONE = 0
    GRADIENTS = 1
    HYPERPARAMETERS = 2
    PLAN = 3
    OTHER_RANK = 4


def fingerprint(text: str) -> int:
    """Return 62 bits of SHA-256: a nonnegative int64 whose negative is an int64 too."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


@dataclass(frozen=True)
class Manifest:
    """What one set of ranks must have in common, as lines that an error can show.

    `params`: versions, then a line per parameter. `sometimes_empty`: names of plain tensors of
    which some rank holds no element. `groups`: indices of the param groups with any of `fqns`.
    """

    mesh: MeshSpec
    digest: str
    params: tuple[str, ...]
    fqns: tuple[str, ...]
    sometimes_empty: frozenset[str]
    groups: tuple[int, ...]

    @cached_property
    def fingerprint(self) -> int:
        """The number that ranks compare: 62 bits of the digest and the lines."""
        return fingerprint("\n".join((self.digest, *self.params)))

    @cached_property
    def all_present(self) -> tuple[str, ...]:
        """The states of gradients if each parameter has an ordinary one."""
        return (PRESENT,) * len(self.fqns)

    @cached_property
    def encoded_all_present(self) -> tuple[int, list[int]]:
        """The encoding of `all_present`, which most steps report."""
        return self.encode_presence(self.all_present)

    def encode_presence(self, states: Sequence[str]) -> tuple[int, list[int]]:
        """Return a fingerprint of states, and the pairs of parameters that may be empty."""
        always: list[str] = []
        pairs: list[int] = []
        for fqn, state in zip(self.fqns, states, strict=True):
            if fqn in self.sometimes_empty:
                pairs += PAIR_OF.get(state, PAIR_OF[PRESENT])
            else:
                always.append(state)
        return fingerprint("\n".join(always)), pairs


@dataclass(frozen=True, slots=True)
class LocalStatus:
    """What this rank reports, per manifest: hyperparameters and the states of gradients.

    `presence` holds one text per parameter of the manifest: MISSING, PRESENT, NO_ELEMENTS, or the
    gradient's placements or dtype if they differ from the parameter's. `fault` is why this rank
    cannot step.
    """

    hyperparameters: tuple[tuple[str, ...], ...]
    presence: tuple[tuple[str, ...], ...]
    fault: Exception | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of a comparison, equal on all ranks.

    `incomplete`: parameters with a gradient on some ranks only. `moved`: whether some rank has
    gradients to redistribute, after which all ranks compare again.
    """

    incomplete: frozenset[str]
    non_finite: bool
    moved: bool


def encode_status(
    manifest: Manifest,
    report: tuple[LocalStatus, int] | None,
    carried: tuple[int, bool, Fault],
    device: torch.device,
    cache: "StatusTensorCache",
) -> Tensor:
    """Return the int64 values that this rank reports; see Note [Status reduction].

    Args:
        manifest: what the set of ranks must have in common.
        report: the status and the index of the manifest in it; None in second sweeps.
        carried: the last three of the nine entries.
        device: the result's device.
        cache: holds tensors on a GPU.
    """
    values, pairs = [0] * Entry.NON_FINITE, [0] * (2 * len(manifest.sometimes_empty))
    if report is not None:
        status, index = report
        plan = manifest.fingerprint
        options = fingerprint("\n".join(status.hyperparameters[index]))
        states = status.presence[index]
        if states is manifest.all_present:
            present, pairs = manifest.encoded_all_present
        else:
            present, pairs = manifest.encode_presence(states)
        values = [plan, -plan, options, -options, present, -present]
    numbers = (*values, *map(int, carried), *pairs)
    return cache.get(numbers, device) if is_accelerator(device) else _int64(numbers)


def _int64(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


class StatusTensorCache:
    """Copies numbers to a device without waiting, and caches the most recent tensors.

    Tensors that a CUDA graph reads when it is replayed live as long as the cache.
    """

    def __init__(self) -> None:
        self._recent: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._captured: list[tuple[Tensor, Tensor]] = []

    def get(self, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        """Return a new int64 tensor of these numbers on `device`."""
        pair = self._recent.pop(numbers, None)
        if pair is None:
            pinned = _int64(numbers).pin_memory()
            pair = pinned, pinned.to(device, non_blocking=True)
        self._recent[numbers] = pair
        if len(self._recent) > NUM_CACHED_TENSORS:
            self._recent.pop(next(iter(self._recent)))
        if is_capturing(device):
            self._captured.append(pair)
        return pair[1].clone()


def differs(values: Sequence[int], entry: Entry) -> bool:
    """Whether ranks reported different values of this entry, from the reduced values."""
    if values[entry] + values[entry + 1] != 0:
        return True
    pairs = values[Entry.PAIRS :]
    return entry is Entry.PRESENCE and any(
        a + b > 0 for a, b in zip(pairs[::2], pairs[1::2], strict=True)
    )


def fault_in(reduced: Tensor) -> Tensor:
    """Return an int64 scalar: the greatest Fault in the reduced values."""
    worst = reduced[Entry.FAULT]
    for entry, fault in (
        (Entry.PLAN, Fault.PLAN),
        (Entry.HYPERPARAMETERS, Fault.HYPERPARAMETERS),
        (Entry.PRESENCE, Fault.GRADIENTS),
    ):
        differ = (reduced[entry] + reduced[entry + 1] != 0).to(torch.int64) * int(fault)
        worst = torch.maximum(worst, differ)
    pairs = reduced[Entry.PAIRS :]
    if len(pairs):
        differ = (pairs[::2] + pairs[1::2] > 0).any().to(torch.int64) * int(Fault.GRADIENTS)
        worst = torch.maximum(worst, differ)
    return worst


def raise_faults(outcomes: Sequence[tuple[int, int]], *, with_non_finite: bool) -> None:
    """Raise the error that ranks found in an earlier step, if any. Does not communicate.

    `outcomes`: the values of `Agreement.settle_on_device`.
    """
    if fault := Fault(max(fault for fault, _ in outcomes)):
        raise error_of(fault)
    if with_non_finite and any(non_finite for _, non_finite in outcomes):
        raise NonFiniteGradientError(
            "A gradient of an earlier step holds NaN or Inf on some rank. That step changed "
            'nothing. Lower the learning rate or clip gradients; nonfinite="skip" skips such '
            "steps silently."
        )


def error_of(fault: Fault) -> Exception:
    """Return the exception for a fault that another set of ranks found."""
    match fault:
        case Fault.PLAN:
            return PlanMismatchError("Ranks hold different plans; the step changed nothing.")
        case Fault.HYPERPARAMETERS:
            return PlanMismatchError(
                "Ranks hold different hyperparameters; the step changed nothing. Set the same "
                "values on all of them."
            )
        case Fault.GRADIENTS:
            return MissingGradientError(
                "A parameter has a gradient on some ranks only; the step changed nothing. Run "
                "the same forward and backward on all ranks."
            )
        case _:
            return RuntimeError("Another rank could not take this step; its error says why.")


def non_finite_flag(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return an int64 scalar on `device`: 1 if any of the tensors holds NaN or Inf."""
    nonempty = [grad for grad in grads if grad.numel()]
    if not nonempty:
        return torch.zeros((), dtype=torch.int64, device=device)
    # NaN and Inf survive in sums and in extremes. On the host sums are five times as fast, but the
    # sum of finite values may overflow. On a GPU one kernel takes all tensors.
    extremes: list[Tensor] = []
    if all(grad.device.type == "cpu" for grad in nonempty):
        sums = (grad.sum(dtype=torch.promote_types(grad.dtype, torch.float32)) for grad in nonempty)
        if all(math.isfinite(total.item()) for total in sums):
            return torch.zeros((), dtype=torch.int64, device=device)
        for grad in nonempty:
            extremes += torch.aminmax(grad)
    else:
        extremes += torch._foreach_norm(nonempty, float("inf"))
    if len({(extreme.dtype, extreme.device) for extreme in extremes}) > 1:
        extremes = [extreme.to(device=device, dtype=torch.float64) for extreme in extremes]
    gathered = torch.stack(extremes).to(device)
    return (~gathered.isfinite()).any().to(torch.int64)
