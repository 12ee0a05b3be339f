"""Tensor parallelism within a node, FSDP2 over nodes: two mesh dims shard each matrix.

    torchrun --nproc-per-node 4 examples/tp_fsdp.py

parallelize_module comes before fully_shard. Needs no config.
"""

import torch.distributed as dist
from common import TP_PLAN, data, finish, make_model, print_losses, print_rank_0, start, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from muon_dtensor import Muon, group_parameters

TP = 2


def main() -> None:
    device = start()
    mesh = init_device_mesh(
        device.type, (dist.get_world_size() // TP, TP), mesh_dim_names=("dp_shard", "tp")
    )
    model = make_model(device)
    for layer in model.layers:
        parallelize_module(layer, mesh["tp"], TP_PLAN)
        fully_shard(layer, mesh=mesh["dp_shard"])
    fully_shard(model, mesh=mesh["dp_shard"])

    optimizer = Muon(group_parameters(model, lr=0.02, adamw={"lr": 3e-3}))
    print_rank_0(optimizer.plan)
    # ranks of one tp group have the same data
    part, num_parts = mesh.get_local_rank("dp_shard"), mesh["dp_shard"].size()
    print_losses(train(model, optimizer, data(device, part, num_parts)))
    finish()


if __name__ == "__main__":
    main()
