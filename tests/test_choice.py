"""What the planner chooses: never slower than one strategy throughout, and teams where they pay."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muon_dtensor.errors import PlanError
from muon_dtensor.layout import Layout, MeshSpec, ParamSpec
from muon_dtensor.matrices import matrices_of
from muon_dtensor.planning.check import check, check_routes
from muon_dtensor.planning.ir import STRATEGIES, Gathered, Gram, Owned, Phase, PlanOptions
from muon_dtensor.planning.planner import GRAM_GAIN, plan_update
from muon_dtensor.planning.predict import predict
from muon_dtensor.planning.presets import PRESETS
from muon_dtensor.planning.strategies import kind_of
from tests.support.models import param_spec

FORCED = [strategy for strategy in STRATEGIES if strategy != "auto"]


@st.composite
def models(draw) -> tuple[list[ParamSpec], PlanOptions]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    names = ["a", "b", "c"][: len(sizes)]
    mesh = MeshSpec.of(**dict(zip(names, sizes, strict=True)))
    specs = []
    for index in range(draw(st.integers(1, 8))):
        shape = tuple(draw(st.sampled_from([1, 8, 64, 500, 2048, 8192])) for _ in range(2))
        cuts: list[list[str]] = [[], []]
        for name in names:
            where = draw(st.integers(-1, 1))
            if where >= 0:
                cuts[where].append(name)
        layout = Layout(mesh, shape, tuple(map(tuple, cuts)))
        specs.append(ParamSpec(f"p{index}", layout, "float32", matrices_of(shape)))
    topology = PRESETS[draw(st.sampled_from(sorted(PRESETS)))]
    return specs, PlanOptions(
        bucket_nbytes=draw(st.sampled_from([1 << 20, 1 << 28])),
        prefetch_count=draw(st.integers(0, 2)),
        topology=topology,
    )


def options_with(options: PlanOptions, **changes) -> PlanOptions:
    values = {name: getattr(options, name) for name in PlanOptions.__slots__}
    return PlanOptions(**{**values, **changes})


def fits(plan) -> bool:
    return all(cost.peak_nbytes <= plan.options.bucket_nbytes for cost in plan.cost.buckets)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(models())
def test_the_choice_is_never_slower_than_one_strategy_throughout(case):
    specs, options = case
    chosen = plan_update(specs, options).prediction.seconds
    relaxed = plan_update(specs, options_with(options, exact=False)).prediction.seconds
    assert relaxed <= chosen
    for strategy in FORCED:
        forced = plan_update(specs, options_with(options, strategy=strategy, exact=False))
        if not fits(forced):
            continue
        if strategy == "gram":
            assert relaxed <= GRAM_GAIN * forced.prediction.seconds
        else:
            assert chosen <= forced.prediction.seconds


def test_tiny_matrices_are_gathered():
    mesh = MeshSpec.of(dp=4)
    plan = plan_update([param_spec(mesh, "router", (8, 16), (("dp",), ()))])
    assert plan.buckets[0].strategy == Gathered(("dp",), ())
    assert plan.buckets[0].reshard == ()
    assert {kind_of(a.strategy) for a in plan.buckets[0].alternatives} == {"owned", "gram"}


def test_stages_where_groups_are_large():
    mesh = MeshSpec.of(dp=128, tp=8)
    specs = [param_spec(mesh, f"w{i}", (1024, 256), (("tp", "dp"), ())) for i in range(256)]
    plan = plan_update(specs)
    assert {kind_of(bucket.strategy) for bucket in plan.buckets} == {"owned_staged"}
    check(plan)


def test_a_team_where_one_matrix_is_all_there_is():
    mesh = MeshSpec.of(dp=8)
    specs = [param_spec(mesh, "w", (4096, 16384), ((), ("dp",)))]
    local = PRESETS["gloo-local"]
    in_float32 = [ParamSpec(s.fqn, s.layout, s.dtype, s.matrices, 5, "float32") for s in specs]
    team = plan_update(in_float32, PlanOptions(exact=False, topology=local))
    assert team.buckets[0].strategy == Gram(("dp",), (), ("dp",), is_in_place=True)
    assert team.buckets[0].unshard == team.buckets[0].reshard == ()
    check_routes(team)
    assert team.digest != plan_update(in_float32, PlanOptions(topology=local)).digest
    # bfloat16 products are several times as fast there, and a team works in float32
    refused = plan_update(specs, PlanOptions(exact=False, topology=local))
    assert not isinstance(refused.buckets[0].strategy, Gram)
    told = [a for a in refused.buckets[0].alternatives if isinstance(a.strategy, Gram)]
    assert told[0].seconds > refused.prediction.seconds / GRAM_GAIN


def test_many_matrices_are_not_shared():
    mesh = MeshSpec.of(dp=8)
    specs = [param_spec(mesh, f"w{i}", (1024, 1024), (("dp",), ())) for i in range(16)]
    plan = plan_update(specs, PlanOptions(exact=False))
    assert {type(bucket.strategy) for bucket in plan.buckets} == {Owned}


@pytest.mark.parametrize("name", PRESETS)
def test_the_topology_is_part_of_the_digest(name):
    specs = [param_spec(MeshSpec.of(dp=4), "w", (64, 64), (("dp",), ()))]
    digests = {plan_update(specs, PlanOptions(topology=PRESETS[n])).digest for n in PRESETS}
    assert len(digests) == len(PRESETS)


def test_a_plan_with_a_team_that_cannot_be_is_refused():
    """An owner inside a team, or ranks that work one after the other: a step would hang."""
    spec = ParamSpec(
        "w",
        Layout(MeshSpec.of(dp=4), (64, 128), ((), ("dp",))),
        "float32",
        matrices_of((64, 128)),
    )
    plan = plan_update([spec], PlanOptions(strategy="gram", exact=False))
    check(plan)
    (bucket,) = plan.buckets
    inside = replace(bucket, assignments=(replace(bucket.assignments[0], owner=1),))
    with pytest.raises(ValueError, match="not the first member"):
        check(replace(plan, buckets=(inside,)))
    with pytest.raises(ValueError, match="one after the other"):
        check(replace(plan, options=replace(plan.options, sequential=True)))


def test_all_parameters_that_cannot_take_a_strategy_are_told():
    mesh = MeshSpec.of(dp=4)
    specs = [
        param_spec(mesh, "a", (96, 64), (("dp",), ())),
        param_spec(mesh, "b", (96, 64), ((), ("dp",))),
    ]
    named = {"a": 0, "b": 1}
    with pytest.raises(PlanError) as raised:
        plan_update(specs, PlanOptions(strategy="gathered"), named)
    assert len(str(raised.value).splitlines()) >= 3
    for name in named:
        assert f"{name} " in str(raised.value)


def test_ranks_in_turn_are_told_why_there_are_no_teams():
    layout = Layout(MeshSpec.of(dp=4), (64, 128), ((), ("dp",)))
    spec = ParamSpec("w", layout, "float32", matrices_of((64, 128)))
    plan = plan_update([spec], PlanOptions(exact=False, sequential=True))
    assert "one after the other" in str(plan)
    spans = predict(plan, watch=range(4)).spans
    assert any(s.action.phase is Phase.ORTHOGONALIZE for s in spans)


def test_replicas_on_a_permuted_mesh_may_not_lie_in_slabs():
    """Members follow global ranks: here those of the second replica hold each other's slabs."""
    mesh = MeshSpec(("a", "b"), (2, 2), (2, 3, 1, 0))
    spec = param_spec(mesh, "x", (4, 16, 64), ((), (), ("b",)))
    plan = plan_update([spec], PlanOptions(strategy="gram", exact=False))
    check(plan)
    check_routes(plan)
    assert not any(b.strategy.is_in_place for b in plan.buckets if b.strategy.team_dims == ("b",))
