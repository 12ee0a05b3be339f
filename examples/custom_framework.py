"""A custom framework moves the matrices: user-written assign, gather and redistribute functions.

    torchrun --nproc-per-node 2 examples/custom_framework.py

A second run lets the planner move the same shards, with owners from a user-written function, and
compares the parameters.
"""

from typing import Any

import torch
import torch.distributed as dist
from common import (
    STEPS,
    FeedForward,
    finish,
    mean_over_ranks,
    print_losses,
    print_rank_0,
    start,
    vectors,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from muon_dtensor import DistributedConfig, Muon, create_auto_config

State = dict[str, Any]


class Framework:
    """Stand-in for a proprietary framework that shards rows of every matrix."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, which must have equal shapes."""
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return parts

    def scatter(self, shards: list[Tensor], src: int) -> Tensor:
        """Return this rank's shard of the list on rank `src`."""
        out = torch.empty_like(shards[self.rank])
        dist.scatter(out, shards if self.rank == src else None, src=src)
        return out

    def average(self, tensor: Tensor) -> Tensor:
        """Return the mean over ranks."""
        dist.all_reduce(tensor)
        return tensor / self.world_size


def assign_fn(params: list[Tensor], state: State) -> dict[int, list[int]]:
    """Assign owners round robin: rank i owns parameters i, i + world_size, ..."""
    world_size = state["world_size"]
    return {rank: list(range(rank, len(params), world_size)) for rank in range(world_size)}


def gather_fn(shard: Tensor, owner: int, state: State) -> Tensor:
    """Return the full matrix. Ranks other than `owner` may return None."""
    return torch.cat(state["framework"].all_gather(shard), dim=state["shard_dim"])


def redistribute_fn(full: Tensor | None, owner: int, state: State) -> Tensor:
    """Return this rank's shard of the owner's matrix. Of other ranks only the shape is used."""
    shards = full.tensor_split(state["world_size"], dim=state["shard_dim"])
    return state["framework"].scatter([s.contiguous() for s in shards], src=owner)


def size_aware_assign_fn(params: list[Tensor], state: State) -> dict[int, list[int]]:
    """Assign parameters by descending size, each to the rank with the fewest elements."""
    assignments: dict[int, list[int]] = {rank: [] for rank in range(state["world_size"])}
    loads = [0] * state["world_size"]
    for index in sorted(range(len(params)), key=lambda i: -params[i].numel()):
        rank = loads.index(min(loads))
        assignments[rank].append(index)
        loads[rank] += params[index].numel()
    print_rank_0(f"elements per rank: {loads}")
    return assignments


def run(
    framework: Framework, config: DistributedConfig, device: torch.device
) -> tuple[list[Tensor], ...]:
    """Train shards with a config. Returns the shards after the first and after the last step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(FeedForward() for _ in range(2))).to(device)
    shards = {
        name: nn.Parameter(param.detach().chunk(framework.world_size)[framework.rank].clone())
        for name, param in model.named_parameters()
    }
    # float32, because in bfloat16 last-bit differences grow from step to step
    optimizer = Muon(shards.items(), lr=0.02, distributed_config=config, ns_dtype=torch.float32)
    if config.gather_fn is not gather_fn:
        print_rank_0(optimizer.plan)  # user-written functions have no plan
    x, target = vectors(device, framework.rank, framework.world_size)
    losses = []
    for _ in range(STEPS):
        full_params = {
            name: torch.cat(framework.all_gather(shard.detach())).requires_grad_()
            for name, shard in shards.items()
        }
        loss = mse_loss(functional_call(model, full_params, x), target)
        loss.backward()
        for name, shard in shards.items():
            grad = framework.average(full_params[name].grad)
            shard.grad = grad.chunk(framework.world_size)[framework.rank]
        optimizer.step()
        losses.append(mean_over_ranks(loss))
        if len(losses) == 1:
            first = [shard.detach().clone() for shard in shards.values()]
    print_losses(losses)
    return first, list(shards.values())


def are_close(a: list[Tensor], b: list[Tensor], rtol: float, atol: float = 1e-8) -> bool:
    """Whether shards are equal within these tolerances."""
    return all(torch.allclose(x, y, rtol=rtol, atol=atol) for x, y in zip(a, b, strict=True))


def main() -> None:
    device = start()
    framework = Framework()
    state = {
        "rank": framework.rank,
        "world_size": framework.world_size,
        "framework": framework,
        "shard_dim": 0,
    }
    custom = run(framework, DistributedConfig(assign_fn, gather_fn, redistribute_fn, state), device)

    # The framework's ranks form a process group, so a config from a factory can move the shards:
    # in buckets, each matrix only to its owner.
    config = create_auto_config(fsdp_process_group=dist.group.WORLD, fsdp_shard_dim=0)
    config.assign_fn = size_aware_assign_fn
    planned = run(framework, config, device)
    # Not bitwise: user-written functions move updates that are already scaled by `lr`, which may
    # change the last bit. Later steps start from this difference.
    same = are_close(custom[0], planned[0], 1e-6) and are_close(custom[1], planned[1], 1e-5, 1e-6)
    print_rank_0(f"same parameters: {same}")
    finish()


if __name__ == "__main__":
    main()
