"""DDP without a config (every rank orthogonalizes every matrix) and with one (ranks share them).

    torchrun --nproc-per-node 2 examples/ddp.py

Both runs end with bitwise equal parameters.
"""

import torch
import torch.distributed as dist
from common import data, finish, make_model, print_losses, print_rank_0, start, train
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from muon_dtensor import DistributedConfig, Muon, create_auto_config, group_parameters


def run(device: torch.device, config: DistributedConfig | None) -> list[Tensor]:
    """Train with or without a config. Returns the trained parameters."""
    model = DistributedDataParallel(make_model(device))
    groups = group_parameters(model, lr=0.02, adamw={"lr": 3e-3})
    optimizer = Muon(groups, distributed_config=config)
    print_rank_0(optimizer.plan)
    print_losses(train(model, optimizer, data(device, dist.get_rank(), dist.get_world_size())))
    return list(model.parameters())


def main() -> None:
    device = start()
    print_rank_0("--- without a config: every rank orthogonalizes every matrix")
    replicated = run(device, None)
    print_rank_0(
        "--- with a config: each matrix has one owner, which sends its update to the other ranks"
    )
    # cp_process_group=dist.group.WORLD has the same effect: parameters are replicated over it
    shared = run(device, create_auto_config(ddp_process_group=dist.group.WORLD))
    same = all(torch.equal(a, b) for a, b in zip(replicated, shared, strict=True))
    print_rank_0(f"same parameters: {same}")
    finish()


if __name__ == "__main__":
    main()
