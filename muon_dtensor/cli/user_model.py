"""Plans a model that a user's function builds and shards on the meta device."""

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
from muon_dtensor.cli.load_object import load_function
from muon_dtensor.planning.plan import PlanOptions
from muon_dtensor.planning.report import PlanReport
from muon_dtensor.runtime.torch_private import fake_process_group

FSDP_MESHES = (("dp_shard",), ("dp_replicate", "dp_shard"))
"""Meshes that `fully_shard` accepts; it reads mesh dims by position, not by name."""


def plan_of_factory(
    path: str,
    sizes: Mapping[str, int],
    options: PlanOptions,
    *,
    shard_momentum: bool = False,
    recognize: bool | str = False,
) -> PlanReport:
    """Return the plan for the model or param groups of `pkg.mod:fn`, built as rank 0 of the mesh.

    A function with required arguments is called as `fn(mesh)`. It returns a model sharded over the
    DeviceMesh, or a value for `Muon`'s `params`. A function without required arguments is called
    as `fn()` and returns an unsharded model, to which `fully_shard` is applied.

    Raises:
        ValueError: no such function; the function raises or returns neither; its model is not
            sharded; an unsharded model on a mesh that `fully_shard` does not accept.
        PlanError: a parameter that Muon cannot step.
    """
    function = load_function(path)
    with fake_process_group(prod(sizes.values())):
        # the mesh is on the CPU but the tensors are on meta: no memory is allocated
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        built = _built(path, function, mesh)
        params: Any = built
        if isinstance(built, nn.Module):
            if mesh.size() > 1 and not any(isinstance(p, DTensor) for p in built.parameters()):
                raise ValueError(f"{path} returns a model that is not sharded over its mesh")
            params = group_parameters(built, lr=0.0, recognize=recognize)
        try:
            optimizer = Muon(
                params,
                bucket_mb=options.bucket_nbytes / 2**20,
                batched=options.batched,
                strategy=options.strategy,
                exact=options.exact,
                topology=options.topology,
                prefetch_count=options.prefetch_count,
                shard_momentum=shard_momentum,
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
            f"{path} takes no mesh, so fully_shard shards its model. fully_shard accepts "
            "dp_shard=N or dp_replicate=M,dp_shard=N, not "
            f"{', '.join(mesh.mesh_dim_names or ())}. Let the function take the DeviceMesh and "
            "return the sharded model"
        )
    try:
        with torch.device("meta"):
            built = function(mesh) if takes_mesh else function()
        if not takes_mesh and isinstance(built, nn.Module):
            fully_shard(built, mesh=mesh)
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        raise ValueError(f"{path} raised {type(error).__name__}: {error}") from error
    if not dist.is_initialized():
        raise ValueError(f"{path} destroyed the process group of its mesh")
    return built
