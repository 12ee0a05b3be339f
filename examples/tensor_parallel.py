"""Tensor parallelism: colwise and rowwise layers in one optimizer.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

A DTensor records its sharded tensor dim, so one optimizer steps both kinds of layers.
"""

import torch.distributed as dist
from common import TP_PLAN, data, finish, make_model, print_losses, print_rank_0, start, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from muon_dtensor import Muon, group_parameters


def main() -> None:
    device = start()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = make_model(device)
    for layer in model.layers:
        parallelize_module(layer, mesh, TP_PLAN)

    # Embedding, norms and head are plain tensors: each rank steps its own full copy.
    optimizer = Muon(group_parameters(model, lr=0.02, adamw={"lr": 3e-3}))
    print_rank_0(optimizer.plan)
    print_losses(train(model, optimizer, data(device)))
    finish()


if __name__ == "__main__":
    main()
