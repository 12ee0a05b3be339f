"""Shared by the benchmarks: tensors that are equal on all ranks, and provenance of results."""

import platform
import subprocess
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, distribute_tensor


def seeded(shapes: list[tuple[int, ...]], seed: int) -> list[Tensor]:
    """Return random tensors, equal on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def layered(layers: int, dim: int) -> list[tuple[int, ...]]:
    """Return the shapes of the benchmark workload: {qkv, proj, fc, out} per layer."""
    return [(3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim)] * layers


def parameters(
    shapes: list[tuple[int, ...]], mesh: DeviceMesh, placements: Sequence[Placement]
) -> list[nn.Parameter]:
    """Return sharded parameters with gradients. Values do not depend on the mesh."""

    def placed(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

    params = [nn.Parameter(placed(w)) for w in seeded(shapes, 0)]
    for param, grad in zip(params, seeded(shapes, 1), strict=True):
        param.grad = placed(grad)
    return params


def commit() -> str:
    """Return the commit of this checkout."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def provenance() -> dict[str, str]:
    """Return commit, torch version and processor."""
    return {
        "commit": commit(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
