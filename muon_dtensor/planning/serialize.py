"""A plan as JSON for programs, and its digest for ranks to compare.

Equal plans have equal text. `from_json` checks the plan that it reads.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from muon_dtensor.layout import Layout, Matrix, MeshSpec, Region
from muon_dtensor.layout.matrices import matrices_of
from muon_dtensor.layout.region import IndexSet
from muon_dtensor.planning.check import check
from muon_dtensor.planning.plan import (
    Action,
    Alternative,
    Assignment,
    Bucket,
    ParamSpec,
    Plan,
    PlanOptions,
)
from muon_dtensor.planning.strategies import STRATEGY_CLASSES, Collective, Strategy
from muon_dtensor.planning.topology import Topology

NOT_A_PLAN = (
    *(KeyError, IndexError, TypeError, AttributeError, AssertionError),
    *(RecursionError, OverflowError),
)

FORMAT = 4
"""Version of the JSON text. It is part of the digest, so digests of different formats differ."""


def to_json(plan: Plan) -> str:
    """Return the plan as JSON with sorted keys and no spaces; equal plans have equal text."""
    meshes = list(plan.meshes)
    mesh_index = {mesh: index for index, mesh in enumerate(meshes)}

    return json.dumps(
        {
            "format": FORMAT,
            "options": {
                **{name: getattr(plan.options, name) for name in PlanOptions.__slots__},
                "topology": plan.options.topology.as_values(),
            },
            "meshes": [
                {"dims": list(m.dim_names), "shape": list(m.shape), "ranks": list(m.ranks)}
                for m in meshes
            ],
            "params": [_param_to_json(s, mesh_index[s.layout.mesh]) for s in plan.params],
            "buckets": [_bucket_to_json(b, mesh_index[b.mesh]) for b in plan.buckets],
            "schedule": " ".join(map(str, plan.schedule)),
        },
        sort_keys=True,
        separators=(",", ":"),
    )


def _param_to_json(spec: ParamSpec, mesh: int) -> dict[str, Any]:
    value: dict[str, Any] = {
        "fqn": spec.fqn,
        "mesh": mesh,
        "shape": list(spec.shape),
        "cuts": [list(dims) for dims in spec.layout.cuts],
        "dtype": spec.dtype,
        "num_iterations": spec.num_iterations,
        "wire_dtype": spec.wire_dtype,
    }
    if not spec.can_distribute:
        value["can_distribute"] = False
    if spec.shards_momentum:
        value["shards_momentum"] = True
    if spec.is_offloaded:
        value["is_offloaded"] = True
    if spec.moment_cuts is not None:
        value["moment_cuts"] = list(spec.moment_cuts)
    if spec.layout.bounds is not None:
        value["bounds"] = [list(ends) for ends in spec.layout.bounds]
    if len(spec.shape) not in (2, 3) or spec.matrices != matrices_of(spec.shape):
        value["matrices"] = [
            [
                *(list(end) for end in (m.region.start, m.region.stop)),
                *(m.rows, m.cols, m.pattern, list(m.axes)),
                *_index_sets_to_json(m.region),
            ]
            for m in spec.matrices
        ]
    return value


def _bucket_to_json(bucket: Bucket, mesh: int) -> dict[str, Any]:
    return {
        "mesh": mesh,
        "strategy": _strategy_to_json(bucket.strategy),
        "seconds": bucket.seconds,
        "alternatives": [
            [_strategy_to_json(a.strategy), a.seconds, a.reason] for a in bucket.alternatives
        ],
        "wire_dtype": bucket.wire_dtype,
        "assignments": [_assignment_to_json(a) for a in bucket.assignments],
        "unshard": _collectives_to_json(bucket.unshard),
        "reshard": _collectives_to_json(bucket.reshard),
    }


def _assignment_to_json(a: Assignment) -> list[Any]:
    if a.slab is None:
        return [a.param, a.matrix, a.owner]
    ends = (list(end) for end in (a.slab.start, a.slab.stop))
    return [a.param, a.matrix, a.owner, *ends, *_index_sets_to_json(a.slab)]


def _assignment_from_json(value: list[Any]) -> Assignment:
    param, matrix, owner, *slab = value
    return Assignment(param, matrix, owner, _region_from_json(*slab) if slab else None)


def _index_sets_to_json(region: Region) -> list[Any]:
    """Return a list of one value, or an empty one if the region has no index sets."""
    if not region.index_sets:
        return []
    return [[[s.first, [list(a) for a in s.axes]] if s else None for s in region.index_sets]]


def _region_from_json(start: list[int], stop: list[int], *index_sets: Any) -> Region:
    sets = tuple(
        IndexSet(value[0], tuple((length, stride) for length, stride in value[1]))
        if value
        else None
        for value in (index_sets[0] if index_sets else ())
    )
    return Region(tuple(start), tuple(stop), sets)


def _collectives_to_json(collectives: tuple[Collective, ...]) -> list[list[Any]]:
    return [[type(c).__name__, list(c.mesh_dims), c.route.value] for c in collectives]


def _strategy_to_json(strategy: Strategy) -> dict[str, Any]:
    values = {field.name: getattr(strategy, field.name) for field in fields(strategy)}
    return {"kind": type(strategy).__name__.lower(), **values}


def _strategy_from_json(value: dict[str, Any]) -> Strategy:
    kinds: dict[str, Callable[..., Strategy]] = {
        kind.__name__.lower(): kind for kind in STRATEGY_CLASSES
    }
    if not isinstance(value["kind"], str) or value["kind"] not in kinds:
        raise ValueError(f"unknown strategy {value['kind']!r} in the JSON text of a plan")
    values = {k: tuple(v) if k.endswith("_dims") else v for k, v in value.items() if k != "kind"}
    for name, field in values.items():
        if name.startswith(("is_", "shares_")) and type(field) is not bool:
            raise ValueError(f"{name} of a strategy must be true or false, got {field!r}")
        if name.endswith("_dims") and not all(isinstance(dim, str) for dim in field):
            raise ValueError(f"{name} of a strategy must be names of mesh dims, got {field!r}")
        if name in ("hops", "team_size") and type(field) is not int:
            raise ValueError(f"{name} of a strategy must be an integer, got {field!r}")
    return kinds[value["kind"]](**values)


def from_json(text: str) -> Plan:
    """Inverse of `to_json`. Raises ValueError if the text is not a plan or `check` rejects it."""
    try:
        value = json.loads(text)
        if type(value["format"]) is not int or value["format"] != FORMAT:
            raise ValueError(f"plan format {value['format']}, this package reads {FORMAT}")
        meshes = [
            MeshSpec(tuple(m["dims"]), tuple(m["shape"]), tuple(m["ranks"]))
            for m in value["meshes"]
        ]
        layouts: dict[tuple[Any, ...], Layout] = {}
        count = sum(len(bucket["assignments"]) for bucket in value["buckets"])
        options = {**value["options"]}
        options["topology"] = Topology.from_values(options["topology"])
        plan = Plan(
            params=tuple(_param_from_json(p, meshes, layouts, count) for p in value["params"]),
            buckets=tuple(_bucket_from_json(b, meshes) for b in value["buckets"]),
            schedule=tuple(Action.parse(token) for token in value["schedule"].split()),
            options=PlanOptions(**options),
        )
        check(plan)
    except NOT_A_PLAN as error:
        raise ValueError(f"not the JSON text of a plan: {error!r}") from error
    return plan


def _mesh_at(meshes: list[MeshSpec], index: Any) -> MeshSpec:
    if type(index) is not int or not 0 <= index < len(meshes):
        raise ValueError(f"there is no mesh {index!r} in this plan")
    return meshes[index]


def _param_from_json(
    value: dict[str, Any],
    meshes: list[MeshSpec],
    layouts: dict[tuple[Any, ...], Layout],
    num_matrices: int,
) -> ParamSpec:
    shape, cuts = tuple(value["shape"]), tuple(tuple(dims) for dims in value["cuts"])
    bounds = tuple(map(tuple, value["bounds"])) if "bounds" in value else None
    key = (value["mesh"], shape, cuts, bounds)
    layout = layouts.setdefault(key, Layout(_mesh_at(meshes, value["mesh"]), shape, cuts, bounds))
    if "matrices" not in value and len(shape) == 3 and 0 not in shape and shape[0] > num_matrices:
        raise ValueError(f"{shape[0]} matrices in one parameter, {num_matrices} in the plan")
    matrices = (
        tuple(
            Matrix(
                _region_from_json(start, stop, *index_sets),
                *(rows, cols, pattern, tuple(map(tuple, axes))),
            )
            for start, stop, rows, cols, pattern, axes, *index_sets in value["matrices"]
        )
        if "matrices" in value
        else matrices_of(shape)
    )
    return ParamSpec(
        value["fqn"],
        layout,
        value["dtype"],
        matrices,
        value["num_iterations"],
        value["wire_dtype"],
        tuple(value["moment_cuts"]) if "moment_cuts" in value else None,
        value.get("can_distribute", True),
        value.get("shards_momentum", False),
        value.get("is_offloaded", False),
    )


def _bucket_from_json(value: dict[str, Any], meshes: list[MeshSpec]) -> Bucket:
    bucket = Bucket(
        _mesh_at(meshes, value["mesh"]),
        _strategy_from_json(value["strategy"]),
        value["wire_dtype"],
        tuple(map(_assignment_from_json, value["assignments"])),
        _seconds(value["seconds"]),
        tuple(
            Alternative(_strategy_from_json(strategy), _seconds(seconds), str(reason))
            for strategy, seconds, reason in value["alternatives"]
        ),
    )
    for phase in ("unshard", "reshard"):
        if value[phase] != _collectives_to_json(getattr(bucket, phase)):
            raise ValueError(
                f"{phase} collectives {value[phase]} are not those of {bucket.strategy}"
            )
    return bucket


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise ValueError(f"seconds must be a finite number of at least 0, got {value!r}")
    return float(value)


def digest(plan: Plan) -> str:
    """Return the SHA-256 of `to_json`, in hex."""
    return hashlib.sha256(to_json(plan).encode()).hexdigest()
