"""Encodes what a rank reports before a step as integers, and decodes the reduced integers.

Note [Ballot]
    Nine int64, reduced by MAX over every set of ranks that a mesh holds, smaller sets first.
    A value and its negative reveal any difference: their maxima sum to zero only if all values
    agree. What a smaller set found travels on in the last three entries, so ranks of a larger set
    that see nothing wrong themselves stop with the others. Where a rank's last set does not hold
    its others (one mesh of rows, one of columns), a second sweep over all sets of such a rank
    carries what was found late back again; who sweeps twice is settled when plans are proven equal.
    A parameter of which some rank holds no element, so that it perhaps never gets a gradient there
    (slices of FSDP1's flat parameters), has a pair of its own after the nine, and that rank
    abstains: it votes what is less than any other vote.
    On a device the ballots stay there, and the step is masked by them. They are copied to pinned
    host memory within the step and read by the next one, on all ranks by the same one: that copy
    is queued before the next forward and backward, so the host does not wait for those.
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
from muon_dtensor.runtime.torch_private import is_capturing

NUM_RECENT_BALLOTS = 64
"""Ballots on a device that are kept: those of a step that changes nothing but its gradients, and of
a few learning rates."""


class Entry(IntEnum):
    """Places of a ballot; each of the first three is followed by its negative."""

    PLAN = 0
    HYPERPARAMETERS = 2
    PRESENCE = 4
    NON_FINITE = 6
    MOVED = 7
    FAULT = 8
    PAIRS = 9


MISSING, PRESENT, NOTHING_HERE = "", "yes", "nothing here"
"""What `Votes.presence` says of a gradient; NOTHING_HERE abstains."""

OF_DTYPE = " gradient"


def of_dtype(name: str) -> str:
    """What `Votes.presence` says of a gradient in another dtype than its parameter's."""
    return f"a {name}{OF_DTYPE}"


PAIR_OF = {PRESENT: (1, -1), MISSING: (0, 0), NOTHING_HERE: (-2, -2)}


class Fault(IntEnum):
    """Why a rank cannot take this step; the greatest wins."""

    NONE = 0
    GRADIENTS = 1
    HYPERPARAMETERS = 2
    PLAN = 3
    OTHER_RANK = 4


def fingerprint(text: str) -> int:
    """62 bits of SHA-256: a nonnegative int64 whose negative is one too."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


@dataclass(frozen=True)
class Manifest:
    """What one set of ranks must have in common, as lines that an error can show.

    `params`: versions, then a line per parameter. `sometimes_empty`: those of `fqns` of which some
    rank holds no element without a DTensor to say so. `groups`: indices of the param groups that
    hold any of its parameters.
    """

    mesh: MeshSpec
    digest: str
    params: tuple[str, ...]
    fqns: tuple[str, ...]
    sometimes_empty: frozenset[str]
    groups: tuple[int, ...]

    @cached_property
    def fingerprint(self) -> int:
        """What ranks compare: 62 bits of the digest and the lines."""
        return fingerprint("\n".join((self.digest, *self.params)))


@dataclass(frozen=True, slots=True)
class Votes:
    """What this rank has to say, per manifest: its hyperparameters, its gradients' state.

    `presence` holds one text per parameter of the manifest: MISSING, PRESENT, NOTHING_HERE, or
    what else is particular about its gradient. `fault` is why this rank cannot step.
    """

    hyperparameters: tuple[tuple[str, ...], ...]
    presence: tuple[tuple[str, ...], ...]
    fault: Exception | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all ranks now know.

    `incomplete`: parameters with a gradient on some ranks only. `moved`: some rank has gradients
    to redistribute, after which all ranks vote again.
    """

    incomplete: frozenset[str]
    non_finite: bool
    moved: bool


def ballot_of(
    manifest: Manifest,
    vote: tuple[Votes, int] | None,
    carried: tuple[int, bool, Fault],
    device: torch.device,
    cache: "DeviceBallots",
) -> Tensor:
    """See Note [Ballot]. `vote`: votes and the index of the manifest; None in second sweeps.

    `carried`: the last three of the nine entries. `cache`: of ballots on a GPU.
    """
    values, pairs = [0] * Entry.NON_FINITE, [0] * (2 * len(manifest.sometimes_empty))
    if vote is not None:
        votes, index = vote
        plan = manifest.fingerprint
        options = fingerprint("\n".join(votes.hyperparameters[index]))
        states = list(zip(manifest.fqns, votes.presence[index], strict=True))
        always = [state for fqn, state in states if fqn not in manifest.sometimes_empty]
        present = fingerprint("\n".join(always))
        values = [plan, -plan, options, -options, present, -present]
        pairs = [
            value
            for fqn, state in states
            if fqn in manifest.sometimes_empty
            for value in PAIR_OF.get(state, PAIR_OF[PRESENT])
        ]
    numbers = (*values, *map(int, carried), *pairs)
    return cache.get(numbers, device) if device.type == "cuda" else _int64(numbers)


def _int64(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


class DeviceBallots:
    """Ballots on a device, by copies that the host does not wait for; the last few are kept.

    What a CUDA graph reads, each time it is replayed, lives as long as this does.
    """

    def __init__(self) -> None:
        self._recent: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._captured: list[tuple[Tensor, Tensor]] = []

    def get(self, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        """A new int64 tensor of these numbers on `device`."""
        pair = self._recent.pop(numbers, None)
        if pair is None:
            pinned = _int64(numbers).pin_memory()
            pair = pinned, pinned.to(device, non_blocking=True)
        self._recent[numbers] = pair
        if len(self._recent) > NUM_RECENT_BALLOTS:
            self._recent.pop(next(iter(self._recent)))
        if is_capturing(device):
            self._captured.append(pair)
        return pair[1].clone()


def differs(values: Sequence[int], entry: Entry) -> bool:
    """Whether ranks voted differently in this entry of a reduced ballot."""
    if values[entry] + values[entry + 1] != 0:
        return True
    pairs = values[Entry.PAIRS :]
    return entry is Entry.PRESENCE and any(
        a + b > 0 for a, b in zip(pairs[::2], pairs[1::2], strict=True)
    )


def fault_in(ballot: Tensor) -> Tensor:
    """int64 scalar: the worst Fault that a reduced ballot shows."""
    worst = ballot[Entry.FAULT]
    for entry, fault in (
        (Entry.PLAN, Fault.PLAN),
        (Entry.HYPERPARAMETERS, Fault.HYPERPARAMETERS),
        (Entry.PRESENCE, Fault.GRADIENTS),
    ):
        differ = (ballot[entry] + ballot[entry + 1] != 0).to(torch.int64) * int(fault)
        worst = torch.maximum(worst, differ)
    pairs = ballot[Entry.PAIRS :]
    if len(pairs):
        differ = (pairs[::2] + pairs[1::2] > 0).any().to(torch.int64) * int(Fault.GRADIENTS)
        worst = torch.maximum(worst, differ)
    return worst


def read(outcomes: Sequence[tuple[int, int]], *, with_non_finite: bool) -> None:
    """Raise what ballots of an earlier step say; no communication.

    `outcomes`: the values of `Agreement.cast`.
    """
    if fault := Fault(max(fault for fault, _ in outcomes)):
        raise error_of(fault)
    if with_non_finite and any(non_finite for _, non_finite in outcomes):
        raise NonFiniteGradientError(
            "A gradient of an earlier step holds NaN or Inf on some rank. That step changed "
            'nothing. Lower the learning rate or clip gradients; nonfinite="skip" leaves such '
            "steps out silently."
        )


def error_of(fault: Fault) -> Exception:
    """What to raise for a fault that another set of ranks found."""
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
    """int64 scalar on `device`: 1 if any of the tensors holds NaN or Inf."""
    nonempty = [grad for grad in grads if grad.numel()]
    if not nonempty:
        return torch.zeros((), dtype=torch.int64, device=device)
    # NaN and Inf survive in sums and in extremes; sums are five times as fast on the host, but may
    # overflow by themselves. One kernel for all tensors on a GPU.
    extremes: list[Tensor] = []
    if device.type == "cpu":
        sums = (grad.sum(dtype=torch.promote_types(grad.dtype, torch.float32)) for grad in nonempty)
        if all(math.isfinite(total.item()) for total in sums):
            return torch.zeros((), dtype=torch.int64)
        for grad in nonempty:
            extremes += torch.aminmax(grad)
    else:
        extremes += torch._foreach_norm(nonempty, float("inf"))
    gathered = torch.stack([extreme.to(device=device, dtype=torch.float64) for extreme in extremes])
    return (~gathered.isfinite()).any().to(torch.int64)
