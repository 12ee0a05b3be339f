"""Pipeline parallelism: each stage has an optimizer of its own, and 1F1B between its steps.

    torchrun --nproc-per-node 2 examples/pipeline_parallel.py

Stages hold different parameters, so their optimizers exchange nothing.
"""

import torch.distributed as dist
from common import (
    cross_entropy,
    data,
    finish,
    keep_stage,
    make_model,
    say,
    say_losses,
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
    say(optimizer.plan)

    say_losses(train_stage(schedule, optimizer, data(device), stage))
    finish()


if __name__ == "__main__":
    main()
