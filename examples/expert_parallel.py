"""Expert parallelism: each rank holds complete experts, and steps them alone.

    torchrun --nproc-per-node 2 examples/expert_parallel.py

Experts are never gathered, so there is no config and the optimizer sends nothing.
"""

import torch.distributed as dist
from common import MoE, average_grads, finish, say, say_losses, start, train, vectors
from torch.nn.functional import mse_loss

from muon_dtensor import Muon

NUM_EXPERTS = 4


def main() -> None:
    device = start()
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    per_rank = NUM_EXPERTS // num_ranks
    held = range(rank * per_rank, (rank + 1) * per_rank)
    model = MoE(NUM_EXPERTS, held, dist.group.WORLD).to(device)

    # The gate is on every rank, each of which orthogonalizes it: with equal gradients it stays the
    # same everywhere.
    optimizer = Muon(model.named_parameters(), lr=0.02)
    say(optimizer.plan)

    def after_backward() -> None:
        """An expert has seen the tokens of all ranks, the gate those of its own."""
        for param in model.experts.parameters():
            param.grad.div_(num_ranks)
        average_grads(model.gate.parameters(), dist.group.WORLD)

    batch = vectors(device, rank, num_ranks)
    say_losses(train(model, optimizer, batch, mse_loss, after_backward))
    finish()


if __name__ == "__main__":
    main()
