"""Performance model of a machine: links by mesh dim, matrix products by size, memory, cores."""

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
    """A link: `latency` in seconds per message, `bandwidth` in bytes per second and rank."""

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not _is_number(self.latency, least=0):
            raise ValueError(f"latency of a link must be 0 or more seconds, got {self.latency!r}")
        if not _is_positive(self.bandwidth):
            raise ValueError(f"bandwidth of a link must be above 0 bytes/s, got {self.bandwidth!r}")


Rates = tuple[tuple[int, float], ...]
"""(short side, FLOP/s) points by ascending side; rates between them are interpolated linearly."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Parameters of the cost model for one kind of machine, in seconds, bytes and FLOP.

    name: name for printed plans.
    node_size: number of consecutive global ranks on one node.
    within_node, between_nodes: links between ranks of one node, and of different nodes.
    mesh_dims: links by name of a mesh dim. They are used instead of the two above if all dims of an
        exchange have one.
    matmul: per dtype, the rate of Newton-Schulz on one device by the short side of the matrix.
    memory_bandwidth: bytes/s that elementwise passes read and write.
    tensor_overhead: host seconds per piece of a parameter in each phase, and per piece from which
        a matrix is assembled.
    collective_overhead: host seconds to start one collective.
    step_overhead: host seconds of a step that sends nothing.
    ring_factor: time of all-gathers and all-reduces relative to that of their links. It is above 1
        where ranks share cores, because they wait for each other at every hop of a ring.
    cores: number of ranks per node that can compute at full speed at the same time; exchanges use
        the same cores. None: all ranks can, and exchanges overlap with compute.
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
            raise ValueError(f"name of a topology must be a non-empty string, got {self.name!r}")
        if type(self.node_size) is not int or self.node_size < 1:
            raise ValueError(f"node_size must be an integer of at least 1, got {self.node_size!r}")
        if not _is_positive(self.memory_bandwidth):
            raise ValueError(f"memory_bandwidth must be above 0, got {self.memory_bandwidth!r}")
        for name in ("tensor_overhead", "collective_overhead", "step_overhead"):
            if not _is_number(getattr(self, name), least=0):
                raise ValueError(f"{name} must be 0 or more seconds, got {getattr(self, name)!r}")
        if not _is_positive(self.ring_factor):
            raise ValueError(f"ring_factor must be above 0, got {self.ring_factor!r}")
        if self.cores is not None and not _is_positive(self.cores):
            raise ValueError(f"cores must be above 0, or null, got {self.cores!r}")
        if {"bfloat16", "float32"} - {dtype for dtype, _ in self.matmul}:
            raise ValueError("matmul needs rates for bfloat16 and float32")
        for dtype, rates in self.matmul:
            sides = [side for side, _ in rates]
            if not rates or any(type(side) is not int or side < 1 for side in sides):
                raise ValueError(f"matmul of {dtype} must be a list of [short side, FLOP/s]")
            if sides != sorted(set(sides)) or not all(_is_positive(rate) for _, rate in rates):
                raise ValueError(f"matmul of {dtype}: sides must ascend, rates must be above 0")

    def matmul_seconds(self, flops: float, short: int, dtype: str) -> float:
        """Return the seconds of `flops` on matrices of this short side, on one device."""
        rates = dict(self.matmul)
        return flops / _rate(rates.get(dtype, rates["float32"]), short)

    def memory_seconds(self, nbytes: float) -> float:
        """Return the seconds in which an elementwise pass reads and writes `nbytes` in total."""
        return nbytes / self.memory_bandwidth

    def all_to_all_seconds(
        self,
        mesh: MeshSpec,
        mesh_dims: tuple[str, ...],
        nbytes: float,
        team_size: int | None = None,
    ) -> float:
        """Return the seconds of an all-to-all; the busiest rank sends or receives `nbytes`.

        It is among all ranks along `mesh_dims`, or among teams of `team_size` ranks.

        (p - 1) alpha + n beta, the pairwise exchange (Thakur, Rabenseifner & Gropp 2005,
        "Optimization of collective communication operations in MPICH", IJHPCA 19(1), section
        4.4). Transfers within the node and between nodes overlap, because they use different links.
        """
        links = _links_of_group(self, mesh, mesh_dims, team_size)
        if links.num_peers == 0:
            return 0.0
        latency = links.num_intra * links.intra.latency + links.num_inter * links.inter.latency
        intra_seconds = nbytes * links.num_intra / links.num_peers / links.intra.bandwidth
        inter_seconds = nbytes * links.num_inter / links.num_peers / links.inter.bandwidth
        return latency + max(intra_seconds, inter_seconds)

    def all_gather_seconds(self, mesh: MeshSpec, mesh_dims: tuple[str, ...], nbytes: int) -> float:
        """Return the seconds of a ring all-gather of `nbytes` per rank.

        (p - 1) (alpha + n beta); ibid., 4.1.
        """
        links = _links_of_group(self, mesh, mesh_dims)
        hop_seconds = links.slowest.latency + nbytes / links.slowest.bandwidth
        return self.ring_factor * links.num_peers * hop_seconds

    def all_reduce_seconds(self, mesh: MeshSpec, mesh_dims: tuple[str, ...], nbytes: int) -> float:
        """Return the seconds of a ring all-reduce of `nbytes`.

        2 (p - 1) (alpha + n beta / p); ibid., 4.5.
        """
        links = _links_of_group(self, mesh, mesh_dims)
        transfer_seconds = nbytes / (links.num_peers + 1) / links.slowest.bandwidth
        return self.ring_factor * 2 * links.num_peers * (links.slowest.latency + transfer_seconds)

    def to_json(self) -> str:
        """Return the topology as JSON; `from_json` returns an equal one."""
        return json.dumps({"format": FORMAT, **self.as_values()}, indent=1) + "\n"

    def as_values(self) -> dict[str, Any]:
        """Return the topology as values that JSON can hold."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("within_node", "between_nodes"):
            values[name] = _link_values(values[name])
        values["mesh_dims"] = {name: _link_values(link) for name, link in self.mesh_dims}
        values["matmul"] = {dtype: [list(point) for point in rates] for dtype, rates in self.matmul}
        return values

    @classmethod
    def from_json(cls, text: str) -> "Topology":
        """Inverse of `to_json`. Raises ValueError that names the missing or invalid field."""
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("a topology must be a JSON object")
        if (version := value.pop("format", None)) != FORMAT:
            raise ValueError(f"topology format {version!r}, this package reads {FORMAT}")
        return cls.from_values(value)

    @classmethod
    def from_values(cls, value: Mapping[str, Any]) -> "Topology":
        """Inverse of `as_values`. Raises ValueError that names the missing or invalid field."""
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in value]:
            raise ValueError(f"the topology has no {', '.join(missing)}")
        if unknown := sorted(set(value) - set(names)):
            raise ValueError(f"a topology has no {', '.join(unknown)}; it has {', '.join(names)}")
        for name in ("mesh_dims", "matmul"):
            if not isinstance(value[name], Mapping):
                raise ValueError(f"{name} must be an object, got {value[name]!r}")
        try:
            matmul = tuple(
                (dtype, tuple((side, rate) for side, rate in rates))
                for dtype, rates in value["matmul"].items()
            )
        except (TypeError, ValueError) as error:
            raise ValueError("matmul must map dtypes to lists of [short side, FLOP/s]") from error
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
        raise ValueError(f"{name} must have latency (s) and bandwidth (bytes/s), got {value!r}")
    try:
        return Link(value["latency"], value["bandwidth"])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _rate(rates: Rates, short: int) -> float:
    """Return the interpolated rate at a short side; constant outside of the points."""
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
class _GroupLinks:
    """Links from one rank to its peers in a process group, and the number of peers over each."""

    num_intra: int
    intra: Link
    num_inter: int
    inter: Link

    @property
    def num_peers(self) -> int:
        return self.num_intra + self.num_inter

    @property
    def slowest(self) -> Link:
        return self.inter if self.num_inter else self.intra


@cache
def _links_of_group(
    topology: Topology, mesh: MeshSpec, mesh_dims: tuple[str, ...], team_size: int | None = None
) -> _GroupLinks:
    """Return the links of the rank at position 0 to its peers along these mesh dims."""
    link_of_dim = dict(topology.mesh_dims)
    dims = tuple(name for name in mesh_dims if mesh.sizes[name] > 1)
    peers = mesh.team(0, dims, team_size or mesh.num_ranks_along(dims))
    num_peers = len(peers) - 1
    if dims and all(name in link_of_dim for name in dims):
        links = [link_of_dim[name] for name in dims]
        link = Link(max(x.latency for x in links), min(x.bandwidth for x in links))
        return _GroupLinks(num_peers, link, 0, link)
    node = mesh.ranks[0] // topology.node_size
    ranks = (mesh.ranks[peer] for peer in peers)
    num_intra = sum(rank // topology.node_size == node for rank in ranks) - 1
    return _GroupLinks(
        num_intra, topology.within_node, num_peers - num_intra, topology.between_nodes
    )
