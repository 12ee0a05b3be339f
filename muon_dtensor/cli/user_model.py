"""Plans a model that the user's code builds and shards, on the meta device."""

import inspect
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from muon_dtensor import Muon, group_parameters
from muon_dtensor.cli.load_object import named
from muon_dtensor.planning.plan import PlanOptions
from muon_dtensor.planning.report import PlanReport
from muon_dtensor.runtime.torch_private import pretended_ranks

FSDP_MESHES = (("dp_shard",), ("dp_replicate", "dp_shard"))
"""Mesh dims of `fully_shard`, which goes by their places."""


def plan_of_factory(path: str, sizes: Mapping[str, int], options: PlanOptions) -> PlanReport:
    """The plan of what `pkg.mod:fn` returns, as rank 0 of the mesh makes it.

    `fn(mesh)` returns a model that it has sharded over the DeviceMesh, or what `Muon` takes as
    `params`; `fn()`, or one whose arguments all have defaults, a bare model, to which
    `fully_shard` is then applied.

    Raises:
        ValueError: no such function; it raises, or returns neither; its model is not sharded; a
            bare model on a mesh that `fully_shard` does not know.
        PlanError: a parameter that Muon cannot step.
    """
    function = named(path)
    with pretended_ranks(prod(sizes.values())):
        # no device is touched: tensors stay on meta, whatever the mesh says
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        built = _built(path, function, mesh)
        params: Any = built
        if isinstance(built, nn.Module):
            if mesh.size() > 1 and not any(isinstance(p, DTensor) for p in built.parameters()):
                raise ValueError(f"{path} returns a model that is not sharded over its mesh")
            params = group_parameters(built, lr=0.0)
        try:
            optimizer = Muon(
                params,
                bucket_mb=options.bucket_nbytes / 2**20,
                batched=options.batched,
                strategy=options.strategy,
                exact=options.exact,
                topology=options.topology,
                prefetch_count=options.prefetch_count,
            )
        except TypeError as error:
            raise ValueError(f"{path} returns {type(built).__name__}: {error}") from error
        return optimizer.plan


def _built(path: str, function: Any, mesh: DeviceMesh) -> Any:
    takes_mesh = any(
        p.default is p.empty and p.kind is not p.VAR_KEYWORD
        for p in inspect.signature(function).parameters.values()
    )
    if not takes_mesh and mesh.mesh_dim_names not in FSDP_MESHES:
        raise ValueError(
            f"{path} takes no mesh, so fully_shard gets it: that knows dp_shard, alone or after "
            f"dp_replicate, and not {', '.join(mesh.mesh_dim_names or ())}. Let it take the "
            "DeviceMesh and return the sharded model"
        )
    try:
        with torch.device("meta"):
            built = function(mesh) if takes_mesh else function()
        if not takes_mesh and isinstance(built, nn.Module):
            fully_shard(built, mesh=mesh)
    except (Exception, SystemExit) as error:  # whatever the user's code does
        raise ValueError(f"{path} raised {type(error).__name__}: {error}") from error
    if not dist.is_initialized():
        raise ValueError(f"{path} destroyed the process group that its mesh lives on")
    return built
