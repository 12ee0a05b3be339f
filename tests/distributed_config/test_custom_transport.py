"""A config of the user's own functions: called as promised, right to rounding, misuse is told."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from muon_dtensor import DistributedConfig, Muon, create_processgroup_config
from tests.support.cases import Oracle, tensors_like
from tests.support.meter import counting, installed
from tests.support.pool import process_outcomes, run_processes
from tests.support.separate import Separate
from tests.support.threads import run_threads

SHAPES = [(8, 12), (12, 12), (4, 16), (8, 3, 5)]
WORLD = 4


class Framework:
    """Stands for a proprietary framework: it has its own collectives, and counts its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        gathered: list[Any] = [None] * WORLD
        dist.all_gather_object(gathered, tensor)
        return gathered

    def scatter(self, whole: Tensor | None, src: int) -> Tensor:
        box = [whole if dist.get_rank() == src else None]
        dist.broadcast_object_list(box, src=src)
        shard: Tensor = box[0].chunk(WORLD)[dist.get_rank()]  # type: ignore[union-attr]
        return shard.clone()


def assign(params: Any, state: dict[str, Any]) -> dict[int, list[int]]:
    state["framework"].calls.append(("assign", len(params)))
    return {rank: list(range(rank, len(params), WORLD)) for rank in range(WORLD)}


def gather_everywhere(update: Tensor, owner: int, state: dict[str, Any]) -> Tensor:
    state["framework"].calls.append(("gather", owner))
    return torch.cat(state["framework"].all_gather(update))


def gather_at_owner(update: Tensor, owner: int, state: dict[str, Any]) -> Tensor | None:
    whole = gather_everywhere(update, owner, state)
    return whole if dist.get_rank() == owner else None


def scatter(whole: Tensor | None, owner: int, state: dict[str, Any]) -> Tensor:
    state["framework"].calls.append(("redistribute", owner))
    return state["framework"].scatter(whole, owner)


def keep_own_part(whole: Tensor | None, owner: int, state: dict[str, Any]) -> Tensor:
    """Wrong: takes the shard out of what this rank has instead of what the owner has."""
    assert whole is not None
    return whole.chunk(WORLD)[dist.get_rank()].clone()


def made(gather: Any, redistribute: Any, **options: Any) -> tuple[list[nn.Parameter], Muon, Any]:
    framework = Framework()
    state = {"rank": dist.get_rank(), "world_size": WORLD, "framework": framework}
    config = DistributedConfig(assign, gather, redistribute, state)
    weights = [w.chunk(WORLD)[dist.get_rank()].clone() for w in tensors_like(SHAPES, 0)]
    params = [nn.Parameter(w) for w in weights]
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    return params, Muon(named, distributed_config=config, **options), framework


def give_gradients(params: list[nn.Parameter], step: int) -> list[Tensor]:
    grads = tensors_like(SHAPES, 1 + step)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.chunk(WORLD)[dist.get_rank()].clone()
    return grads


def stepped(gather: Any) -> tuple[list[float], list[tuple[str, int]], int]:
    with installed(), counting() as count:
        params, optimizer, framework = made(gather, scatter)
        oracle = Oracle(tensors_like(SHAPES, 0))
        for step in range(2):
            oracle.step(give_gradients(params, step))
            optimizer.step()
    apart = [
        (p - whole.chunk(WORLD)[dist.get_rank()]).abs().max().item()
        for p, whole in zip(params, oracle.results(), strict=True)
    ]
    return apart, framework.calls, count.num_matrices


@pytest.mark.parametrize("gather", [gather_everywhere, gather_at_owner])
def test_functions_are_called_once_each_and_the_result_is_torch_s(gather):
    step = [(what, owner) for owner in range(4) for what in ("gather", "redistribute")]
    outcomes = run_processes(WORLD, stepped, gather)
    for apart, calls, _ in outcomes:
        # wide matrices are bitwise; of tall ones the owner scales the update for their lr
        assert apart[0] == apart[1] == apart[2] == 0
        assert apart[3] <= 1e-7
        assert calls == [("assign", 4), *step, *step]
    # the owner alone orthogonalizes: one matrix each, eight experts on rank 3; two steps
    assert [done for *_, done in outcomes] == [2, 2, 2, 16]


def broken(kind: str) -> tuple[str, bool]:
    gather, redistribute = gather_everywhere, scatter
    if kind == "own part":
        redistribute = keep_own_part
    elif kind == "other shape":
        redistribute = lambda *a: scatter(*a)[:1]  # noqa: E731
    elif kind == "nothing gathered":
        gather = lambda *a: (gather_everywhere(*a), None)[1]  # noqa: E731
    params, optimizer, _ = made(gather, redistribute)
    give_gradients(params, 0)
    before = copy.deepcopy([p.detach() for p in params])
    momenta = [optimizer.state[p]["momentum_buffer"] for p in params]
    try:
        optimizer.step()
    except RuntimeError as error:
        text = str(error)
    else:
        text = ""
    same = all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    return text, same and not any(m.any() for m in momenta)


def test_a_shard_that_is_not_the_owner_s_is_told():
    outcomes = run_processes(WORLD, broken, "own part")
    assert "must hand out what rank 0, the owner, passes to it" in outcomes[1][0]
    for text, unchanged in outcomes:
        assert "redistribute_fn returned NaN or Inf" in text
        assert unchanged


def test_a_shard_of_another_shape_is_told():
    for text, unchanged in run_processes(WORLD, broken, "other shape"):
        assert "redistribute_fn returned [1, 12] for p0" in text
        assert "whose shard is [2, 12]" in text
        assert unchanged


def test_an_owner_without_its_matrix_is_told():
    outcomes = process_outcomes(WORLD, broken, "nothing gathered", collective_seconds=3)
    text, unchanged = outcomes[0][1]
    assert "gather_fn returned None for p0 on its owner, rank 0" in text
    assert unchanged


TALL = [(24, 3), (48, 3, 2, 2)]
"""So that no matrix has the scale 1 of its learning rate."""


def with_declarations() -> tuple[bool, bool]:
    """Fused blocks of one tensor, and a convolution, moved by hand."""
    wholes = tensors_like(TALL, 0)
    params = [nn.Parameter(w.chunk(WORLD)[dist.get_rank()].clone()) for w in wholes]
    framework = Framework()
    config = DistributedConfig(assign, gather_at_owner, scatter, {"framework": framework})
    groups: list[dict[str, Any]] = [
        {"params": [("qkv", params[0])], "split_sizes": (12, 8, 4)},
        {"params": [("conv", params[1])], "matrix": "o i kh kw -> o (i kh kw)"},
    ]
    optimizer = Muon(groups, lr=0.1, distributed_config=config)
    oracles = [Separate(w, group, lr=0.1) for w, group in zip(wholes, groups, strict=True)]
    grads = tensors_like(TALL, 1)
    for param, grad, oracle in zip(params, grads, oracles, strict=True):
        param.grad = grad.chunk(WORLD)[dist.get_rank()].clone()
        oracle.step(grad)
    optimizer.step()
    same = [
        # owners scale updates before they hand them out, which rounds once more
        torch.allclose(p, oracle.whole().chunk(WORLD)[dist.get_rank()], rtol=1e-6, atol=1e-7)
        for p, oracle in zip(params, oracles, strict=True)
    ]
    return same[0], same[1]


def test_declared_matrices_under_hand_written_functions():
    assert run_processes(WORLD, with_declarations) == [(True, True)] * WORLD


def alone() -> list[bool]:
    """Without torch.distributed and without rank or world_size in the state."""
    weights = tensors_like([(4, 6), (6, 4)], 0)
    params = [nn.Parameter(w.clone()) for w in weights]
    config = DistributedConfig(
        lambda params, state: dict.fromkeys(range(len(params)), 0),
        lambda update, owner, state: update,
        lambda whole, owner, state: whole,
    )
    optimizer = Muon(params, distributed_config=config)
    oracle = Oracle(weights)
    grads = tensors_like([(4, 6), (6, 4)], 1)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer.step()
    oracle.step(grads)
    return [
        torch.allclose(p, w, rtol=0, atol=1e-7)
        for p, w in zip(params, oracle.results(), strict=True)
    ]


def test_one_process_without_torch_distributed():
    assert alone() == [True, True]


def test_such_a_config_has_no_plan():
    config = DistributedConfig(lambda *_: {0: 0}, lambda t, *_: t, lambda t, *_: t)
    optimizer = Muon([nn.Parameter(torch.ones(2, 2))], distributed_config=config)
    with pytest.raises(RuntimeError, match="without a plan"):
        _ = optimizer.plan


def replaced_gather() -> int:
    config = create_processgroup_config(fsdp_pg=dist.group.WORLD)
    seen = []
    original = config.gather_fn

    def gather(update: Tensor, owner: int, state: dict[str, Any]) -> Tensor | None:
        seen.append(owner)
        return original(update, owner, state)

    config.gather_fn = gather
    config.assign_fn = lambda params, state: {0: 1}
    weight = tensors_like([(8, 12)], 0)[0]
    param = nn.Parameter(weight.chunk(WORLD)[dist.get_rank()].clone())
    optimizer = Muon([("w", param)], distributed_config=config)
    oracle = Oracle([weight])
    grads = tensors_like([(8, 12)], 1)
    param.grad = grads[0].chunk(WORLD)[dist.get_rank()].clone()
    optimizer.step()
    oracle.step(grads)
    assert torch.equal(param, oracle.results()[0].chunk(WORLD)[dist.get_rank()])
    return len(seen)


def test_a_made_config_with_its_own_gather_is_a_hand_written_one():
    assert run_threads(WORLD, replaced_gather) == [1] * WORLD
