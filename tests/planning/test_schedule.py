"""Events of each phase of a bucket, the buffers that they name, and the lifetimes of buffers."""

from collections import defaultdict

import pytest
from hypothesis import given, settings

from muon_dtensor.layout import MeshSpec, Region
from muon_dtensor.planning.buckets import BufferBound, owned_matrix
from muon_dtensor.planning.matrix_costs import ITEMSIZES
from muon_dtensor.planning.memory import bucket_peak_nbytes
from muon_dtensor.planning.owners import Candidate
from muon_dtensor.planning.plan import Action, Assignment, Bucket, Phase
from muon_dtensor.planning.report import plan_report
from muon_dtensor.planning.schedule import (
    Compute,
    Content,
    Repack,
    Send,
    Wait,
    buffer_sequence,
    flat,
    lifetimes,
    live_sets,
    lower,
    phases_of,
    schedule,
)
from muon_dtensor.planning.strategies import Owned
from tests.support.random_plans import random_params

MESH = MeshSpec.of(r=2, a=2, b=2)
STRATEGIES = [
    pytest.param(Owned(), 0, 0, id="local"),
    pytest.param(Owned(("a", "b")), 1, 1, id="direct"),
    pytest.param(Owned((), ("r",)), 0, 1, id="replicas"),
    pytest.param(Owned(("a", "b"), ("r",)), 1, 1, id="shared-1-hop"),
    pytest.param(Owned(("a", "b"), ("r",), hops=2), 1, 2, id="shared-2-hops"),
    pytest.param(Owned(("a", "b"), ("r",), hops=2, is_staged=True), 2, 3, id="staged"),
]


@pytest.mark.parametrize(("strategy", "num_unshard", "num_reshard"), STRATEGIES)
def test_every_collective_has_one_send_and_one_wait(strategy, num_unshard, num_reshard):
    sequence = buffer_sequence(strategy, MESH)
    assert (len(sequence.unshard), len(sequence.reshard)) == (num_unshard, num_reshard)
    program = lower([Action(phase, 0) for phase in phases_of(sequence)], {0: sequence})
    events = [event for _, event in flat(program)]
    sent = [event.hop.index for event in events if isinstance(event, Send)]
    assert sent == [event.hop.index for event in events if isinstance(event, Wait)]
    assert sent == list(range(num_unshard + num_reshard))
    assert [event.hop.index for event in events if isinstance(event, Repack)] == [
        hop.index for hop in sequence.hops if hop.repacks
    ]
    assert [e.buffer for e in events if isinstance(e, Compute)] == [sequence.wholes]
    lives = lifetimes(program)
    assert {number for _, number in lives} == set(range(len(sequence.contents)))


def test_contents_of_numbered_buffers():
    staged = buffer_sequence(Owned(("a", "b"), is_staged=True), MESH)
    pieces, middle, wholes = Content(()), Content(("b",)), Content(("b", "a"))
    assert staged.contents == (pieces, middle, middle, wholes, middle, middle, pieces)
    shared = buffer_sequence(Owned(("a", "b"), ("r",)), MESH)
    wholes = Content(("a", "b"))
    assert shared.contents == (pieces, wholes, Content(None))
    assert [hop.copies for hop in shared.hops] == [1, 2]


def test_live_sets_of_buffers():
    assert live_sets(buffer_sequence(Owned(), MESH)) == ((0,),)
    assert live_sets(buffer_sequence(Owned(("a", "b")), MESH)) == ((0,), (0, 1), (1,), (1, 2), (2,))


def test_actions_of_other_buckets_are_skipped():
    sequence = buffer_sequence(Owned(), MESH)
    schedule = [Action(Phase.UNSHARD, 0), Action(Phase.UNSHARD, 1), Action(Phase.APPLY, 0)]
    assert [action for action, _ in lower(schedule, {0: sequence})] == [schedule[0], schedule[2]]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(random_params())
def test_the_buffer_bound_is_at_least_the_exact_peak(case):
    specs, options = case
    report = plan_report(specs, options)
    for traffic in report.traffic:
        bucket, sequence = traffic.bucket, traffic.sequence
        bound = BufferBound(live_sets(sequence))
        boxes: dict[tuple[int, int], dict[int, Region]] = defaultdict(dict)
        for a in bucket.assignments:
            boxes[a.param, a.matrix][a.owner] = report.plan.region(a)
        for a in {(a.param, a.matrix): a for a in bucket.assignments}.values():
            spec = report.spec(a)
            candidate = Candidate(a.param, a.matrix, report.matrix(a), 1, (spec.fqn, a.matrix))
            bound.add(
                owned_matrix(
                    candidate,
                    boxes[a.param, a.matrix],
                    spec,
                    strategy=bucket.strategy,
                    sequence=sequence,
                    itemsize=ITEMSIZES[bucket.wire_dtype],
                )
            )
        assert bound.nbytes >= bucket_peak_nbytes(traffic)


def tokens(strategy: Owned, owners: list[int], prefetch_count: int) -> str:
    """The schedule of one bucket for each owner, each a wave of its own."""
    buckets = [Bucket(MESH, strategy, "bfloat16", (Assignment(0, 0, o),)) for o in owners]
    waves = [[index] for index in range(len(buckets))]
    return " ".join(map(str, schedule(buckets, waves, prefetch_count)))


def test_the_second_hop_is_in_flight_during_the_next_compute():
    two_hops = Owned(("a", "b"), ("r",), hops=2)
    assert tokens(two_hops, [0, 0, 0, 0], 1) == (
        "U0 U1 W0 O0 R0 U2 W1 O1 R1 P0 U3 W2 O2 R2 P1 A0 W3 O3 R3 P2 A1 P3 A2 A3"
    )
    assert tokens(two_hops, [0, 0], 0) == "U0 W0 O0 R0 P0 A0 U1 W1 O1 R1 P1 A1"


def test_waves_of_other_owners_do_not_wait_for_results():
    direct = Owned(("a", "b"))
    assert tokens(direct, [0, 1, 2, 0], 1) == (
        "U0 U1 W0 O0 R0 U2 W1 O1 R1 U3 W2 O2 R2 A0 A1 W3 O3 R3 A2 A3"
    )
    assert tokens(direct, [0, 0, 0], 1) == "U0 U1 W0 O0 R0 U2 W1 O1 R1 A0 W2 O2 R2 A1 A2"
