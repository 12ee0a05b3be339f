"""Loss on real text with momenta and weights in few bits: `python -m benchmarks.bench_state`.

A GPT of two layers learns the characters of Python's own documentation for 500 steps, from the same
seeds and batches with each option. Writes benchmarks/results/state.json.
"""

import json
import math
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.common import commit
from muon_dtensor import Muon, group_parameters

CONTEXT, WIDTH, HEADS, LAYERS, BATCH, STEPS, SEEDS = 64, 128, 4, 2, 16, 500, (0, 1, 2)
WEIGHTS = torch.float32, torch.bfloat16
RUNS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32 momentum": (torch.float32, {"momentum_dtype": torch.float32}),
    "bfloat16 momentum": (torch.float32, {"momentum_dtype": torch.bfloat16}),
    "8-bit momentum": (torch.float32, {"momentum_bits": 8}),
    "4-bit momentum": (torch.float32, {"momentum_bits": 4}),
    "bfloat16 weights": (torch.bfloat16, {}),
    "bfloat16 weights, stochastic": (torch.bfloat16, {"weight_rounding": "stochastic"}),
    "bfloat16 weights, compensated": (torch.bfloat16, {"weight_rounding": "compensated"}),
}


class Layer(nn.Module):
    """Attention and a feed-forward part, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            part.view(batch, length, HEADS, -1).transpose(1, 2)
            for part in self.qkv(F.rms_norm(x, (WIDTH,))).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(F.rms_norm(x, (WIDTH,)))))


class Model(nn.Module):
    """A GPT over characters."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocabulary, WIDTH)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tok_embeddings(x) + self.pos_embed
        for layer in self.layers:
            y = layer(y)
        return self.head(F.rms_norm(y, (WIDTH,)))


def tokens() -> tuple[Tensor, int]:
    """Return the characters of the text as numbers, and the number of different ones."""
    text = "\n".join(topics[name] for name in sorted(topics))
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([index[character] for character in text]), len(index)


def loss_of(model: nn.Module, text: Tensor, generator: torch.Generator, size: int) -> Tensor:
    """Return the loss of a random batch."""
    starts = torch.randint(len(text) - CONTEXT - 1, (size,), generator=generator)
    chunk = torch.stack([text[s : s + CONTEXT + 1] for s in starts.tolist()])
    logits = model(chunk[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), chunk[:, 1:].flatten())


def trained(dtype: torch.dtype, options: dict[str, Any], seed: int) -> float:
    """Return the validation loss after all steps."""
    text, vocabulary = tokens()
    cut = len(text) * 9 // 10
    torch.manual_seed(seed)
    model = Model(vocabulary)
    if dtype == torch.bfloat16:  # the weights that Muon steps
        model.layers.to(dtype)
        for layer in model.layers:
            layer.register_forward_pre_hook(lambda _, args: (args[0].to(dtype),))
        model.head.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    groups = group_parameters(model, lr=0.005, rules=[("qkv", {"split_sizes": (WIDTH,) * 3})])
    of_group = {k: v for k, v in options.items() if k != "momentum_dtype"}
    for group in groups:
        if group["algorithm"] == "muon":
            group.update(of_group)
    optimizer = Muon(groups, momentum_dtype=options.get("momentum_dtype"))
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group.setdefault("first_lr", group["lr"])
            group["lr"] = group["first_lr"] * (1 - step / STEPS)
        loss_of(model, text[:cut], generator, BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        losses = [float(loss_of(model, text[cut:], generator, 64)) for _ in range(20)]
    return sum(losses) / len(losses)


def main() -> None:
    """Run every option with every seed, and write the means."""
    torch.set_num_threads(1)
    losses = {name: [trained(*run, seed) for seed in SEEDS] for name, run in RUNS.items()}
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    for name, mean in means.items():
        base = means["bfloat16 momentum"]
        spread = math.sqrt(sum((v - mean) ** 2 for v in losses[name]) / len(SEEDS))
        print(f"{name:32} {mean:.4f} {100 * (mean / base - 1):+.2f} % (spread {spread:.4f})")
    result = {"commit": commit(), "torch": torch.__version__, "steps": STEPS, "losses": losses}
    Path("benchmarks/results/state.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
