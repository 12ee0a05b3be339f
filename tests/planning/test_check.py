"""`planning.check`, and `check_routes` of these tests, raise for each kind of invalid plan."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from muon_dtensor.layout import Layout, Matrix, MeshSpec, Region
from muon_dtensor.layout.matrices import matrices_of
from muon_dtensor.planning.check import check, problem_of_matrices
from muon_dtensor.planning.plan import Assignment, ParamSpec, Plan, PlanOptions
from muon_dtensor.planning.planner import plan_update
from muon_dtensor.planning.routes import Packing, RankBucket, rank_bucket
from muon_dtensor.planning.strategies import can_own
from tests.support import routes
from tests.support.routes import check_routes

MESH = MeshSpec.of(dp=2, tp=2)


def spec(shape: tuple[int, ...], cuts: Any, name: str = "w") -> ParamSpec:
    return ParamSpec(name, Layout(MESH, shape, cuts), "float32", matrices_of(shape))


def exchanged_plan(**options: Any) -> Plan:
    return plan_update([spec((8, 6), (("dp",), ("tp",)))], PlanOptions(**options))


def with_bucket(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, buckets=(replace(plan.buckets[0], **changes), *plan.buckets[1:]))


def owned_by(plan: Plan, owner: int) -> Plan:
    first, *others = plan.buckets[0].assignments
    return with_bucket(plan, assignments=(replace(first, owner=owner), *others))


def test_matrices_that_overlap_and_leave_a_gap_are_invalid():
    """Their numels sum to that of the parameter."""
    boxes = [Region((0, 0), (2, 2)), Region((0, 1), (2, 2))]
    matrices = tuple(Matrix(box, *box.shape) for box in boxes)
    invalid = ParamSpec("w", Layout(MESH, (2, 3), ((), ())), "float32", matrices)
    problem = problem_of_matrices(invalid)
    assert problem == "Its matrices do not cover every element exactly once."


def test_an_owner_that_the_collectives_cannot_reach_raises():
    experts = plan_update([spec((4, 6, 5), (("dp",), (), ("tp",)))], PlanOptions(strategy="owned"))
    check(experts)
    assignment = experts.buckets[0].assignments[0]
    layout, matrix = experts.spec(assignment).layout, experts.matrix(assignment)
    unreachable = next(p for p in range(4) if not can_own(layout, matrix.region, p))
    with pytest.raises(ValueError, match="w: matrix 0 cannot be sent to its owner"):
        check(owned_by(experts, unreachable))


def test_an_owner_outside_of_the_mesh_raises():
    with pytest.raises(ValueError, match="w: owner 4 is not on mesh"):
        check(owned_by(exchanged_plan(strategy="owned"), 4))


def test_schedules_with_missing_repeated_or_reordered_phases_raise():
    plan = exchanged_plan(strategy="owned")
    first, second, *others = plan.schedule
    for schedule in ((second, first, *others), (first, second), (first, first, second, *others)):
        with pytest.raises(ValueError, match=r"bucket 0 runs .*, not UWORA"):
            check(replace(plan, schedule=tuple(schedule)))


def check_routes_message(plan: Plan, changed_position: int, change: Any) -> str:
    """The error of `check_routes` if one rank derives a changed RankBucket; empty without error."""

    def changed_rank_bucket(plan: Plan, bucket: Any, position: int) -> RankBucket:
        local = rank_bucket(plan, bucket, position)
        return change(local) if position == changed_position else local

    with mock.patch.object(routes, "rank_bucket", changed_rank_bucket):
        try:
            check_routes(plan)
        except ValueError as error:
            return str(error)
    return ""


def swap_peers(packing: Packing) -> Packing:
    """The same packing with the slots of the first two peers exchanged."""
    first, second, *others = packing.by_peer
    return Packing((second, first, *others))


def test_routes_that_peers_do_not_expect_raise():
    plan = exchanged_plan(strategy="owned")
    check_routes(plan)

    def send_to_wrong_peers(local: RankBucket) -> RankBucket:
        hop = local.unshard[0]
        return replace(local, unshard=(replace(hop, send=swap_peers(hop.send)),))

    owner = plan.buckets[0].assignments[0].owner
    message = check_routes_message(plan, 1 if owner == 0 else 0, send_to_wrong_peers)
    assert "sends pieces that position" in message
    assert "does not expect" in message


def test_a_matrix_whose_pieces_overlap_raises():
    """The pieces have as many elements as the matrix, but some of them twice."""
    plan = exchanged_plan(strategy="owned")
    owner = plan.buckets[0].assignments[0].owner

    def assemble_a_piece_twice(local: RankBucket) -> RankBucket:
        slots = list(local.wholes.slots)
        slots[1] = replace(slots[0], offset=slots[1].offset)
        changed = replace(local)
        changed.__dict__["wholes"] = Packing((tuple(slots),))  # overrides the cached property
        return changed

    message = check_routes_message(plan, owner, assemble_a_piece_twice)
    assert "have 48 elements and do not tile a region of 48" in message


def test_results_for_matrices_that_a_rank_does_not_store_raise():
    plan = exchanged_plan(strategy="owned")

    def receive_of_others(local: RankBucket) -> RankBucket:
        changed = replace(local)
        other = replace(local.results.slots[0], assignment=Assignment(99, 0, 0))
        changed.__dict__["results"] = Packing((*local.results.by_peer, (other,)))
        return changed

    message = check_routes_message(plan, 3, receive_of_others)
    assert "position 3 receives results of matrices that it does not store" in message
