"""Islands: two groups of ranks with a slow link between them train with DiLoCo and Muon.

    torchrun --nproc-per-node 4 examples/islands.py

Each island shards the model by FSDP2 and steps as if it were alone. Every two steps the islands
combine what they have learned, in 8 bits. Longer runs use 30 steps or more.
"""

import torch
import torch.distributed as dist
from common import data, finish, make_model, print_losses, print_rank_0, start, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muon_dtensor import Muon, group_parameters
from muon_dtensor.islands import DiLoCo

NUM_ISLANDS = 2


def main() -> None:
    device = start()
    mesh = init_device_mesh(
        device.type,
        (NUM_ISLANDS, dist.get_world_size() // NUM_ISLANDS),
        mesh_dim_names=("island", "dp_shard"),
    )
    model = make_model(device)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["dp_shard"])
    fully_shard(model, mesh=mesh["dp_shard"])

    optimizer = Muon(group_parameters(model, lr=0.02, adamw={"lr": 3e-3}))
    outer = DiLoCo(optimizer, mesh["island"], sync_every=2, lr=0.9, momentum=0.6, wire="int8")
    print_rank_0(outer.plan)
    losses = train(model, optimizer, data(device, dist.get_rank(), dist.get_world_size()))
    print_losses(losses)

    metrics = outer.metrics()
    print_rank_0(f"{metrics['rounds']:.0f} rounds, {metrics['sent_nbytes']:,.0f} bytes of a rank")
    total = torch.stack([value.double().sum() for value in outer.state_dict()["base"].values()])
    print_rank_0(f"base values {total.sum().full_tensor():.9f}")
    finish()


if __name__ == "__main__":
    main()
