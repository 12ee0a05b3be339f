"""Plans: pure, exact about what they cost, at the lower bound, readable. No torch, no ranks."""

import json
import os
import random
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muon_dtensor.errors import PlanError
from muon_dtensor.layout import Layout, Matrix, MeshSpec, Region
from muon_dtensor.layout.declarations import Declaration
from muon_dtensor.planning.check import check, check_routes
from muon_dtensor.planning.matrix_costs import newton_schulz_flops
from muon_dtensor.planning.memory import bucket_peak_nbytes
from muon_dtensor.planning.plan import Action, ParamSpec, Phase, Plan, PlanOptions
from muon_dtensor.planning.planner import restrict
from muon_dtensor.planning.render import families, quantity
from muon_dtensor.planning.report import PlanReport, plan_report
from muon_dtensor.planning.routes import rank_bucket
from muon_dtensor.planning.serialize import digest, to_json
from muon_dtensor.planning.strategies import Owned
from tests.support.deadlines import run_program
from tests.support.models import anchors, layered, llama3_70b, param_spec
from tests.support.random_plans import random_params

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA_MESH = {"dp_replicate": 16, "dp_shard": 64, "tp": 8}


def small_models() -> dict[str, PlanReport]:
    fsdp, hsdp = MeshSpec.of(dp=4), MeshSpec.of(dp_replicate=2, dp_shard=2)
    both, cube = MeshSpec.of(dp=2, tp=2), MeshSpec.of(dp_replicate=2, dp_shard=2, tp=2)
    experts = [("experts", (8, 24, 16), (("dp",), (), ())), ("router", (8, 16), (("dp",), ()))]
    same = (("tp", "dp_shard"), ())
    return {
        "fsdp": plan_report(anchors(fsdp, (("dp",), ()), 4)),
        "fsdp_5_layers": plan_report(anchors(fsdp, (("dp",), ()), 5)),
        "fsdp_small_buckets": plan_report(
            anchors(fsdp, (("dp",), ()), 4), PlanOptions(bucket_nbytes=600_000)
        ),
        "hsdp": plan_report(anchors(hsdp, (("dp_shard",), ()), 4)),
        "fsdp_tp": plan_report(anchors(both, (("dp",), ("tp",)), 4)),
        "hsdp_tp_same_dim": plan_report(anchors(cube, same, 4)),
        "ddp": plan_report(anchors(fsdp, ((), ()), 4)),
        "experts": plan_report(list(layered(fsdp, 3, experts))),
        "uneven": plan_report(
            [param_spec(fsdp, f"w{i}", (5 + i, 3), (("dp",), ())) for i in range(4)]
        ),
        "llama3_70b": plan_report(llama3_70b(MeshSpec.of(**LLAMA_MESH))),
    }


@pytest.fixture(scope="module")
def plans() -> dict[str, PlanReport]:
    return small_models()


NAMES = [
    *("fsdp", "fsdp_5_layers", "fsdp_small_buckets", "hsdp", "fsdp_tp", "hsdp_tp_same_dim"),
    *("ddp", "experts", "uneven", "llama3_70b"),
]


@pytest.mark.parametrize("name", NAMES)
def test_golden(plans, name):
    """A changed plan shows in review. UPDATE_GOLDEN=1 writes the files anew."""
    path = GOLDEN / f"{name}.txt"
    plan = plans[name]
    text = f"{plan}\n\n{plan.explain(plan.params[0].fqn)}\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
    assert text.isascii()
    assert len(str(plan).splitlines()) <= 50


@pytest.mark.parametrize("name", NAMES)
def test_json_and_back(plans, name):
    plan = plans[name]
    again = PlanReport.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest


@pytest.mark.parametrize("name", NAMES[:-1])
def test_small_plans_hold_what_plans_must(plans, name):
    check(plans[name].plan)
    check_routes(plans[name].plan)


@pytest.mark.parametrize("name", ["fsdp", "hsdp", "fsdp_tp", "hsdp_tp_same_dim", "ddp"])
def test_even_shapes_reach_the_lower_bound(plans, name):
    cost = plans[name].cost
    assert cost.total_nbytes == cost.bound_nbytes == sum(cost.received_nbytes)
    assert cost.redundancy == 1.0


def test_the_bound_is_the_formula_of_the_design():
    mesh = MeshSpec.of(r=3, n=4)
    plan = plan_report([param_spec(mesh, "w", (16, 10), (("n",), ()))])
    elements, itemsize, shards, replicas = 160, 2, 4, 3
    away = itemsize * elements * (shards - 1) / shards
    assert plan.cost.bound_nbytes == 2 * away + itemsize * elements * (replicas - 1)


@pytest.mark.parametrize("num_ranks", [3, 4, 7])
def test_uneven_shapes_come_within_2_percent(num_ranks):
    mesh = MeshSpec.of(dp=num_ranks)
    specs = [param_spec(mesh, f"w{i}", (101, 47), (("dp",), ())) for i in range(4 * num_ranks)]
    cost = plan_report(specs).cost
    assert abs(cost.total_nbytes / cost.bound_nbytes - 1) <= 0.02


@pytest.mark.parametrize(
    ("num_layers", "most"), [(4, 1.02), (5, 1.10)], ids=["4-layers", "5-layers"]
)
@pytest.mark.parametrize(
    ("mesh", "cuts"),
    [
        (MeshSpec.of(dp=4), (("dp",), ())),
        (MeshSpec.of(r=2, dp=2), (("dp",), ())),
        (MeshSpec.of(dp=2, tp=2), (("dp",), ("tp",))),
        (MeshSpec.of(dp=4), ((), ())),
    ],
    ids=["fsdp", "hsdp", "fsdp-tp", "ddp"],
)
def test_the_slowest_rank_is_close_to_the_mean(mesh, cuts, num_layers, most):
    cost = plan_report(anchors(mesh, cuts, num_layers)).cost
    assert cost.imbalance <= most
    assert cost.imbalance <= cost.makespan <= most


def test_buckets_keep_owners_busy_together(plans):
    plan = plans["fsdp_small_buckets"]
    assert len(plan.buckets) == 3
    assert plan.cost.makespan <= 1.10
    assert max(map(bucket_peak_nbytes, plan.traffic)) <= plan.options.bucket_nbytes


def test_whole_matrices_send_nothing(plans):
    plan = plans["experts"]
    strategies = {plan.params[b.assignments[0].param].fqn: b.strategy for b in plan.buckets}
    assert strategies["layers.0.experts"] == Owned()
    local = next(b for b in plan.traffic if b.bucket.strategy.is_local)
    assert local.bucket.unshard == local.bucket.reshard == ()
    assert len(set(local.flops)) == 1, "every rank has two experts of each layer"


def test_a_plan_for_8192_ranks_is_made_in_seconds():
    start = process_time()
    plan = plan_report(llama3_70b(MeshSpec.of(**LLAMA_MESH)))
    text = str(plan)
    assert process_time() - start < 5
    assert len(text.splitlines()) <= 50
    assert max(map(len, text.splitlines())) <= 200
    cost = plan.cost
    assert cost.total_nbytes == cost.bound_nbytes
    assert cost.num_matrices == 560
    assert len({rank for ranks in plan.owners.values() for rank in ranks}) == 560


@pytest.mark.slow
def test_heads_of_8192_ranks_are_planned_in_seconds():
    """80 layers of 64 query heads, 2 x 8 key and value heads, and four matrices."""
    heads = {"wq": 64, "wk": 8, "wv": 8}
    specs = []
    by_shape: dict[Any, Any] = {}
    for spec in llama3_70b(MeshSpec.of(**LLAMA_MESH)):
        name = spec.fqn.split(".")[-2]
        matrices = spec.matrices
        if name in heads:
            key = (spec.shape, heads[name])
            if key not in by_shape:
                declaration = Declaration("(h d) m -> h d m", (("h", heads[name]),))
                by_shape[key] = declaration.matrices(spec.shape)
            matrices = by_shape[key]
        specs.append(replace(spec, matrices=matrices))
    start = process_time()
    plan = plan_report(specs)
    text = str(plan)
    assert process_time() - start < 20
    assert plan.cost.num_matrices == 80 * (64 + 2 * 8 + 4)
    assert len(text.splitlines()) <= 50


def test_every_rank_makes_the_same_plan():
    """Whatever the hash seed, and without torch."""
    code = (
        "import sys\n"
        "from muon_dtensor.layout import MeshSpec\n"
        "from muon_dtensor.planning.report import plan_report\n"
        "from tests.support.models import llama3_70b\n"
        f"plan = plan_report(llama3_70b(MeshSpec.of(**{LLAMA_MESH})))\n"
        "assert 'torch' not in sys.modules\n"
        "print(plan.digest)"
    )
    digests = set()
    for seed in ("0", "1", "4242"):
        run = run_program(
            [sys.executable, "-c", code],
            60,
            env={"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
        )
        assert run.returncode == 0, run.stderr
        digests.add(run.stdout)
    assert len(digests) == 1


def test_everything_that_matters_changes_the_digest(plans):
    plan = plans["fsdp"].plan
    others = [
        replace(plan, options=PlanOptions(prefetch_count=2)),
        replace(plan, params=(replace(plan.params[0], fqn="x"), *plan.params[1:])),
        replace(plan, params=(replace(plan.params[0], dtype="bfloat16"), *plan.params[1:])),
        replace(plan, schedule=plan.schedule[::-1]),
    ]
    assert len({digest(plan), *map(digest, others)}) == 5


def damaged(plan: Plan) -> list[Plan]:
    """The plan with one thing wrong, each time another."""
    bucket = plan.buckets[0]
    first, *rest = bucket.assignments

    def with_bucket(**changes) -> Plan:
        return replace(plan, buckets=(replace(bucket, **changes), *plan.buckets[1:]))

    return [
        with_bucket(assignments=tuple(rest)),
        with_bucket(assignments=(first, first, *rest)),
        with_bucket(assignments=(replace(first, owner=99), *rest)),
        with_bucket(assignments=(replace(first, matrix=7), *rest)),
        with_bucket(assignments=(replace(first, param=999), *rest)),
        with_bucket(strategy=Owned()),
        with_bucket(strategy=Owned(("dp",), hops=2, is_staged=True)),
        with_bucket(wire_dtype="float32"),
        replace(plan, schedule=plan.schedule[1:]),
        replace(plan, schedule=(*plan.schedule, Action(Phase.APPLY, 0))),
        replace(plan, schedule=(*plan.schedule, Action(Phase.UNSHARD, 50))),
        replace(plan, params=(replace(plan.params[0], matrices=()), *plan.params[1:])),
        replace(
            plan,
            params=(
                replace(plan.params[0], matrices=(Matrix(Region((0, 0), (5, 5)), 5, 5),)),
                *plan.params[1:],
            ),
        ),
    ]


@pytest.mark.parametrize("index", range(13))
def test_a_damaged_plan_is_refused(plans, index):
    plan = damaged(plans["fsdp"].plan)[index]
    with pytest.raises(ValueError, match="not a valid plan"):
        check(plan)
    with pytest.raises(ValueError, match="not a valid plan"):
        PlanReport.from_json(to_json(plan))


def test_json_whose_collectives_do_not_serve_its_strategy_is_refused(plans):
    value = json.loads(plans["fsdp"].to_json())
    bucket = value["buckets"][0]
    bucket["unshard"], bucket["reshard"] = bucket["reshard"], bucket["unshard"]
    with pytest.raises(ValueError, match="do not serve"):
        PlanReport.from_json(json.dumps(value))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 99}', '{"format": 1}'])
def test_foreign_json_is_refused(text):
    with pytest.raises(ValueError, match=r"plan|Expecting"):
        PlanReport.from_json(text)


def _places(value, path=()):
    """Every place in a JSON value, as a path of keys."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, (dict, list)):
            yield from _places(inner, (*path, key))
        else:
            yield (*path, key)


ODD = [None, "x", -1, 1.5, 10**30, [], {}, True, float("nan")]


def test_no_mutated_json_makes_anything_but_a_plan_or_a_value_error(plans):
    text = plans["experts"].to_json()
    rng = random.Random(0)
    places = [path for path in _places(json.loads(text)) if path]
    for path in rng.sample(places, min(len(places), 120)):
        for odd in ODD:
            value = json.loads(text)
            inner = value
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = odd
            try:
                plan = PlanReport.from_json(json.dumps(value))
            except ValueError:
                continue
            assert plan.cost.num_matrices >= 0
            assert str(plan)


def test_deep_json_is_refused():
    with pytest.raises(ValueError, match="not the JSON text of a plan"):
        PlanReport.from_json("[" * 100_000)


@pytest.mark.parametrize(
    "matrices",
    [
        (Matrix(Region((0, 0), (4, 4)), 4, 4), Matrix(Region((2, 0), (4, 4)), 2, 4)),
        (Matrix(Region((0, 0), (4, 3)), 4, 3),),
        (Matrix(Region((0, 0), (5, 4)), 5, 4),),
        (Matrix(Region((0,), (16,)), 4, 4),),
        (),
    ],
    ids=["overlap", "too-few", "outside", "1-D", "none"],
)
def test_matrices_that_are_not_the_parameter_are_refused(matrices):
    layout = Layout(MeshSpec.of(dp=2), (4, 4), (("dp",), ()))
    with pytest.raises(PlanError, match=r"[Mm]atri"):
        plan_report([ParamSpec("w", layout, "float32", matrices)])


def test_tokens_parse_back():
    for phase in Phase:
        assert Action.parse(str(Action(phase, 12))) == Action(phase, 12)
    with pytest.raises(ValueError, match="X"):
        Action.parse("X3")


@pytest.mark.parametrize("prefetch_count", [0, 1, 2, 7])
def test_the_schedule_keeps_as_much_in_flight_as_it_says(prefetch_count):
    options = PlanOptions(bucket_nbytes=600_000, prefetch_count=prefetch_count)
    plan = plan_report(anchors(MeshSpec.of(dp=4), (("dp",), ()), 8), options)
    check(plan.plan)
    in_flight: set[tuple[str, int]] = set()
    most = 0
    for action in plan.schedule:
        match action.phase:
            case Phase.UNSHARD:
                in_flight.add(("unshard", action.bucket))
            case Phase.WAIT:
                in_flight.discard(("unshard", action.bucket))
            case Phase.RESHARD:
                in_flight.add(("reshard", action.bucket))
            case Phase.APPLY:
                in_flight.discard(("reshard", action.bucket))
            case Phase.ORTHOGONALIZE:
                unshards = [b for kind, b in in_flight if kind == "unshard"]
                assert len(unshards) <= prefetch_count
                most = max(most, len(unshards))
                if prefetch_count == 0:
                    assert not in_flight
    assert not in_flight
    assert most == min(prefetch_count, len(plan.buckets) - 1)
    held = (prefetch_count + 2) * max(map(bucket_peak_nbytes, plan.traffic))
    assert plan.cost.peak_buffer_nbytes <= held


def test_loads_are_carried_across_meshes_of_the_same_ranks():
    rows, cols = MeshSpec.of(dp=4), MeshSpec(("ep",), (4,), (0, 1, 2, 3))
    specs = [
        param_spec(mesh, f"{mesh.dim_names[0]}.{i}", (512, 512), ((mesh.dim_names[0],), ()))
        for mesh in (rows, cols)
        for i in range(2)
    ]
    plan = plan_report(specs)
    assert sorted(rank for ranks in plan.owners.values() for rank in ranks) == [0, 1, 2, 3]
    part = restrict(plan.plan, rows.rank_set)
    assert part == plan.plan
    assert restrict(plan.plan, frozenset({7})).params == ()


def test_flops_count_three_products():
    rows, cols = 3, 10
    multiply = 2 * rows * rows * cols + 2 * rows**3 + 2 * rows * rows * cols
    assert newton_schulz_flops(rows, cols, 5) == newton_schulz_flops(cols, rows, 5) == 5 * multiply


def test_words():
    assert quantity(0, "B") == "0 B"
    assert quantity(999, "B") == "999 B"
    assert quantity(7_300_000, "B") == "7.3 MB"
    assert families(["a.0.w1", "a.1.w1", "a.2.w1"]) == "a.{0..2}.w1"
    assert families(["a.0.w", "a.4.w"]) == "a.{0,4}.w"
    assert families(["x"]) == "x"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(random_params())
def test_any_plan_routes_every_element_once(case):
    specs, options = case
    plan = plan_report(specs, options)
    check(plan.plan)
    check_routes(plan.plan)
    assert PlanReport.from_json(plan.to_json()) == plan
    cost = plan.cost
    assert sum(cost.sent_nbytes) == sum(cost.received_nbytes)
    assert cost.redundancy == 1.0
    assert max(cost.peak_nbytes) >= cost.peak_buffer_nbytes
    for index, bucket in enumerate(plan.buckets):
        for position in range(bucket.mesh.num_ranks):
            local = rank_bucket(plan.plan, bucket, position)
            priced = cost.buckets[index]
            assert local.pieces.numel == priced.pieces[position]
            assert local.wholes.numel == priced.wholes[position]
            assert local.numels == tuple(numels[position] for numels in priced.buffers)
            for hop in priced.sequence.hops:
                transfer = local.collective(hop)
                peers = bucket.mesh.peers(position, transfer.collective.mesh_dims)
                own = transfer.send.numels[peers.index(position)]
                assert 2 * (transfer.send.numel - own) == priced.sent_nbytes(hop)[position]
                got = 2 * (transfer.recv.numel - transfer.recv.numels[peers.index(position)])
                assert got == priced.received_nbytes(hop)[position]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(random_params(), st.integers(0, 10**6))
def test_the_order_of_parameters_moves_no_owner(case, seed):
    specs, options = case
    shuffled = random.Random(seed).sample(specs, len(specs))
    there = plan_report(specs, options).owners
    assert plan_report(shuffled, options).owners == there


@pytest.mark.slow
def test_planning_thousands_of_ranks_takes_little_memory():
    tracemalloc.start()
    plan_report(llama3_70b(MeshSpec.of(dp_replicate=32, dp_shard=64, tp=8)))
    _, peak_nbytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_nbytes < 100 << 20


def test_two_hops_where_direct_loads_the_owner():
    few = MeshSpec.of(r=4, n=8)
    sizes = [8192, 4096, 4096, 4096]
    one_large = plan_report(
        [param_spec(few, f"w{i}", (n, 4096), (("n",), ())) for i, n in enumerate(sizes)]
    )
    assert one_large.buckets[0].strategy == Owned(("n",), ("r",), hops=2)
    many = plan_report([param_spec(few, f"w{i}", (512, 512), (("n",), ())) for i in range(64)])
    assert many.buckets[0].strategy == Owned(("n",), ("r",), hops=1)
    check_routes(one_large.plan)
    check_routes(many.plan)


def test_a_plan_of_empty_parameters_prints():
    spec = param_spec(MeshSpec.of(dp=2), "x", (0, 8), (("dp",), ()))
    plan = plan_report([spec])
    assert "nothing to do" in plan.explain("x")
    assert "0 matrices" in str(plan)
    assert "empty" in str(plan)
