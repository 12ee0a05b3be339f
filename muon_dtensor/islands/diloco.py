"""`DiLoCo`: islands train alone for some steps, then combine their updates.

Note [A round]
    All islands hold the same base values. A round of a fragment, after its inner steps:

        d   = base - param                               the island's update
        d   <- d min(1, clip / |d|) + noise              if asked for
        sent = decode(encode(d + e)),   e <- d + e - sent     error feedback
        u   = rule(sent of all islands)
        v   <- momentum v + u
        base <- base - lr (u + momentum v)               Nesterov's SGD, as torch.optim.SGD
        param <- base

    (Douillard et al. 2023, arXiv:2311.08105, algorithm 1; with Muon as the inner optimizer MuLoCo,
    Thérien et al. 2025, arXiv:2505.23725.) With a delay the last line is applied some steps later,
    and what the island has learned in between stays: param <- base + (param - param when sent).
    Nothing of a round is stored before its exchange has succeeded: after a failed one the next
    update covers the steps of both.
"""

import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from muon_dtensor.errors import CheckpointError
from muon_dtensor.islands.exchange import (
    Combined,
    Exchange,
    Header,
    InFlight,
    Islands,
    MeshIslands,
    OwnIsland,
    check_plans,
    digest_of,
    short_digest,
)
from muon_dtensor.islands.rules import INFINITY, Mean, Median, Rule, rule_of
from muon_dtensor.islands.wires import wire_of
from muon_dtensor.layout import Layout
from muon_dtensor.planning.outer import (
    OuterPlan,
    OuterRoute,
    WireCost,
    best_route,
    fragments_of,
    outer_params,
)
from muon_dtensor.runtime.dtensors import LayoutCache
from muon_dtensor.runtime.process_groups import Groups
from muon_dtensor.runtime.torch_private import local_part, this_rank, with_shard

logger = logging.getLogger("muon_dtensor")

CAN_SPREAD = (Mean, Median)
"""Rules that trust every rank to combine a part for the others."""


@dataclass
class Shard:
    """One parameter on this rank, float32: `base`, outer momentum `velocity`, and error feedback.

    `error`: None without feedback.
    """

    name: str
    param: Tensor
    base: Tensor
    velocity: Tensor
    error: Tensor | None

    @property
    def local(self) -> Tensor:
        """This rank's shard of the parameter."""
        return local_part(self.param).detach()


@dataclass
class Pending:
    """A round in flight: its exchange, the parameters when it was sent, the error that it leaves.

    `work`: the inner steps or tokens of the update. `age`: inner steps since it was sent.
    """

    flight: InFlight
    sent: list[Tensor]
    errors: list[Tensor]
    work: float
    age: int = 0


class DiLoCo:
    """Combines the parameters of islands that train alone in between; see Note [A round].

        optimizer = Muon(group_parameters(model, lr=0.02))
        outer = DiLoCo(optimizer, mesh["island"], sync_every=30)
        ...
        optimizer.step()          # a round runs after every 30th step

    It adds a hook to `optimizer.step`. The inner optimizer keeps its own state. Inside an island
    parameters may have any layout; rank r exchanges with rank r of the other islands. Results are
    bitwise the same on every inner layout, except with a top-k wire.

    All ranks construct it together, with equal parameters on all islands.

    Args:
        optimizer: any optimizer of torch; all its parameters that require gradients now take part.
        islands: a mesh of one dim, `mesh["island"]`, or `torchft.TorchFT` for islands that come and
            go.
        sync_every: inner steps between two rounds of a fragment; or a timedelta, after which an
            island sends what it has done: slower islands then do fewer steps. With a timedelta the
            updates are weighted by their steps, or by `add_tokens`, and there is one fragment.
        lr: of the outer steps.
        momentum: of the outer steps, Nesterov's; 0 for none.
        fragments: parts of the model that are exchanged in turn, each every `sync_every` steps.
        delay: inner steps after which the result of a round is applied. Training goes on meanwhile.
        wire: float32, bfloat16, float16, int8, int4, int2, or topk:RATIO.
        feedback: add what the wire lost to the next update.
        reduce: a rule of `islands.rules`, or its name.
        clip: largest L2 norm of an island's update over the whole fragment; None for no limit.
        noise_multiplier: standard deviation of the Gaussian noise on the sum of the updates,
            divided by `clip`; each island adds its share.
        max_staleness: rounds that an island may have missed so that its own late work still counts
            when it returns, with weight (1 + rounds)^(-1/2) (Xie, Koyejo & Gupta 2019,
            arXiv:1903.03934, section 5.2, polynomial with a = 1/2). Older work is dropped.
        seed: of the noise; None: a secret one of each island. With a known seed anyone can
            subtract the noise, so a number is for tests.
        route: "spread" or "everyone", see `OuterRoute`; None: the one that sends fewer bytes. Rules
            that tolerate wrong updates use "everyone".

    Raises:
        ValueError: an option is out of range, or the rule is not defined for this number of
            islands.
        PlanMismatchError: the islands differ in options or parameters.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        islands: DeviceMesh | Islands,
        *,
        sync_every: int | timedelta = 30,
        lr: float = 0.9,
        momentum: float = 0.8,
        fragments: int = 1,
        delay: int = 0,
        wire: str = "float32",
        feedback: bool = True,
        reduce: str | Rule = "mean",
        clip: float | None = None,
        noise_multiplier: float = 0.0,
        max_staleness: int = 0,
        seed: int | None = None,
        route: str | None = None,
    ) -> None:
        members = MeshIslands(islands) if isinstance(islands, DeviceMesh) else islands
        self._islands = members
        self._rule, self._wire = rule_of(reduce), wire_of(wire)
        self._period = sync_every if isinstance(sync_every, timedelta) else None
        steps = 0 if isinstance(sync_every, timedelta) else sync_every
        _check_options(steps, self._period, lr, momentum, fragments, delay, clip, noise_multiplier)
        if type(max_staleness) is not int or max_staleness < 0:
            raise ValueError(f"max_staleness must be 0 rounds or more, got {max_staleness!r}")
        self._max_staleness = max_staleness
        self._lr, self._momentum, self._delay = lr, momentum, delay
        self._clip, self._noise = clip, noise_multiplier
        uses_feedback = feedback and wire != "float32"
        self._shards = list(_shards(optimizer, uses_feedback=uses_feedback))
        self._cache = LayoutCache()
        self._layouts = [self._layout(shard.param) for shard in self._shards]
        groups = Groups(self._cache.device_meshes, this_rank())
        self._own = OwnIsland(self._layouts, groups)
        self._fragments, self._user_route, self._uses_feedback = fragments, route, uses_feedback
        self._steps = steps
        self._plans: dict[int, OuterPlan] = {}
        self.plan = self._plan()
        options = (lr, momentum, clip, noise_multiplier, seed, max_staleness, str(self._period))
        self._options = str(options)
        if isinstance(members, MeshIslands):
            check_plans(members, f"{self.plan.digest} {self._options}")
        self._seed = self._secret() if seed is None and noise_multiplier else seed
        self._exchanges = [
            Exchange(
                self._islands,
                [self._layouts[i] for i in fragment],
                groups,
                rule=self._rule,
                wire=self._wire,
                route=self.plan.route,
            )
            for fragment in self.plan.fragments
        ]
        self._pending: dict[int, Pending] = {}
        self._num_steps = 0
        self._rounds = [0] * len(self.plan.fragments)
        self._work = [0.0] * len(self.plan.fragments)
        self._tokens = 0.0
        self._counts_tokens = False
        self._started = time.monotonic()
        self._metrics = dict.fromkeys(_METRICS, 0.0)
        members.register(self._heal, self._healing_state)
        optimizer.register_step_post_hook(self._after_step)

    def _secret(self) -> int:
        """Return a random number, equal on all ranks of this island. A collective of them."""
        return int(self._own.maximum(float(secrets.randbits(50)), self._device))

    def _layout(self, param: Tensor) -> Layout:
        """Return the layout of a parameter within its island; plain tensors are local."""
        if isinstance(param, DTensor):
            return self._cache.layout(param)
        mesh = self._cache.plain_mesh
        return Layout(mesh, tuple(param.shape), ((),) * param.ndim)

    def _plan(self) -> OuterPlan:
        """Return the plan for the present number of islands. Raises ValueError."""
        n = self._islands.size
        if n not in self._plans:
            self._rule.check(n)
            self._plans[n] = self._make_plan(n)
            if self._plans[n].warning:
                logger.warning("%s", self._plans[n].warning)
        return self._plans[n]

    def _make_plan(self, n: int) -> OuterPlan:
        cost, route = WireCost.of(self._wire.text), self._user_route
        can_spread = isinstance(self._rule, CAN_SPREAD) and self._wire.is_elementwise
        best = best_route(cost, n, can_spread=can_spread)
        if route not in (None, *OuterRoute):
            raise ValueError(f"route must be None, 'spread' or 'everyone', got {route!r}")
        chosen = best if route is None else OuterRoute(route)
        if chosen is OuterRoute.SPREAD and not can_spread:
            raise ValueError(
                f"route='spread' lets each rank combine a part for all others: {self._rule.text} "
                f"with {self._wire.text} needs route='everyone'"
            )
        names = [shard.name for shard in self._shards]
        params = outer_params(list(zip(names, self._layouts, strict=True)))
        return OuterPlan(
            params,
            n,
            fragments_of(names, self._fragments),
            self._steps,
            self._delay,
            cost,
            chosen,
            self._rule.text,
            self._rule.warning(n),
            copies=2 + self._uses_feedback,
        )

    def add_tokens(self, count: float) -> None:
        """Count tokens of this island since its last round: they weigh its update, not its steps.

        All islands must call it, or none.
        """
        self._tokens += count
        self._counts_tokens = True

    def metrics(self) -> dict[str, float]:
        """Return counts since construction, and figures of the last round. No collective.

        `rounds`: of all fragments. `failed`: of them, those that changed nothing. `accepted`,
        `dropped`: updates of islands. `sent_nbytes`: by this rank. `seconds_waited`: for exchanges.
        `islands`: that took part in the last round. `update_norm`: of the combined update on this
        rank in the last round. `late_accepted`, `late_dropped`: how often this island was away, and
        its late work counted or not.
        """
        return dict(self._metrics)

    def epsilon(self, delta: float = 1e-5) -> float:
        """Return epsilon of (epsilon, delta) differential privacy of one island's data so far.

        By the RDP accountant of Opacus (extra `privacy`): every round of every fragment is a
        Gaussian mechanism in which all islands take part. Infinite without noise.

        Raises ValueError if there is no `clip`.
        """
        if self._clip is None:
            raise ValueError("epsilon needs clip and noise_multiplier")
        num_rounds = sum(self._rounds)
        if self._noise == 0:
            return float("inf") if num_rounds else 0.0
        from opacus.accountants import RDPAccountant  # an extra, rarely needed

        accountant = RDPAccountant()
        accountant.history = [(self._noise, 1.0, num_rounds)] if num_rounds else []
        return float(accountant.get_epsilon(delta)) if num_rounds else 0.0

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        """Count an inner step, apply results that are due, and start a round if one is due."""
        self._num_steps += 1
        work = self._tokens if self._counts_tokens else 1.0
        self._tokens = 0.0
        self._work = [w + work for w in self._work]
        for fragment, pending in sorted(self._pending.items()):
            pending.age += 1
            if pending.age >= self._delay:
                self._finish(fragment)
        fragment_due = self._due()
        if fragment_due is None:
            return
        if fragment_due in self._pending or self._islands.is_elastic:
            self.finish()
        if not self._begin():
            return
        if self._islands.is_elastic:  # it may have loaded the state of another island
            now_due = None if self._period is not None else self.plan.at(self._num_steps)
            fragment_due = fragment_due if now_due is None else now_due
        self._start(fragment_due)
        if self._delay == 0:
            self._finish(fragment_due)

    def _begin(self) -> bool:
        """Begin a round; return False if there is none, equally on all ranks of this island."""
        if not self._islands.is_elastic:
            return True
        problem = ""
        try:
            self._islands.begin()
        except (RuntimeError, TimeoutError) as error:
            problem = str(error)
        if self._own.maximum(float(bool(problem)), self._device):
            self._fail(problem or "another rank of this island found no quorum")
            return False
        try:
            self.plan = self._plan()
        except ValueError as error:
            self._islands.commit(str(error))
            self._fail(str(error))
            return False
        for exchange in self._exchanges:
            exchange.route = self.plan.route
        return True

    def _fail(self, problem: str) -> None:
        self._metrics["rounds"] += 1
        self._metrics["failed"] += 1
        logger.warning("a round of islands failed and changed nothing: %s", problem)

    def _due(self) -> int | None:
        """Return the fragment whose round starts now, or None."""
        if self._period is None:
            return self.plan.at(self._num_steps)
        elapsed = time.monotonic() - self._started >= self._period.total_seconds()
        if not self._own.maximum(float(elapsed), self._device):
            return None
        self._started = time.monotonic()
        return 0

    @property
    def _device(self) -> torch.device:
        return self._shards[0].base.device if self._shards else torch.device("cpu")

    def finish(self) -> None:
        """Apply the results of all rounds in flight now. A collective of all islands."""
        with torch.no_grad():
            for fragment in sorted(self._pending):
                self._finish(fragment)

    def _of(self, fragment: int) -> list[Shard]:
        return [self._shards[i] for i in self.plan.fragments[fragment]]

    def _start(self, fragment: int, sent: list[Tensor] | None = None) -> None:
        """Send the update of a fragment. `sent`: its parameters, the live ones by default."""
        shards = self._of(fragment)
        sent = [shard.local.float().clone() for shard in shards] if sent is None else sent
        updates = [
            shard.base.to(shard.local.dtype).float() - values
            for shard, values in zip(shards, sent, strict=True)
        ]
        self._make_private(fragment, updates)
        for shard, update in zip(shards, updates, strict=True):
            if shard.error is not None:
                update += shard.error
        base = digest_of([shard.base for shard in shards])
        work, self._work[fragment] = self._work[fragment], 0.0
        is_weighted = self._period is not None or self._counts_tokens
        weight = max(work, 1e-9) if is_weighted else 1.0
        plan = short_digest(f"{self.plan.digest} {self._options}")
        header = Header(plan, base, self._rounds[fragment], weight, finite=True)
        flight = self._exchanges[fragment].start(updates, header)
        errors = [a - b for a, b in zip(updates, flight.arrived, strict=True)]
        self._pending[fragment] = Pending(flight, sent, errors, work)

    def _make_private(self, fragment: int, updates: list[Tensor]) -> None:
        """Clip an update to norm `clip` over all its shards, and add this island's noise."""
        if self._clip is None:
            return
        own = self._exchanges[fragment].own
        (largest,) = own.largest([updates])
        if largest == INFINITY:
            return  # not finite: the exchange reports it
        norm = own.gram([updates], [largest])[0][0] ** 0.5
        factor = min(1.0, self._clip / norm) if norm > 0 else 1.0
        for update in updates:
            update *= factor
        scale = self._noise * self._clip / self._islands.size**0.5
        if scale == 0:
            return
        for number, (index, update) in enumerate(
            zip(self.plan.fragments[fragment], updates, strict=True)
        ):
            layout = self._layouts[index]
            home = layout.home(layout.mesh.position_of(this_rank()))
            key = (self._seed, fragment, self._rounds[fragment], number, self._islands.index, home)
            generator = torch.Generator(update.device).manual_seed(short_digest(str(key)))
            noise = torch.randn(update.shape, generator=generator, device=update.device)
            update += scale * noise

    def _finish(self, fragment: int) -> None:
        """Wait for a round, and apply its result."""
        pending = self._pending.pop(fragment)
        before = time.monotonic()
        combined = self._exchanges[fragment].finish(pending.flight)
        self._metrics["seconds_waited"] += time.monotonic() - before
        counts = self._islands.commit(combined.problem)
        self._metrics["sent_nbytes"] += combined.sent_nbytes
        if self._islands.is_elastic and not counts:
            self._work[fragment] += pending.work
            self._fail(combined.problem or "too few islands, or another rank has no result")
            return
        self._rounds[fragment] += 1  # of a mesh also if the rule has no result: all islands agree
        if combined.update is None:
            self._work[fragment] += pending.work
            self._fail(combined.problem)
            return
        self._count(combined, combined.update)
        is_own_finite = combined.finite[self._islands.index]
        shards = self._of(fragment)
        for shard, update, sent, error in zip(
            shards, combined.update, pending.sent, pending.errors, strict=True
        ):
            if shard.error is not None:
                shard.error.copy_(error if is_own_finite else torch.zeros_like(error))
            self._outer_step(shard, update, sent)
            progress = shard.local.float() - sent
            if is_own_finite and pending.age:
                shard.local.copy_(shard.base + progress)
            else:
                shard.local.copy_(shard.base)
        if not is_own_finite:
            logger.warning(
                "the update of this island was not finite: it takes over the result of the others"
            )

    def _outer_step(self, shard: Shard, update: Tensor, sent: Tensor) -> None:
        """Move the base by the combined update, see Note [A round]."""
        is_identity = self._islands.size == 1 and self._lr == 1 and self._momentum == 0
        if is_identity and self._clip is None and self._wire.text == "float32":
            shard.base.copy_(sent)  # base - (base - param) would round
            return
        step = update
        if self._momentum:
            shard.velocity.mul_(self._momentum).add_(update)
            step = update + shard.velocity * self._momentum
        shard.base.sub_(step * self._lr)

    def _count(self, combined: Combined, update: Sequence[Tensor]) -> None:
        metrics = self._metrics
        metrics["rounds"] += 1
        metrics["accepted"] += sum(combined.finite)
        metrics["dropped"] += combined.finite.count(False)
        metrics["islands"] = float(len(combined.finite))
        metrics["update_norm"] = float(sum(u.square().sum() for u in update)) ** 0.5

    def _healing_state(self) -> dict[str, Any]:
        """Return what an island that was away needs: this rank's shards, as plain tensors."""
        return {
            "base": [shard.base.clone() for shard in self._shards],
            "velocity": [shard.velocity.clone() for shard in self._shards],
            "rounds": list(self._rounds),
            "steps": self._num_steps,
        }

    @torch.no_grad()
    def _heal(self, state: Mapping[str, Any]) -> None:
        """Take over the state of another island, and go on from there with late work of its own."""
        staleness = max(a - b for a, b in zip(state["rounds"], self._rounds, strict=True))
        is_late = staleness > 0
        counts = staleness <= self._max_staleness
        factor = (1 + staleness) ** -0.5 if counts else 0.0
        for shard, base, velocity in zip(
            self._shards, state["base"], state["velocity"], strict=True
        ):
            work = shard.local.float() - shard.base.to(shard.local.dtype).float()
            shard.base.copy_(base)
            shard.velocity.copy_(velocity)
            shard.local.copy_(shard.base + factor * work if factor else shard.base)
        self._rounds = list(state["rounds"])
        self._num_steps = state["steps"]
        self._metrics["late_accepted"] += is_late and counts
        self._metrics["late_dropped"] += is_late and not counts

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `torch.distributed.checkpoint`: DTensors placed as the parameters.

        `base` and `velocity` are equal on all islands; `feedback` has the number of this island in
        its keys. A round in flight is saved as the parameters that were sent; after loading it is
        sent again. Checkpoints load on any number of islands: those without saved feedback begin
        without any (`DefaultLoadPlanner(allow_partial_load=True)`).
        """
        island = f"island{self._islands.index}"
        state: dict[str, Any] = {
            "base": self._named([shard.base for shard in self._shards]),
            "velocity": self._named([shard.velocity for shard in self._shards]),
            "counters": {
                "steps": self._num_steps,
                "rounds": list(self._rounds),
                "work": list(self._work),
            },
            "in_flight": {str(f): pending.age for f, pending in sorted(self._pending.items())},
        }
        errors = [shard.error for shard in self._shards]
        if errors and errors[0] is not None:
            state["feedback"] = {island: self._named([e for e in errors if e is not None])}
        sent = {
            self._shards[i].name: with_shard(self._shards[i].param, values)
            for fragment, pending in self._pending.items()
            for i, values in zip(self.plan.fragments[fragment], pending.sent, strict=True)
        }
        if sent:
            state["sent"] = {island: sent}
        return state

    def _named(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        return {
            shard.name: with_shard(shard.param, value)
            for shard, value in zip(self._shards, values, strict=True)
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load `state_dict`, of the same parameters. A collective if a round was in flight.

        Raises CheckpointError if parameters are missing or have other shapes; nothing has changed
        then.
        """
        names = {shard.name for shard in self._shards}
        for key in ("base", "velocity"):
            saved = state_dict.get(key, {})
            if saved.keys() != names:
                differing = sorted(names ^ saved.keys())
                raise CheckpointError(
                    f"'{key}' of the outer state and the optimizer differ in parameters: "
                    f"{differing[:5]}"
                )
            for shard in self._shards:
                if local_part(saved[shard.name]).shape != shard.base.shape:
                    raise CheckpointError(
                        f"'{key}' of {shard.name} has shards of "
                        f"{list(local_part(saved[shard.name]).shape)}, the parameter of "
                        f"{list(shard.base.shape)}. Load with torch.distributed.checkpoint, which "
                        "reshards."
                    )
        island = f"island{self._islands.index}"
        feedback = state_dict.get("feedback", {}).get(island, {})
        for shard in self._shards:
            shard.base.copy_(local_part(state_dict["base"][shard.name]))
            shard.velocity.copy_(local_part(state_dict["velocity"][shard.name]))
            if shard.error is not None:
                error = feedback.get(shard.name)
                shard.error.copy_(0 * shard.error if error is None else local_part(error))
        counters = state_dict["counters"]
        self._num_steps = int(counters["steps"])
        self._rounds = [int(r) for r in counters["rounds"]]
        self._work = [float(w) for w in counters["work"]]
        self._pending.clear()
        sent = state_dict.get("sent", {}).get(island, {})
        for fragment, age in state_dict.get("in_flight", {}).items():
            if not self._begin():
                continue
            shards = self._of(int(fragment))
            values = [local_part(sent[shard.name]).float().clone() for shard in shards]
            self._start(int(fragment), values)
            self._pending[int(fragment)].age = int(age)


_METRICS = (
    *("rounds", "failed", "accepted", "dropped", "sent_nbytes", "seconds_waited", "islands"),
    *("update_norm", "late_accepted", "late_dropped"),
)


def _shards(optimizer: Optimizer, *, uses_feedback: bool) -> Iterator[Shard]:
    """Yield the parameters of an optimizer that require gradients, with new outer state."""
    number = 0
    for group in optimizer.param_groups:
        names = group.get("param_names") or [None] * len(group["params"])
        for name, param in zip(names, group["params"], strict=True):
            number += 1
            if not param.requires_grad:
                continue
            base = local_part(param).detach().float().clone()
            error = torch.zeros_like(base) if uses_feedback else None
            yield Shard(name or f"param.{number - 1}", param, base, torch.zeros_like(base), error)


def _check_options(
    steps: int,
    period: timedelta | None,
    lr: float,
    momentum: float,
    fragments: int,
    delay: int,
    clip: float | None,
    noise_multiplier: float,
) -> None:
    """Raise ValueError if an option of `DiLoCo` is out of range."""

    def require(condition: bool, name: str, what: str, value: object) -> None:
        if not condition:
            raise ValueError(f"{name} must be {what}, got {value!r}")

    if period is None:
        require(type(steps) is int and steps >= 1, "sync_every", "1 step or more", steps)
    else:
        require(period > timedelta(0), "sync_every", "above 0", period)
        require(fragments == 1, "fragments", "1 if sync_every is a timedelta", fragments)
    require(lr > 0, "lr", "above 0", lr)
    require(0 <= momentum < 1, "momentum", "at least 0 and below 1", momentum)
    most = steps if period is None else fragments
    require(
        type(fragments) is int and 1 <= fragments <= most, "fragments", f"1 to {most}", fragments
    )
    longest = steps - 1 if period is None else 10**9
    require(type(delay) is int and 0 <= delay <= longest, "delay", f"0 to {longest} steps", delay)
    require(clip is None or clip > 0, "clip", "above 0 or None", clip)
    require(noise_multiplier >= 0, "noise_multiplier", "at least 0", noise_multiplier)
    require(
        noise_multiplier == 0 or clip is not None, "clip", "set if there is noise_multiplier", clip
    )
