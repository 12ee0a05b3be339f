"""A config with the user's own functions: calls, results up to rounding, and errors of misuse."""

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
    """A mock of a proprietary framework with its own collectives. It records calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        gathered: list[Any] = [None] * WORLD
        dist.all_gather_object(gathered, tensor)
        return gathered

    def scatter(self, full_tensor: Tensor | None, src: int) -> Tensor:
        box = [full_tensor if dist.get_rank() == src else None]
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
    full_tensor = gather_everywhere(update, owner, state)
    return full_tensor if dist.get_rank() == owner else None


def scatter(full_tensor: Tensor | None, owner: int, state: dict[str, Any]) -> Tensor:
    state["framework"].calls.append(("redistribute", owner))
    return state["framework"].scatter(full_tensor, owner)


def keep_own_part(full_tensor: Tensor | None, owner: int, state: dict[str, Any]) -> Tensor:
    """Wrong: cuts the shard from this rank's tensor instead of the owner's."""
    assert full_tensor is not None
    return full_tensor.chunk(WORLD)[dist.get_rank()].clone()


def sharded_optimizer(
    gather: Any, redistribute: Any, **options: Any
) -> tuple[list[nn.Parameter], Muon, Any]:
    framework = Framework()
    state = {"rank": dist.get_rank(), "world_size": WORLD, "framework": framework}
    config = DistributedConfig(assign, gather, redistribute, state)
    weights = [w.chunk(WORLD)[dist.get_rank()].clone() for w in tensors_like(SHAPES, 0)]
    params = [nn.Parameter(w) for w in weights]
    named_params = [(f"p{i}", p) for i, p in enumerate(params)]
    return params, Muon(named_params, distributed_config=config, **options), framework


def set_grads(params: list[nn.Parameter], step: int) -> list[Tensor]:
    grads = tensors_like(SHAPES, 1 + step)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.chunk(WORLD)[dist.get_rank()].clone()
    return grads


def stepped(gather: Any) -> tuple[list[float], list[tuple[str, int]], int]:
    with installed(), counting() as count:
        params, optimizer, framework = sharded_optimizer(gather, scatter)
        oracle = Oracle(tensors_like(SHAPES, 0))
        for step in range(2):
            oracle.step(set_grads(params, step))
            optimizer.step()
    errors = [
        (p - full_tensor.chunk(WORLD)[dist.get_rank()]).abs().max().item()
        for p, full_tensor in zip(params, oracle.results(), strict=True)
    ]
    return errors, framework.calls, count.num_matrices


@pytest.mark.parametrize("gather", [gather_everywhere, gather_at_owner])
def test_functions_are_called_once_each_and_the_result_is_torch_s(gather):
    step = [(what, owner) for owner in range(4) for what in ("gather", "redistribute")]
    outcomes = run_processes(WORLD, stepped, gather)
    for errors, calls, _ in outcomes:
        # Wide matrices are bitwise equal. For tall ones, the owner scales the update for lr.
        assert errors[0] == errors[1] == errors[2] == 0
        assert errors[3] <= 1e-7
        assert calls == [("assign", 4), *step, *step]
    # Only owners orthogonalize: one matrix each, eight experts on rank 3; two steps.
    assert [done for *_, done in outcomes] == [2, 2, 2, 16]


def broken(kind: str) -> tuple[str, bool]:
    gather, redistribute = gather_everywhere, scatter
    if kind == "own part":
        redistribute = keep_own_part
    elif kind == "other shape":
        redistribute = lambda *a: scatter(*a)[:1]  # noqa: E731
    elif kind == "nothing gathered":
        gather = lambda *a: (gather_everywhere(*a), None)[1]  # noqa: E731
    params, optimizer, _ = sharded_optimizer(gather, redistribute)
    set_grads(params, 0)
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


def test_a_shard_that_is_not_the_owner_s_raises():
    outcomes = run_processes(WORLD, broken, "own part")
    assert "must return shards of the tensor that rank 0, the owner, passes to it" in outcomes[1][0]
    for text, unchanged in outcomes:
        assert "redistribute_fn returned NaN or Inf" in text
        assert unchanged


def test_a_shard_of_another_shape_raises():
    for text, unchanged in run_processes(WORLD, broken, "other shape"):
        assert "redistribute_fn returned shape [1, 12] for p0" in text
        assert "whose shard has shape [2, 12]" in text
        assert unchanged


def test_an_owner_without_its_matrix_raises():
    outcomes = process_outcomes(WORLD, broken, "nothing gathered", collective_seconds=3)
    text, unchanged = outcomes[0][1]
    assert "gather_fn returned None for p0 on its owner, rank 0" in text
    assert unchanged


TALL = [(24, 3), (48, 3, 2, 2)]
"""Shapes for which the scale of the learning rate is not 1."""


def with_declarations() -> tuple[bool, bool]:
    """Step fused blocks of one tensor, and a convolution, with the user's functions."""
    full_weights = tensors_like(TALL, 0)
    params = [nn.Parameter(w.chunk(WORLD)[dist.get_rank()].clone()) for w in full_weights]
    framework = Framework()
    config = DistributedConfig(assign, gather_at_owner, scatter, {"framework": framework})
    groups: list[dict[str, Any]] = [
        {"params": [("qkv", params[0])], "split_sizes": (12, 8, 4)},
        {"params": [("conv", params[1])], "matrix": "o i kh kw -> o (i kh kw)"},
    ]
    optimizer = Muon(groups, lr=0.1, distributed_config=config)
    oracles = [Separate(w, group, lr=0.1) for w, group in zip(full_weights, groups, strict=True)]
    grads = tensors_like(TALL, 1)
    for param, grad, oracle in zip(params, grads, oracles, strict=True):
        param.grad = grad.chunk(WORLD)[dist.get_rank()].clone()
        oracle.step(grad)
    optimizer.step()
    same = [
        # Owners scale updates before redistribute_fn, which rounds once more.
        torch.allclose(p, oracle.full_tensor().chunk(WORLD)[dist.get_rank()], rtol=1e-6, atol=1e-7)
        for p, oracle in zip(params, oracles, strict=True)
    ]
    return same[0], same[1]


def test_declared_matrices_under_hand_written_functions():
    assert run_processes(WORLD, with_declarations) == [(True, True)] * WORLD


def single_process_step() -> list[bool]:
    """Step without torch.distributed, and without rank or world_size in the state."""
    weights = tensors_like([(4, 6), (6, 4)], 0)
    params = [nn.Parameter(w.clone()) for w in weights]
    config = DistributedConfig(
        lambda params, state: dict.fromkeys(range(len(params)), 0),
        lambda update, owner, state: update,
        lambda full_tensor, owner, state: full_tensor,
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
    assert single_process_step() == [True, True]


def test_a_hand_written_config_has_no_plan():
    config = DistributedConfig(lambda *_: {0: 0}, lambda t, *_: t, lambda t, *_: t)
    optimizer = Muon([nn.Parameter(torch.ones(2, 2))], distributed_config=config)
    with pytest.raises(RuntimeError, match="there is no plan"):
        _ = optimizer.plan


def replaced_gather() -> int:
    config = create_processgroup_config(fsdp_pg=dist.group.WORLD)
    owners = []
    original = config.gather_fn

    def gather(update: Tensor, owner: int, state: dict[str, Any]) -> Tensor | None:
        owners.append(owner)
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
    return len(owners)


def test_a_factory_s_config_with_another_gather_fn_is_hand_written():
    assert run_threads(WORLD, replaced_gather) == [1] * WORLD
