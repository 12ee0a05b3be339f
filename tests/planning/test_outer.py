"""The plan of synchronizations between islands: fragments, steps, bytes, seconds, text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.planning.outer import (
    HEADER_NBYTES,
    OuterParam,
    OuterPlan,
    OuterRoute,
    WireCost,
    best_route,
    fragments_of,
    outer_params,
)

PARAMS = tuple(OuterParam(f"layers.{i}.w", (100, 60), (10, 6)) for i in range(4))


def plan(wire: str = "float32", islands: int = 4, fragments: int = 1, **options) -> OuterPlan:
    cost = WireCost.of(wire)
    route = options.pop("route", best_route(cost, islands, can_spread=True))
    return OuterPlan(
        PARAMS,
        islands,
        fragments_of([p.fqn for p in PARAMS], fragments),
        options.pop("sync_every", 30),
        options.pop("delay", 0),
        cost,
        route,
        "mean",
        **options,
    )


@pytest.mark.parametrize(
    ("wire", "route", "nbytes"),
    [
        ("float32", "everyone", 3 * (HEADER_NBYTES + 1600)),
        ("float32", "spread", 3 * (HEADER_NBYTES + 2 * 400)),
        ("int8", "everyone", 3 * (HEADER_NBYTES + 160 + 400)),
        ("int8", "spread", 3 * (HEADER_NBYTES + 160 + 2 * 100)),
        ("int4", "spread", 3 * (HEADER_NBYTES + 160 + 50 + 100)),
        ("topk:0.1", "everyone", 3 * (HEADER_NBYTES + 410 * 6)),
    ],
)
def test_bytes_of_the_busiest_rank(wire, route, nbytes):
    assert plan(wire, route=OuterRoute(route)).round_nbytes == nbytes


def test_one_island_sends_nothing():
    assert plan(islands=1).round_nbytes == 0


def test_the_bytes_of_an_island_are_those_of_its_ranks():
    outer = plan("int8")
    assert outer.island_nbytes == outer.sent_nbytes(0, 0) + outer.sent_nbytes(0, 1)
    assert outer.every_step_nbytes == 30 * 2 * 4 * 640 * 3 // 4


@pytest.mark.parametrize(
    ("wire", "islands", "can_spread", "expected"),
    [
        ("float32", 2, True, "everyone"),
        ("float32", 3, True, "spread"),
        ("int4", 3, True, "everyone"),
        ("int4", 4, True, "spread"),
        ("float32", 8, False, "everyone"),
        ("topk:0.1", 8, True, "everyone"),
    ],
)
def test_the_route_with_fewer_bytes(wire, islands, can_spread, expected):
    assert best_route(WireCost.of(wire), islands, can_spread=can_spread) == expected


@given(st.integers(1, 40), st.data())
def test_every_fragment_is_sent_once_in_each_period(sync_every, data):
    count = data.draw(st.integers(1, min(4, sync_every)))
    outer = plan(fragments=count, sync_every=sync_every)
    sent = [outer.at(step) for step in range(1, 4 * sync_every + 1)]
    for start in range(sync_every, 4 * sync_every, sync_every):
        period = [f for f in sent[start : start + sync_every] if f is not None]
        assert sorted(period) == list(range(count))
    assert outer.at(sync_every) == count - 1


def test_fragments_are_whole_blocks_in_turn():
    names = ["embed", "layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b", "layers.2.a", "head"]
    assert fragments_of(names, 1) == ((0, 1, 2, 3, 4, 5, 6),)
    assert fragments_of(names, 2) == ((0, 3, 4, 6), (1, 2, 5))
    with pytest.raises(ValueError, match="fragments=5, but the parameters have 4 blocks"):
        fragments_of(names, 5)


@pytest.mark.parametrize("name", ["int3", "topk:0", "topk:1.5", "topk:x", "", "FLOAT32"])
def test_unknown_wires_raise(name):
    with pytest.raises(ValueError, match="wire must be one of float32"):
        WireCost.of(name)


def test_sizes_of_shards_on_the_ranks_of_the_largest_mesh():
    mesh = MeshSpec.of(dp=3, tp=2)
    matrix = Layout(mesh, (7, 4), (("dp",), ("tp",)))
    vector = Layout(MeshSpec.of(dp=3), (5,), (("dp",),))
    plain = Layout(MeshSpec((), (), (4,)), (2, 5), ((), ()))
    found = outer_params([("matrix", matrix), ("vector", vector), ("plain", plain)])
    assert found == (
        OuterParam("matrix", (6, 6, 6, 6, 2, 2), (3, 3, 3, 3, 1, 1)),
        OuterParam("vector", (2, 2, 2, 2, 1, 1), (1,) * 6),
        OuterParam("plain", (10,) * 6, (2,) * 6),
    )
    assert outer_params([]) == ()


def test_seconds_on_a_link():
    text = plan("float32", delay=2, fragments=2).summary(link_bits=8000.0, step_seconds=0.5)
    # an island sends 2 x (100 + 60) elements of a fragment, in two halves of 3/4 each
    nbytes = sum(plan("float32", fragments=2).sent_nbytes(0, rank) for rank in (0, 1))
    assert f"{8 * nbytes / 8000 * 1:.3g} s on the link" in text
    assert f"{8 * nbytes / 8000 - 1:.3g} s of it exposed" in text
    assert "computes 8" in text
    assert "bit/s an island" in text


def test_equal_plans_have_equal_digests():
    assert plan().digest == plan().digest
    assert len({plan().digest, plan("int8").digest, plan(islands=3).digest}) == 3


def test_the_text_of_a_plan():
    text = str(plan("int8", fragments=2, warning="Bulyan has no guarantee"))
    assert "4 islands of 2 ranks: every 30 steps, 4 parameters in 2 fragments, mean, int8" in text
    assert "warning: Bulyan has no guarantee" in text
    assert "fragment 0  layers.0.w and 1 more: all_to_all, each combines a part, all_gather" in text
    assert "a rank in addition" in text
