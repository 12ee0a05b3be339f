"""What the examples share: a tiny language model, a mixture of experts, fixed data, the loop.

Nothing here is about the optimizer: how it is made is in each example.
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
    """This rank's GPU if every rank of this machine has one, else the CPU."""
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def start() -> torch.device:
    """Join the other ranks of torchrun, over NCCL on GPUs and over gloo on CPUs."""
    device = pick_device()
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    return device


def finish() -> None:
    """Leave the process group.

    A thread of gloo lets go of the last tensors a moment after they have arrived, and needs
    Python's lock for it: if Python is shutting down by then, the process aborts (torch 2.13).
    """
    time.sleep(0.1)
    dist.destroy_process_group()


class Attention(nn.Module):
    """Causal self-attention; under tensor parallelism a rank holds whole heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(DIM, DIM, bias=False)
        self.k_proj = nn.Linear(DIM, DIM, bias=False)
        self.v_proj = nn.Linear(DIM, DIM, bias=False)
        self.out_proj = nn.Linear(DIM, DIM, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [batch, head, position, DIM / HEADS]."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(*self.heads(x), is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers, the hidden one three times as wide."""

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
    """Tokens in, logits of the next token out."""

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
    """The same model on every rank."""
    torch.manual_seed(0)
    return Transformer(num_layers).to(device)


def keep_stage(model: Transformer, stage_id: int, num_stages: int) -> list[nn.Module]:
    """Leave a model only its part in a pipeline stage, under the names of the whole model.

    Returns the layers that are left.
    """
    if stage_id > 0:
        model.embed = nn.Identity()
    if stage_id < num_stages - 1:
        model.norm, model.output = nn.Identity(), nn.Identity()
    kept = []
    for index, layer in enumerate(model.layers):
        if index * num_stages // len(model.layers) == stage_id:
            kept.append(layer)
        else:
            model.layers[index] = nn.Identity()
    return kept


# Colwise cuts the columns of x @ W.T, and so tensor dim 0 of nn.Linear's [out, in] weight; rowwise
# cuts tensor dim 1.
TP_PLAN = {
    "attention.q_proj": ColwiseParallel(),
    "attention.k_proj": ColwiseParallel(),
    "attention.v_proj": ColwiseParallel(),
    "attention.out_proj": RowwiseParallel(),
    "ffn.w1": ColwiseParallel(),
    "ffn.w2": RowwiseParallel(),
}


class Exchange(torch.autograd.Function):
    """`dist.all_to_all_single` of rows; gradients go the other way."""

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
    """A gate on every rank; experts dealt over the ranks of `ep_group`; each token goes to one.

    `held`: indices of this rank's experts; every rank of the group has equally many, in order.
    """

    def __init__(self, num_experts: int, held: Iterable[int], ep_group: dist.ProcessGroup) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(DIM, num_experts, bias=False)
        experts = [FeedForward() for _ in range(num_experts)]
        self.experts = nn.ModuleDict({str(index): experts[index] for index in held})
        self.num_experts, self.ep_group = num_experts, ep_group

    def forward(self, x: Tensor) -> Tensor:  # [tokens, DIM]
        weight, expert = self.gate(x).softmax(-1).max(-1)
        order = expert.argsort(stable=True)
        counts = expert.bincount(minlength=self.num_experts)
        num_ranks = self.ep_group.size()
        arriving = torch.empty_like(counts)  # [rank it comes from, this rank's expert]
        dist.all_to_all_single(arriving, counts, group=self.ep_group)
        sent = counts.view(num_ranks, -1).sum(1).tolist()
        arrived = arriving.view(num_ranks, -1)
        received = arrived.sum(1).tolist()
        here = Exchange.apply(x[order], sent, received, self.ep_group)
        parts = here.split(arrived.flatten().tolist())
        out = list(parts)
        for index, module in enumerate(self.experts.values()):
            mine = range(index, len(parts), len(self.experts))
            results = module(torch.cat([parts[i] for i in mine]))
            for i, result in zip(mine, results.split([len(parts[i]) for i in mine]), strict=True):
                out[i] = result
        back = Exchange.apply(torch.cat(out), received, sent, self.ep_group)
        return x + weight[:, None] * back[order.argsort()]


def data(device: torch.device, part: int = 0, num_parts: int = 1) -> tuple[Tensor, Tensor]:
    """One of `num_parts` parts of the only batch: tokens and the tokens that follow them."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (SEQUENCES, CONTEXT + 1), generator=generator)
    mine = tokens.chunk(num_parts)[part].to(device)
    return mine[:, :-1], mine[:, 1:]


def vectors(device: torch.device, part: int = 0, num_parts: int = 1) -> tuple[Tensor, Tensor]:
    """As `data`, vectors in and vectors out: [tokens, DIM]."""
    both = torch.randn(2, SEQUENCES * CONTEXT, DIM, generator=torch.Generator().manual_seed(1))
    x, target = both.chunk(num_parts, dim=1)[part].to(device)
    return x, target


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over all tokens, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def mean_over_ranks(value: Tensor) -> float:
    """The mean of a scalar that each rank has."""
    value = value.detach().clone()
    if not dist.is_initialized():
        return value.item()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def average_grads(params: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Replace gradients by their means over a group."""
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
    """Train for a few steps on one batch; the losses, averaged over ranks."""
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
    """Train a pipeline stage by its schedule on one batch; the losses, averaged over ranks."""
    tokens, target = batch
    losses = []
    for _ in range(STEPS):
        parts: list[Tensor] = []
        schedule.step(*((tokens,) if stage.is_first else ()), target=target, losses=parts)
        optimizer.step()
        optimizer.zero_grad()
        # Only the last stage has losses: they count for all stages in the mean over ranks.
        total = torch.stack(parts).mean() if parts else torch.zeros((), device=target.device)
        losses.append(mean_over_ranks(total * stage.num_stages))
    return losses


def say(*values: object) -> None:
    """Print on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*values, flush=True)


def say_losses(losses: list[float]) -> None:
    """Print the first and the last loss on rank 0."""
    say(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
