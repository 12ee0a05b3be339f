"""One exchange of updates between islands: encode, send, check, combine.

Rank r of an island exchanges with rank r of the other islands. Within an island ranks only share
maxima and the Gram matrix of a rule, see `islands.rules`.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work
from torch.distributed.device_mesh import DeviceMesh

from muon_dtensor.errors import PlanMismatchError
from muon_dtensor.islands.gram import gram_of, largest_element, limb_products
from muon_dtensor.islands.rules import INFINITY, Matrix, Rule, combine
from muon_dtensor.islands.wires import (
    Integer,
    Wire,
    expanded,
    flat,
    row_maxima,
    rows_and_cols,
    unflattened,
)
from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.planning.outer import HEADER_NBYTES, OuterRoute, WireCost, padded
from muon_dtensor.runtime.collectives import all_gather_values, all_reduce_max, finish
from muon_dtensor.runtime.process_groups import Groups
from muon_dtensor.runtime.torch_private import this_rank, timeout_of
from muon_dtensor.runtime.totals import sharded_sum


class Islands(Protocol):
    """The islands that exchange updates, seen from one rank: its counterparts on all of them.

    `size`: number of islands in this round. `index`: of this island among them. `is_elastic`:
    whether islands come and go, so that a failed exchange is no error.
    """

    is_elastic: bool
    size: int
    index: int

    def begin(self) -> None:
        """Begin a round: find its islands. An island that was away loads the state of another."""

    def commit(self, problem: str) -> bool:
        """End a round: return whether its result counts. `problem`: why this rank has none."""

    def gather(self, received: list[Tensor], sent: Tensor) -> Work:
        """Start an all-gather of tensors of equal size."""

    def exchange(self, received: Tensor, sent: Tensor) -> Work:
        """Start an all-to-all of equal parts."""

    def wait(self, work: Work) -> None:
        """Wait for a collective. Raises RuntimeError if an island does not answer."""

    def register(self, load: Callable[[Any], None], save: Callable[[], Any]) -> None:
        """Name the functions that give an island that was away the state of another one."""


class MeshIslands:
    """The islands along a mesh dim: they neither come nor go."""

    is_elastic = False

    def __init__(self, mesh: DeviceMesh) -> None:
        """`mesh`: of one dim, such as `mesh["island"]`. Raises ValueError for another mesh."""
        if mesh.ndim != 1:
            raise ValueError(
                f"islands lie along one mesh dim, this mesh has {mesh.ndim}: pass mesh['island']"
            )
        self.group: ProcessGroup = mesh.get_group()
        self.size, self.index = mesh.size(), mesh.get_local_rank()

    def begin(self) -> None:
        """See `Islands`."""

    def commit(self, problem: str) -> bool:
        """See `Islands`."""
        return not problem

    def gather(self, received: list[Tensor], sent: Tensor) -> Work:
        """See `Islands`."""
        work: Work | None = dist.all_gather(received, sent, group=self.group, async_op=True)
        assert work is not None, "async_op=True returns a Work"
        return work

    def exchange(self, received: Tensor, sent: Tensor) -> Work:
        """See `Islands`."""
        work: Work | None = dist.all_to_all_single(received, sent, group=self.group, async_op=True)
        assert work is not None, "async_op=True returns a Work"
        return work

    def wait(self, work: Work) -> None:
        """See `Islands`."""
        finish(work, timeout_of(self.group))

    def register(self, load: Callable[[Any], None], save: Callable[[], Any]) -> None:
        """See `Islands`."""


@dataclass(frozen=True)
class Header:
    """What each rank tells its counterparts in an exchange.

    `plan`: digest of the outer plan. `base`: digest of the values to which updates refer. `number`:
    of the round. `weight`: of the island, above 0. `finite`: whether its update is.
    """

    plan: int
    base: int
    number: int
    weight: float
    finite: bool

    def encoded(self, device: torch.device) -> Tensor:
        """Return uint8 [HEADER_NBYTES]."""
        numbers = torch.zeros(HEADER_NBYTES // 8, dtype=torch.int64)
        numbers[:3] = torch.tensor([self.plan, self.base, self.number])
        numbers[3:4] = torch.tensor([self.weight], dtype=torch.float64).view(torch.int64)
        numbers[4] = int(self.finite)
        return numbers.view(torch.uint8).to(device)

    @classmethod
    def decoded(cls, codes: Tensor) -> "Header":
        """Inverse of `encoded`."""
        numbers = codes.cpu().clone().view(torch.int64)
        weight = float(numbers[3:4].view(torch.float64))
        plan, base, number, _, finite, *_ = numbers.tolist()
        return cls(plan, base, number, weight, bool(finite))


def short_digest(text: str) -> int:
    """Return the first 62 bits of the SHA-256 of a text."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) >> 2


def digest_of(tensors: Sequence[Tensor]) -> int:
    """Return a digest of the bits of float32 tensors: sums of their integers, two weightings."""
    total = 0
    for number, tensor in enumerate(tensors, 1):
        bits = tensor.contiguous().view(torch.int32).reshape(-1).to(torch.int64)
        places = torch.arange(1, len(bits) + 1, device=bits.device) * number
        total += int(bits.sum()) * 31 + int((bits * places).sum())
    return total % (1 << 62)


@dataclass
class InFlight:
    """An exchange that has started.

    `arrived`: this rank's own update as the others decode it, in the shapes of the tensors.
    `sent_nbytes`: to other ranks so far.
    """

    header: Header
    tensors: list[Tensor]
    arrived: list[Tensor]
    messages: list[Tensor]
    payloads: list[Tensor]
    works: list[Work] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    sent_nbytes: int = 0
    headers: list[Tensor] = field(default_factory=list)
    problem: str = ""


@dataclass(frozen=True)
class Combined:
    """The result of an exchange. `update`: None if the rule could not combine the updates.

    `finite`: per island, whether its update is. `problem`: why there is no update.
    """

    update: list[Tensor] | None
    finite: list[bool]
    sent_nbytes: int
    problem: str = ""


class OwnIsland:
    """Reductions over the ranks of this island, of tensors with these layouts.

    Collectives of all its ranks. The results are equal on all of them, and on every layout.
    """

    def __init__(self, layouts: Sequence[Layout], groups: Groups) -> None:
        self.layouts, self._groups, self._rank = list(layouts), groups, this_rank()

    def maximum(self, value: float, device: torch.device) -> float:
        """Return the largest value of any rank; 0 without tensors."""
        number = torch.tensor(value, dtype=torch.float64, device=device)
        return float(self._reduced([number] * len(self.layouts), take_largest=True))

    def largest(self, updates: Sequence[Sequence[Tensor]]) -> list[float]:
        """Return the `largest_element` of each update, over all its tensors and shards."""
        if not self.layouts:
            return [0.0] * len(updates)
        values = [
            torch.stack([largest_element(t) for t in tensors])
            for tensors in zip(*updates, strict=True)
        ]
        numbers: list[float] = self._reduced(values, take_largest=True).tolist()
        return numbers

    def gram(self, updates: Sequence[Sequence[Tensor]], largest: Sequence[float]) -> Matrix:
        """Return the inner products of updates, [n, n]. `largest`: see `gram.limb_products`."""
        if not self.layouts:
            return [[0.0] * len(updates) for _ in updates]
        sums = [limb_products(tensors, largest) for tensors in zip(*updates, strict=True)]
        return gram_of(self._reduced(sums), largest)

    def _reduced(self, values: Sequence[Tensor], *, take_largest: bool = False) -> Tensor:
        pairs = list(zip(self.layouts, values, strict=True))
        return sharded_sum(pairs, self._groups, self._rank, take_largest=take_largest)


CHECKS = {
    "plan": "follow another outer plan",
    "number": "are in another round",
    "base": "hold other base values, or were sent other values in an earlier round",
}
"""By field of the header, what an island does where its value differs."""


class Exchange:
    """Combines tensors over the islands, for tensors of fixed shapes and layouts.

    All ranks of an island, and their counterparts, call `start` and `finish` in the same order.
    """

    def __init__(
        self,
        islands: Islands,
        layouts: Sequence[Layout],
        groups: Groups,
        *,
        rule: Rule,
        wire: Wire,
        route: OuterRoute,
        checks: Mapping[str, str] | None = None,
        checks_sizes: bool = False,
    ) -> None:
        """`layouts`: of each tensor within the island. `groups`: their process groups. `checks`: by
        field of the header, what an island does where its value differs. `checks_sizes`: compare
        headers before anything else is sent, since sizes may differ.
        """
        self._islands, self.own, self._groups = islands, OwnIsland(layouts, groups), groups
        self._rule, self._wire, self.route = rule, wire, route
        self._checks = CHECKS if checks is None else checks
        self._checks_sizes = checks_sizes
        self._cost = WireCost.of(wire.text)
        self._returns: Wire = wire
        if isinstance(wire, Integer) and wire.bits != self._cost.return_bits:
            self._returns = Integer(self._cost.return_bits)
        self._cut_rows: dict[tuple[MeshSpec, tuple[str, ...]], list[int]] = {}
        for index, layout in enumerate(layouts):
            dims = [d for d in layout.cuts[-1] if layout.mesh.sizes[d] > 1] if layout.cuts else []
            if dims and wire.needs_scales:
                self._cut_rows.setdefault((layout.mesh, tuple(dims)), []).append(index)

    def start(self, tensors: Sequence[Tensor], header: Header) -> InFlight:
        """Send an update: float32 shards, one per layout. `header.finite` is set here.

        The update is not finite if any shard on any rank of the island is not, as others decode it:
        float16 has a largest value.
        """
        scales = self._scales(tensors) if self._wire.needs_scales else []
        vector, scale_of = flat(tensors), self._expanded(scales, tensors)
        if self.route is OuterRoute.SPREAD:
            multiple = self._islands.size * self._cost.part
            vector = _pad(vector, multiple)
            scale_of = None if scale_of is None else _pad(scale_of, multiple, 1.0)
        codes = self._wire.encode(vector, scale_of)
        numel = sum(t.numel() for t in tensors)
        own = self._wire.decode(codes, len(vector), scale_of)[:numel]
        not_finite = self.own.maximum(float(not own.isfinite().all()), vector.device)
        header = replace(header, finite=not not_finite)
        parts = [header.encoded(vector.device), *(scale.view(torch.uint8) for scale in scales)]
        flight = InFlight(header, list(tensors), unflattened(own, tensors), [], [])
        if self._checks_sizes:
            self._gather(parts.pop(0), flight.headers, flight)
            self._wait(flight)
            self._check([Header.decoded(message) for message in flight.headers])
        self._gather(torch.cat(parts or [vector[:0].view(torch.uint8)]), flight.messages, flight)
        if self.route is OuterRoute.SPREAD:
            self._exchange(codes, flight)
        else:
            self._gather(codes, flight.payloads, flight)
        return flight

    def finish(self, flight: InFlight) -> Combined:
        """Wait for an exchange, and combine the updates.

        Raises PlanMismatchError if islands differ in plan, base or round, on all of them.
        """
        if problem := self._problem(flight):
            return Combined(None, [], flight.sent_nbytes, problem)
        headers = [Header.decoded(m[:HEADER_NBYTES]) for m in flight.headers or flight.messages]
        self._check(headers)
        start = 0 if flight.headers else HEADER_NBYTES
        scales = [self._split_scales(m[start:], flight.tensors) for m in flight.messages]
        if self.route is OuterRoute.SPREAD:
            return self._finish_spread(flight, headers, scales)
        numel = sum(t.numel() for t in flight.tensors)
        updates = [
            unflattened(
                self._wire.decode(codes, numel, self._expanded(scale, flight.tensors)),
                flight.tensors,
            )
            for codes, scale in zip(flight.payloads, scales, strict=True)
        ]
        largest = self.own.largest(updates)
        finite = [
            header.finite and value < INFINITY
            for header, value in zip(headers, largest, strict=True)
        ]
        gram = None
        if self._rule.needs_gram:
            pairs = zip(largest, finite, strict=True)
            limits = [value if is_finite else 0.0 for value, is_finite in pairs]
            gram = self.own.gram(updates, limits)
        return self._combined(flight, headers, finite, updates, gram)

    def _finish_spread(
        self, flight: InFlight, headers: list[Header], scales: list[list[Tensor]]
    ) -> Combined:
        n, index = self._islands.size, self._islands.index
        finite = [header.finite for header in headers]
        multiple = n * self._cost.part
        numel = sum(t.numel() for t in flight.tensors)
        length = padded(numel, multiple) // n
        part = slice(index * length, (index + 1) * length)
        scales_of: list[Tensor | None] = []
        for scale in scales:
            whole = self._expanded(scale, flight.tensors)
            scales_of.append(None if whole is None else _pad(whole, multiple, 1.0))
        updates = [
            [self._wire.decode(codes, length, None if scale is None else scale[part])]
            for codes, scale in zip(flight.payloads, scales_of, strict=True)
        ]
        combined = self._combined(flight, headers, finite, updates, None)
        if combined.update is None:
            return combined
        largest = None
        bounds = [s for s, is_finite in zip(scales_of, finite, strict=True) if is_finite]
        if bounds and bounds[0] is not None:  # no combination of the islands is larger
            largest = torch.stack([s for s in bounds if s is not None]).amax(0)
        codes = self._returns.encode(combined.update[0], None if largest is None else largest[part])
        results: list[Tensor] = []
        self._gather(codes, results, flight)
        if problem := self._problem(flight):
            return Combined(None, finite, flight.sent_nbytes, problem)
        vector = self._returns.decode(torch.cat(results), n * length, largest)[:numel]
        update = unflattened(vector, flight.tensors)
        return Combined(update, finite, flight.sent_nbytes)

    def _combined(
        self,
        flight: InFlight,
        headers: list[Header],
        finite: list[bool],
        updates: list[list[Tensor]],
        gram: Matrix | None,
    ) -> Combined:
        weights = [header.weight for header in headers]
        try:
            update = combine(self._rule, updates, gram=gram, weights=weights, finite=finite)
        except ValueError as error:
            return Combined(None, finite, flight.sent_nbytes, str(error))
        return Combined(update, finite, flight.sent_nbytes)

    def _check(self, headers: list[Header]) -> None:
        """Raise PlanMismatchError if the headers of the islands differ."""
        for name, what in self._checks.items():
            values = [getattr(header, name) for header in headers]
            most = max(values, key=lambda value: (values.count(value), -values.index(value)))
            if differing := [i for i, value in enumerate(values) if value != most]:
                raise PlanMismatchError(
                    f"Islands {differing} of {len(headers)} {what} than the majority. Nothing was "
                    "changed. Give all islands equal options, and load one checkpoint on all."
                )

    def _scales(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the largest element of each row, over all ranks that hold a part of the row."""
        scales = [row_maxima(t).nan_to_num(nan=INFINITY, posinf=INFINITY) for t in tensors]
        for (mesh, dims), indices in self._cut_rows.items():
            together = self._groups.on_device(mesh, torch.cat([scales[i] for i in indices]))
            all_reduce_max(together, self._groups.over(mesh, dims))
            parts = torch.split(together, [len(scales[i]) for i in indices])
            for index, part in zip(indices, parts, strict=True):
                scales[index] = part.to(scales[index].device, copy=True)
        return scales

    def _split_scales(self, codes: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        if not self._wire.needs_scales:
            return []
        scales = codes.clone().view(torch.float32)
        return list(torch.split(scales, [rows_and_cols(t)[0] for t in tensors]))

    def _expanded(self, scales: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor | None:
        return expanded(scales, tensors) if self._wire.needs_scales else None

    def _gather(self, codes: Tensor, target: list[Tensor], flight: InFlight) -> None:
        """Start an all-gather over the islands of bytes of one length."""
        n = self._islands.size
        received = torch.empty(n * len(codes), dtype=torch.uint8, device=codes.device)
        target += received.view(n, -1).unbind() if len(codes) else [received] * n
        if not len(codes):
            return
        self._begin(flight, lambda: self._islands.gather(list(target), codes))
        flight.buffers += [codes, received]
        flight.sent_nbytes += (n - 1) * len(codes)

    def _exchange(self, codes: Tensor, flight: InFlight) -> None:
        """Start an exchange in which each island gets an equal part of the bytes."""
        n = self._islands.size
        received = torch.empty_like(codes)
        flight.payloads += received.view(n, -1).unbind() if len(codes) else [received] * n
        if not len(codes):
            return
        self._begin(flight, lambda: self._islands.exchange(received, codes))
        flight.buffers += [codes, received]
        flight.sent_nbytes += (n - 1) * (len(codes) // n)

    def _begin(self, flight: InFlight, issue: Callable[[], Work]) -> None:
        """Start a collective; between islands that come and go an error ends the round only."""
        if not self._islands.is_elastic:
            flight.works.append(issue())
        elif not flight.problem:
            try:
                flight.works.append(issue())
            except RuntimeError as error:
                flight.problem = str(error)

    def _wait(self, flight: InFlight) -> None:
        for work in flight.works:
            self._islands.wait(work)
        flight.works.clear()
        flight.buffers.clear()

    def _problem(self, flight: InFlight) -> str:
        """Wait for the exchange, and return why it failed, equally on all ranks of this island."""
        if not self._islands.is_elastic:
            self._wait(flight)
            return ""
        if not flight.problem:
            try:
                self._wait(flight)
            except RuntimeError as error:
                flight.problem = str(error)
        device = flight.tensors[0].device if flight.tensors else torch.device("cpu")
        if self.own.maximum(float(bool(flight.problem)), device):
            return flight.problem or "another rank of this island could not exchange its update"
        return ""


def check_plans(islands: MeshIslands, digest: str) -> None:
    """Raise PlanMismatchError on all islands if their outer plans differ. A collective."""
    digests = all_gather_values(digest, islands.group)
    if differing := [i for i, other in enumerate(digests) if other != digests[0]]:
        raise PlanMismatchError(
            f"Islands {differing} of {islands.size} have another outer plan than island 0: "
            "construct DiLoCo with the same options, and with models of the same names, shapes "
            "and placements. print(outer.plan) shows the plan."
        )


def _pad(vector: Tensor, multiple: int, value: float = 0.0) -> Tensor:
    return torch.nn.functional.pad(vector, (0, -len(vector) % multiple), value=value)
