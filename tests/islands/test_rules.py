"""Rules equal short float64 oracles, and keep their bounds."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muon_dtensor.islands import gram
from muon_dtensor.islands.rules import (
    Bulyan,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    NearestNeighbourMixing,
    Rule,
    TrimmedMean,
    combine,
    rule_of,
)

RULES = [
    Mean(),
    Median(),
    TrimmedMean(2),
    Krum(2),
    MultiKrum(2),
    Bulyan(2),
    GeometricMedian(),
    NearestNeighbourMixing(2),
    NearestNeighbourMixing(2, Krum(2)),
    NearestNeighbourMixing(2, GeometricMedian()),
]


def gram_matrix(x: Tensor) -> list[list[float]]:
    return (x.double() @ x.double().T).tolist()


def combined(rule: Rule, x: Tensor, **options) -> Tensor:
    """Combine the rows of [n, d]."""
    (result,) = combine(rule, [[row] for row in x], gram=gram_matrix(x), **options)
    return result


def oracle(rule: Rule, x: Tensor) -> Tensor:
    """The rule on rows of [n, d] in float64, by its definition."""
    n, f, x = len(x), rule.f, x.double()
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    if isinstance(rule, Mean):
        return x.mean(0)
    if isinstance(rule, Median):
        return x.quantile(0.5, dim=0)
    if isinstance(rule, TrimmedMean):
        return x.sort(0).values[f : n - f].mean(0)
    if isinstance(rule, NearestNeighbourMixing):
        nearest = distances.argsort(dim=1, stable=True)[:, : n - f]
        return oracle(rule.then, x[nearest].mean(1))
    if isinstance(rule, GeometricMedian):
        y = x.mean(0)
        for _ in range(2000):
            w = 1 / (x - y).norm(dim=1)
            y = (w[:, None] * x).sum(0) / w.sum()
        return y
    if isinstance(rule, Bulyan):
        rest, chosen = list(range(n)), []
        for _ in range(n - 2 * f):
            chosen.append(rest.pop(krum_order(distances[rest][:, rest], f)[0]))
        rows = x[chosen]
        nearest = (rows - rows.quantile(0.5, dim=0)).abs().argsort(0)[: len(chosen) - 2 * f]
        return rows.gather(0, nearest).mean(0)
    order = krum_order(distances, f)
    return x[order[: n - f - 2]].mean(0) if isinstance(rule, MultiKrum) else x[order[0]]


def krum_order(distances: Tensor, f: int) -> list[int]:
    n = len(distances)
    scores = distances.square().sort(dim=1).values[:, 1 : n - f - 1].sum(1)
    return scores.argsort(stable=True).tolist()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.text)
@pytest.mark.parametrize("seed", range(5))
def test_rules_equal_their_oracles(rule, seed):
    x = torch.randn(11, 40, generator=torch.Generator().manual_seed(seed))
    tolerance = 1e-3 if "geometric" in rule.text else 1e-6
    assert torch.allclose(combined(rule, x).double(), oracle(rule, x), atol=tolerance)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.text)
def test_one_island_is_the_identity(rule):
    x = torch.randn(1, 7)
    rule.check(1)
    assert torch.equal(combined(rule, x), x[0])
    assert rule.warning(1) == ""


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.text)
def test_equal_updates_are_kept(rule):
    x = torch.randn(5).expand(9, 5)
    assert torch.allclose(combined(rule, x), x[0], rtol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.text)
def test_zero_updates_give_zero(rule):
    assert torch.equal(combined(rule, torch.zeros(9, 4)), torch.zeros(4))


@pytest.mark.parametrize("rule", RULES[1:], ids=lambda rule: rule.text)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_two_wrong_updates_of_nine_move_a_robust_rule_little(rule, bad):
    generator = torch.Generator().manual_seed(3)
    honest = 1 + 0.1 * torch.randn(7, 30, generator=generator)
    x = torch.cat([torch.full((1, 30), bad), honest, torch.full((1, 30), -bad)])
    is_finite = [bool(row.isfinite().all()) for row in x]
    assert (combined(rule, x, finite=is_finite) - 1).abs().max() < 0.4


def test_the_mean_drops_updates_that_are_not_finite_and_weighs_the_others():
    x = torch.tensor([[1.0], [float("nan")], [4.0]])
    result = combined(Mean(), x, weights=[2.0, 5.0, 1.0], finite=[True, False, True])
    assert torch.allclose(result, torch.tensor([2.0]))


@pytest.mark.parametrize(
    ("rule", "n", "num_infinite"),
    [(TrimmedMean(1), 5, 2), (Median(), 5, 3), (Krum(1), 5, 2), (Mean(), 3, 3)],
    ids=str,
)
def test_more_infinite_updates_than_tolerated_raise(rule, n, num_infinite):
    x = torch.randn(n, 3)
    finite = [i >= num_infinite for i in range(n)]
    message = f"updates of {num_infinite} of {n} islands are not finite"
    with pytest.raises(ValueError, match=message):
        combined(rule, x, finite=finite)


@pytest.mark.parametrize(
    ("rule", "fewest"),
    [
        (TrimmedMean(2), 5),
        (Krum(2), 7),
        (MultiKrum(2), 7),
        (Bulyan(2), 9),
        (NearestNeighbourMixing(2), 5),
        (NearestNeighbourMixing(2, Bulyan(2)), 9),
    ],
    ids=lambda value: getattr(value, "text", str(value)),
)
def test_bounds_name_the_islands_and_f(rule, fewest):
    rule.check(fewest)
    with pytest.raises(ValueError, match=rf"at least {fewest} islands for f=2, and there are 4"):
        rule.check(4)


def test_bulyan_warns_outside_its_guarantee():
    Bulyan(2).check(9)
    assert "has a guarantee from 11 islands on, and there are 9" in Bulyan(2).warning(9)
    assert Bulyan(2).warning(11) == ""


def test_krum_fails_beyond_its_bound():
    """Four of nine islands flip the sign together: the rule refuses, and would choose them."""
    with pytest.raises(ValueError, match="at least 11 islands for f=4, and there are 9"):
        Krum(4).check(9)
    generator = torch.Generator().manual_seed(0)
    honest = 1 + 0.5 * torch.randn(5, 50, generator=generator)
    x = torch.cat([honest, -4 * honest.mean(0).expand(4, 50)])
    assert combined(Krum(4), x).mean() < -3


@pytest.mark.parametrize("f", [-1, 1.0, True])
def test_a_wrong_f_raises(f):
    with pytest.raises(ValueError, match="f must be an integer"):
        TrimmedMean(f)


def test_names_of_rules():
    assert rule_of("mean") == Mean()
    assert rule_of("geometric_median") == GeometricMedian()
    assert rule_of(Krum(3)) == Krum(3)
    with pytest.raises(ValueError, match="reduce must be a rule or one of mean, median"):
        rule_of("krum")
    with pytest.raises(ValueError, match="f=1, the mixing f=2"):
        NearestNeighbourMixing(2, Krum(1))


@st.composite
def updates(draw) -> list[list[Tensor]]:
    n = draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shapes = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=3))
    scale = draw(st.sampled_from([1e-12, 1.0, 1e12]))
    return [[scale * torch.randn(s, generator=generator) for s in shapes] for _ in range(n)]


@settings(deadline=None, derandomize=True)
@given(updates(), st.integers(1, 4))
def test_inner_products_do_not_depend_on_the_cut(tensors, num_parts):
    largest = [max(float(gram.largest_element(t)) for t in island) for island in tensors]
    whole = sum(gram.limb_products(ts, largest) for ts in zip(*tensors, strict=True))
    cut = sum(
        gram.limb_products(parts, largest)
        for ts in zip(*tensors, strict=True)
        for parts in zip(*(t.chunk(num_parts) for t in ts), strict=True)
    )
    assert torch.equal(whole, cut)
    flat = torch.stack([torch.cat([t.flatten() for t in island]) for island in tensors]).double()
    exact = flat @ flat.T
    found = torch.tensor(gram.gram_of(whole, largest), dtype=torch.float64)
    assert torch.allclose(found, exact, rtol=0, atol=1e-6 * float(exact.abs().max()) + 1e-300)


def test_large_tensors_are_multiplied_in_chunks(monkeypatch):
    tensors = [[torch.randn(1000)] for _ in range(3)]
    largest = [float(gram.largest_element(t)) for (t,) in tensors]
    whole = gram.limb_products([t for (t,) in tensors], largest)
    monkeypatch.setattr(gram, "CHUNK", 7)
    assert torch.equal(gram.limb_products([t for (t,) in tensors], largest), whole)


def test_an_update_that_is_not_finite_counts_as_zero():
    tensors = [torch.ones(4), torch.tensor([1.0, float("nan"), 2.0, 3.0])]
    assert [float(gram.largest_element(t)) for t in tensors] == [1.0, float("inf")]
    products = gram.gram_of(gram.limb_products(tensors, [1.0, 0.0]), [1.0, 0.0])
    assert products == [[4.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.text)
def test_results_do_not_depend_on_the_cut(rule):
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    products = gram_matrix(x)
    (whole,) = combine(rule, [[row] for row in x], gram=products)
    for size in (1, 3, 17):
        parts = combine(rule, [list(row.split(size)) for row in x], gram=products)
        assert torch.equal(torch.cat(parts), whole)
    for order in itertools.islice(itertools.permutations(range(9)), 1000, 1003):
        again = combined(rule, x[list(order)])
        assert torch.allclose(again, whole, atol=1e-5)
