"""The prices of a machine: links by mesh dim, matrix products by size, memory, cores."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from muon_dtensor.layout import MeshSpec

FORMAT = 1
"""Version of the JSON text."""


@dataclass(frozen=True, slots=True)
class Link:
    """What a message costs: `latency` seconds each, then `bandwidth` bytes per second and rank."""

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not _is_number(self.latency, least=0):
            raise ValueError(f"a link's latency is 0 or more seconds, got {self.latency!r}")
        if not _is_positive(self.bandwidth):
            raise ValueError(f"a link's bandwidth is above 0 bytes/s, got {self.bandwidth!r}")


Rates = tuple[tuple[int, float], ...]
"""(short side, FLOP/s) points, sides ascending; between them rates are linear in the side."""


@dataclass(frozen=True, slots=True)
class Topology:
    """One kind of machine, as the cost model knows it. All seconds, bytes and FLOP.

    name: for people.
    node_size: this many consecutive global ranks share a node.
    within_node, between_nodes: the links of ranks on one node, and on two.
    mesh_dims: links that are known by the name of a mesh dim; they come first where all dims of
        an exchange have one.
    matmul: per dtype the rate of Newton-Schulz on one device by the short side of the matrix.
    memory_bandwidth: bytes/s that elementwise passes read and write.
    tensor_overhead: host seconds per piece of a parameter and phase, and per piece of which a
        matrix is put together.
    collective_overhead: host seconds to start one collective.
    step_overhead: host seconds of a step that moves nothing.
    ring_factor: how many times what their links say all-gathers and all-reduces take: ranks that
        share cores wait for each other at every hop of a ring.
    cores: how many ranks of a node compute at full speed together; None: all of them, and
        exchanges run beside compute. A number: ranks share cores, and exchanges need them too.
    """

    name: str
    node_size: int
    within_node: Link
    between_nodes: Link
    matmul: tuple[tuple[str, Rates], ...]
    memory_bandwidth: float
    tensor_overhead: float = 0.0
    collective_overhead: float = 0.0
    step_overhead: float = 0.0
    ring_factor: float = 1.0
    cores: float | None = None
    mesh_dims: tuple[tuple[str, Link], ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name):
            raise ValueError(f"a topology has a name, got {self.name!r}")
        if type(self.node_size) is not int or self.node_size < 1:
            raise ValueError(f"node_size is an integer from 1 on, got {self.node_size!r}")
        if not _is_positive(self.memory_bandwidth):
            raise ValueError(f"memory_bandwidth is above 0, got {self.memory_bandwidth!r}")
        for name in ("tensor_overhead", "collective_overhead", "step_overhead"):
            if not _is_number(getattr(self, name), least=0):
                raise ValueError(f"{name} is 0 or more seconds, got {getattr(self, name)!r}")
        if not _is_positive(self.ring_factor):
            raise ValueError(f"ring_factor is above 0, got {self.ring_factor!r}")
        if self.cores is not None and not _is_positive(self.cores):
            raise ValueError(f"cores is above 0, or null, got {self.cores!r}")
        if {"bfloat16", "float32"} - {dtype for dtype, _ in self.matmul}:
            raise ValueError("matmul needs rates for bfloat16 and float32")
        for dtype, rates in self.matmul:
            sides = [side for side, _ in rates]
            if not rates or any(type(side) is not int or side < 1 for side in sides):
                raise ValueError(f"matmul of {dtype} is a list of [short side, FLOP/s]")
            if sides != sorted(set(sides)) or not all(_is_positive(rate) for _, rate in rates):
                raise ValueError(f"matmul of {dtype}: sides ascend and rates are above 0")

    def matmul_seconds(self, flops: float, short: int, dtype: str) -> float:
        """Seconds of so many FLOP on matrices of this short side, on one device by itself."""
        rates = dict(self.matmul)
        return flops / _rate(rates.get(dtype, rates["float32"]), short)

    def memory_seconds(self, nbytes: float) -> float:
        """Seconds to read and write so many bytes elementwise."""
        return nbytes / self.memory_bandwidth

    def all_to_all_seconds(
        self, mesh: MeshSpec, mesh_dims: tuple[str, ...], nbytes: float
    ) -> float:
        """An all-to-all in which the busiest rank sends or receives so many bytes.

        (p - 1) alpha + n beta, the pairwise exchange (Thakur, Rabenseifner & Gropp 2005,
        "Optimization of collective communication operations in MPICH", IJHPCA 19(1), section
        4.4). Peers on the node and beyond are reached over links of their own at the same time.
        """
        group = _reach(self, mesh, mesh_dims)
        peers = group.num_near + group.num_far
        if peers == 0:
            return 0.0
        latency = group.num_near * group.near.latency + group.num_far * group.far.latency
        near = nbytes * group.num_near / peers / group.near.bandwidth
        far = nbytes * group.num_far / peers / group.far.bandwidth
        return latency + max(near, far)

    def all_gather_seconds(self, mesh: MeshSpec, mesh_dims: tuple[str, ...], nbytes: int) -> float:
        """A ring all-gather of so many bytes per rank: (p - 1) (alpha + n beta); ibid., 4.1."""
        group = _reach(self, mesh, mesh_dims)
        steps = group.num_near + group.num_far
        each = group.slowest.latency + nbytes / group.slowest.bandwidth
        return self.ring_factor * steps * each

    def all_reduce_seconds(self, mesh: MeshSpec, mesh_dims: tuple[str, ...], nbytes: int) -> float:
        """A ring all-reduce of so many bytes: 2 (p - 1) (alpha + n beta / p); ibid., 4.5."""
        group = _reach(self, mesh, mesh_dims)
        steps = group.num_near + group.num_far
        part = nbytes / (steps + 1) / group.slowest.bandwidth
        return self.ring_factor * 2 * steps * (group.slowest.latency + part)

    def to_json(self) -> str:
        """The topology as JSON; `from_json` reads it back to an equal one."""
        return json.dumps({"format": FORMAT, **self.as_values()}, indent=1) + "\n"

    def as_values(self) -> dict[str, Any]:
        """Plain values, as they stand in JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("within_node", "between_nodes"):
            values[name] = _link_values(values[name])
        values["mesh_dims"] = {name: _link_values(link) for name, link in self.mesh_dims}
        values["matmul"] = {dtype: [list(point) for point in rates] for dtype, rates in self.matmul}
        return values

    @classmethod
    def from_json(cls, text: str) -> "Topology":
        """Inverse of `to_json`. Raises ValueError that names what is missing or out of range."""
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("a topology is a JSON object")
        if (version := value.pop("format", None)) != FORMAT:
            raise ValueError(f"topology format {version!r}, this package reads {FORMAT}")
        return cls.from_values(value)

    @classmethod
    def from_values(cls, value: Mapping[str, Any]) -> "Topology":
        """Inverse of `as_values`. Raises ValueError that names what is missing or out of range."""
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in value]:
            raise ValueError(f"the topology has no {', '.join(missing)}")
        if unknown := sorted(set(value) - set(names)):
            raise ValueError(f"a topology has no {', '.join(unknown)}; it has {', '.join(names)}")
        for name in ("mesh_dims", "matmul"):
            if not isinstance(value[name], Mapping):
                raise ValueError(f"{name} is an object, got {value[name]!r}")
        try:
            matmul = tuple(
                (dtype, tuple((side, rate) for side, rate in rates))
                for dtype, rates in value["matmul"].items()
            )
        except (TypeError, ValueError) as error:
            raise ValueError("matmul maps dtypes to lists of [short side, FLOP/s]") from error
        return cls(
            **{
                **value,
                "within_node": _link("within_node", value["within_node"]),
                "between_nodes": _link("between_nodes", value["between_nodes"]),
                "matmul": matmul,
                "mesh_dims": tuple((n, _link(n, v)) for n, v in value["mesh_dims"].items()),
            }
        )


def _is_number(value: object, least: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= least  # type: ignore[arg-type, operator]


def _is_positive(value: object) -> bool:
    return _is_number(value, least=0) and value != 0


def _link_values(link: Link) -> dict[str, float]:
    return {"latency": link.latency, "bandwidth": link.bandwidth}


def _link(name: str, value: Any) -> Link:
    if not isinstance(value, Mapping) or set(value) != {"latency", "bandwidth"}:
        raise ValueError(f"{name} has latency (s) and bandwidth (bytes/s), got {value!r}")
    try:
        return Link(value["latency"], value["bandwidth"])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _rate(rates: Rates, short: int) -> float:
    before = rates[0]
    for point in rates:
        if point[0] >= short:
            if point[0] == before[0]:
                return point[1]
            share = (short - before[0]) / (point[0] - before[0])
            return before[1] + share * (point[1] - before[1])
        before = point
    return before[1]


@dataclass(frozen=True, slots=True)
class _Group:
    """How many peers a rank reaches over which link."""

    num_near: int
    near: Link
    num_far: int
    far: Link

    @property
    def slowest(self) -> Link:
        return self.far if self.num_far else self.near


@cache
def _reach(topology: Topology, mesh: MeshSpec, mesh_dims: tuple[str, ...]) -> _Group:
    """The group of position 0 along these mesh dims, as one of its ranks sees the others."""
    known = dict(topology.mesh_dims)
    moved = tuple(name for name in mesh_dims if mesh.sizes[name] > 1)
    peers = mesh.num_ranks_along(moved) - 1
    if moved and all(name in known for name in moved):
        links = [known[name] for name in moved]
        link = Link(max(x.latency for x in links), min(x.bandwidth for x in links))
        return _Group(peers, link, 0, link)
    node = mesh.ranks[0] // topology.node_size
    ranks = (mesh.ranks[peer] for peer in mesh.peers(0, moved))
    near = sum(rank // topology.node_size == node for rank in ranks) - 1
    return _Group(near, topology.within_node, peers - near, topology.between_nodes)
