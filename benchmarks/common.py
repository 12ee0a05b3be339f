"""What benchmarks share: tensors that all ranks draw alike, and where figures were taken."""

import platform
import subprocess

import torch
from torch import Tensor


def seeded(shapes: list[tuple[int, ...]], seed: int) -> list[Tensor]:
    """The same tensors on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def commit() -> str:
    """The commit of this checkout."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def provenance() -> dict[str, str]:
    """Commit, torch and processor."""
    return {
        "commit": commit(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
