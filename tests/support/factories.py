"""What users hand to `muon-dtensor plan --model pkg.mod:fn`, right and wrong."""

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
    """A model that nobody has sharded."""
    return nn.Sequential(*(Block() for _ in range(3)))


def sharded(mesh: DeviceMesh) -> nn.Module:
    """The same under tensor parallelism and FSDP2, as torchtitan wraps layers."""
    model = bare()
    for block in model:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp_shard"])
    fully_shard(model, mesh=mesh["dp_shard"])
    return model


def groups(mesh: DeviceMesh) -> list[dict[str, Any]]:
    """Param groups instead of a model: fused blocks declared."""
    model = sharded(mesh)
    matrices = [(n, p) for n, p in model.named_parameters() if p.ndim == 2 and "up" in n]
    return [{"params": matrices, "split_sizes": (512, 512)}]


def huge(mesh: DeviceMesh) -> nn.Module:
    """A terabyte of weights: only the meta device can hold it."""
    model = nn.Sequential(*(nn.Linear(1 << 16, 1 << 16, bias=False) for _ in range(64)))
    fully_shard(model, mesh=mesh)
    return model


def raising(mesh: DeviceMesh) -> nn.Module:
    """Fails, over two lines."""
    raise RuntimeError(f"no model\nfor {mesh.size()} ranks")


def leaving(mesh: DeviceMesh) -> nn.Module:
    """Ends the process."""
    raise SystemExit(0)


def without_group(mesh: DeviceMesh) -> nn.Module:
    """Takes the ground away."""
    torch.distributed.destroy_process_group()
    return bare()


def unsharded(mesh: DeviceMesh) -> nn.Module:
    """Forgets the mesh."""
    return bare()


def nothing(mesh: DeviceMesh) -> int:
    """Neither a model nor parameters."""
    return mesh.size()


def uneven_heads(mesh: DeviceMesh) -> nn.Module:
    """What torch itself refuses: a view that does not divide."""
    torch.empty(10, device="meta").view(mesh.size(), -1)
    return bare()
