"""FSDP1: each rank of a process group holds a slice of a flat parameter.

    torchrun --nproc-per-node 2 examples/fsdp1.py

For a new model, prefer FSDP2 (fsdp.py).
"""

import torch.distributed as dist
from common import data, finish, make_model, print_losses, print_rank_0, start, train
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from muon_dtensor import Muon, create_auto_config, group_parameters


def main() -> None:
    device = start()
    model = make_model(device)
    options = {
        # Without it FSDP1 exposes only flat parameters, which are not matrices.
        "use_orig_params": True,
        # SHARD_GRAD_OP takes the same config. HYBRID_SHARD with process_group=(shard, replicate)
        # takes create_auto_config(shard_process_group=shard, replicate_process_group=replicate).
        "sharding_strategy": ShardingStrategy.FULL_SHARD,
        "device_id": device,
    }
    for index, layer in enumerate(model.layers):
        model.layers[index] = FullyShardedDataParallel(layer, **options)
    wrapped = FullyShardedDataParallel(model, **options)

    config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    groups = group_parameters(wrapped, lr=0.02, adamw={"lr": 3e-3})
    optimizer = Muon(groups, distributed_config=config)
    print_rank_0(optimizer.plan)
    print_losses(train(wrapped, optimizer, data(device, dist.get_rank(), dist.get_world_size())))
    finish()


if __name__ == "__main__":
    main()
