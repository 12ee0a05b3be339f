"""Which strategy each group of matrices takes: price the legal ones, take the fastest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from muon_dtensor.layout import MeshSpec
from muon_dtensor.planning.buckets import OVER_CAP
from muon_dtensor.planning.memory import bucket_peak_nbytes
from muon_dtensor.planning.plan import Alternative, Plan, PlanOptions
from muon_dtensor.planning.simulate import simulate
from muon_dtensor.planning.strategies import Strategy
from muon_dtensor.planning.traffic import plan_traffic

STAGED_GAIN = 1.1
"""How much faster than a direct exchange a staged one must be: it sends more bytes."""


@dataclass(frozen=True)
class GroupKey:
    """What the matrices of one group have in common: they can travel in the same buckets.

    `is_named`: the user names their owners.
    """

    mesh: MeshSpec
    wire_dtype: str
    strategies: tuple[Strategy, ...]
    is_named: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """A strategy, the seconds of a step of its group alone, and the other legal strategies."""

    strategy: Strategy
    seconds: float
    alternatives: tuple[Alternative, ...]


Strategies = Mapping[GroupKey, Strategy]
Build = Callable[[Strategies], Plan]
"""The plan of some groups, and of nothing else."""

Prices = dict[Strategy, float]
"""Seconds of a step of one group alone."""


def search(keys: Sequence[GroupKey], options: PlanOptions, build: Build) -> dict[GroupKey, Choice]:
    """A strategy for every group on one set of ranks.

    Each is priced alone, under the cap. The mix of the fastest is then compared with plans of one
    kind throughout, because exchanges of several groups hide behind each other's compute.
    """
    prices = {key: _prices(key, options, build) for key in keys}
    mixes = [{key: _fastest(found) for key, (found, _) in prices.items()}]
    kinds = dict.fromkeys(s.kind for found, _ in prices.values() for s in found)
    for kind in kinds if options.strategy == "auto" else ():
        mix = {
            key: _fastest({s: x for s, x in found.items() if s.kind == kind} or found)
            for key, (found, _) in prices.items()
        }
        if mix not in mixes:
            mixes.append(mix)
    best = mixes[0]
    if len(keys) > 1 and len(mixes) > 1:
        best = min(mixes, key=lambda mix: _handicapped(mix, build))
    return {key: _choice(strategy, *prices[key]) for key, strategy in best.items()}


def _handicapped(mix: Strategies, build: Build) -> float:
    """Seconds of a step of all groups; STAGED_GAIN times as many if any of them is staged."""
    seconds, _ = _simulated(build(mix))
    return seconds * (STAGED_GAIN if any(s.is_staged for s in mix.values()) else 1.0)


def _prices(
    key: GroupKey, options: PlanOptions, build: Build
) -> tuple[Prices, tuple[Alternative, ...]]:
    """Seconds by each strategy that fits into memory, and the strategies that do not."""
    simulated = {s: _simulated(build({key: s})) for s in _requested(key, options)}
    leanest = min(nbytes for _, nbytes in simulated.values())
    limit = max(options.bucket_nbytes, OVER_CAP * leanest)
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
    """The legal strategies of the kind that the user requests.

    Where a matrix cannot be staged, for its pieces lie apart along one mesh dim only, or along
    none, it is owned.
    """
    if options.strategy == "auto":
        return list(key.strategies)
    same_kind = [s for s in key.strategies if s.kind == options.strategy]
    return same_kind or [s for s in key.strategies if not s.is_staged]


def _fastest(prices: Prices) -> Strategy:
    """A staged strategy only where it is STAGED_GAIN times as fast as every direct one."""
    handicap = {s: x * STAGED_GAIN if s.is_staged else x for s, x in prices.items()}
    return min(handicap, key=handicap.__getitem__)


def _choice(strategy: Strategy, prices: Prices, too_large: tuple[Alternative, ...]) -> Choice:
    """The chosen strategy of a group, with the reason against each other one."""
    others = []
    for other, seconds in prices.items():
        if other == strategy:
            continue
        ratio = seconds / prices[strategy]
        reason = f"{ratio:.2f} times as long"
        if ratio < 1:
            reason = "slower together with the other matrices"
            if other.is_staged and ratio * STAGED_GAIN > 1:
                reason = f"{ratio:.2f} times as long, and it sends more bytes"
        others.append(Alternative(other, seconds, reason))
    return Choice(strategy, prices[strategy], (*others, *too_large))


def _simulated(plan: Plan) -> tuple[float, int]:
    """(seconds of a step, bytes of the fullest bucket on any rank)."""
    traffics = plan_traffic(plan)
    return simulate(plan, traffics).seconds, max(map(bucket_peak_nbytes, traffics))
