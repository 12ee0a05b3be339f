"""Models of the requirement documents, and functions that join and compare their parameters."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812


class Attention(nn.Module):
    """Causal attention of four heads; its parameters are matrices."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.head_dim = dim // 4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(-3, -2).flatten(-2))


class FeedForward(nn.Module):
    """Two linear layers, the hidden one three times as wide."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, 3 * dim, bias=False)
        self.w2 = nn.Linear(3 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(x)))


class Block(nn.Module):
    """One layer of a transformer. Norms have no parameters, so all parameters are matrices."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention, self.ffn = Attention(dim), FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(F.rms_norm(x, x.shape[-1:]))
        return x + self.ffn(F.rms_norm(x, x.shape[-1:]))


class TinyTransformer(nn.Module):
    """A sequence of `layers` blocks, from [batch, sequence, dim] to the same shape."""

    def __init__(self, dim: int = 16, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(42)
        self.layers = nn.ModuleList(Block(dim) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class MoE(nn.Module):
    """A gate, and the experts with indices `held`; token i goes to expert i % num_experts.

    From [tokens, dim] to the same shape; the output for tokens of other experts is zero.
    """

    def __init__(self, dim: int, num_experts: int, held: Iterable[int]) -> None:
        super().__init__()
        torch.manual_seed(42)
        self.gate = nn.Linear(dim, num_experts, bias=False)
        all_experts = [nn.Linear(dim, dim, bias=False) for _ in range(num_experts)]
        self.experts = nn.ModuleDict({str(index): all_experts[index] for index in held})
        self.num_experts = num_experts

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for name, expert in self.experts.items():
            tokens = x[int(name) :: self.num_experts]
            weight = self.gate(tokens).softmax(-1)[:, int(name), None]
            out[int(name) :: self.num_experts] = weight * expert(tokens)
        return out


def create_dummy_model(
    num_params: int = 4, param_size: tuple[int, int] = (12, 12)
) -> nn.Sequential:
    """Return a sequence of Linear layers, as in the document; `param_size` must be square."""
    torch.manual_seed(42)
    rows, cols = param_size
    return nn.Sequential(*(nn.Linear(cols, rows, bias=False) for _ in range(num_params)))


def batch(step: int, *shape: int) -> Tensor:
    """Return random numbers that are the same on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + step))


def clean(name: str) -> str:
    """Return a parameter's name without the prefixes of DDP, FSDP1 and torch.compile."""
    for wrapper in ("_fsdp_wrapped_module.", "module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    return name


def full_params(model: nn.Module) -> dict[str, Tensor]:
    """Return the full parameters of a model of DTensors and plain tensors, by name."""
    return {
        clean(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def joined(shards: Iterable[tuple[str, Tensor, int | None]], group: Any) -> dict[str, Tensor]:
    """Gather (name, this rank's shard, tensor dim of the cut) to full tensors by name."""
    full_tensors = {}
    for name, shard, tensor_dim in shards:
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, shard.detach(), group=group)
        full_tensors[name] = (
            shard.detach() if tensor_dim is None else torch.cat(gathered, tensor_dim)
        )
    return full_tensors


def differences(
    params: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> list[str]:
    """Return names whose values differ by more than the tolerance, relative and absolute.

    With a tolerance of 0 values are compared bitwise.
    """
    differing = [name for name in params if name not in expected]
    for name, value in params.items():
        if name in differing:
            continue
        if tolerance == 0:
            same = torch.equal(value, expected[name])
        else:
            same = torch.allclose(value, expected[name], rtol=tolerance, atol=tolerance)
        if not same:
            differing.append(f"{name}: {(value - expected[name]).abs().max():.3g}")
    return differing
