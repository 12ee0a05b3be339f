"""Every strategy on every layout: bitwise, with the planned bytes and flops.

Ranks are threads here, and processes where it says so.
"""

import pytest
from torch.distributed.tensor import Replicate, Shard

from muon_dtensor.planning.plan import STRATEGIES
from tests.support.cases import (
    Case,
    Outcome,
    compare_in_process,
    compare_with_oracle,
)
from tests.support.meter import installed
from tests.support.pool import run_processes
from tests.support.threads import run_threads
from tests.test_layouts_bitwise import EVEN, EXPERTS, LAYOUTS, ODD

R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)


def case(mesh_shape, shapes, placements, **kwargs) -> Case:
    params = tuple((shape, placements) for shape in shapes)
    return Case(mesh_shape, params, **{"num_steps": 2, **kwargs})


def run(case: Case) -> list[Outcome]:
    with installed():
        return run_threads(case.num_ranks, compare_with_oracle, case)


def hold_to_plan(outcomes: list[Outcome]) -> None:
    assert [o.sent_nbytes for o in outcomes] == [o.planned_sent_nbytes for o in outcomes]
    assert [o.flops for o in outcomes] == [o.planned_flops for o in outcomes]
    assert len({o.digest for o in outcomes}) == 1


@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS)
@pytest.mark.parametrize("shapes", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bitwise(strategy, shapes, mesh_shape, placements):
    outcomes = run(case(mesh_shape, shapes, placements, ours={"strategy": strategy}))
    assert [o.differences for o in outcomes] == [[]] * len(outcomes)
    hold_to_plan(outcomes)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [((4,), (S1,)), ((2, 2), (R, S0)), ((2, 2), (S0, S1)), ((2, 2, 2), (S0, S1, S2))],
    ids=["rows", "hsdp-experts", "experts-and-rows", "all-three"],
)
def test_experts(strategy, mesh_shape, placements):
    outcomes = run(case(mesh_shape, EXPERTS, placements, ours={"strategy": strategy}))
    hold_to_plan(outcomes)
    assert [o.differences for o in outcomes] == [[]] * len(outcomes)


def test_strategies_over_gloo():
    for strategy in STRATEGIES:
        hard = case((2, 2, 2), ODD, (R, S0, S0), ours={"strategy": strategy})
        outcomes = run_processes(8, compare_in_process, hard)
        assert [o.differences for o in outcomes] == [[]] * 8
        hold_to_plan(outcomes)
