"""Pipeline parallelism: each stage has its own optimizer and runs the 1F1B schedule.

    torchrun --nproc-per-node 2 examples/pipeline_parallel.py

Stages hold different parameters, so optimizers of different stages do not communicate.
"""

import torch.distributed as dist
from common import (
    cross_entropy,
    data,
    finish,
    keep_stage,
    make_model,
    print_losses,
    print_rank_0,
    start,
    train_stage,
)
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from muon_dtensor import Muon, create_auto_config, group_parameters


def main() -> None:
    device = start()
    pp_group, stage_id, num_stages = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    model = make_model(device, num_layers=4)
    keep_stage(model, stage_id, num_stages)
    stage = PipelineStage(model, stage_id, num_stages, device, group=pp_group)
    schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=cross_entropy)

    config = create_auto_config(
        pp_process_group=pp_group, pp_stage_id=stage_id, pp_num_stages=num_stages
    )
    groups = group_parameters(model, lr=0.02, adamw={"lr": 3e-3})
    optimizer = Muon(groups, distributed_config=config)
    print_rank_0(optimizer.plan)

    print_losses(train_stage(schedule, optimizer, data(device), stage))
    finish()


if __name__ == "__main__":
    main()
