"""HSDP: FSDP2 on a 2-D mesh, sharded within a node and replicated over nodes.

    torchrun --nproc-per-node 4 examples/hsdp.py

The replicas share the matrices: each is orthogonalized once, not once a replica.
"""

import torch.distributed as dist
from common import data, finish, make_model, say, say_losses, start, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muon_dtensor import Muon, group_parameters

NUM_NODES = 2


def main() -> None:
    device = start()
    # One mesh makes all groups. By hand, every rank would have to call dist.new_group for every
    # group, also for those that it is not in.
    mesh = init_device_mesh(
        device.type,
        (NUM_NODES, dist.get_world_size() // NUM_NODES),
        mesh_dim_names=("dp_replicate", "dp_shard"),
    )
    model = make_model(device)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    optimizer = Muon(group_parameters(model, lr=0.02, adamw={"lr": 3e-3}))
    say(optimizer.plan)
    say_losses(train(model, optimizer, data(device, dist.get_rank(), dist.get_world_size())))
    finish()


if __name__ == "__main__":
    main()
