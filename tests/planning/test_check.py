"""Every rule of `planning.check` refuses the one thing it is about, and says so."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from muon_dtensor.layout import Layout, Matrix, MeshSpec, Region
from muon_dtensor.layout.matrices import matrices_of
from muon_dtensor.planning import check as rules
from muon_dtensor.planning.check import check, check_routes, wrong_matrices
from muon_dtensor.planning.plan import ParamSpec, Plan, PlanOptions
from muon_dtensor.planning.planner import plan_update
from muon_dtensor.planning.routes import Packing, RankBucket, rank_bucket
from muon_dtensor.planning.strategies import can_own

MESH = MeshSpec.of(dp=2, tp=2)


def spec(shape: tuple[int, ...], cuts: Any, name: str = "w") -> ParamSpec:
    return ParamSpec(name, Layout(MESH, shape, cuts), "float32", matrices_of(shape))


def exchanged(**options: Any) -> Plan:
    return plan_update([spec((8, 6), (("dp",), ("tp",)))], PlanOptions(**options))


def with_bucket(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, buckets=(replace(plan.buckets[0], **changes), *plan.buckets[1:]))


def owned_by(plan: Plan, owner: int) -> Plan:
    first, *rest = plan.buckets[0].assignments
    return with_bucket(plan, assignments=(replace(first, owner=owner), *rest))


def test_matrices_that_overlap_and_leave_a_hole_are_refused():
    """Together they have as many elements as the parameter."""
    boxes = [Region((0, 0), (2, 2)), Region((0, 1), (2, 2))]
    matrices = tuple(Matrix(box, *box.shape) for box in boxes)
    wrong = ParamSpec("w", Layout(MESH, (2, 3), ((), ())), "float32", matrices)
    assert wrong_matrices(wrong) == "Its matrices do not hold every element exactly once."


def test_an_owner_to_which_a_matrix_cannot_travel_is_refused():
    experts = plan_update([spec((4, 6, 5), (("dp",), (), ("tp",)))], PlanOptions(strategy="owned"))
    check(experts)
    assignment = experts.buckets[0].assignments[0]
    layout, matrix = experts.spec(assignment).layout, experts.matrix(assignment)
    elsewhere = next(p for p in range(4) if not can_own(layout, matrix.region, p))
    with pytest.raises(ValueError, match="w: matrix 0 cannot travel to its owner"):
        check(owned_by(experts, elsewhere))


def test_an_owner_outside_of_the_mesh_is_refused():
    with pytest.raises(ValueError, match="w: owner 4 is not on mesh"):
        check(owned_by(exchanged(strategy="owned"), 4))


def test_schedules_that_run_phases_in_another_order_are_refused():
    plan = exchanged(strategy="owned")
    first, second, *rest = plan.schedule
    for schedule in ((second, first, *rest), (first, second), (first, first, second, *rest)):
        with pytest.raises(ValueError, match=r"bucket 0 runs .*, not UWORA"):
            check(replace(plan, schedule=tuple(schedule)))


def refused_routes(plan: Plan, position: int, change: Any) -> str:
    """What `check_routes` says if one rank derived its part of a bucket otherwise."""

    def derived(plan: Plan, bucket: Any, here: int) -> RankBucket:
        found = rank_bucket(plan, bucket, here)
        return change(found) if here == position else found

    with mock.patch.object(rules, "rank_bucket", derived):
        try:
            check_routes(plan)
        except ValueError as error:
            return str(error)
    return ""


def swapped(packing: Packing) -> Packing:
    """The same slots, those of two peers exchanged."""
    first, second, *rest = packing.by_peer
    return Packing((second, first, *rest))


def test_routes_that_peers_do_not_expect_are_refused():
    plan = exchanged(strategy="owned")
    check_routes(plan)

    def sends_otherwise(here: RankBucket) -> RankBucket:
        hop = here.unshard[0]
        return replace(here, unshard=(replace(hop, send=swapped(hop.send)),))

    owner = plan.buckets[0].assignments[0].owner
    told = refused_routes(plan, 1 if owner == 0 else 0, sends_otherwise)
    assert "sends to" in told
    assert "what that does not expect" in told


def test_a_matrix_whose_pieces_overlap_is_refused():
    """As many elements as the matrix has, and some of them twice."""
    plan = exchanged(strategy="owned")
    owner = plan.buckets[0].assignments[0].owner

    def assembles_twice(here: RankBucket) -> RankBucket:
        slots = list(here.wholes.slots)
        slots[1] = replace(slots[0], offset=slots[1].offset)
        changed = replace(here)
        changed.__dict__["wholes"] = Packing((tuple(slots),))  # it is cached there
        return changed

    assert "gets 48 of 48 elements" in refused_routes(plan, owner, assembles_twice)


def test_results_of_what_a_rank_does_not_hold_are_refused():
    plan = exchanged(strategy="owned")

    def holds_nothing(here: RankBucket) -> RankBucket:
        return replace(here, stored=())

    told = refused_routes(plan, 3, holds_nothing)
    assert "position 3 gets what it does not hold" in told
