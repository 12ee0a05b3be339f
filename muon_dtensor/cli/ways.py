"""The ways of working of today's packages, as plans of ours. Models; runs none of them."""

from collections.abc import Sequence
from dataclasses import replace

from muon_dtensor.layout import Layout, MeshSpec, ParamSpec
from muon_dtensor.planning.ir import Plan, PlanOptions
from muon_dtensor.planning.planner import plan_update

WAYS = ("naive", "1d-owner", "ours")


def planned(way: str, specs: Sequence[ParamSpec], options: PlanOptions) -> Plan:
    """The plan of one way of working.

    naive: everyone gathers and orthogonalizes everything, as `full_tensor()` in each rank's loop
    does. 1d-owner: an owner for each matrix among the ranks that hold one copy of it, and every
    replica does the same again, as optimizers of one 1-D mesh do (microsoft/dion, torchtitan's
    DistMuon); of a matrix that several mesh dims cut they refuse most, and the model is kind: it
    takes those dims for one. ours: the plan.

    Raises ValueError for another way.
    """
    match way:
        case "naive":
            return plan_update(specs, replace(options, strategy="gathered", exact=True))
        case "1d-owner":
            alone = {layout: _one_replica(layout) for layout in {s.layout for s in specs}}
            inner = [replace(spec, layout=alone[spec.layout]) for spec in specs]
            return plan_update(inner, replace(options, strategy="owned", exact=True))
        case "ours":
            return plan_update(specs, options)
        case _:
            raise ValueError(f"--compare takes {', '.join(WAYS)}, got {way!r}")


def _one_replica(layout: Layout) -> Layout:
    """The same on the ranks of the first replica alone."""
    mesh, dropped = layout.mesh, layout.replica_dims
    kept = tuple(name for name in mesh.dim_names if name not in dropped)
    ranks = tuple(rank for p, rank in enumerate(mesh.ranks) if mesh.index_along(p, dropped) == 0)
    inner = MeshSpec(kept, tuple(mesh.sizes[name] for name in kept), ranks)
    return replace(layout, mesh=inner)
