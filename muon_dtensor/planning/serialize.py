"""A plan as JSON for programs, and as a digest for ranks to compare.

Equal plans, equal text. What it reads back, it checks.
"""

import hashlib
import json
from typing import Any

from muon_dtensor.layout import Layout, Matrix, MeshSpec, ParamSpec, Region
from muon_dtensor.matrices import matrices_of
from muon_dtensor.planning.check import check
from muon_dtensor.planning.ir import (
    Action,
    AllToAll,
    Assignment,
    Bucket,
    Local,
    Owned,
    Plan,
    PlanOptions,
    Route,
    Strategy,
)

NOT_A_PLAN = (
    *(KeyError, IndexError, TypeError, AttributeError, AssertionError),
    *(RecursionError, OverflowError),
)

FORMAT = 1
"""Version of the JSON text; part of the digest, so ranks with different formats disagree."""


def to_json(plan: Plan) -> str:
    """The plan as JSON with sorted keys and no spaces: equal plans, equal text."""
    meshes = list(plan.meshes)
    mesh_index = {id(mesh): index for index, mesh in enumerate(meshes)}

    def index_of(mesh: MeshSpec) -> int:
        known = mesh_index.get(id(mesh))
        if known is None:
            known = mesh_index[id(mesh)] = meshes.index(mesh)
        return known

    return json.dumps(
        {
            "format": FORMAT,
            "options": {name: getattr(plan.options, name) for name in PlanOptions.__slots__},
            "meshes": [
                {"dims": list(m.dim_names), "shape": list(m.shape), "ranks": list(m.ranks)}
                for m in meshes
            ],
            "params": [_param_to_json(s, index_of(s.layout.mesh)) for s in plan.params],
            "buckets": [_bucket_to_json(b, index_of(b.mesh)) for b in plan.buckets],
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
    if spec.layout.bounds is not None:
        value["bounds"] = [list(ends) for ends in spec.layout.bounds]
    if len(spec.shape) not in (2, 3) or spec.matrices != matrices_of(spec.shape):
        value["matrices"] = [
            [list(m.region.start), list(m.region.stop), m.rows, m.cols, m.pattern, list(m.axes)]
            for m in spec.matrices
        ]
    return value


def _bucket_to_json(bucket: Bucket, mesh: int) -> dict[str, Any]:
    match bucket.strategy:
        case Local():
            strategy: dict[str, Any] = {"kind": "local"}
        case Owned(unshard_dims=apart, replica_dims=same, hops=hops):
            strategy = {"kind": "owned", "unshard": apart, "replicas": same, "hops": hops}
    return {
        "mesh": mesh,
        "strategy": strategy,
        "wire_dtype": bucket.wire_dtype,
        "assignments": [[a.param, a.matrix, a.owner] for a in bucket.assignments],
        "unshard": [[list(c.mesh_dims), c.route.value] for c in bucket.unshard],
        "reshard": [[list(c.mesh_dims), c.route.value] for c in bucket.reshard],
    }


def from_json(text: str) -> Plan:
    """Inverse of `to_json`. Raises ValueError for what is no plan, or breaks `check`."""
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
        plan = Plan(
            params=tuple(_param_from_json(p, meshes, layouts, count) for p in value["params"]),
            buckets=tuple(_bucket_from_json(b, meshes) for b in value["buckets"]),
            schedule=tuple(Action.parse(token) for token in value["schedule"].split()),
            options=PlanOptions(**value["options"]),
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
            Matrix(Region(tuple(start), tuple(stop)), rows, cols, pattern, tuple(map(tuple, axes)))
            for start, stop, rows, cols, pattern, axes in value["matrices"]
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
    )


def _bucket_from_json(value: dict[str, Any], meshes: list[MeshSpec]) -> Bucket:
    kind = value["strategy"]["kind"]
    if kind == "local":
        strategy: Strategy = Local()
    elif kind == "owned":
        s = value["strategy"]
        strategy = Owned(tuple(s["unshard"]), tuple(s["replicas"]), s["hops"])
    else:
        raise ValueError(f"unknown strategy {kind!r} in the JSON text of a plan")
    unshard, reshard = (
        tuple(AllToAll(tuple(dims), Route(route)) for dims, route in value[phase])
        for phase in ("unshard", "reshard")
    )
    return Bucket(
        _mesh_at(meshes, value["mesh"]),
        strategy,
        value["wire_dtype"],
        tuple(Assignment(*triple) for triple in value["assignments"]),
        unshard,
        reshard,
    )


def digest(plan: Plan) -> str:
    """SHA-256 of `to_json`, in hex."""
    return hashlib.sha256(to_json(plan).encode()).hexdigest()
