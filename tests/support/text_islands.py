"""A character model on real text, trained on islands that are threads; some of them may lie.

The text is Python's own documentation. A run of nine islands and 80 steps takes five seconds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from muon_dtensor import Muon, create_dtensor_config
from muon_dtensor.islands import DiLoCo
from tests.support.threads import run_threads

CONTEXT, WIDTH, HIDDEN = 8, 24, 192


@cache
def tokens() -> tuple[Tensor, Tensor, int]:
    """Return characters for training and validation, and the number of different ones."""
    text = "\n".join(topics[name] for name in sorted(topics))
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    numbers = torch.tensor([index[character] for character in text])
    cut = len(numbers) * 9 // 10
    return numbers[:cut], numbers[cut:], len(index)


class Model(nn.Module):
    """Predicts a character from the eight before it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        _, _, vocabulary = tokens()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.first = nn.Linear(CONTEXT * WIDTH, HIDDEN, bias=False)
        self.second = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, vocabulary, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for param in self.parameters():
            scale = 0.5 if param is self.embed.weight else 1 / math.sqrt(param.shape[-1])
            param.data = torch.randn(param.shape, generator=generator) * scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.embed(x).flatten(1)).relu()
        return self.head(y + self.second(y).relu())


def batch(text: Tensor, generator: torch.Generator, size: int = 64) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(text) - CONTEXT - 1, (size,), generator=generator)
    return torch.stack([text[i : i + CONTEXT] for i in starts.tolist()]), text[starts + CONTEXT]


Attack = Callable[[Tensor, torch.Generator], Tensor]
"""Returns the update that a liar sends instead of its own."""

ATTACKS: dict[str, Attack] = {
    "sign flip": lambda update, _: -4 * update,
    "x 1000": lambda update, _: 1000 * update,
    "noise": lambda update, generator: (
        40 * update.std() * torch.randn(update.shape, generator=generator)
    ),
    "zeros": lambda update, _: 0 * update,
}

ALIE = "a little is enough"
"""Liars send the mean of the honest updates minus 1.5 standard deviations of each element (Baruch,
Baruch & Goldberg 2019, arXiv:1902.06156)."""


@dataclass(frozen=True)
class Training:
    """`outer`: options of DiLoCo; None: islands alone; "every step": the mean of all gradients.

    `liars`: how many islands, the first ones, send something else. `speeds`: the share of the steps
    that each island does, by default all.
    """

    islands: int = 4
    steps: int = 80
    sync_every: int = 8
    outer: Any = field(default_factory=dict)
    attack: str | None = None
    liars: int = 2
    inner: str = "muon"
    lr: float = 0.02
    seed: int = 0
    speeds: tuple[float, ...] = ()


def optimizer_of(training: Training, model: Model) -> torch.optim.Optimizer:
    if training.inner == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=3e-3)
    hidden = [model.first.weight, model.second.weight]
    others = [model.embed.weight, model.head.weight]
    groups = [
        {"params": hidden},
        {"params": others, "algorithm": "adamw", "lr": 3e-3},
    ]
    return Muon(
        groups, lr=training.lr, ns_dtype=torch.float32, distributed_config=create_dtensor_config()
    )


def lie(training: Training, outer: DiLoCo, mesh: Any, generator: torch.Generator) -> None:
    """Replace this island's update before a round."""
    rank = dist.get_rank()
    for shard in outer._shards:
        update = shard.base - shard.local
        if training.attack == ALIE:
            updates = [torch.empty_like(update) for _ in range(training.islands)]
            dist.all_gather(updates, update.contiguous(), group=mesh["island"].get_group())
            honest = torch.stack(updates[training.liars :])
            update = honest.mean(0) - 1.5 * honest.std(0)
        else:
            assert training.attack is not None
            update = ATTACKS[training.attack](update, generator)
        if rank < training.liars:
            shard.local.copy_(shard.base - update)


def train(training: Training) -> tuple[float, dict[str, float]]:
    """Train this island; return the validation loss in nats, and the metrics."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (training.islands,), mesh_dim_names=("island",))
    text, validation, _ = tokens()
    model = Model(training.seed)
    optimizer = optimizer_of(training, model)
    generator = torch.Generator().manual_seed(1000 * training.seed + rank)
    noise = torch.Generator().manual_seed(rank)
    outer: DiLoCo | None = None
    steps = 0

    @torch.no_grad()
    def before_a_round(*_: object) -> None:
        nonlocal steps
        steps += 1
        if training.attack is not None and steps % training.sync_every == 0:
            assert outer is not None
            lie(training, outer, mesh, noise)

    optimizer.register_step_post_hook(before_a_round)
    if isinstance(training.outer, dict):
        options = {"lr": 0.8, "momentum": 0.6, **training.outer}
        outer = DiLoCo(optimizer, mesh["island"], sync_every=training.sync_every, **options)
    speed = training.speeds[rank] if training.speeds else 1.0
    for step in range(training.steps):
        x, y = batch(text, generator)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        if training.outer == "every step":
            for param in model.parameters():
                grads = [torch.empty_like(param.grad) for _ in range(training.islands)]
                dist.all_gather(grads, param.grad, group=mesh["island"].get_group())
                param.grad = torch.stack(grads).mean(0)
        if step % 10 >= round(10 * speed):  # a slow island has done nothing in this time
            for param in model.parameters():
                param.grad = None
        elif outer is not None and training.speeds:
            outer.add_tokens(64.0)
        optimizer.step()
    if outer is not None:
        outer.finish()
    with torch.no_grad():
        x, y = batch(validation, torch.Generator().manual_seed(5), 4096)
        value = float(F.cross_entropy(model(x), y))
    return value, {} if outer is None else outer.metrics()


def loss_of(training: Training) -> float:
    """Train all islands; return the validation loss of the last one, which never lies."""
    return run_threads(training.islands, train, training)[-1][0]
