"""Choose the strategy of each group of matrices: predict the legal ones, pick the fastest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from muon_dtensor.layout import MeshSpec
from muon_dtensor.planning.buckets import OVER_CAP
from muon_dtensor.planning.memory import bucket_peak_nbytes
from muon_dtensor.planning.plan import Alternative, Plan, PlanOptions
from muon_dtensor.planning.simulate import simulate
from muon_dtensor.planning.strategies import Distributed, Strategy
from muon_dtensor.planning.traffic import plan_traffic

REQUIRED_GAIN = {"owned_staged": 1.1, "distributed": 1.3}
"""How many times as fast as the others a strategy of this kind must be: a staged exchange sends
more bytes, and a distributed iteration rounds differently."""


@dataclass(frozen=True)
class GroupKey:
    """The key of a group: matrices with equal keys can share buckets.

    `is_named`: the user has named their owners. `is_offloaded`: see `ParamSpec`.
    """

    mesh: MeshSpec
    wire_dtype: str
    strategies: tuple[Strategy, ...]
    is_named: bool
    is_offloaded: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """The strategy of a group, the seconds of a step of this group, and the alternatives."""

    strategy: Strategy
    seconds: float
    alternatives: tuple[Alternative, ...]


Strategies = Mapping[GroupKey, Strategy]
Build = Callable[[Strategies], Plan]
"""Returns the plan of these groups alone."""

Prices = dict[Strategy, float]
"""Predicted seconds of a step of one group alone."""


def search(keys: Sequence[GroupKey], options: PlanOptions, build: Build) -> dict[GroupKey, Choice]:
    """Return the strategy of every group on one set of ranks.

    The planner predicts each strategy of each group alone, under the memory cap. It then compares
    the mix of the fastest strategies with mixes of a single kind, because exchanges of a group
    overlap with compute of the others.
    """
    predictions = {key: _predict(key, options, build) for key in keys}
    mixes = [{key: _fastest(prices) for key, (prices, _) in predictions.items()}]
    kinds = dict.fromkeys(s.kind for prices, _ in predictions.values() for s in prices)
    for kind in kinds if options.strategy == "auto" else ():
        mix = {
            key: _fastest({s: x for s, x in prices.items() if s.kind == kind} or prices)
            for key, (prices, _) in predictions.items()
        }
        if mix not in mixes:
            mixes.append(mix)
    best = mixes[0]
    if len(keys) > 1 and len(mixes) > 1:
        best = min(mixes, key=lambda mix: _weighted_seconds(mix, build))
    return {key: _choice(strategy, *predictions[key]) for key, strategy in best.items()}


def _weighted_seconds(mix: Strategies, build: Build) -> float:
    """Return the seconds of a step of all groups, times the largest gain that any of them needs."""
    seconds, _ = _simulated(build(mix))
    return seconds * max(_required_gain(strategy) for strategy in mix.values())


def _required_gain(strategy: Strategy) -> float:
    return REQUIRED_GAIN.get(strategy.kind, 1.0)


def _predict(
    key: GroupKey, options: PlanOptions, build: Build
) -> tuple[Prices, tuple[Alternative, ...]]:
    """Return the seconds of each strategy that fits the memory cap, and those that do not fit."""
    simulated = {s: _simulated(build({key: s})) for s in _requested(key, options)}
    exact = [n for s, (_, n) in simulated.items() if not isinstance(s, Distributed)]
    min_nbytes = min(exact or [nbytes for _, nbytes in simulated.values()])
    limit = max(options.bucket_nbytes, OVER_CAP * min_nbytes)
    prices: Prices = {}
    too_large = []
    for strategy, (seconds, nbytes) in simulated.items():
        if nbytes <= limit:
            prices[strategy] = seconds
            continue
        reason = f"needs {nbytes / limit:.1f} times the buffers that are allowed"
        too_large.append(Alternative(strategy, seconds, reason))
    return prices, tuple(too_large)


def _requested(key: GroupKey, options: PlanOptions) -> list[Strategy]:
    """Return the legal strategies of the kind that the user requests.

    A matrix that has none is owned: one cut over fewer than two mesh dims cannot be staged.
    """
    if options.strategy == "auto":
        return list(key.strategies)
    same_kind = [s for s in key.strategies if s.kind == options.strategy]
    return same_kind or [s for s in key.strategies if s.kind in ("owned", "local")]


def _fastest(prices: Prices) -> Strategy:
    """Return the fastest strategy; see REQUIRED_GAIN."""
    weighted = {s: x * _required_gain(s) for s, x in prices.items()}
    return min(weighted, key=weighted.__getitem__)


def _choice(strategy: Strategy, prices: Prices, too_large: tuple[Alternative, ...]) -> Choice:
    """Return the choice of a group, with the reason against each alternative."""
    alternatives = []
    for other, seconds in prices.items():
        if other == strategy:
            continue
        ratio = seconds / prices[strategy]
        reason = f"{ratio:.2f} times as long"
        if ratio < 1:
            reason = "slower together with the other matrices"
            if ratio * _required_gain(other) > 1:
                drawback = "sends more bytes" if other.is_staged else "rounds differently"
                reason = f"{ratio:.2f} times as long, and it {drawback}"
        alternatives.append(Alternative(other, seconds, reason))
    return Choice(strategy, prices[strategy], (*alternatives, *too_large))


def _simulated(plan: Plan) -> tuple[float, int]:
    """Return (seconds of a step, the most bytes of buffers that a bucket needs on any rank)."""
    traffics = plan_traffic(plan)
    return simulate(plan, traffics).seconds, max(map(bucket_peak_nbytes, traffics))
