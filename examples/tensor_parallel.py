"""Tensor parallelism: colwise and rowwise layers in one optimizer.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

A DTensor knows which of its tensor dims is cut, so there is no dim to tell and no second optimizer.
"""

import torch.distributed as dist
from common import TP_PLAN, data, finish, make_model, say, say_losses, start, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from muon_dtensor import Muon, group_parameters


def main() -> None:
    device = start()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = make_model(device)
    for layer in model.layers:
        parallelize_module(layer, mesh, TP_PLAN)

    # Embedding, norms and head are no DTensors: each rank has them whole, and steps its own copy.
    optimizer = Muon(group_parameters(model, lr=0.02, adamw={"lr": 3e-3}))
    say(optimizer.plan)
    say_losses(train(model, optimizer, data(device)))
    finish()


if __name__ == "__main__":
    main()
