"""Debug mode: one rank works at a time, nothing is in flight overlapped, and a trace shows it.

    torchrun --nproc-per-node 4 examples/debug_mode.py --out /tmp

writes trace_RANK.json, for chrome://tracing or ui.perfetto.dev. Before it trains it checks the
process groups, and that gathering and redistributing a shard changes nothing.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from common import TP_PLAN, data, finish, make_model, say, say_losses, start, train
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from muon_dtensor import DistributedConfig, Muon, create_auto_config, group_parameters


def check_groups(mesh: DeviceMesh) -> None:
    """Groups are orthogonal: this rank is all that any two of them have in common."""
    ranks = [set(dist.get_process_group_ranks(group)) for group in mesh.get_all_groups()]
    assert set.intersection(*ranks) == {dist.get_rank()}, ranks
    say(f"groups of rank 0: {dict(zip(mesh.mesh_dim_names, map(sorted, ranks), strict=True))}")


def check_round_trip(shard: Tensor, config: DistributedConfig) -> None:
    """A shard that is gathered and redistributed is as before."""
    whole = config.gather_fn(shard, dist.get_rank(), config.state)
    back = config.redistribute_fn(whole, dist.get_rank(), config.state)
    assert torch.equal(back, shard), "gather and redistribute changed a shard"
    say(f"gather and redistribute: {list(shard.shape)} -> {list(whole.shape)} -> the same shard")


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
        # What the functions of the config do when they are called by hand, as below: out_proj is
        # cut over dp_shard along rows, over tp along columns. A step asks the DTensors instead.
        fsdp_shard_dim=0,
        tp_shard_dim=1,
    )
    config.async_gpu_parallelism = False  # ranks orthogonalize one after the other
    config.prefetch_count = 0  # no exchange while a matrix is orthogonalized
    check_round_trip(model.layers[0].attention.out_proj.weight.to_local().detach(), config)

    groups = group_parameters(model, lr=0.02, adamw={"lr": 3e-3})
    optimizer = Muon(groups, distributed_config=config, trace=True)
    say(optimizer.plan)
    batch = data(device, mesh.get_local_rank("dp_shard"), mesh["dp_shard"].size())
    say_losses(train(model, optimizer, batch))
    optimizer.trace.save(out / f"trace_{dist.get_rank()}.json")
    finish()


if __name__ == "__main__":
    main()
