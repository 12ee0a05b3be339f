"""FSDP2: parameters are DTensors, so Muon reads the sharding from their placements.

    torchrun --nproc-per-node 2 examples/fsdp.py

Needs no config and no process group. For FSDP1 see fsdp1.py.
"""

import torch.distributed as dist
from common import data, finish, make_model, print_losses, print_rank_0, start, train
from torch.distributed.fsdp import fully_shard

from muon_dtensor import Muon, group_parameters


def main() -> None:
    device = start()
    model = make_model(device)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)

    optimizer = Muon(group_parameters(model, lr=0.02, adamw={"lr": 3e-3}))
    print_rank_0(optimizer.plan)
    print_losses(train(model, optimizer, data(device, dist.get_rank(), dist.get_world_size())))
    finish()


if __name__ == "__main__":
    main()
