"""Expert parallelism and tensor parallelism: each expert is sharded over a tp group.

    torchrun --nproc-per-node 4 examples/expert_tensor_parallel.py

A matrix is gathered over its tp group only.
"""

import torch.distributed as dist
from common import MoE, average_grads, finish, print_losses, print_rank_0, start, train, vectors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss

from muon_dtensor import Muon, create_auto_config

NUM_EXPERTS, TP = 4, 2


def main() -> None:
    device = start()
    ep_size = dist.get_world_size() // TP
    # init_device_mesh creates all groups on all ranks. With dist.new_group, every rank would have
    # to call it for every group.
    mesh = init_device_mesh(device.type, (ep_size, TP), mesh_dim_names=("ep", "tp"))
    ep_group, per_rank = mesh.get_group("ep"), NUM_EXPERTS // ep_size
    first = mesh.get_local_rank("ep") * per_rank
    model = MoE(NUM_EXPERTS, range(first, first + per_rank), ep_group).to(device)
    for expert in model.experts.values():
        # sharded along tensor dims 0 and 1 of the [out, in] weights
        plan = {"w1": ColwiseParallel(), "w2": RowwiseParallel()}
        parallelize_module(expert, mesh["tp"], plan)

    config = create_auto_config(
        tp_process_group=mesh.get_group("tp"),
        tp_shard_dim={"gate.weight": None},  # replicated; DTensors need no entry
        ep_process_group=ep_group,
    )
    optimizer = Muon(model.named_parameters(), lr=0.02, distributed_config=config)
    print_rank_0(optimizer.plan)

    def after_backward() -> None:
        """Average gradients: experts received tokens of all ep ranks, a gate only its rank's."""
        for param in model.experts.parameters():
            param.grad.to_local().div_(ep_size)
        average_grads(model.gate.parameters(), ep_group)

    batch = vectors(device, mesh.get_local_rank("ep"), ep_size)
    print_losses(train(model, optimizer, batch, mse_loss, after_backward))
    finish()


if __name__ == "__main__":
    main()
