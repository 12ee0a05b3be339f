"""Shared by the examples: a small language model, a mixture of experts, data, training loops.

Each example builds the optimizer itself.
"""

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

VOCAB, DIM, HEADS = 64, 32, 4
SEQUENCES, CONTEXT = 16, 16
STEPS = 5


def pick_device() -> torch.device:
    """Return this rank's GPU if every rank of this machine has one, else the CPU."""
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def start() -> torch.device:
    """Initialize the default process group (NCCL on GPUs, gloo on CPUs); return the device."""
    device = pick_device()
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    return device


def finish() -> None:
    """Destroy the default process group after gloo has released its tensors.

    A thread of gloo releases the last tensors shortly after they have arrived, and needs Python's
    GIL for that. If Python is already shutting down, the process aborts (torch 2.13).
    """
    time.sleep(0.1)
    dist.destroy_process_group()


class Attention(nn.Module):
    """Causal self-attention. Tensor parallelism shards it by heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(DIM, DIM, bias=False)
        self.k_proj = nn.Linear(DIM, DIM, bias=False)
        self.v_proj = nn.Linear(DIM, DIM, bias=False)
        self.out_proj = nn.Linear(DIM, DIM, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, [batch, head, position, DIM / HEADS]."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(*self.heads(x), is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with a hidden size of 3 * DIM."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(DIM, 3 * DIM, bias=False)
        self.w2 = nn.Linear(3 * DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(DIM), Attention()
        self.ffn_norm, self.ffn = nn.RMSNorm(DIM), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """Computes logits of the next token from tokens."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.embed: nn.Module = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(Block() for _ in range(num_layers))
        self.norm: nn.Module = nn.RMSNorm(DIM)
        self.output: nn.Module = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # tokens [batch, position]
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


def make_model(device: torch.device, num_layers: int = 2) -> Transformer:
    """Return a model with the same weights on every rank."""
    torch.manual_seed(0)
    return Transformer(num_layers).to(device)


def keep_stage(model: Transformer, stage_id: int, num_stages: int) -> list[nn.Module]:
    """Replace the modules of other pipeline stages by Identity, so that names do not change.

    Returns the layers of this stage.
    """
    if stage_id > 0:
        model.embed = nn.Identity()
    if stage_id < num_stages - 1:
        model.norm, model.output = nn.Identity(), nn.Identity()
    stage_layers = []
    for index, layer in enumerate(model.layers):
        if index * num_stages // len(model.layers) == stage_id:
            stage_layers.append(layer)
        else:
            model.layers[index] = nn.Identity()
    return stage_layers


# nn.Linear's weight is [out, in]: ColwiseParallel shards tensor dim 0, RowwiseParallel dim 1.
TP_PLAN = {
    "attention.q_proj": ColwiseParallel(),
    "attention.k_proj": ColwiseParallel(),
    "attention.v_proj": ColwiseParallel(),
    "attention.out_proj": RowwiseParallel(),
    "ffn.w1": ColwiseParallel(),
    "ffn.w2": RowwiseParallel(),
}


class Exchange(torch.autograd.Function):
    """`dist.all_to_all_single` of rows; the backward pass sends gradients back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.arguments = received, sent, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return Exchange.apply(grad, *ctx.arguments), None, None, None


class MoE(nn.Module):
    """Mixture of experts: a replicated gate, top-1 routing, experts sharded over `ep_group`.

    `expert_ids`: indices of this rank's experts. Every rank has the same number of experts, in
    rank order.
    """

    def __init__(
        self, num_experts: int, expert_ids: Iterable[int], ep_group: dist.ProcessGroup
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(DIM, num_experts, bias=False)
        experts = [FeedForward() for _ in range(num_experts)]
        self.experts = nn.ModuleDict({str(index): experts[index] for index in expert_ids})
        self.num_experts, self.ep_group = num_experts, ep_group

    def forward(self, x: Tensor) -> Tensor:  # [tokens, DIM]
        weight, expert = self.gate(x).softmax(-1).max(-1)
        order = expert.argsort(stable=True)
        counts = expert.bincount(minlength=self.num_experts)
        num_ranks = self.ep_group.size()
        received_counts = torch.empty_like(counts)  # [source rank, this rank's expert]
        dist.all_to_all_single(received_counts, counts, group=self.ep_group)
        sent = counts.view(num_ranks, -1).sum(1).tolist()
        received_counts = received_counts.view(num_ranks, -1)
        received = received_counts.sum(1).tolist()
        tokens = Exchange.apply(x[order], sent, received, self.ep_group)
        parts = tokens.split(received_counts.flatten().tolist())
        out = list(parts)
        for index, module in enumerate(self.experts.values()):
            part_ids = range(index, len(parts), len(self.experts))
            sizes = [len(parts[i]) for i in part_ids]
            results = module(torch.cat([parts[i] for i in part_ids])).split(sizes)
            for i, result in zip(part_ids, results, strict=True):
                out[i] = result
        combined = Exchange.apply(torch.cat(out), received, sent, self.ep_group)
        return x + weight[:, None] * combined[order.argsort()]


def data(device: torch.device, part: int = 0, num_parts: int = 1) -> tuple[Tensor, Tensor]:
    """Return part `part` of `num_parts` of the only batch: (tokens, next tokens)."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (SEQUENCES, CONTEXT + 1), generator=generator)
    tokens = tokens.chunk(num_parts)[part].to(device)
    return tokens[:, :-1], tokens[:, 1:]


def vectors(device: torch.device, part: int = 0, num_parts: int = 1) -> tuple[Tensor, Tensor]:
    """Return part `part` of `num_parts` of a batch of (inputs, targets), each [tokens, DIM]."""
    batch = torch.randn(2, SEQUENCES * CONTEXT, DIM, generator=torch.Generator().manual_seed(1))
    x, target = batch.chunk(num_parts, dim=1)[part].to(device)
    return x, target


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean over all tokens, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def mean_over_ranks(value: Tensor) -> float:
    """Return the mean over ranks of a scalar."""
    value = value.detach().clone()
    if not dist.is_initialized():
        return value.item()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def average_grads(params: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Average gradients over a group, in place."""
    for param in params:
        dist.all_reduce(param.grad, group=group)
        param.grad.div_(group.size())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    after_backward: Callable[[], Any] = lambda: None,
) -> list[float]:
    """Train for STEPS steps on one batch. Returns the losses, averaged over ranks."""
    x, target = batch
    losses = []
    for _ in range(STEPS):
        loss = loss_fn(model(x), target)
        loss.backward()
        after_backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_ranks(loss))
    return losses


def train_stage(
    schedule: Any,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    stage: PipelineStage,
) -> list[float]:
    """Train a pipeline stage on one batch. Returns the losses, averaged over ranks."""
    tokens, target = batch
    losses = []
    for _ in range(STEPS):
        parts: list[Tensor] = []
        schedule.step(*((tokens,) if stage.is_first else ()), target=target, losses=parts)
        optimizer.step()
        optimizer.zero_grad()
        # Only the last stage has losses, so they are scaled before the mean over ranks.
        total = torch.stack(parts).mean() if parts else torch.zeros((), device=target.device)
        losses.append(mean_over_ranks(total * stage.num_stages))
    return losses


def print_rank_0(*values: object) -> None:
    """Print on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*values, flush=True)


def print_losses(losses: list[float]) -> None:
    """Print the first and the last loss on rank 0."""
    print_rank_0(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
