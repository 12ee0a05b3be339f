"""Pipeline x tensor parallelism x HSDP, on one DeviceMesh of 2 x 2 x 2 x 2 ranks.

    torchrun --nproc-per-node 16 examples/four_d.py

The ranks of a stage gather each matrix over tp and dp_shard. Replicas share the matrices.
"""

from common import (
    TP_PLAN,
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import parallelize_module

from muon_dtensor import Muon, create_auto_config, group_parameters

SIZES = {"pp": 2, "dp_replicate": 2, "dp_shard": 2, "tp": 2}


def main() -> None:
    device = start()
    # The mesh creates the four groups of every rank. Rank lists computed by hand are error-prone:
    # tp may equal dp_replicate, or pp may hold the ranks of one stage.
    mesh = init_device_mesh(device.type, tuple(SIZES.values()), mesh_dim_names=tuple(SIZES))
    data_mesh = mesh["dp_replicate", "dp_shard"]
    stage_id, num_stages = mesh.get_local_rank("pp"), SIZES["pp"]

    model = make_model(device, num_layers=4)
    for layer in keep_stage(model, stage_id, num_stages):
        parallelize_module(layer, mesh["tp"], TP_PLAN)
        fully_shard(layer, mesh=data_mesh)
    fully_shard(model, mesh=data_mesh)
    stage = PipelineStage(model, stage_id, num_stages, device, group=mesh.get_group("pp"))
    schedule = Schedule1F1B(stage, n_microbatches=2, loss_fn=cross_entropy)

    config = create_auto_config(
        pp_process_group=mesh.get_group("pp"),
        pp_stage_id=stage_id,
        pp_num_stages=num_stages,
        tp_process_group=mesh.get_group("tp"),
        shard_process_group=mesh.get_group("dp_shard"),
        replicate_process_group=mesh.get_group("dp_replicate"),
    )
    groups = group_parameters(model, lr=0.02, adamw={"lr": 3e-3})
    optimizer = Muon(groups, distributed_config=config)
    print_rank_0(optimizer.plan)

    replica, shard = (mesh.get_local_rank(name) for name in ("dp_replicate", "dp_shard"))
    batch = data(device, replica * SIZES["dp_shard"] + shard, data_mesh.size())
    print_losses(train_stage(schedule, optimizer, batch, stage))
    finish()


if __name__ == "__main__":
    main()
