"""Tensor parallelism and HSDP: a 3-D mesh of replicas, FSDP2 shards and tensor parallelism.

    torchrun --nproc-per-node 8 examples/tp_hsdp.py

`print(optimizer.plan.explain(name))` describes the plan of one parameter, with reasons.
"""

import torch.distributed as dist
from common import TP_PLAN, data, finish, make_model, print_losses, print_rank_0, start, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from muon_dtensor import Muon, group_parameters

SHARD, TP = 2, 2


def main() -> None:
    device = start()
    mesh = init_device_mesh(
        device.type,
        (dist.get_world_size() // (SHARD * TP), SHARD, TP),
        mesh_dim_names=("dp_replicate", "dp_shard", "tp"),
    )
    data_mesh = mesh["dp_replicate", "dp_shard"]
    model = make_model(device)
    for layer in model.layers:
        parallelize_module(layer, mesh["tp"], TP_PLAN)
        fully_shard(layer, mesh=data_mesh)
    fully_shard(model, mesh=data_mesh)

    optimizer = Muon(group_parameters(model, lr=0.02, adamw={"lr": 3e-3}))
    print_rank_0(optimizer.plan)
    print_rank_0(optimizer.plan.explain("layers.0.attention.q_proj.weight"))
    part = dist.get_rank() // TP
    print_losses(train(model, optimizer, data(device, part, data_mesh.size())))
    finish()


if __name__ == "__main__":
    main()
