"""FSDP1: parameters are slices of flat ones, cut anywhere over the ranks of a process group.

    torchrun --nproc-per-node 2 examples/fsdp1.py

For a new model, prefer FSDP2 (fsdp.py).
"""

import torch.distributed as dist
from common import data, finish, make_model, say, say_losses, start, train
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from muon_dtensor import Muon, create_auto_config, group_parameters


def main() -> None:
    device = start()
    model = make_model(device)
    options = {
        # Without it FSDP1 hands out one flat parameter, in which there are no matrices any more.
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
    say(optimizer.plan)
    say_losses(train(wrapped, optimizer, data(device, dist.get_rank(), dist.get_world_size())))
    finish()


if __name__ == "__main__":
    main()
