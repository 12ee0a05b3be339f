"""HSDP: FSDP2 on a 2-D mesh, sharded within a node and replicated over nodes.

    torchrun --nproc-per-node 4 examples/hsdp.py

Replicas share the matrices: each matrix is orthogonalized once, not once per replica.
"""

import torch.distributed as dist
from common import data, finish, make_model, print_losses, print_rank_0, start, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muon_dtensor import Muon, group_parameters

NUM_NODES = 2


def main() -> None:
    device = start()
    # init_device_mesh creates all groups. With dist.new_group, every rank would have to call it
    # for every group, including groups that it does not belong to.
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
    print_rank_0(optimizer.plan)
    print_losses(train(model, optimizer, data(device, dist.get_rank(), dist.get_world_size())))
    finish()


if __name__ == "__main__":
    main()
