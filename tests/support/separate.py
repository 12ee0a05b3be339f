"""Oracle of matrix declarations: torch.optim.Muon on each declared matrix stored separately."""

from collections.abc import Sequence
from typing import Any

import einops
import torch
from torch import Tensor, nn


def split_matrices(full: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """Return the declared matrices. Uses einops and torch.split, not the code under test."""
    sizes, split_dim = options.get("split_sizes"), options.get("split_dim", 0)
    patterns = options.get("matrix")
    if not isinstance(patterns, tuple):
        patterns = (patterns,) * len(sizes or (1,))
    axes = options.get("matrix_axes") or {}
    if isinstance(split_dim, str):  # bring that axis to the front, and split it
        left = patterns[0].split(" -> ")[0]
        names = left.replace("(", "").replace(")", "").split()
        others = " ".join(name for name in names if name != split_dim)
        lengths = {split_dim: sum(sizes), **axes}
        unfolded = einops.rearrange(full, f"{left} -> {split_dim} {others}", **lengths)
        axes = {name: size for name, size in axes.items() if name != split_dim}
        blocks = unfolded.split(list(sizes))
        patterns = [f"{split_dim} {others} -> {p.split(' -> ')[1]}" for p in patterns]
    else:
        blocks = [full] if sizes is None else full.split(list(sizes), split_dim)
    matrices: list[Tensor] = []
    for block, pattern in zip(blocks, patterns, strict=True):
        result = block
        if pattern is not None:
            sizes_in_pattern = {n: size for n, size in axes.items() if n in pattern}
            result = einops.rearrange(block, pattern, **sizes_in_pattern)
        matrices += result.reshape(-1, *result.shape[-2:]).unbind()
    return [matrix.contiguous() for matrix in matrices]


class Separate:
    """torch.optim.Muon on every declared matrix of a parameter, stored separately."""

    def __init__(self, full: Tensor, options: dict[str, Any], **muon: Any) -> None:
        self.shape, self.options = full.shape, options
        self.matrices = [nn.Parameter(m.clone()) for m in split_matrices(full, options)]
        self.optimizer = torch.optim.Muon(self.matrices, **muon)
        # index in the parameter of every element of a matrix
        indices = torch.arange(full.numel()).view(full.shape)
        self.indices = [n.flatten() for n in split_matrices(indices, options)]

    def step(self, grad: Tensor) -> None:
        for matrix, part in zip(self.matrices, split_matrices(grad, self.options), strict=True):
            matrix.grad = part.clone()
        self.optimizer.step()

    def full_tensor(self) -> Tensor:
        return self._assembled(self.matrices)

    def momentum(self) -> Tensor:
        return self._assembled([self.optimizer.state[m]["momentum_buffer"] for m in self.matrices])

    def _assembled(self, parts: Sequence[Tensor]) -> Tensor:
        flat = torch.empty(self.shape.numel(), dtype=self.matrices[0].dtype)
        for index, part in zip(self.indices, parts, strict=True):
            flat[index] = part.detach().flatten()
        return flat.view(self.shape)
