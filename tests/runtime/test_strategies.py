"""Every strategy on every layout: bitwise, with the planned bytes and flops.

Ranks are threads here, and processes in `test_strategies_over_gloo`.
"""

import pytest
from torch.distributed.tensor import Replicate, Shard

from muon_dtensor.planning.plan import EXACT_STRATEGIES
from tests.support.cases import (
    Case,
    compare_in_process,
)
from tests.support.layouts import EVEN, EXPERTS, LAYOUTS, ODD, hold_to_plan, run
from tests.support.pool import run_processes

R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)


def case(mesh_shape, shapes, placements, **kwargs) -> Case:
    params = tuple((shape, placements) for shape in shapes)
    return Case(mesh_shape, params, **{"num_steps": 2, **kwargs})


@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS)
@pytest.mark.parametrize("shapes", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("strategy", EXACT_STRATEGIES)
def test_bitwise(strategy, shapes, mesh_shape, placements):
    outcomes = run(case(mesh_shape, shapes, placements, ours={"strategy": strategy}))
    hold_to_plan(outcomes)


@pytest.mark.parametrize("strategy", EXACT_STRATEGIES)
@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [((4,), (S1,)), ((2, 2), (R, S0)), ((2, 2), (S0, S1)), ((2, 2, 2), (S0, S1, S2))],
    ids=["rows", "hsdp-experts", "experts-and-rows", "all-three"],
)
def test_experts(strategy, mesh_shape, placements):
    outcomes = run(case(mesh_shape, EXPERTS, placements, ours={"strategy": strategy}))
    hold_to_plan(outcomes)


@pytest.mark.P1
def test_strategies_over_gloo():
    for strategy in EXACT_STRATEGIES:
        hard = case((2, 2, 2), ODD, (R, S0, S0), ours={"strategy": strategy})
        outcomes = run_processes(8, compare_in_process, hard)
        hold_to_plan(outcomes)
