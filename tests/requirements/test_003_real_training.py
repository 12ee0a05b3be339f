"""003, "Convergence Validation Tests" and "Full Integration Tests": islands on real text."""

import math
from datetime import timedelta

import pytest
import torch

from muon_dtensor.islands import Bulyan, Krum, MultiKrum, TrimmedMean
from tests.support.text_islands import Training, loss_of, train
from tests.support.threads import run_threads

pytestmark = pytest.mark.P0
SHORT = {"islands": 4, "steps": 64, "sync_every": 8}
UNTRAINED = math.log(103)


class TestRealTraining:
    def test_adaptive_vs_fixed_staleness_homogeneous(self):
        """Equal islands: a clock gives what a fixed number of steps gives."""
        fixed = loss_of(Training(**SHORT))
        adaptive = loss_of(Training(**SHORT, speeds=(1.0,) * 4))  # weighted by their work
        assert fixed < UNTRAINED - 2
        assert adaptive == pytest.approx(fixed, rel=1e-4)

    @pytest.mark.P1
    def test_adaptive_vs_fixed_staleness_heterogeneous(self):
        """Islands that do 100, 90, 60 and 50 % of the steps: within 2 % of equal ones."""
        speeds = (1.0, 0.9, 0.6, 0.5)
        equal = loss_of(Training(steps=240, sync_every=15, speeds=(0.8,) * 4))
        uneven = loss_of(Training(steps=240, sync_every=15, speeds=speeds))
        assert uneven == pytest.approx(equal, rel=0.02)

    @pytest.mark.parametrize("rule", [Krum(1), MultiKrum(1), Bulyan(1)], ids=str)
    def test_rules_vs_mean_clean_workers(self, rule):
        """With honest islands robust rules learn nearly what the mean does."""
        options = {"islands": 5, "steps": 48, "sync_every": 8}
        mean = loss_of(Training(**options))
        assert loss_of(Training(**options, outer={"reduce": rule})) < mean + 0.15

    def test_topk_compression_preserves_gradients(self):
        """A tenth of the elements learns; test_wires checks that they arrive exactly."""
        outer = {"wire": "topk:0.13", "momentum": 0.0, "lr": 1.0}
        assert loss_of(Training(**SHORT, outer=outer)) < UNTRAINED - 1.5


class TestFullIntegration:
    def test_full_feature_integration(self):
        """Uneven islands, a robust rule, a compressed wire, clipping, noise and delay together."""
        outer = {
            "reduce": TrimmedMean(1),
            "wire": "int8",
            "clip": 3.0,
            "noise_multiplier": 1e-3,
            "delay": 2,
        }
        training = Training(5, 64, 8, outer, speeds=(1.0, 1.0, 0.8, 0.6, 0.5))
        results = run_threads(5, train, training)
        for loss, metrics in results:
            assert loss < UNTRAINED - 1.5
            assert metrics["rounds"] == 8
            assert metrics["accepted"] == 40, "every contribution is accepted"
            assert metrics["failed"] == metrics["dropped"] == 0

    @pytest.mark.parametrize("rule", ["mean", "median", TrimmedMean(1), Krum(1)], ids=str)
    def test_feature_interactions(self, rule):
        outer = {"reduce": rule, "wire": "int4", "clip": 2.0}
        loss = loss_of(Training(5, 32, 8, outer))
        assert loss < UNTRAINED - 1

    def test_empty_gradient_buffer(self):
        """Islands that contribute nothing: no error, and nothing changes."""
        loss, metrics = run_threads(3, train, Training(3, 8, 8, speeds=(0.0,) * 3))[0]
        start = run_threads(3, train, Training(3, 0, 8))[0][0]
        assert loss == start
        assert metrics["rounds"] == 1
        assert metrics["update_norm"] == 0

    @pytest.mark.parametrize(
        "rule",
        ["mean", "median", "geometric_median", TrimmedMean(1), Krum(1), Bulyan(1)],
        ids=str,
    )
    def test_single_worker(self, rule):
        """One island under every rule is that island, with outer steps."""
        expected = loss_of(Training(1, 16, 8))
        assert loss_of(Training(1, 16, 8, {"reduce": rule})) == expected


class TestLossAtEqualTokens:
    """K = 4 islands, against one island alone and the gradients of every step."""

    @pytest.mark.P1
    @pytest.mark.parametrize(
        "sync_every",
        [15, *(pytest.param(h, marks=pytest.mark.P2) for h in (5, 30))],
    )
    def test_between_alone_and_every_step_and_ahead_of_adamw_inside(self, sync_every):
        training = {"steps": 240}
        every_step = loss_of(Training(**training, outer="every step"))
        alone = loss_of(Training(1, **training, outer=None))
        muloco = loss_of(Training(**training, sync_every=sync_every))
        assert every_step < muloco < alone
        assert muloco < loss_of(Training(**training, sync_every=sync_every, inner="adamw"))

    @pytest.mark.P1
    @pytest.mark.parametrize(
        "wire",
        ["int2", *(pytest.param(w, marks=pytest.mark.P2) for w in ("bfloat16", "int8", "int4"))],
    )
    def test_wires_lose_less_than_2_percent(self, wire):
        training = {"steps": 240, "sync_every": 15}
        exact = loss_of(Training(**training))
        assert loss_of(Training(**training, outer={"wire": wire})) < 1.02 * exact


class TestAsyncCoordinator:
    def test_submission_does_not_block(self):
        """With a delay a round is in flight while the island trains; its result comes later."""
        results = run_threads(2, train, Training(2, 24, 8, {"delay": 4}))
        for loss, metrics in results:
            assert metrics["rounds"] == 3
            assert loss < UNTRAINED - 1

    def test_statistics(self):
        _, metrics = run_threads(2, train, Training(2, 16, 8))[0]
        assert metrics["rounds"] == 2
        assert metrics["accepted"] == 4
        assert metrics["sent_nbytes"] > 0
        assert metrics["seconds_waited"] >= 0
        assert metrics["late_accepted"] == metrics["late_dropped"] == 0

    def test_a_clock_is_an_option(self):
        torch.manual_seed(0)
        results = run_threads(2, train, Training(2, 30, timedelta(hours=1)))
        assert all(metrics["rounds"] == 0 for _, metrics in results)
