"""torch.optim.Muon on declared matrices stored apart: what a declaration must equal."""

from collections.abc import Sequence
from typing import Any

import einops
import torch
from torch import Tensor, nn


def split_whole(whole: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """The logical matrices, by einops and torch.split: not by the code under test."""
    sizes = options.get("split_sizes")
    blocks = [whole] if sizes is None else whole.split(list(sizes), options.get("split_dim", 0))
    patterns = options.get("matrix")
    if not isinstance(patterns, tuple):
        patterns = (patterns,) * len(blocks)
    axes = options.get("matrix_axes") or {}
    found: list[Tensor] = []
    for block, pattern in zip(blocks, patterns, strict=True):
        result = block
        if pattern is not None:
            known = {n: size for n, size in axes.items() if n in pattern}
            result = einops.rearrange(block, pattern, **known)
        found += result.reshape(-1, *result.shape[-2:]).unbind()
    return [matrix.contiguous() for matrix in found]


class Separate:
    """torch.optim.Muon on every logical matrix stored on its own; the whole is put back."""

    def __init__(self, whole: Tensor, options: dict[str, Any], **muon: Any) -> None:
        self.shape, self.options = whole.shape, options
        self.matrices = [nn.Parameter(m.clone()) for m in split_whole(whole, options)]
        self.optimizer = torch.optim.Muon(self.matrices, **muon)
        # where each element of the whole went: the same split of their numbers
        numbers = torch.arange(whole.numel()).view(whole.shape)
        self.places = [n.flatten() for n in split_whole(numbers, options)]

    def step(self, grad: Tensor) -> None:
        for matrix, part in zip(self.matrices, split_whole(grad, self.options), strict=True):
            matrix.grad = part.clone()
        self.optimizer.step()

    def whole(self) -> Tensor:
        return self._put_back(self.matrices)

    def momentum(self) -> Tensor:
        return self._put_back([self.optimizer.state[m]["momentum_buffer"] for m in self.matrices])

    def _put_back(self, parts: Sequence[Tensor]) -> Tensor:
        flat = torch.empty(self.shape.numel(), dtype=self.matrices[0].dtype)
        for place, part in zip(self.places, parts, strict=True):
            flat[place] = part.detach().flatten()
        return flat.view(self.shape)
