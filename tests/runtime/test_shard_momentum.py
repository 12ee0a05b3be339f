"""A momentum that is cut over the replicas of its parameter: bitwise, smaller, and in checkpoints.

Ranks are threads here, and processes in `test_over_gloo` and for checkpoints.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from muon_dtensor import (
    CheckpointError,
    DistributedConfig,
    GroupOptionError,
    Muon,
    create_devicemesh_config,
)
from muon_dtensor.distributed_config.full_tensor import cut_like
from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.runtime.dtensors import describe_layout, from_shard, placements_of
from muon_dtensor.runtime.torch_private import StridedShard, fake_process_group
from tests.support.cases import compare_in_process, mesh_of, spread, tensors_like
from tests.support.layouts import EVEN, EXPERTS, LAYOUTS, ODD, case, hold_to_plan, run
from tests.support.pool import run_processes
from tests.support.threads import run_threads

R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)
CUT = {"shard_momentum": True}


@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS)
@pytest.mark.parametrize("shapes", [EVEN, ODD], ids=["even", "odd"])
def test_matrices(mesh_shape, placements, shapes):
    outcomes = run(case(mesh_shape, shapes, placements, ours=CUT))
    hold_to_plan(outcomes)
    if shapes is EVEN and 3 not in mesh_shape:
        assert sum(o.sent_nbytes for o in outcomes) == outcomes[0].bound_nbytes


@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [
        ((4,), (R,)),
        ((2, 2), (R, S0)),
        ((2, 2), (R, S2)),
        ((2, 2, 2), (R, S0, S2)),
        ((3, 2), (R, R)),
    ],
    ids=str,
)
@pytest.mark.parametrize("strategy", ["auto", "owned_staged"])
def test_experts_and_small_buckets(mesh_shape, placements, strategy):
    ours = {**CUT, "bucket_mb": 1e-4, "prefetch_count": 2, "strategy": strategy}
    hold_to_plan(run(case(mesh_shape, (*EXPERTS, *EXPERTS), placements, ours=ours)))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"muon": {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}},
        {"ours": {**CUT, "deferred_checks": True}},
        {"ours": {**CUT, "async_gpu_parallelism": False}},
    ],
    ids=["bf16", "options", "masked", "sequential"],
)
@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS[2::3])
def test_options(mesh_shape, placements, options):
    hold_to_plan(run(case(mesh_shape, EVEN + ODD, placements, **{"ours": CUT, **options})))


@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [((4,), (R,)), ((2, 2), (R, S0)), ((2, 2), (S1, R)), ((2, 2, 2), (R, S0, S0))],
    ids=["ddp", "hsdp", "replicas-inside", "hsdp-tp"],
)
def test_over_gloo(mesh_shape, placements):
    shapes = (*EVEN, *ODD, (40, 33))
    one = case(mesh_shape, shapes, placements, ours={**CUT, "bucket_mb": 1e-3})
    hold_to_plan(run_processes(one.num_ranks, compare_in_process, one))


@st.composite
def layouts(draw) -> Layout:
    names = draw(st.permutations(["a", "b", "c"]))[: draw(st.integers(1, 3))]
    mesh = MeshSpec.of(**{name: draw(st.integers(1, 4)) for name in names})
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    cuts: list[tuple[str, ...]] = [()] * len(shape)
    for name in draw(st.permutations(names)):
        where = draw(st.integers(-1, len(shape) - 1))
        if where >= 0:
            cuts[where] = (*cuts[where], name)
    return Layout(mesh, shape, tuple(cuts))


@settings(deadline=None, derandomize=True)
@given(layouts())
def test_cut_over_replicas_every_element_is_on_one_rank_that_stored_it(layout):
    further = layout.over_replicas
    positions = range(layout.mesh.num_ranks)
    sizes = [further.region(p).numel for p in positions]
    first_of_ones = [p for p in positions if layout.mesh.index_along(p, further.replica_dims) == 0]
    assert sum(sizes[p] for p in first_of_ones) == torch.Size(layout.shape).numel()
    assert all(layout.region(p).covers(further.region(p)) for p in positions)
    assert not further.replica_dims
    assert further.over_replicas is further


@dataclass
class Found:
    """What a rank holds after a step: elements of momentum and parameter, and where they are."""

    momentum: int
    param: int
    placements: tuple
    summary: str
    explained: str


def found_after_a_step(mesh_shape: tuple, placements: tuple, shape: tuple, plain: bool) -> Found:
    mesh = mesh_of(mesh_shape)
    (weight,), (grad,) = tensors_like([shape], 0), tensors_like([shape], 1)
    param = nn.Parameter(weight if plain else spread(weight, mesh, placements))
    config = create_devicemesh_config(mesh) if plain else None
    optimizer = Muon([("w", param)], distributed_config=config, **CUT)
    param.grad = grad if plain else spread(grad, mesh, placements)
    optimizer.step()
    momentum = optimizer.state[param]["momentum_buffer"]
    whole = momentum.full_tensor()
    assert torch.equal(whole, torch.zeros(shape).lerp(grad, 0.05))
    return Found(
        momentum.to_local().numel(),
        (param if plain else param.to_local()).numel(),
        momentum.placements,
        str(optimizer.plan),
        optimizer.plan.explain("w"),
    )


@pytest.mark.parametrize(
    ("mesh_shape", "placements", "shape", "expected"),
    [
        ((4,), (R,), (8, 6), (S0,)),
        ((4,), (R,), (6, 8), (S1,)),
        ((2, 2), (R, S0), (8, 6), (StridedShard(0, split_factor=2), S0)),
        ((2, 2), (R, S0), (6, 8), (S1, S0)),
        ((2, 2), (R, R), (3, 8, 5), (S1, S1)),
        ((4,), (R,), (4, 6, 5), (S0,)),
    ],
    ids=str,
)
def test_each_replica_stores_its_part(mesh_shape, placements, shape, expected):
    for found in run_threads(4, found_after_a_step, mesh_shape, placements, shape, False):
        replicas = 4 if placements[-1] == R else 2
        assert found.momentum * replicas == found.param
        assert found.placements == expected
        total = torch.Size(shape).numel()
        line = "momentum cut over replicas: at most {:,} elements a rank, of weights {:,}"
        assert line.format(total // 4, total * replicas // 4) in found.summary
        assert "\n  momentum: " in found.explained


def test_plain_replicas_of_ddp():
    for found in run_threads(4, found_after_a_step, (4,), (R,), (8, 6), True):
        assert found.momentum * 4 == found.param == 48


@settings(deadline=None, derandomize=True)
@given(layouts())
def test_placements_describe_the_layout(layout):
    further = layout.over_replicas
    mesh = layout.mesh
    with fake_process_group(mesh.num_ranks):
        device_mesh = init_device_mesh("cpu", mesh.shape, mesh_dim_names=mesh.dim_names)
        shard = torch.zeros(further.region(0).shape)
        value = from_shard(shard, device_mesh, placements_of(further), further.shape)
        described = describe_layout(value, mesh)
    assert [described.region(p) for p in range(mesh.num_ranks)] == [
        further.region(p) for p in range(mesh.num_ranks)
    ]


SHAPES = ((8, 16), (16, 8), (4, 8, 8))


def trained(mesh_shape: tuple, placements: tuple, num_steps: int, **options: Any):
    mesh = mesh_of(mesh_shape)
    weights = tensors_like(SHAPES, 0)
    params = [nn.Parameter(spread(w, mesh, placements)) for w in weights]
    optimizer = Muon([(f"w{i}", p) for i, p in enumerate(params)], **options)
    train(params, optimizer, range(num_steps))
    return params, optimizer


def train(params: list, optimizer: Muon, steps: range) -> None:
    for step in steps:
        for param, grad in zip(params, tensors_like(SHAPES, 1 + step), strict=True):
            param.grad = spread(grad, param.device_mesh, param.placements)
        optimizer.step()


def named(params: list, optimizer: Muon) -> dict[str, Any]:
    state = {f"w{i}": dict(optimizer.state[p]) for i, p in enumerate(params)}
    return {"params": {f"w{i}": p.detach() for i, p in enumerate(params)}, "state": state}


def saved(path: str, mesh_shape: tuple, placements: tuple, cut: bool) -> None:
    params, optimizer = trained(mesh_shape, placements, 2, shard_momentum=cut)
    dcp.save(named(params, optimizer), checkpoint_id=path)


def resumed(path: str, mesh_shape: tuple, placements: tuple, cut: bool) -> list[Tensor]:
    """Load, step twice, and return full weights."""
    params, optimizer = trained(mesh_shape, placements, 0, shard_momentum=cut)
    dcp.load(named(params, optimizer), checkpoint_id=path)
    train(params, optimizer, range(2, 4))
    return [p.detach().full_tensor() for p in params]


def uninterrupted() -> list[Tensor]:
    params = [nn.Parameter(w) for w in tensors_like(SHAPES, 0)]
    optimizer = Muon(params)
    for step in range(4):
        for param, grad in zip(params, tensors_like(SHAPES, 1 + step), strict=True):
            param.grad = grad
        optimizer.step()
    return [p.detach() for p in params]


LOADED = [((2, 2), (R, S0), True), ((4,), (R,), True), ((4,), (S0,), False), ((4,), (R,), False)]


@pytest.mark.parametrize(
    "source", [((2, 2), (R, S0), True), ((4,), (R,), True), ((4,), (R,), False)]
)
def test_checkpoints_are_whole_and_load_into_any_layout(tmp_path, source):
    path = str(tmp_path / "checkpoint")
    run_processes(4, saved, path, *source)
    expected = uninterrupted()
    for target in LOADED:
        for weights in run_processes(4, resumed, path, *target):
            assert all(map(torch.equal, weights, expected))


def full_state_after(mesh_shape: tuple, placements: tuple) -> dict[str, Any]:
    mesh = mesh_of(mesh_shape)
    model = nn.Linear(16, 8, bias=False)
    model.weight = nn.Parameter(spread(tensors_like([(8, 16)], 0)[0], mesh, placements))
    optimizer = Muon(model.named_parameters(), **CUT)
    model.weight.grad = spread(tensors_like([(8, 16)], 1)[0], mesh, placements)
    optimizer.step()
    full = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=full)
    momentum = optimizer.state[model.weight]["momentum_buffer"]
    before = momentum.to_local().clone()
    momentum.to_local().zero_()
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, optimizer, state, options=broadcast)
    after = optimizer.state[model.weight]["momentum_buffer"]
    assert after.placements == momentum.placements
    assert torch.equal(after.to_local(), before)
    return state.get("state", {})


def test_full_state_dicts():
    expected = torch.zeros(8, 16).lerp(tensors_like([(8, 16)], 1)[0], 0.05)
    for state in run_processes(4, full_state_after, (2, 2), (R, S0)):
        assert torch.equal(state["weight"]["momentum_buffer"], expected)


def loads_in_memory(mesh_shape: tuple, placements: tuple) -> str:
    """Load an uncut state dict into a cut optimizer, then the reverse; return the error of that."""
    params, whole = trained(mesh_shape, placements, 2)
    cut_params, cut = trained(mesh_shape, placements, 0, **CUT)
    cut.load_state_dict(whole.state_dict())
    for param, cut_param in zip(params, cut_params, strict=True):
        cut_param.data.copy_(param.data)
        momentum = cut.state[cut_param]["momentum_buffer"]
        full = whole.state[param]["momentum_buffer"].full_tensor()
        assert torch.equal(momentum.to_local(), cut_like(full, momentum).to_local())
    train(params, whole, range(2, 4))
    train(cut_params, cut, range(2, 4))
    assert all(map(torch.equal, [p.to_local() for p in params], [p.to_local() for p in cut_params]))
    cut.load_state_dict(cut.state_dict())
    before = [whole.state[p]["momentum_buffer"].to_local().clone() for p in params]
    with pytest.raises(CheckpointError) as error:
        whole.load_state_dict(cut.state_dict())
    after = [whole.state[p]["momentum_buffer"].to_local() for p in params]
    assert all(map(torch.equal, before, after))
    return str(error.value)


@pytest.mark.parametrize(
    ("mesh_shape", "placements"), [((4,), (R,)), ((2, 2), (R, S0)), ((2, 2), (S1, R))]
)
def test_state_dicts_in_memory(mesh_shape, placements):
    for message in run_threads(4, loads_in_memory, mesh_shape, placements):
        assert "Load with torch.distributed.checkpoint, which reshards" in message


def metrics_of(mesh_shape: tuple, placements: tuple, cut: bool) -> dict[str, float]:
    _, optimizer = trained(mesh_shape, placements, 3, metrics_every=1, shard_momentum=cut)
    names = ("group0/momentum_norm", "group0/grad_norm", "group0/update_norm", "group0/param_norm")
    return {name: optimizer.metrics()[name] for name in names}


@pytest.mark.parametrize(("mesh_shape", "placements"), [((4,), (R,)), ((2, 2), (R, S0))])
def test_metrics(mesh_shape, placements):
    cut = run_threads(4, metrics_of, mesh_shape, placements, True)
    whole = run_threads(4, metrics_of, mesh_shape, placements, False)
    for found, expected in zip(cut, whole, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


def normuon(mesh_shape: tuple, placements: tuple, cut: bool) -> list[Tensor]:
    params, _ = trained(mesh_shape, placements, 3, normuon_beta=0.95, shard_momentum=cut)
    return [p.detach().to_local() for p in params]


@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS[2:16:3])
def test_normuon(mesh_shape, placements):
    num_ranks = torch.Size(mesh_shape).numel()
    cut = run_threads(num_ranks, normuon, mesh_shape, placements, True)
    whole = run_threads(num_ranks, normuon, mesh_shape, placements, False)
    for found, expected in zip(cut, whole, strict=True):
        assert all(map(torch.equal, found, expected))


def test_a_hand_written_transport_cannot_cut_it():
    config = DistributedConfig(lambda p, s: {0: 0}, lambda t, o, s: t, lambda t, o, s: t, {})
    with pytest.raises(GroupOptionError, match="shard_momentum needs a plan"):
        Muon([nn.Parameter(torch.ones(2, 3))], distributed_config=config, **CUT)
