"""A fault in the config of one rank raises on every connected rank within seconds."""

import copy
import gc
import pickle
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import Replicate, Shard

from muon_dtensor import (
    DistributedConfig,
    Muon,
    create_auto_config,
    create_devicemesh_config,
    create_processgroup_config,
)
from muon_dtensor.runtime.torch_private import local_part
from tests.support.cases import Oracle, mesh_of, spread, tensors_like
from tests.support.deadlines import slowness
from tests.support.pool import run_processes
from tests.support.threads import run_threads

R, S0 = Replicate(), Shard(0)


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")
    return ""


def wrong_on_one_rank(kind: str) -> tuple[str, float]:
    """Rank 3 of a 2 x 2 grid passes other groups than the other ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    groups: dict[str, Any] = {"fsdp_process_group": dp, "tp_process_group": tp}
    trio = dist.new_group([0, 1, 2])
    if dist.get_rank() == 3:
        match kind:
            case "no member":
                groups["tp_process_group"] = trio
            case "omits a group":
                del groups["tp_process_group"]
            case "same group twice":
                groups["tp_process_group"] = dp
            case "swapped":
                groups = {"fsdp_process_group": tp, "tp_process_group": dp}
            case "other keywords":
                groups = {"replicate_process_group": dp, "tp_process_group": tp}
    start = time.monotonic()
    text = error_of(lambda: create_auto_config(**groups))
    return text, time.monotonic() - start


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no member", "does not contain rank 3"),
        ("omits a group", "tp_process_group"),
        ("same group twice", "both hold ranks"),
        ("swapped", "passes"),
        ("other keywords", "passes"),
        ("nothing wrong", ""),
    ],
)
def test_wrong_groups_on_one_rank_raise_on_all(kind, words):
    for text, seconds in run_processes(4, wrong_on_one_rank, kind):
        assert seconds < 20 * slowness()
        if kind == "nothing wrong":
            assert text == ""
        else:
            assert re.match(f"ValueError: .*{words}", text), text


def ring() -> str:
    """Pairs around a ring of six ranks: two groups share one rank, but do not form a grid."""
    rank = dist.get_rank()
    even = [dist.new_group([i, i + 1]) for i in (0, 2, 4)]
    odd = [dist.new_group(sorted([i, (i + 1) % 6])) for i in (1, 3, 5)]
    return error_of(
        lambda: create_auto_config(
            fsdp_process_group=even[rank // 2], tp_process_group=odd[((rank - 1) % 6) // 2]
        )
    )


def test_groups_that_do_not_form_a_grid_raise_on_all_ranks():
    for text in run_processes(6, ring):
        assert "do not form a grid" in text


def one_rank_without_parameters() -> str:
    config = create_processgroup_config(fsdp_pg=dist.group.WORLD)
    params = [] if dist.get_rank() == 1 else [("w", nn.Parameter(torch.ones(2, 3)))]
    return error_of(lambda: Muon(params, distributed_config=config))


def test_a_rank_without_parameters_raises_on_every_rank():
    for text in run_processes(2, one_rank_without_parameters):
        assert re.match("PlanMismatchError: .*rank 0 has 1 .w., rank 1 has 0", text), text


def fsdp1(model: nn.Module, **options: Any) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu"), **options
    )


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def beside_slices() -> str:
    inner = TwoLayers()
    model = fsdp1(inner, ignored_modules=[inner.second])
    config = create_processgroup_config(fsdp_pg=dist.group.WORLD)
    return error_of(lambda: Muon(model.named_parameters(), distributed_config=config))


def frozen_by_gc() -> str:
    model = fsdp1(TwoLayers())
    config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    gc.freeze()
    try:
        return error_of(lambda: Muon(model.named_parameters(), distributed_config=config))
    finally:
        gc.unfreeze()


def swapped_hybrid() -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    shard, replicate = mesh.get_group("shard"), mesh.get_group("replicate")
    model = fsdp1(
        nn.Linear(8, 8, bias=False),
        process_group=(shard, replicate),
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
    )
    config = create_auto_config(shard_process_group=replicate, replicate_process_group=shard)
    return error_of(lambda: Muon(model.named_parameters(), distributed_config=config))


def without_sync() -> str:
    torch.manual_seed(0)
    model = fsdp1(TwoLayers())
    config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    optimizer = Muon(model.named_parameters(), distributed_config=config)
    with model.no_sync():
        model(torch.ones(3, 8)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    text = error_of(optimizer.step)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (beside_slices, "PlanError.*plain tensor beside DTensors or slices of FSDP1"),
        (frozen_by_gc, r"PlanError.*before gc.freeze\(\)"),
        (swapped_hybrid, "PlanError.*as the matching argument"),
        (without_sync, "RuntimeError.*(no_sync|another rank|Another rank)"),
    ],
)
def test_configs_that_do_not_match_fsdp1_raise(body, words):
    for text in run_processes(4, body):
        assert re.match(words, text), text


def dtensors_in_another_group(later: bool) -> str:
    mesh = mesh_of((2,))
    config = create_auto_config(tp_process_group=mesh.get_group("a"), tp_shard_dim=0)
    plain = {"params": [("w", nn.Parameter(torch.ones(4, 4)))]}
    other = nn.Parameter(spread(torch.ones(4, 4), mesh, (R,)))
    adamw = {"params": [("d", other)], "algorithm": "adamw"}
    if not later:
        return error_of(lambda: Muon([plain, adamw], distributed_config=config))
    optimizer = Muon([plain], distributed_config=config)
    text = error_of(lambda: optimizer.add_param_group(adamw))
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4, 4)
    optimizer.step()
    return text


@pytest.mark.parametrize("later", [False, True])
def test_a_rule_for_all_parameters_beside_dtensors_raises(later):
    for text in run_processes(2, dtensors_in_another_group, later):
        assert re.match("PlanError.*w.*beside DTensors", text), text


def failing_group() -> int:
    config = create_devicemesh_config(mesh_of((2,)))
    config.assign_fn = lambda params, state: {i: [0][i] for i in range(len(params))}
    optimizer = Muon([("a", nn.Parameter(torch.ones(2, 2)))], distributed_config=config)
    group = {"params": [("b", nn.Parameter(torch.ones(2, 2)))]}
    with pytest.raises(IndexError):
        optimizer.add_param_group(group)
    return len(optimizer.param_groups)


def test_a_group_is_not_added_after_any_error():
    assert run_threads(2, failing_group) == [1, 1]


def groups_of_one() -> list[bool]:
    mesh = init_device_mesh("cpu", (4, 1), mesh_dim_names=("fsdp", "tp"))
    config = create_auto_config(
        fsdp_process_group=mesh.get_group("fsdp"), tp_process_group=mesh.get_group("tp")
    )
    model = fsdp1(TwoLayers())
    weights = tensors_like([(8, 8), (8, 8)], 0)
    with FullyShardedDataParallel.summon_full_params(model):
        for param, weight in zip(model.parameters(), weights, strict=True):
            param.data.copy_(weight)
    optimizer = Muon(model.named_parameters(), distributed_config=config)
    oracle = Oracle(weights)
    x = torch.ones(2, 8)
    model(x).square().sum().backward()
    reference = TwoLayers()
    for param, weight in zip(reference.parameters(), weights, strict=True):
        param.data.copy_(weight)
    reference(x).square().sum().backward()
    oracle.step([p.grad for p in reference.parameters() if p.grad is not None])
    optimizer.step()
    with FullyShardedDataParallel.summon_full_params(model):
        return [
            torch.equal(p, w) for p, w in zip(model.parameters(), oracle.results(), strict=True)
        ]


def test_a_group_of_one_rank_does_not_cut():
    assert run_processes(4, groups_of_one) == [[True, True]] * 4


def shapes_of_assign_fn() -> list[Any]:
    shapes: list[Any] = []
    model = fsdp1(TwoLayers())
    config = create_auto_config(fsdp_process_group=dist.group.WORLD)

    def assign(params: Any, state: Any) -> dict[int, int]:
        shapes.extend((tuple(p.shape), p.device.type) for p in params)
        return {0: 0, 1: 1}

    config.assign_fn = assign
    Muon(model.named_parameters(), distributed_config=config)
    return shapes


def test_assign_fn_gets_the_same_shapes_on_every_rank():
    assert run_processes(2, shapes_of_assign_fn) == [[((8, 8), "meta")] * 2] * 2


def copies() -> bool:
    config = create_processgroup_config(fsdp_pg=dist.group.WORLD)
    param = nn.Parameter(torch.ones(2, 3))
    optimizer = Muon([("w", param)], distributed_config=config, trace=True)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.trace is not None
        assert copied.plan.digest == optimizer.plan.digest
        copied.param_groups[0]["params"][0].grad = torch.ones(2, 3)
        copied.step()
    optimizer.load_state_dict(optimizer.state_dict())
    return True


def test_copies_and_pickles():
    assert run_processes(2, copies) == [True] * 2


@pytest.mark.parametrize("dims", [True, "0", 1.0, [0, "1"], {1: 0}, [[0, 1]]], ids=str)
def test_invalid_tensor_dims_raise(dims):
    with pytest.raises(ValueError, match="tp_shard_dim must be"):
        create_processgroup_config(tp_shard_dim=dims)


def rules_by_parameter() -> tuple[str, str]:
    group = dist.group.WORLD
    config = create_processgroup_config(tp_pg=group, tp_shard_dim=[0, 1])
    by_hand = error_of(lambda: config.gather_fn(torch.ones(2, 2), 0, config.state))
    too_many = error_of(
        lambda: Muon([("w", nn.Parameter(torch.ones(2, 2)))], distributed_config=config)
    )
    return by_hand, too_many


def test_a_rule_by_parameter_does_not_apply_to_a_tensor_without_a_name():
    for by_hand, too_many in run_processes(2, rules_by_parameter):
        assert "tp_shard_dim was given for each parameter" in by_hand
        assert "tp_shard_dim has 2 tensor dims for 1 parameters" in too_many


def gathered_on_a_sub_mesh() -> list[Any]:
    mesh = mesh_of((2, 2))
    config = create_devicemesh_config(mesh)
    full = tensors_like([(6, 4)], 0)[0]
    shard = spread(full, mesh["b"], (S0,))
    gathered = [config.gather_fn(shard, rank, config.state) for rank in range(4)]
    return [None if g is None else torch.equal(g, full) for g in gathered]


def test_a_sub_mesh_gathers_on_the_line_of_the_destination():
    for rank, gathered in enumerate(run_threads(4, gathered_on_a_sub_mesh)):
        assert gathered == [True if other == rank else None for other in range(4)]


def gathered_and_redistributed(kind: str) -> str:
    """Call gather_fn and redistribute_fn of a factory's config; return the error or outcome."""
    rank, world = dist.get_rank(), dist.group.WORLD
    full = tensors_like([(10, 6)], 0)[0]
    config = create_auto_config(fsdp_process_group=world)
    match kind:
        case "slices of FSDP1":
            shard = full.flatten()[[0, 7, 30, 44][rank] : [7, 30, 44, 60][rank]]
        case "rows of FSDP2":
            shard = spread(full, mesh_of((4,)), (S0,))
        case "cols":
            shard = full.chunk(3, dim=1)[rank] if rank < 3 else full[:, :0]
        case "a DTensor":
            config = create_devicemesh_config(mesh_of((4,)))
            shard = spread(full, mesh_of((4,)), (S0,))
        case "a replica":
            config = create_devicemesh_config(mesh_of((4,)))
            shard = full
    gathered = config.gather_fn(shard, 0, config.state)
    if gathered is not None:
        assert torch.equal(gathered.view(-1), full.view(-1))
    try:
        back = config.redistribute_fn(gathered, 0, config.state)
    except ValueError as error:
        return str(error)
    return "the same" if torch.equal(back, local_part(shard)) else "another shard"


@pytest.mark.parametrize("kind", ["slices of FSDP1", "rows of FSDP2", "a DTensor"])
def test_shards_that_would_be_redistributed_differently_raise(kind):
    for message in run_processes(4, gathered_and_redistributed, kind):
        assert "a tensor of 60 elements was gathered from shards that are not those" in message


@pytest.mark.parametrize("kind", ["cols", "a replica"])
def test_gathered_shards_are_redistributed_as_they_were(kind):
    assert run_processes(4, gathered_and_redistributed, kind) == ["the same"] * 4


class Unhashable:
    """A function that cannot be hashed."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, tensor: Any, *_: Any) -> Any:
        return tensor


def step_with_a_named_mesh(kind: str) -> str:
    """Step with a hand-written config whose state has the mesh of its ranks."""
    mesh = mesh_of((2,))
    rank = dist.get_rank()
    config = DistributedConfig(
        lambda params, state: dict.fromkeys(range(len(params)), 0),
        Unhashable(),
        lambda full_tensor, *_: None if kind == "none" else full_tensor,
        {"device_mesh": mesh},
    )
    sizes = (2, 3) if rank == 0 or kind != "uneven" else (0, 3)
    params = [nn.Parameter(torch.ones(sizes)), nn.Parameter(torch.ones(2, 2))]
    optimizer = Muon([("a", params[0]), ("b", params[1])], distributed_config=config)
    for index, param in enumerate(params):
        if kind != "crossed" or index == rank:
            param.grad = torch.ones_like(param)
    return error_of(optimizer.step)


def test_ranks_of_a_hand_written_config_compare_over_its_mesh():
    for text in run_processes(2, step_with_a_named_mesh, "crossed"):
        assert text.startswith("MissingGradientError")
        assert "a: no gradient on rank 1" in text
    first, second = run_processes(2, step_with_a_named_mesh, "none")
    assert "redistribute_fn returned None for a on rank 0" in first
    assert "redistribute_fn returned None for a on rank 1" in second


def unused_and_empty() -> list[str]:
    """Return the gathers of a step with a parameter that has no gradient and is empty on a rank."""
    calls: list[str] = []

    def gather(update: Tensor, owner: int, state: Any) -> Tensor:
        calls.append(str(tuple(update.shape)))
        return update

    config = DistributedConfig(
        lambda params, state: {0: 0, 1: 0}, gather, lambda full_tensor, *_: full_tensor, {}
    )
    sizes = (2, 3) if dist.get_rank() == 0 else (0, 3)
    unused, used = nn.Parameter(torch.ones(sizes)), nn.Parameter(torch.ones(2, 2))
    used.grad = torch.ones(2, 2)
    optimizer = Muon([unused, used], distributed_config=config, nonfinite="propagate")
    optimizer.step()
    return calls


def test_a_parameter_without_gradients_is_not_gathered():
    assert run_processes(2, unused_and_empty) == [["(2, 2)"]] * 2


def test_hand_written_functions_can_move_flat_shards():
    """Shards are flat, as in ZeRO. Only the functions know the matrix."""
    weight, grad = tensors_like([(4, 6), (4, 6)], 0)
    param = nn.Parameter(weight.flatten().clone())
    config = DistributedConfig(
        lambda params, state: {0: 0},
        lambda update, owner, state: update.view(4, 6),
        lambda full_tensor, owner, state: full_tensor.flatten(),
    )
    optimizer = Muon([param], distributed_config=config)
    oracle = Oracle([weight])
    param.grad = grad.flatten()
    optimizer.step()
    oracle.step([grad])
    assert torch.equal(param.view(4, 6), oracle.results()[0])
