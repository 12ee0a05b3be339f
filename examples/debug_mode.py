"""Debug mode: ranks compute in turns, nothing overlaps, and each rank writes a trace.

    torchrun --nproc-per-node 4 examples/debug_mode.py --out /tmp

writes trace_RANK.json for chrome://tracing or ui.perfetto.dev. Before the training it checks the
process groups, and that gather and redistribute reproduce a shard.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from common import TP_PLAN, data, finish, make_model, print_losses, print_rank_0, start, train
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from muon_dtensor import DistributedConfig, Muon, create_auto_config, group_parameters


def check_groups(mesh: DeviceMesh) -> None:
    """Check that the groups of this rank have only this rank in common."""
    ranks = [set(dist.get_process_group_ranks(group)) for group in mesh.get_all_groups()]
    assert set.intersection(*ranks) == {dist.get_rank()}, ranks
    print_rank_0(
        f"groups of rank 0: {dict(zip(mesh.mesh_dim_names, map(sorted, ranks), strict=True))}"
    )


def check_round_trip(shard: Tensor, config: DistributedConfig) -> None:
    """Check that a gathered and redistributed shard is unchanged."""
    full_tensor = config.gather_fn(shard, dist.get_rank(), config.state)
    result = config.redistribute_fn(full_tensor, dist.get_rank(), config.state)
    assert torch.equal(result, shard), "gather and redistribute changed a shard"
    shapes = f"{list(shard.shape)} -> {list(full_tensor.shape)}"
    print_rank_0(f"gather and redistribute: {shapes} -> the same shard")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the traces")
    out = parser.parse_args().out
    device = start()
    mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("dp_shard", "tp"))
    check_groups(mesh)
    model = make_model(device)
    for layer in model.layers:
        parallelize_module(layer, mesh["tp"], TP_PLAN)
        fully_shard(layer, mesh=mesh["dp_shard"])
    fully_shard(model, mesh=mesh["dp_shard"])

    config = create_auto_config(
        fsdp_process_group=mesh.get_group("dp_shard"),
        tp_process_group=mesh.get_group("tp"),
        # Used only by manual calls of the config's functions, as in check_round_trip: out_proj is
        # sharded over dp_shard along rows, over tp along columns. A step reads the DTensors.
        fsdp_shard_dim=0,
        tp_shard_dim=1,
    )
    config.async_gpu_parallelism = False  # ranks orthogonalize one after the other
    config.prefetch_count = 0  # no exchange while a matrix is orthogonalized
    check_round_trip(model.layers[0].attention.out_proj.weight.to_local().detach(), config)

    groups = group_parameters(model, lr=0.02, adamw={"lr": 3e-3})
    optimizer = Muon(groups, distributed_config=config, trace=True)
    print_rank_0(optimizer.plan)
    batch = data(device, mesh.get_local_rank("dp_shard"), mesh["dp_shard"].size())
    print_losses(train(model, optimizer, batch))
    optimizer.trace.save(out / f"trace_{dist.get_rank()}.json")
    finish()


if __name__ == "__main__":
    main()
