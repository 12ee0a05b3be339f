"""Every strategy on every layout: bitwise or within tolerance, with the planned bytes and flops.

Ranks are threads here, and processes where it says so.
"""

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from muon_dtensor import Muon
from muon_dtensor.errors import PlanError
from muon_dtensor.orthogonalize import newton_schulz
from muon_dtensor.planning.ir import STRATEGIES
from tests.support.cases import (
    Case,
    Outcome,
    compare_in_process,
    compare_with_oracle,
    mesh_of,
    spread,
    tensors_like,
)
from tests.support.meter import installed
from tests.support.pool import run_processes
from tests.support.threads import run_threads
from tests.test_layouts_bitwise import EVEN, EXPERTS, LAYOUTS, ODD

R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)
EXACT = [strategy for strategy in STRATEGIES if strategy != "gram"]
GRAM = {"strategy": "gram", "exact": False, "ns_dtype": torch.float32}
GRAM_TOLERANCE = 5e-4
"""numerics.md: "Gram in float32, 5e-4 with one restart"."""


MESH = ("a", "b")


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
@pytest.mark.parametrize("strategy", EXACT)
def test_bitwise(strategy, shapes, mesh_shape, placements):
    outcomes = run(case(mesh_shape, shapes, placements, ours={"strategy": strategy}))
    assert [o.differences for o in outcomes] == [[]] * len(outcomes)
    hold_to_plan(outcomes)


@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS)
@pytest.mark.parametrize("shapes", [EVEN, ODD], ids=["even", "odd"])
def test_gram_is_as_planned(shapes, mesh_shape, placements):
    hold_to_plan(run(case(mesh_shape, shapes, placements, ours=GRAM)))


@pytest.mark.parametrize("strategy", [*EXACT, "gram"])
@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [((4,), (S1,)), ((2, 2), (R, S0)), ((2, 2), (S0, S1)), ((2, 2, 2), (S0, S1, S2))],
    ids=["rows", "hsdp-experts", "experts-and-rows", "all-three"],
)
def test_experts(strategy, mesh_shape, placements):
    ours = GRAM if strategy == "gram" else {"strategy": strategy}
    outcomes = run(case(mesh_shape, EXPERTS, placements, ours=ours))
    hold_to_plan(outcomes)
    if strategy != "gram":
        assert [o.differences for o in outcomes] == [[]] * len(outcomes)


@pytest.mark.parametrize("shape", [(64, 96), (200, 64), (96, 96), (5, 64), (130, 7)], ids=str)
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_gram_stays_within_its_tolerance(num_ranks, shape):
    """Against the plain iteration in float64, rows cut over the team, on real processes."""
    errors = run_processes(num_ranks, gram_error, (num_ranks,), shape)
    assert max(errors) <= GRAM_TOLERANCE


@pytest.mark.parametrize("mesh_shape", [(2, 2), (2, 2, 2)], ids=str)
def test_gram_on_meshes_of_more_dims(mesh_shape):
    num_ranks = torch.Size(mesh_shape).numel()
    errors = run_processes(num_ranks, gram_error, mesh_shape, (48, 100))
    assert max(errors) <= GRAM_TOLERANCE


@pytest.mark.parametrize("ns_steps", [0, 1, 2, 3, 7])
def test_gram_follows_a_number_of_steps_that_changes(ns_steps):
    """Also to none at all: the direction, divided by its norm."""
    errors = run_processes(4, gram_error, (2, 2), (48, 100), None, ns_steps)
    assert max(errors) <= GRAM_TOLERANCE


def test_gram_on_a_permuted_mesh_with_replicas():
    """Members follow global ranks; in the second replica those are the other way around."""
    errors = run_processes(4, gram_error, (2, 2), (64, 16), [[2, 3], [1, 0]])
    assert max(errors) <= GRAM_TOLERANCE


def gram_error(mesh_shape, shape, ranks=None, ns_steps=None) -> float:
    """Relative error of the change of this rank's shard by a step of lr 1."""
    mesh = mesh_of(mesh_shape) if ranks is None else DeviceMesh("cpu", ranks, mesh_dim_names=MESH)
    placements = (R, S1, S0)[-len(mesh_shape) :] if ranks is None else (R, S0)
    weight, grad = torch.zeros(shape), tensors_like([shape], 3)[0]
    param = torch.nn.Parameter(spread(weight, mesh, placements))
    param.grad = spread(grad, mesh, placements)
    optimizer = Muon([param], lr=1.0, weight_decay=0.0, momentum=0.0, **GRAM)
    assert {type(b.strategy).__name__ for b in optimizer.plan.buckets} == {"Gram"}
    ns_steps = optimizer.param_groups[0]["ns_steps"] if ns_steps is None else ns_steps
    optimizer.param_groups[0]["ns_steps"] = ns_steps
    optimizer.step()
    scale = max(1, shape[0] / shape[1]) ** 0.5
    plain = newton_schulz(grad.double(), dtype=torch.float64, num_iterations=ns_steps)
    exact = -scale * plain
    # shard by shard: on a permuted mesh full_tensor() puts shards in the order of ranks
    due = spread(exact, mesh, placements).to_local()
    return float((param.detach().to_local().double() - due).norm() / due.norm().clamp(min=1e-30))


def test_gram_has_to_be_allowed():
    with pytest.raises(ValueError, match="exact=False"):
        Muon([torch.nn.Parameter(torch.ones(2, 2))], strategy="gram")


def gram_with_a_function() -> str:
    mesh = mesh_of((2,))
    param = torch.nn.Parameter(spread(torch.ones(4, 4), mesh, (S0,)))
    try:
        Muon([("w", param)], orthogonalizer=lambda x: x, **GRAM)
    except PlanError as error:
        return str(error)
    return ""


def test_gram_cannot_share_a_function_of_the_users():
    for told in run_threads(2, gram_with_a_function):
        assert "w" in told
        assert "strategy='gram'" in told


def test_strategies_over_gloo():
    for strategy in EXACT:
        hard = case((2, 2, 2), ODD, (R, S0, S0), ours={"strategy": strategy})
        outcomes = run_processes(8, compare_in_process, hard)
        assert [o.differences for o in outcomes] == [[]] * 8
        hold_to_plan(outcomes)
