"""The integers that ranks reduce before a step: what they show, and what they do not."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from muon_dtensor.errors import MissingGradientError, NonFiniteGradientError, PlanMismatchError
from muon_dtensor.layout import MeshSpec
from muon_dtensor.runtime.consistency_codec import (
    MISSING,
    NO_ELEMENTS,
    PRESENT,
    Entry,
    Fault,
    LocalStatus,
    Manifest,
    StatusTensorCache,
    differs,
    encode_status,
    fault_in,
    fingerprint,
    non_finite_flag,
    raise_faults,
)

CPU = torch.device("cpu")
MANIFEST = Manifest(
    mesh=MeshSpec.of(dp=3),
    digest="digest",
    params=("versions", "w", "slice"),
    fqns=("w", "slice"),
    sometimes_empty=frozenset({"slice"}),
    groups=(0,),
)
STATUS = LocalStatus((("lr=0.1",),), ((PRESENT, PRESENT),), None)


def reduced(
    *ranks: tuple[Manifest, LocalStatus], carried: tuple[int, bool, Fault] = (0, False, Fault.NONE)
) -> Tensor:
    """Encode the statuses of several ranks and reduce them by MAX; the first rank has `carried`."""
    cache = StatusTensorCache()
    encoded = [
        encode_status(
            manifest, (status, 0), carried if rank == 0 else (0, False, Fault.NONE), CPU, cache
        )
        for rank, (manifest, status) in enumerate(ranks)
    ]
    return torch.stack(encoded).amax(0)


def with_presence(*states: str) -> LocalStatus:
    return replace(STATUS, presence=(states,))


def test_equal_statuses_show_no_fault():
    values = reduced(*[(MANIFEST, STATUS)] * 3)
    assert fault_in(values) == Fault.NONE
    assert not any(
        differs(values.tolist(), e) for e in (Entry.PLAN, Entry.HYPERPARAMETERS, Entry.PRESENCE)
    )
    assert (values[Entry.NON_FINITE], values[Entry.MOVED]) == (0, 0)


DIFFERENT = {
    "digest": (replace(MANIFEST, digest="x"), STATUS, Entry.PLAN, Fault.PLAN),
    "a parameter": (
        replace(MANIFEST, params=("versions", "v", "slice")),
        STATUS,
        Entry.PLAN,
        Fault.PLAN,
    ),
    "an option": (
        MANIFEST,
        replace(STATUS, hyperparameters=(("lr=0.2",),)),
        Entry.HYPERPARAMETERS,
        Fault.HYPERPARAMETERS,
    ),
    "a missing gradient": (
        MANIFEST,
        with_presence(MISSING, PRESENT),
        Entry.PRESENCE,
        Fault.GRADIENTS,
    ),
    "a gradient of another dtype": (
        MANIFEST,
        with_presence("a float32 gradient", PRESENT),
        Entry.PRESENCE,
        Fault.GRADIENTS,
    ),
    "a missing gradient of a slice": (
        MANIFEST,
        with_presence(PRESENT, MISSING),
        Entry.PRESENCE,
        Fault.GRADIENTS,
    ),
}


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("name", DIFFERENT)
def test_one_rank_that_differs_is_seen_by_all(name, rank):
    manifest, status, entry, fault = DIFFERENT[name]
    ranks = [(MANIFEST, STATUS)] * 3
    ranks[rank] = (manifest, status)
    values = reduced(*ranks)
    assert differs(values.tolist(), entry)
    assert fault_in(values) == fault
    others = {Entry.PLAN, Entry.HYPERPARAMETERS, Entry.PRESENCE} - {entry}
    assert not any(differs(values.tolist(), other) for other in others)


@pytest.mark.parametrize("state", [PRESENT, MISSING])
def test_a_rank_without_elements_agrees_with_every_other(state):
    """Its own state counts only if all ranks are without elements."""
    empty, status = with_presence(PRESENT, NO_ELEMENTS), with_presence(PRESENT, state)
    assert fault_in(reduced((MANIFEST, empty), (MANIFEST, status), (MANIFEST, status))) == 0
    mixed = reduced((MANIFEST, empty), (MANIFEST, STATUS), (MANIFEST, with_presence(PRESENT, "")))
    assert fault_in(mixed) == Fault.GRADIENTS


def test_the_greatest_fault_counts_and_is_carried():
    ranks = [(MANIFEST, STATUS), (MANIFEST, with_presence(MISSING, PRESENT))]
    assert fault_in(reduced(*ranks, carried=(0, False, Fault.PLAN))) == Fault.PLAN
    assert fault_in(reduced(*ranks, carried=(0, False, Fault.NONE))) == Fault.GRADIENTS
    values = reduced(*[(MANIFEST, STATUS)] * 2, carried=(1, True, Fault.OTHER_RANK))
    assert values[[Entry.NON_FINITE, Entry.MOVED, Entry.FAULT]].tolist() == [1, 1, 4]


def test_a_second_sweep_carries_faults_and_compares_nothing():
    cache = StatusTensorCache()
    values = encode_status(MANIFEST, None, (0, False, Fault.HYPERPARAMETERS), CPU, cache)
    assert fault_in(values) == Fault.HYPERPARAMETERS
    assert len(values) == Entry.PAIRS + 2
    assert values.count_nonzero() == 1


def test_a_fingerprint_and_its_negative_are_int64():
    for text in ("", "a", "b" * 1000):
        assert 0 <= fingerprint(text) < 2**62
    assert fingerprint("a") != fingerprint("b")


@pytest.mark.parametrize(
    ("outcomes", "error"),
    [
        ([(Fault.NONE, 0), (Fault.NONE, 0)], None),
        ([(Fault.NONE, 0), (Fault.GRADIENTS, 0)], MissingGradientError),
        ([(Fault.GRADIENTS, 0), (Fault.PLAN, 1)], PlanMismatchError),
        ([(Fault.HYPERPARAMETERS, 0)], PlanMismatchError),
        ([(Fault.OTHER_RANK, 0)], RuntimeError),
        ([(Fault.NONE, 1)], NonFiniteGradientError),
    ],
    ids=str,
)
def test_results_of_a_masked_step_raise_the_greatest_fault(outcomes, error):
    if error is None:
        raise_faults(outcomes, with_non_finite=True)
        return
    with pytest.raises(error):
        raise_faults(outcomes, with_non_finite=True)
    if error is NonFiniteGradientError:
        raise_faults(outcomes, with_non_finite=False)


HUGE = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("values", "dtype", "flag"),
    [
        ([], torch.float32, 0),
        ([1.0, -2.0], torch.float32, 0),
        ([1.0, math.nan], torch.float32, 1),
        ([1.0, math.inf], torch.bfloat16, 1),
        ([math.inf, -math.inf], torch.float16, 1),
        ([HUGE, HUGE], torch.float32, 0),  # the sum overflows, the elements are finite
        ([HUGE, HUGE, math.nan], torch.float32, 1),
        ([6e4] * 100, torch.float16, 0),
        ([1e300, -1e300], torch.float64, 0),
        ([1e300, math.inf], torch.float64, 1),
    ],
    ids=str,
)
def test_non_finite_elements_are_found(values, dtype, flag):
    grads = [torch.ones(3), torch.tensor(values, dtype=dtype), torch.ones(0)]
    found = non_finite_flag(grads, CPU)
    assert (found.item(), found.dtype) == (flag, torch.int64)
