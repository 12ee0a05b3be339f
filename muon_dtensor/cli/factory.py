"""Plans for a model that the user's own code builds and shards, without memory or machines.

The model stands on the meta device, its mesh on a process group that only pretends. Prints
nothing.
"""

import inspect
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from muon_dtensor import Muon, group_parameters
from muon_dtensor.cli.named import named
from muon_dtensor.planning.ir import Plan, PlanOptions
from muon_dtensor.runtime.describe import pretended_ranks

DATA_DIMS = ("dp_replicate", "dp_shard")


def plan_of_factory(path: str, sizes: Mapping[str, int], options: PlanOptions) -> Plan:
    """The plan of what `pkg.mod:fn` returns, as rank 0 of the mesh makes it.

    `fn(mesh)` returns a model that it has sharded over the DeviceMesh, or what `Muon` takes as
    `params`; `fn()` a bare model, to which `fully_shard` is then applied.

    Raises:
        ValueError: no such function; it raises, or returns neither; a bare model on a mesh with
            dims that `fully_shard` does not know.
        PlanError: a parameter that Muon cannot step.
    """
    function = named(path)
    with pretended_ranks(prod(sizes.values())):
        # no device is touched: tensors stay on meta, whatever the mesh says
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        built = _built(path, function, mesh)
        params = group_parameters(built, lr=0.0) if isinstance(built, nn.Module) else built
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
    takes_mesh = bool(inspect.signature(function).parameters)
    others = [name for name in mesh.mesh_dim_names or () if name not in DATA_DIMS]
    if not takes_mesh and others:
        raise ValueError(
            f"{path} takes no mesh, so it cannot use {', '.join(others)}: let it take the "
            "DeviceMesh and return the sharded model, or leave only dp_replicate and dp_shard"
        )
    try:
        with torch.device("meta"):
            built = function(mesh) if takes_mesh else function()
        if not takes_mesh and isinstance(built, nn.Module):
            fully_shard(built, mesh=mesh)
    except Exception as error:
        raise ValueError(f"{path} raised {type(error).__name__}: {error}") from error
    return built
