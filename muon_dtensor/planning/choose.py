"""Which strategy each transport takes: price what is legal, take the cheapest, keep the rest.

Prices by building plans and predicting them. Knows no owners and no buckets.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from muon_dtensor.errors import PlanError, Problem
from muon_dtensor.layout import Matrix, MeshSpec, ParamSpec
from muon_dtensor.planning.buckets import OVER_CAP
from muon_dtensor.planning.ir import Alternative, Gathered, Gram, Local, Plan, PlanOptions, Strategy
from muon_dtensor.planning.predict import orthogonalize_seconds, priced, team_seconds
from muon_dtensor.planning.strategies import kind_of


@dataclass(frozen=True, slots=True)
class Item:
    """One matrix on its way through the planner."""

    param: int
    index: int
    matrix: Matrix


@dataclass(frozen=True)
class Transport:
    """What all matrices of a bucket share. `is_named`: the user names their owners."""

    mesh: MeshSpec
    wire_dtype: str
    strategies: tuple[Strategy, ...]
    is_named: bool


Choice = Mapping[Transport, Strategy]
Build = Callable[[Choice], Plan]
"""The plan of some transports, and of nothing else."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A strategy, what a step of its transport alone takes, and what else was thought of."""

    strategy: Strategy
    seconds: float
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True)
class Choices:
    """A verdict for every transport, and what a step of all of them takes."""

    verdicts: dict[Transport, Verdict]
    seconds: float


def choose(
    params: Sequence[ParamSpec],
    transports: Mapping[Transport, Sequence[Item]],
    options: PlanOptions,
    build: Build,
) -> Choices:
    """A strategy for every transport of one set of ranks.

    Each is priced alone, under the cap; then the mix of the cheapest is compared with plans of one
    strategy throughout, because exchanges of several transports hide behind each other's compute.

    Raises PlanError: a strategy was asked for that some matrices cannot take.
    """
    pricing = _Pricing(params, transports, options, build)
    allowed = {t: pricing.allowed(t) for t in transports}
    if problems := [p for t, found in allowed.items() if not found for p in pricing.cannot(t)]:
        raise PlanError(problems, num_params=len(params))
    prices = {t: pricing.alone(t, found) for t, found in allowed.items()}
    mixes = [{t: _cheapest(found) for t, found in prices.items()}]
    if options.strategy == "auto":
        for kind in dict.fromkeys(kind_of(s) for found in prices.values() for s in found):
            mix = {
                t: _cheapest({s: x for s, x in found.items() if kind_of(s) == kind} or found)
                for t, found in prices.items()
            }
            if mix not in mixes:
                mixes.append(mix)
    seconds = [pricing.together(mix, prices) for mix in mixes]
    best = min(range(len(mixes)), key=seconds.__getitem__)
    return Choices(
        {
            t: Verdict(s, prices[t][s], pricing.others(t, s, prices[t]))
            for t, s in mixes[best].items()
        },
        seconds[best],
    )


def _cheapest(prices: Mapping[Strategy, float]) -> Strategy:
    return min(prices, key=prices.__getitem__)


class _Pricing:
    """Prices of the transports of one set of ranks."""

    def __init__(
        self,
        params: Sequence[ParamSpec],
        transports: Mapping[Transport, Sequence[Item]],
        options: PlanOptions,
        build: Build,
    ) -> None:
        self.params = params
        self.items = transports
        self.options = options
        self.build = build
        self.refused: dict[tuple[Transport, Strategy], Alternative] = {}

    def together(self, mix: Choice, prices: Mapping[Transport, Mapping[Strategy, float]]) -> float:
        """Seconds of a step of all transports."""
        if len(mix) == 1:
            ((transport, strategy),) = mix.items()
            return prices[transport][strategy]
        return self.build(mix).prediction.seconds

    def alone(self, transport: Transport, allowed: Sequence[Strategy]) -> dict[Strategy, float]:
        """Seconds of a step of one transport by each strategy that is worth looking at."""
        prices: dict[Strategy, float] = {}
        held: dict[Strategy, int] = {}
        for strategy in allowed:
            least = self.at_least(transport, strategy)
            if prices and least > min(prices.values()):
                reason = f"{least / min(prices.values()):.1f} times as long for compute alone"
                self.refused[transport, strategy] = Alternative(strategy, None, reason)
                continue
            plan = self.build({transport: strategy})
            prices[strategy] = plan.prediction.seconds
            held[strategy] = max(cost.peak_nbytes for cost in plan.bucket_costs)
        _, leanest = min((isinstance(s, Gram), nbytes) for s, nbytes in held.items())
        limit = max(self.options.bucket_nbytes, OVER_CAP * leanest)
        for strategy, nbytes in held.items():
            if nbytes > limit:
                reason = f"needs {nbytes / limit:.1f} times the buffers that are allowed"
                seconds = prices.pop(strategy)
                self.refused[transport, strategy] = Alternative(strategy, seconds, reason)
        return prices

    def allowed(self, transport: Transport) -> list[Strategy]:
        """What options allow, maybe nothing; of several teams the one that promises most."""
        options, found = self.options, list(transport.strategies)
        if isinstance(found[0], Local):
            return found
        if transport.is_named:
            found = [s for s in found if kind_of(s).startswith("owned")]
        teams = [s for s in found if isinstance(s, Gram)]
        found = [s for s in found if not isinstance(s, Gram)]
        if teams:
            found.append(min(teams, key=lambda s: self.team_estimate(transport, s)))
        if options.strategy == "auto":
            return found
        asked = [s for s in found if kind_of(s) == options.strategy]
        if not asked and options.strategy == "owned_staged":
            # its pieces lie apart along one mesh dim only
            asked = [s for s in found if kind_of(s) == "owned"]
        return asked

    def cannot(self, transport: Transport) -> list[Problem]:
        """Why the parameters of a transport cannot take the strategy that was asked for."""
        word = self.options.strategy
        reason = f"Its matrices cannot be orthogonalized by strategy={word!r}."
        remedy = "Teams need unfolded matrices and a polynomial iteration; leave strategy='auto'."
        if transport.is_named:
            reason = f"Its owner is named, and strategy={word!r} has none."
            remedy = "Leave assign_fn or strategy as they are by default."
        names = dict.fromkeys(item.param for item in self.items[transport])
        return [
            Problem(self.params[i].fqn, str(list(self.params[i].shape)), reason, remedy)
            for i in names
        ]

    def at_least(self, transport: Transport, strategy: Strategy) -> float:
        """Seconds that compute alone takes on the mean rank, if everyone works for himself."""
        if not isinstance(strategy, Gathered):
            return 0.0
        topology, dtype = self.options.topology, transport.wire_dtype

        def price(matrix: Matrix, num_iterations: int) -> float:
            return orthogonalize_seconds(topology, matrix, num_iterations, dtype)

        total = 0.0
        for item, seconds in priced(self.items[transport], self.size_of, price):
            layout = self.params[item.param].layout
            num_homes = len(layout.holders(item.matrix.region))
            total += seconds * num_homes * len(layout.replica_offsets)
        return total / transport.mesh.num_ranks

    def team_estimate(self, transport: Transport, strategy: Gram) -> float:
        """Seconds of compute and rings if teams of this size shared all matrices evenly."""
        mesh, topology = transport.mesh, self.options.topology

        def price(matrix: Matrix, num_iterations: int) -> float:
            return sum(team_seconds(topology, mesh, strategy.team_dims, matrix, num_iterations))

        total = sum(seconds for _, seconds in priced(self.items[transport], self.size_of, price))
        num_teams = mesh.num_ranks_along(
            (*strategy.unshard_dims, *strategy.replica_dims)
        ) // mesh.num_ranks_along(strategy.team_dims)
        count = len(self.items[transport])
        return -(-count // num_teams) / count * total

    def size_of(self, item: Item) -> tuple[Matrix, int]:
        """A matrix and its number of iterations."""
        return item.matrix, self.params[item.param].num_iterations

    def others(
        self, transport: Transport, chosen: Strategy, prices: Mapping[Strategy, float]
    ) -> tuple[Alternative, ...]:
        """What was not taken, and why."""
        found = []
        for strategy, seconds in prices.items():
            if strategy == chosen:
                continue
            ratio = seconds / prices[chosen]
            reason = f"{ratio:.2f} times as long"
            if ratio < 1:
                reason = "slower together with the other matrices"
            found.append(Alternative(strategy, seconds, reason))
        refused = [a for (t, _), a in self.refused.items() if t == transport]
        return (*found, *refused)
