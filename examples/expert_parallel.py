"""Expert parallelism: each rank holds complete experts and steps them without communication.

    torchrun --nproc-per-node 2 examples/expert_parallel.py

Experts are not gathered, so the optimizer needs no config.
"""

import torch.distributed as dist
from common import MoE, average_grads, finish, print_losses, print_rank_0, start, train, vectors
from torch.nn.functional import mse_loss

from muon_dtensor import Muon

NUM_EXPERTS = 4


def main() -> None:
    device = start()
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    per_rank = NUM_EXPERTS // num_ranks
    expert_ids = range(rank * per_rank, (rank + 1) * per_rank)
    model = MoE(NUM_EXPERTS, expert_ids, dist.group.WORLD).to(device)

    # Every rank orthogonalizes its copy of the gate. Gradients are equal, so copies stay equal.
    optimizer = Muon(model.named_parameters(), lr=0.02)
    print_rank_0(optimizer.plan)

    def after_backward() -> None:
        """Average gradients: experts received tokens of all ranks, a gate only its rank's."""
        for param in model.experts.parameters():
            param.grad.div_(num_ranks)
        average_grads(model.gate.parameters(), dist.group.WORLD)

    batch = vectors(device, rank, num_ranks)
    print_losses(train(model, optimizer, batch, mse_loss, after_backward))
    finish()


if __name__ == "__main__":
    main()
