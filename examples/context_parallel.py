"""Context parallelism: sequences are sharded over ranks, parameters are replicated.

    torchrun --nproc-per-node 2 examples/context_parallel.py

Gradients are averaged over the group. Each rank then orthogonalizes its share of the matrices and
sends the updates.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from common import (
    Attention,
    average_grads,
    data,
    finish,
    make_model,
    print_losses,
    print_rank_0,
    start,
    train,
)
from torch import Tensor

from muon_dtensor import Muon, create_auto_config, group_parameters


class GatherSequence(torch.autograd.Function):
    """All-gather along tensor dim 2; the backward pass sums gradients over ranks."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size(), dim=2)[dist.get_rank()]


class ContextParallelAttention(Attention):
    """Attention of this rank's queries to the keys and values of the full sequence."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        keys, values = GatherSequence.apply(k), GatherSequence.apply(v)
        num_queries, num_keys = q.size(2), keys.size(2)
        first = dist.get_rank() * num_queries
        position = torch.arange(num_keys, device=x.device)
        causal = position[first : first + num_queries, None] >= position
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


def main() -> None:
    device = start()
    cp_group = dist.group.WORLD
    model = make_model(device)
    for layer in model.layers:
        layer.attention.__class__ = ContextParallelAttention  # keeps the weights

    config = create_auto_config(cp_process_group=cp_group)
    groups = group_parameters(model, lr=0.02, adamw={"lr": 3e-3})
    optimizer = Muon(groups, distributed_config=config)
    print_rank_0(optimizer.plan)

    tokens, target = (t.chunk(dist.get_world_size(), dim=1)[dist.get_rank()] for t in data(device))
    losses = train(
        model,
        optimizer,
        (tokens, target),
        after_backward=lambda: average_grads(model.parameters(), cp_group),
    )
    print_losses(losses)
    finish()


if __name__ == "__main__":
    main()
