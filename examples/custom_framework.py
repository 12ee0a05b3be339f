"""A framework of your own moves the matrices: hand-written assign, gather and redistribute.

    torchrun --nproc-per-node 2 examples/custom_framework.py

Then the planner moves the same shards, with owners that a function names: the same parameters.
"""

from typing import Any

import torch
import torch.distributed as dist
from common import STEPS, FeedForward, finish, mean_over_ranks, say, say_losses, start, vectors
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from muon_dtensor import DistributedConfig, Muon, create_auto_config

State = dict[str, Any]


class Framework:
    """Stands for a proprietary one: it keeps rows of every matrix, and has these three calls."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, of one shape."""
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return parts

    def scatter(self, shards: list[Tensor], src: int) -> Tensor:
        """This rank's of the shards that rank `src` has."""
        out = torch.empty_like(shards[self.rank])
        dist.scatter(out, shards if self.rank == src else None, src=src)
        return out

    def average(self, tensor: Tensor) -> Tensor:
        """The mean over ranks."""
        dist.all_reduce(tensor)
        return tensor / self.world_size


def assign_fn(params: list[Tensor], state: State) -> dict[int, list[int]]:
    """Round robin: rank i owns parameters i, i + world_size, ..."""
    world_size = state["world_size"]
    return {rank: list(range(rank, len(params), world_size)) for rank in range(world_size)}


def gather_fn(shard: Tensor, owner: int, state: State) -> Tensor:
    """The whole matrix, here on every rank; None would do on those that do not own it."""
    return torch.cat(state["framework"].all_gather(shard), dim=state["shard_dim"])


def redistribute_fn(whole: Tensor | None, owner: int, state: State) -> Tensor:
    """This rank's shard of what the owner passes; what other ranks pass is only of its shape."""
    shards = whole.tensor_split(state["world_size"], dim=state["shard_dim"])
    return state["framework"].scatter([s.contiguous() for s in shards], src=owner)


def size_aware_assign_fn(params: list[Tensor], state: State) -> dict[int, list[int]]:
    """Largest first, each to the rank with the fewest elements so far."""
    assignments: dict[int, list[int]] = {rank: [] for rank in range(state["world_size"])}
    loads = [0] * state["world_size"]
    for index in sorted(range(len(params)), key=lambda i: -params[i].numel()):
        rank = loads.index(min(loads))
        assignments[rank].append(index)
        loads[rank] += params[index].numel()
    say(f"elements per rank: {loads}")
    return assignments


def run(
    framework: Framework, config: DistributedConfig, device: torch.device
) -> tuple[list[Tensor], ...]:
    """Train shards with a config; the shards after the first step and after the last."""
    torch.manual_seed(0)
    model = nn.Sequential(*(FeedForward() for _ in range(2))).to(device)
    shards = {
        name: nn.Parameter(param.detach().chunk(framework.world_size)[framework.rank].clone())
        for name, param in model.named_parameters()
    }
    # in bfloat16 a last bit that differs grows in each of the steps that follow
    optimizer = Muon(shards.items(), lr=0.02, distributed_config=config, ns_dtype=torch.float32)
    if config.gather_fn is not gather_fn:
        say(optimizer.plan)  # functions have no plan
    x, target = vectors(device, framework.rank, framework.world_size)
    losses = []
    for _ in range(STEPS):
        whole = {
            name: torch.cat(framework.all_gather(shard.detach())).requires_grad_()
            for name, shard in shards.items()
        }
        loss = mse_loss(functional_call(model, whole, x), target)
        loss.backward()
        for name, shard in shards.items():
            grad = framework.average(whole[name].grad)
            shard.grad = grad.chunk(framework.world_size)[framework.rank]
        optimizer.step()
        losses.append(mean_over_ranks(loss))
        if len(losses) == 1:
            first = [shard.detach().clone() for shard in shards.values()]
    say_losses(losses)
    return first, list(shards.values())


def are_close(a: list[Tensor], b: list[Tensor], rtol: float, atol: float = 1e-8) -> bool:
    """Whether shards are equal to these tolerances."""
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
    by_hand = run(
        framework, DistributedConfig(assign_fn, gather_fn, redistribute_fn, state), device
    )

    # The framework's ranks are those of a process group, so a made config can move the shards:
    # in buckets, each matrix to its owner alone.
    config = create_auto_config(fsdp_process_group=dist.group.WORLD, fsdp_shard_dim=0)
    config.assign_fn = size_aware_assign_fn
    planned = run(framework, config, device)
    # after a step to the last bit but one, for functions hand out updates that are scaled for `lr`
    # already; that bit is in the gradients of the steps that follow
    same = are_close(by_hand[0], planned[0], 1e-6) and are_close(by_hand[1], planned[1], 1e-5, 1e-6)
    say(f"same parameters: {same}")
    finish()


if __name__ == "__main__":
    main()
