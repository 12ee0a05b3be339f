"""Teams: their sizes, the slab of each member, and where a plan uses them."""

import random
from dataclasses import replace

import pytest

from muon_dtensor.layout import Layout, Matrix, MeshSpec, Region
from muon_dtensor.layout.matrices import is_slab, slab_size, slabs_of
from muon_dtensor.planning.check import check
from muon_dtensor.planning.plan import ParamSpec, PlanOptions
from muon_dtensor.planning.presets import PRESETS
from muon_dtensor.planning.report import PlanReport, plan_report
from muon_dtensor.planning.strategies import Distributed, Owned, can_own
from muon_dtensor.planning.teams import (
    TeamOption,
    allot,
    distributed_strategies,
    holds_slabs,
    team_of,
    team_slabs,
)
from tests.support.models import llama3_70b, param_spec
from tests.support.routes import check_routes


def matrix(*shape: int, rows: int, cols: int) -> Matrix:
    return Matrix(Region.of_shape(shape), rows, cols)


@pytest.mark.parametrize(
    ("whole", "count", "sizes"),
    [
        (matrix(4, 10, rows=4, cols=10), 4, [(4, 2), (4, 3), (4, 2), (4, 3)]),
        (matrix(10, 4, rows=10, cols=4), 3, [(3, 4), (3, 4), (4, 4)]),
        (matrix(1, 6, 9, rows=6, cols=9), 3, [(6, 3)] * 3),
        (matrix(8, 3, 2, 2, rows=8, cols=12), 3, [(8, 4)] * 3),
        (matrix(2, 6, 3, rows=12, cols=3), 2, [(6, 3)] * 2),
        (matrix(1, 7, rows=1, cols=7), 7, [(1, 1)] * 7),
    ],
    ids=lambda value: str(getattr(value, "region", "")),
)
def test_slabs_cut_the_long_side(whole, count, sizes):
    slabs = slabs_of(whole, count)
    assert [slab_size(whole, slab) for slab in slabs] == sizes
    assert all(is_slab(whole, slab) for slab in slabs)
    assert sum(slab.numel for slab in slabs) == whole.numel


def test_matrices_without_slabs():
    assert slabs_of(matrix(4, 3, rows=4, cols=3), 5) == ()
    assert slabs_of(matrix(12, rows=3, cols=4), 2) == ()  # stored flat: its columns are no box
    turned = Matrix(Region.of_shape((3, 8)), 8, 3, pattern="i o -> o i")
    assert slabs_of(turned, 2) == ()


def test_a_square_matrix_is_a_slab_by_rows_and_by_columns():
    square = matrix(6, 6, rows=6, cols=6)
    assert is_slab(square, Region((0, 0), (2, 6)))
    assert is_slab(square, Region((0, 2), (6, 4)))
    assert not is_slab(square, Region((0, 0), (2, 2)))
    assert not is_slab(square, Region((2, 0), (2, 6)))


def distributed(spec: ParamSpec, size: int) -> list[Distributed]:
    return [s for s in distributed_strategies(spec, spec.matrices[0]) if s.team_size == size]


def test_shards_that_are_slabs_stay_where_they_are():
    spec = param_spec(MeshSpec.of(dp=4), "w", (10, 4), (("dp",), ()))  # 3, 3, 3 and 1 rows
    assert holds_slabs(spec.layout, spec.matrices[0], 4)
    strategy = distributed(spec, 4)[0]
    assert (strategy.unshard_dims, strategy.unshard, strategy.reshard(("dp",))) == ((), (), ())
    slabs = team_slabs(strategy, spec.layout, spec.matrices[0], (0, 1, 2, 3))
    assert [slab.shape for slab in slabs.values()] == [(3, 4), (3, 4), (3, 4), (1, 4)]


def test_a_member_takes_the_slab_of_which_it_stores_most():
    spec = param_spec(MeshSpec.of(r=2, dp=2), "w", (8, 4), (("dp",), ()))
    strategy = distributed(spec, 4)[0]
    assert strategy.team_dims == ("r", "dp")
    slabs = team_slabs(strategy, spec.layout, spec.matrices[0], (0, 1, 2, 3))
    # positions 0 and 2 store rows 0 to 3, positions 1 and 3 rows 4 to 7
    assert [slabs[p].start[0] for p in range(4)] == [0, 4, 2, 6]


def test_some_parameters_cannot_be_distributed():
    spec = param_spec(MeshSpec.of(dp=4), "w", (8, 16), (("dp",), ()))
    assert distributed(spec, 4)
    assert not list(distributed_strategies(replace(spec, can_distribute=False), spec.matrices[0]))
    experts = param_spec(MeshSpec.of(ep=4), "e", (4, 8, 16), (("ep",), (), ()))
    assert not list(distributed_strategies(experts, experts.matrices[0]))


@pytest.mark.parametrize(
    ("sizes", "cuts"),
    [
        ({"r": 2}, ((), (), ())),
        ({"r": 4, "s": 2}, ((), ("s",), ())),
        ({"r": 2, "q": 2, "s": 2}, (("s",), (), ())),
        ({"r": 2, "s": 3}, ((), (), ("s",))),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, 1, 2), (4, 8, 16), (3, 9, 14)], ids=str)
def test_every_member_can_be_sent_its_slab(shape, sizes, cuts):
    """Also where the momentum is cut over replicas, between experts."""
    for shards_momentum in (False, True):
        spec = param_spec(MeshSpec.of(**sizes), "e", shape, cuts)
        spec = replace(spec, shards_momentum=shards_momentum)
        layout = spec.momentum_layout
        for one in spec.matrices:
            owner = next(iter(layout.holders(one.region)))
            for strategy in distributed_strategies(spec, one):
                team = team_of(owner, layout.mesh, strategy)
                assert all(can_own(layout, one.region, member) for member in team), strategy
        check(plan_report([spec], PlanOptions(strategy="distributed", exact=False)).plan)


def option(num_ranks: int, seconds: float) -> TeamOption:
    if num_ranks == 1:
        return TeamOption(Owned(("dp",)), seconds)
    return TeamOption(Distributed(("dp",), team_dims=("dp",), team_size=num_ranks), seconds)


LARGE = (option(1, 8.0), option(2, 5.0), option(4, 3.0))


@pytest.mark.parametrize(
    ("sizes", "num_ranks", "expected"),
    [
        ([(1, LARGE)], 1, [1]),
        ([(1, LARGE)], 2, [2]),
        ([(1, LARGE)], 4, [4]),
        ([(2, LARGE)], 4, [2]),  # 5 s side by side, against two teams of 4 one after the other: 6 s
        ([(4, LARGE)], 4, [1]),
        ([(1, LARGE), (3, (option(1, 1.0),))], 4, [4, 1]),
        ([(1, LARGE), (8, (option(1, 4.0),))], 4, [4, 1]),  # 3 + 8 s, against 12 s
        ([(1, LARGE), (6, (option(1, 4.0),))], 4, [1, 1]),  # 8 s, against 3 + 8 s
    ],
)
def test_teams_are_as_large_as_there_are_ranks_for_them(sizes, num_ranks, expected):
    assert [o.num_ranks for o in allot(sizes, num_ranks)] == expected


def test_allotments_are_never_longer_than_without_teams():
    generator = random.Random(0)
    for _ in range(200):
        sizes = []
        for _ in range(generator.randint(1, 4)):
            alone = generator.uniform(1, 10)
            options = [option(1, alone)]
            for size in (2, 4, 8):
                options.append(option(size, alone / size * generator.uniform(1, 3)))
            sizes.append((generator.randint(1, 20), options))
        num_ranks = generator.choice([8, 16, 64])
        chosen = allot(sizes, num_ranks)
        mean = sum(n * o.num_ranks * o.seconds for (n, _), o in zip(sizes, chosen, strict=True))
        alone = sum(n * options[0].seconds for n, options in sizes)
        longest = max(options[0].seconds for _, options in sizes)
        # list scheduling takes at most the mean and the longest matrix (Graham 1969)
        assert max(mean / num_ranks, max(o.seconds for o in chosen)) <= alone / num_ranks + longest


def large_model(**changes) -> PlanReport:
    mesh = MeshSpec.of(dp_shard=64, tp=8)
    specs = [spec for spec in llama3_70b(mesh) if spec.fqn.startswith("layers.0.")]
    return plan_report(specs, PlanOptions(batched=True, **changes))


def test_more_ranks_than_matrices():
    owned, together = large_model(), large_model(exact=False)
    assert {b.strategy.kind for b in owned.buckets} == {"owned"}
    strategies = [b.strategy for b in together.buckets if isinstance(b.strategy, Distributed)]
    assert max(strategy.team_size for strategy in strategies) == 8  # the ranks of a node
    assert together.prediction.seconds < owned.prediction.seconds / 2
    check(together.plan)
    check_routes(together.plan)
    assert PlanReport.from_json(together.to_json()) == together
    assert "teams of 8, polynomial shared" in str(together)
    assert "all_to_all in teams" in str(together)


def test_as_many_matrices_as_ranks_are_not_distributed():
    mesh = MeshSpec.of(dp=8)
    layout = Layout(mesh, (4096, 4096), (("dp",), ()))
    matrices = param_spec(mesh, "", (4096, 4096), layout.cuts).matrices
    specs = [ParamSpec(f"w{i}", layout, "float32", matrices) for i in range(16)]
    exact = plan_report(specs)
    assert plan_report(specs, PlanOptions(exact=False)).buckets == exact.buckets


def test_ranks_that_compute_one_after_the_other_form_no_teams():
    report = large_model(exact=False, sequential=True)
    assert all(bucket.strategy.kind == "owned" for bucket in report.buckets)


def test_invalid_teams_raise():
    spec = param_spec(MeshSpec.of(dp=4), "w", (8, 64), (("dp",), ()))
    options = PlanOptions(exact=False, strategy="distributed", topology=PRESETS["h100-nvlink"])
    plan = plan_report([spec], options).plan
    (bucket,) = plan.buckets
    first, second, *others = bucket.assignments
    swapped = (replace(first, slab=second.slab), replace(second, slab=first.slab), *others)
    for assignments in (swapped, (first, *others), (first, first, *others)):
        with pytest.raises(ValueError, match="not cut into the slabs of one team"):
            check(replace(plan, buckets=(replace(bucket, assignments=assignments),)))
    with pytest.raises(ValueError, match="is not legal for its layout"):
        check(replace(plan, options=replace(options, exact=True, strategy="auto")))
    whole = replace(bucket, strategy=Owned(("dp",)), assignments=(first,))
    with pytest.raises(ValueError, match="is not legal for its layout"):
        check(replace(plan, buckets=(whole,)))
