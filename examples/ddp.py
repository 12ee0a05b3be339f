"""DDP, first without a config: every rank orthogonalizes every matrix. Then its ranks share them.

    torchrun --nproc-per-node 2 examples/ddp.py

Both end with the same parameters, bit for bit.
"""

import torch
import torch.distributed as dist
from common import data, finish, make_model, say, say_losses, start, train
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from muon_dtensor import DistributedConfig, Muon, create_auto_config, group_parameters


def run(device: torch.device, config: DistributedConfig | None) -> list[Tensor]:
    """Train with a config, or without; the trained parameters."""
    model = DistributedDataParallel(make_model(device))
    groups = group_parameters(model, lr=0.02, adamw={"lr": 3e-3})
    optimizer = Muon(groups, distributed_config=config)
    say(optimizer.plan)
    say_losses(train(model, optimizer, data(device, dist.get_rank(), dist.get_world_size())))
    return list(model.parameters())


def main() -> None:
    device = start()
    say("--- without a config: the plan is this rank's own, and every rank does all of it")
    alone = run(device, None)
    say("--- shared: each matrix has one owner, which sends its update to the others")
    # cp_process_group=dist.group.WORLD says the same: parameters are replicated over the group
    shared = run(device, create_auto_config(ddp_process_group=dist.group.WORLD))
    same = all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    say(f"same parameters: {same}")
    finish()


if __name__ == "__main__":
    main()
