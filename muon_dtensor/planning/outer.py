"""Plan of the synchronizations between islands: fragments, routes, bytes, seconds.

A pure function of shapes and options, as the plan of a step is.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.planning.render import duration, quantity

HEADER_NBYTES = 64
"""Bytes that every rank sends to its counterparts before each exchange, beside row scales."""

SCALE_NBYTES = 4

FLOAT_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}
INTEGER_BITS = {"int8": 8, "int4": 4, "int2": 2}
"""Bits of an element by the name of a wire."""

TOP_K_CHUNK = 4096
"""Elements among which a top-k wire chooses, as in SparseLoCo (Sarfi, Thérien, Lidin & Belilovsky
2025, arXiv:2508.15706). A value has 4 bytes, and its index in the chunk 2."""


class OuterRoute(StrEnum):
    """How the updates of a fragment are combined over the islands."""

    SPREAD = "spread"
    """Each rank receives 1/n of all updates, combines it, and sends the result to all others."""
    EVERYONE = "everyone"
    """Each rank receives all updates and combines them itself, so that no other rank could send a
    wrong result."""


@dataclass(frozen=True, slots=True)
class OuterParam:
    """One parameter: its name, and the elements and rows of its shard on each rank of an island.

    `numels`, `rows`: one number per rank. A row has one scale on integer wires.
    """

    fqn: str
    numels: tuple[int, ...]
    rows: tuple[int, ...]


class WireCost(NamedTuple):
    """Bytes of a wire format, as `planning` needs them.

    `bits`: of an element; of all other wires, a chunk of `chunk` elements has `chunk_nbytes`.
    `return_bits`: of an element of the result on the route `SPREAD`.
    """

    name: str
    bits: int
    return_bits: int
    has_scales: bool = False
    chunk: int = 0
    chunk_nbytes: int = 0

    def nbytes(self, numel: int) -> int:
        """Return the bytes of a vector, without scales."""
        if self.chunk:
            return -(-numel // self.chunk) * self.chunk_nbytes
        return -(-numel * self.bits // 8)

    @classmethod
    def of(cls, name: str) -> "WireCost":
        """Return the cost of a wire by its name, see `islands.wires.wire_of`. Raises ValueError.

        Integers below 8 bits return results as int8: a mean of few values has more levels.
        """
        if name in FLOAT_BITS:
            return cls(name, FLOAT_BITS[name], FLOAT_BITS[name])
        if name in INTEGER_BITS:
            bits = INTEGER_BITS[name]
            return cls(name, bits, max(bits, 8), has_scales=True)
        match = re.fullmatch(r"topk:([0-9]*\.?[0-9]+(?:e-[0-9]+)?)", name)
        if match and 0 < float(match[1]) <= 1:
            nbytes = 6 * math.ceil(float(match[1]) * TOP_K_CHUNK)
            return cls(name, 0, 0, chunk=TOP_K_CHUNK, chunk_nbytes=nbytes)
        raise ValueError(
            f"wire must be one of {', '.join((*FLOAT_BITS, *INTEGER_BITS))}, or topk:RATIO with a "
            f"ratio above 0 and up to 1; got {name!r}"
        )

    @property
    def part(self) -> int:
        """Elements that are encoded as a whole number of bytes."""
        return max(1, 8 // self.bits) if self.bits else 1


@dataclass(frozen=True)
class OuterPlan:
    """What the islands exchange, and when; equal on all islands.

    `fragments`: indices of the parameters that are exchanged together; fragment k is first sent
    after step `sync_every` (k + 1) / len(fragments). `sync_every`: inner steps between two
    exchanges of a fragment; 0 if a clock decides. `delay`: steps between sending and applying.
    `rule`: its text, and `warning` why it has no guarantee. `copies`: float32 values kept for each
    element: the base, the outer momentum and the error feedback.
    """

    params: tuple[OuterParam, ...]
    islands: int
    fragments: tuple[tuple[int, ...], ...]
    sync_every: int
    delay: int
    wire: WireCost
    route: OuterRoute
    rule: str
    warning: str = ""
    copies: int = 3

    @property
    def ranks(self) -> int:
        """The number of ranks of an island."""
        return len(self.params[0].numels) if self.params else 1

    def numel(self, fragment: int, rank: int) -> int:
        """Return the elements of a fragment on a rank."""
        return sum(self.params[i].numels[rank] for i in self.fragments[fragment])

    def sent_nbytes(self, fragment: int, rank: int) -> int:
        """Return the bytes that a rank sends to its counterparts for a fragment."""
        others, numel = self.islands - 1, self.numel(fragment, rank)
        rows = sum(self.params[i].rows[rank] for i in self.fragments[fragment])
        header = HEADER_NBYTES + SCALE_NBYTES * rows * self.wire.has_scales
        if self.route is OuterRoute.EVERYONE:
            return others * (header + self.wire.nbytes(numel))
        part = padded(numel, self.islands * self.wire.part) // self.islands
        return others * (header + part * (self.wire.bits + self.wire.return_bits) // 8)

    def at(self, step: int) -> int | None:
        """Return the fragment that is sent after this inner step (from 1), or None."""
        count = len(self.fragments)
        for fragment in range(count):
            first = self.sync_every * (fragment + 1) // count
            if step >= first and (step - first) % self.sync_every == 0:
                return fragment
        return None

    @cached_property
    def round_nbytes(self) -> int:
        """Bytes that the busiest rank sends for all fragments once."""
        return max(
            sum(self.sent_nbytes(f, rank) for f in range(len(self.fragments)))
            for rank in range(self.ranks)
        )

    @cached_property
    def island_nbytes(self) -> int:
        """Bytes that all ranks of an island send for all fragments once."""
        return sum(
            self.sent_nbytes(f, rank)
            for rank in range(self.ranks)
            for f in range(len(self.fragments))
        )

    @cached_property
    def every_step_nbytes(self) -> int:
        """Bytes that an island sends in `sync_every` steps if it averages each step's gradients.

        A ring all-reduce in float32: 2 (n - 1) / n times the elements.
        """
        numel = sum(sum(param.numels) for param in self.params)
        return 2 * 4 * numel * (self.islands - 1) * max(1, self.sync_every) // self.islands

    @cached_property
    def state_nbytes(self) -> int:
        """Bytes that a rank keeps, at most: `copies` float32 values of each element."""
        return max(
            4 * self.copies * sum(param.numels[rank] for param in self.params)
            for rank in range(self.ranks)
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the plan in hex: equal digests are equal plans."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def __str__(self) -> str:
        return self.summary()

    def summary(self, link_bits: float | None = None, step_seconds: float | None = None) -> str:
        """Return the plan as text.

        Args:
            link_bits: bits per second that an island can send, for all its ranks together.
            step_seconds: of an inner step.
        """
        when = f"every {self.sync_every} steps" if self.sync_every else "by the clock"
        lines = [
            f"{self.islands} islands of {self.ranks} rank{'s' * (self.ranks > 1)}: {when}, "
            f"{len(self.params)} parameters in {len(self.fragments)} fragment"
            f"{'s' * (len(self.fragments) > 1)}, {self.rule}, {self.wire.name}"
        ]
        if self.warning:
            lines.append(f"warning: {self.warning}")
        if self.wire.chunk:
            lines.append("which elements are sent depends on how the tensors are cut")
        for index, params in enumerate(self.fragments):
            nbytes = sum(self.sent_nbytes(index, rank) for rank in range(self.ranks))
            most = max(self.sent_nbytes(index, rank) for rank in range(self.ranks))
            names = self.params[params[0]].fqn
            if len(params) > 1:
                names += f" and {len(params) - 1} more"
            line = (
                f"fragment {index}  {names}: {_ROUTES[self.route]}: "
                f"{quantity(most, 'B')} a rank, {quantity(nbytes, 'B')} an island"
            )
            if link_bits is not None:
                line += f"; {duration(8 * nbytes / link_bits)} on the link"
                if step_seconds is not None:
                    hidden = self.delay * step_seconds
                    exposed = max(0.0, 8 * nbytes / link_bits - hidden)
                    line += f", {duration(exposed)} of it exposed"
            lines.append(line)
        ratio = self.island_nbytes / self.every_step_nbytes if self.every_step_nbytes else 0.0
        lines.append(
            f"sent {quantity(self.island_nbytes, 'B')} an island in {max(1, self.sync_every)} "
            f"steps; the gradients of every step in float32 are "
            f"{quantity(self.every_step_nbytes, 'B')}: {100 * ratio:.2f} %"
        )
        if link_bits is not None and step_seconds is not None and self.sync_every:
            lines.append(self._share(link_bits, step_seconds))
        lines.append(f"keeps {quantity(self.state_nbytes, 'B')} a rank in addition")
        lines.append(f"digest {self.digest[:16]}")
        return "\n".join(lines)

    def _share(self, link_bits: float, step_seconds: float) -> str:
        """Return a line about the share of time that an island computes."""
        compute = self.sync_every * step_seconds
        exposed = 0.0
        for index in range(len(self.fragments)):
            nbytes = sum(self.sent_nbytes(index, rank) for rank in range(self.ranks))
            exposed += max(0.0, 8 * nbytes / link_bits - self.delay * step_seconds)
        least = 8 * self.island_nbytes / compute
        return (
            f"computes {100 * compute / (compute + exposed):.0f} % of the time; with delay the "
            f"link needs at least {quantity(least, 'bit/s')} an island"
        )


_ROUTES = {
    OuterRoute.SPREAD: "all_to_all, each combines a part, all_gather",
    OuterRoute.EVERYONE: "all_gather, everyone combines",
}


def outer_params(tensors: Sequence[tuple[str, Layout]]) -> tuple[OuterParam, ...]:
    """Return the parameters of a plan from their names and layouts within an island.

    Ranks are those of the largest mesh. On a smaller mesh a parameter is replicated over the other
    dims; one whose mesh has other dims counts as replicated over all ranks.
    """
    meshes = (layout.mesh for _, layout in tensors)
    mesh = max(meshes, key=lambda mesh: mesh.num_ranks, default=MeshSpec((), (), (0,)))
    sizes: dict[Layout, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for _, layout in tensors:
        if layout not in sizes:
            shapes = [layout.region(position).shape for position in _positions(layout, mesh)]
            rows = [math.prod(shape[:-1]) if len(shape) > 1 else 1 for shape in shapes]
            sizes[layout] = tuple(map(math.prod, shapes)), tuple(rows)
    return tuple(OuterParam(name, *sizes[layout]) for name, layout in tensors)


def _positions(layout: Layout, mesh: MeshSpec) -> list[int]:
    """Return the position on the layout's own mesh of each position of a larger mesh."""
    dims = layout.mesh.dim_names
    if not set(dims) <= set(mesh.dim_names):
        return [0] * mesh.num_ranks
    indices = (mesh.index_along(position, dims) for position in range(mesh.num_ranks))
    return [layout.mesh.offset_of(index, dims) for index in indices]


def padded(numel: int, multiple: int) -> int:
    """Return the next multiple."""
    return -(-numel // multiple) * multiple


def best_route(wire: WireCost, islands: int, *, can_spread: bool) -> OuterRoute:
    """Return the route that sends fewer bytes; of equal ones the one with a single exchange."""
    spread = (wire.bits + wire.return_bits) * (islands - 1) / islands
    if can_spread and not wire.chunk and spread < wire.bits * (islands - 1):
        return OuterRoute.SPREAD
    return OuterRoute.EVERYONE


def fragments_of(fqns: Sequence[str], count: int) -> tuple[tuple[int, ...], ...]:
    """Return the indices of parameters in `count` fragments: whole blocks, in turn.

    A block is the parameters with equal names up to and with the first number, as `layers.3.`; all
    others belong to one more block. The n-th block is in fragment n modulo `count`, as in Streaming
    DiLoCo (Douillard et al. 2025, arXiv:2501.18512, section 3.1).

    Raises ValueError if there are fewer blocks than fragments.
    """
    blocks: dict[str, list[int]] = {}
    for index, fqn in enumerate(fqns):
        parts = fqn.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
        block = ".".join(parts[: numbers[0] + 1]) if numbers and count > 1 else ""
        blocks.setdefault(block, []).append(index)
    if len(blocks) < count and (fqns or count > 1):
        raise ValueError(
            f"fragments={count}, but the parameters have {len(blocks)} blocks of layers: use at "
            f"most {len(blocks)}"
        )
    fragments: list[list[int]] = [[] for _ in range(count)]
    for number, indices in enumerate(blocks.values()):
        fragments[number % count] += indices
    return tuple(tuple(sorted(fragment)) for fragment in fragments)
