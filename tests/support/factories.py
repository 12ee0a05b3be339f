"""Valid and invalid functions for `muon-dtensor plan --model pkg.mod:fn`."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)


class Block(nn.Module):
    """A feed-forward block with a norm."""

    def __init__(self, dim: int = 256) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)


def bare() -> nn.Module:
    """An unsharded model."""
    return nn.Sequential(*(Block() for _ in range(3)))


def sharded(mesh: DeviceMesh) -> nn.Module:
    """The model of `bare` under tensor parallelism and FSDP2, as torchtitan wraps layers."""
    model = bare()
    for block in model:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp_shard"])
    fully_shard(model, mesh=mesh["dp_shard"])
    return model


def groups(mesh: DeviceMesh) -> list[dict[str, Any]]:
    """Param groups with declared fused blocks, instead of a model."""
    model = sharded(mesh)
    matrices = [(n, p) for n, p in model.named_parameters() if p.ndim == 2 and "up" in n]
    return [{"params": matrices, "split_sizes": (512, 512)}]


def huge(mesh: DeviceMesh) -> nn.Module:
    """A terabyte of weights: only the meta device can hold it."""
    model = nn.Sequential(*(nn.Linear(1 << 16, 1 << 16, bias=False) for _ in range(64)))
    fully_shard(model, mesh=mesh)
    return model


def raising(mesh: DeviceMesh) -> nn.Module:
    """Raises with a message of two lines."""
    raise RuntimeError(f"no model\nfor {mesh.size()} ranks")


def exiting(mesh: DeviceMesh) -> nn.Module:
    """Raises SystemExit."""
    raise SystemExit(0)


def without_group(mesh: DeviceMesh) -> nn.Module:
    """Destroys the process group of the mesh."""
    torch.distributed.destroy_process_group()
    return bare()


def unsharded(mesh: DeviceMesh) -> nn.Module:
    """Returns a model that is not sharded over the mesh."""
    return bare()


def wrong_type(mesh: DeviceMesh) -> int:
    """Returns neither a model nor param groups."""
    return mesh.size()


def uneven_heads(mesh: DeviceMesh) -> nn.Module:
    """Raises in torch: a view whose size does not divide."""
    torch.empty(10, device="meta").view(mesh.size(), -1)
    return bare()
