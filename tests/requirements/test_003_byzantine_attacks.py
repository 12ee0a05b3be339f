"""003, "Byzantine Attack Simulation Tests": nine islands on real text, two of them lie.

Muon is the inner optimizer. Losses are validation losses in nats after ten rounds of eight steps.
"""

from functools import cache

import pytest

from muon_dtensor.islands import (
    Bulyan,
    GeometricMedian,
    Krum,
    NearestNeighbourMixing,
    Rule,
    TrimmedMean,
)
from tests.support.text_islands import ALIE, Training, loss_of

pytestmark = pytest.mark.P1
SEEDS = [0, pytest.param(1, marks=pytest.mark.P2), pytest.param(2, marks=pytest.mark.P2)]
ROBUST = [Krum(2), Bulyan(2), TrimmedMean(2), GeometricMedian()]
WEEKLY = pytest.mark.P2


@cache
def loss(rule: str | Rule, attack: str | None, seed: int) -> float:
    return loss_of(Training(9, attack=attack, seed=seed, outer={"reduce": rule}))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "rule",
    [Krum(2), TrimmedMean(2), *(pytest.param(r, marks=WEEKLY) for r in ROBUST[1::2])],
    ids=str,
)
@pytest.mark.parametrize(
    "attack",
    ["sign flip", *(pytest.param(a, marks=pytest.mark.P2) for a in ("x 1000", "noise"))],
)
class TestAttacks:
    """Sign flips times 4, scaling by 1000, and noise of 40 standard deviations."""

    def test_robust_rules_hold_where_the_mean_fails(self, attack, rule, seed):
        no_attack = loss("mean", None, seed)
        assert loss(rule, attack, seed) < no_attack + 0.15
        assert loss("mean", attack, seed) > no_attack + 1


@pytest.mark.parametrize("seed", SEEDS)
class TestOthers:
    @pytest.mark.P2
    def test_zero_gradient_attack(self, seed):
        """Lazy islands delay the others; only Krum may choose one of them."""
        no_attack = loss("mean", None, seed)
        for rule in ("mean", TrimmedMean(2), GeometricMedian(), NearestNeighbourMixing(2)):
            assert loss(rule, "zeros", seed) < no_attack + 0.2, rule

    def test_nearest_neighbour_mixing_repairs_a_little_is_enough(self, seed):
        no_attack = loss("mean", None, seed)
        assert loss(TrimmedMean(2), ALIE, seed) > no_attack + 0.15, "the attack works"
        assert loss(NearestNeighbourMixing(2), ALIE, seed) < no_attack + 0.1


def test_byzantine_tolerance_limits():
    """f = 2 of n = 9 is within the limits of every rule; f = 4 of 9 is refused by Krum."""
    for rule in (*ROBUST, NearestNeighbourMixing(2)):
        rule.check(9)
    with pytest.raises(ValueError, match=r"Krum \(f=4\) needs at least 11 islands"):
        loss_of(Training(9, steps=0, outer={"reduce": Krum(4)}))
