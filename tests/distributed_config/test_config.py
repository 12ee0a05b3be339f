"""`create_devicemesh_config` and `create_dtensor_config`: plain parameters, meshes, debug mode."""

import time
from itertools import groupby, pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from muon_dtensor import Muon, create_devicemesh_config, create_dtensor_config
from muon_dtensor.runtime import hyperparameters as muon_options
from tests.support.cases import Oracle, mesh_of, spread, tensors_like
from tests.support.logs import logged
from tests.support.meter import counting, installed
from tests.support.pool import run_processes
from tests.support.threads import run_threads

R, S0 = Replicate(), Shard(0)
SHAPES = [(8, 16), (16, 8), (7, 5), (3, 4, 6), (1, 9), (0, 4)]


def shared(mesh_shape: tuple[int, ...], names: tuple[str, ...] | None, **options: Any) -> Any:
    """Step plain parameters and a DTensor, with equal gradients on all ranks as under DDP."""
    mesh = mesh_of(mesh_shape)
    weights = tensors_like([*SHAPES, (12, 6)], 0)
    params = [nn.Parameter(w) for w in weights[:-1]]
    params.append(nn.Parameter(spread(weights[-1], mesh, (S0,) * mesh.ndim)))
    config = create_devicemesh_config(mesh, names, **options)
    named_params = [(f"p{i}", p) for i, p in enumerate(params)]
    optimizer = Muon(named_params, distributed_config=config, strategy="owned")
    oracle = Oracle(weights)
    with counting() as count:
        for step in range(3):
            grads = tensors_like([*SHAPES, (12, 6)], 1 + step)
            for param, grad in zip(params[:-1], grads, strict=False):
                param.grad = grad.clone()
            params[-1].grad = spread(grads[-1], mesh, (S0,) * mesh.ndim)
            optimizer.step()
            oracle.step(grads)
    *plain, last = oracle.results()
    same = [torch.equal(p, w) for p, w in zip(params[:-1], plain, strict=True)]
    same.append(
        torch.equal(params[-1].to_local(), spread(last, mesh, params[-1].placements).to_local())
    )
    cost = optimizer.plan.cost
    return same, count.num_matrices, cost.num_matrices, count.sent_nbytes, cost.sent_nbytes


@pytest.mark.parametrize(
    ("mesh_shape", "names", "copies"),
    [
        pytest.param((4,), None, 1, id="ddp"),
        pytest.param((2, 2), None, 1, id="two-dims"),
        pytest.param((2, 2), ("a",), 2, id="over-a-only"),
        pytest.param((2, 3), ("b",), 2, id="over-b-only"),
        pytest.param((1,), None, 1, id="one-rank"),
    ],
)
def test_plain_parameters_share_the_work(mesh_shape, names, copies):
    num_ranks = torch.Size(mesh_shape).numel()
    with installed():
        outcomes = run_threads(num_ranks, lambda: shared(mesh_shape, names))
    assert all(all(same) for same, *_ in outcomes)
    done = sum(num for _, num, *_ in outcomes)
    # Each group of replicas shares seven plain matrices; all ranks share the DTensor's matrix.
    assert done == 3 * (7 * copies + 1)
    if copies == 1:
        for rank, (_, _, in_plan, sent, planned) in enumerate(outcomes):
            assert in_plan == 8
            assert sent == 3 * planned[rank]


def without_names() -> Any:
    mesh = init_device_mesh("cpu", (2, 2))
    param = nn.Parameter(torch.ones(6, 4))
    optimizer = Muon([param], distributed_config=create_devicemesh_config(mesh))
    return str(optimizer.plan.meshes[0]), optimizer.plan.digest


def test_a_mesh_without_names():
    outcomes = run_threads(4, without_names)
    assert outcomes == [("(dim0=2, dim1=2)", outcomes[0][1])] * 4


def real_ddp() -> list[bool]:
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))
    model = DistributedDataParallel(model)
    params = list(model.parameters())
    oracle = Oracle([p.detach() for p in params])
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    optimizer = Muon(model.named_parameters(), distributed_config=create_devicemesh_config(mesh))
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        model(torch.randn(5, 6, generator=generator)).square().mean().backward()
        oracle.step([p.grad for p in params])
        optimizer.step()
        optimizer.zero_grad()
    return [torch.equal(p, w) for p, w in zip(params, oracle.results(), strict=True)]


def test_real_ddp():
    assert run_processes(4, real_ddp) == [[True, True]] * 4


def intervals(
    sequential: bool, ranks: Any = ((0, 1), (2, 3))
) -> tuple[list[torch.Tensor], list[tuple[float, float]]]:
    """Return parameters after three steps, and when this rank orthogonalized."""
    spans: list[tuple[float, float]] = []
    original = muon_options.iterate

    def timed_iterate(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        start = time.monotonic()
        time.sleep(0.002)
        result = original(x, *args, **kwargs)
        spans.append((start, time.monotonic()))
        return result

    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("a", "b"))
    params = [nn.Parameter(spread(w, mesh, (R, S0))) for w in tensors_like([(8, 6)] * 8, 0)]
    config = create_devicemesh_config(
        mesh, async_gpu_parallelism=not sequential, prefetch_count=0 if sequential else 1
    )
    optimizer = Muon(params, distributed_config=config, bucket_mb=5e-4)
    with mock.patch.object(muon_options, "iterate", timed_iterate):
        for step in range(3):
            for param, grad in zip(params, tensors_like([(8, 6)] * 8, 1 + step), strict=True):
                param.grad = spread(grad, mesh, (R, S0))
            optimizer.step()
    return [p.to_local().detach() for p in params], spans


def test_sequential_execution_is_one_rank_at_a_time_with_the_same_result():
    sequential = run_processes(4, intervals, True)
    spans = sorted(
        (start, stop, rank)
        for rank, (_, own_spans) in enumerate(sequential)
        for start, stop in own_spans
    )
    assert len(spans) == 24
    for (_, stop, _), (start, _, _) in pairwise(spans):
        assert stop <= start
    for (sequential_params, _), (parallel_params, _) in zip(
        sequential, run_processes(4, intervals, False), strict=True
    ):
        assert all(
            torch.equal(a, b) for a, b in zip(sequential_params, parallel_params, strict=True)
        )


def test_sequential_execution_follows_global_ranks_on_a_permuted_mesh():
    """It does not follow the order of the mesh, since logs and debuggers show global ranks."""
    outcomes = run_processes(4, intervals, True, ((3, 1), (0, 2)))
    spans = sorted(
        (start, rank) for rank, (_, own_spans) in enumerate(outcomes) for start, _ in own_spans
    )
    turns = [rank for rank, _ in groupby(rank for _, rank in spans)]
    assert turns == [0, 1, 2, 3] * (len(turns) // 4)


def from_sizes() -> list[Any]:
    config = create_devicemesh_config(dp_replicate=2, dp_shard=-1, tp=2)
    assert config.mesh is not None
    results: list[Any] = [config.mesh.mesh_dim_names, tuple(config.mesh.shape)]
    stages = create_devicemesh_config(pp=2, dp_shard=4)
    assert stages.plain_rule is not None
    results.append(stages.plain_rule.mesh.mesh_dim_names)
    for wrong in (
        {},
        {"mesh": config.mesh, "tp": 2},
        {"dp_shard": 3},
        {"dp_shard": -1, "tp": -1},
        {"tp": 0},
        {"dp_shard": 4},
        {"mesh": config.mesh, "mesh_dim_names": ["ep"]},
    ):
        with pytest.raises(ValueError, match=r"mesh|world size|sizes") as caught:
            create_devicemesh_config(**wrong)
        results.append(str(caught.value))
    return results


def test_a_mesh_from_sizes():
    names, shape, plain, *errors = run_threads(8, from_sizes)[0]
    assert (names, shape) == (("dp_replicate", "dp_shard", "tp"), (2, 2, 2))
    assert plain == ("dp_shard",)
    assert errors == [
        "pass either a DeviceMesh or sizes like dp_shard=4, not both",
        "pass either a DeviceMesh or sizes like dp_shard=4, not both",
        "the product of dp_shard=3 does not match the world size of 8",
        "only one mesh size may be -1, got dp_shard=-1, tp=-1",
        "mesh sizes must be 1 or more, or -1 for one of them, got tp=0",
        "the product of dp_shard=4 does not match the world size of 8",
        "mesh dims ['ep'] are not on the mesh, which has ('dp_replicate', 'dp_shard', 'tp')",
    ]


def foreign_mesh() -> str:
    world = mesh_of((2, 2))
    param = nn.Parameter(spread(torch.ones(4, 4), world, (S0, S0)))
    with pytest.raises(ValueError, match="lives on mesh") as caught:
        Muon([("w", param)], distributed_config=create_devicemesh_config(world["b"]))
    return str(caught.value)


def test_the_mesh_of_a_config_must_hold_the_parameters():
    for text in run_threads(4, foreign_mesh):
        assert "w lives on mesh (a=2, b=2) with ranks 0 to 3" in text
        assert "mesh (b=2) does not hold" in text


def test_create_dtensor_config():
    config = create_dtensor_config(prefetch_count=3, async_gpu_parallelism=False)
    optimizer = Muon([nn.Parameter(torch.ones(2, 2))], distributed_config=config)
    assert optimizer.plan.options.prefetch_count == 3
    assert optimizer.plan.options.sequential
    other = Muon([nn.Parameter(torch.ones(2, 2))], distributed_config=config, prefetch_count=0)
    assert other.plan.options.prefetch_count == 0


def replicated_dims(names: tuple[str, ...]) -> tuple[str, ...]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    rule = create_devicemesh_config(mesh).plain_rule
    assert rule is not None
    return rule.mesh.mesh_dim_names or ()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("dp", "ep"), ("dp",)),
        (("pp", "cp"), ("cp",)),
        (("dp_replicate", "tp"), ("dp_replicate", "tp")),
    ],
    ids=str,
)
def test_plain_parameters_are_replicated_over_all_dims_but_pp_and_ep(names, expected):
    assert run_threads(4, replicated_dims, names) == [expected] * 4


THREE = [(8, 6), (6, 8), (5, 5)]


def changed_later(field: str, ranks: tuple[int, ...]) -> tuple[str, Any, bool]:
    """Change a field of the config on some ranks between steps.

    Returns the error, the value in the plan afterwards, and whether the result is unchanged.
    """
    mesh = mesh_of((4,))
    results, error = [], ""
    for changes in (True, False):
        params = [nn.Parameter(w) for w in tensors_like(THREE, 0)]
        config = create_devicemesh_config(mesh)
        optimizer = Muon(params, lr=0.1, distributed_config=config, strategy="owned")
        for step in range(3):
            for param, grad in zip(params, tensors_like(THREE, 1 + step), strict=True):
                param.grad = grad
            if step == 1 and changes and dist.get_rank() in ranks:
                match field:
                    case "prefetch_count":
                        config.prefetch_count = 3
                    case "async_gpu_parallelism":
                        config.async_gpu_parallelism = False
                    case "assign_fn":
                        config.assign_fn = lambda params, state: dict.fromkeys(range(3), 2)
                    case "state":
                        config.state = {**config.state, "plain_rule": None}
                    case "wrong":
                        config.prefetch_count = -1
            try:
                optimizer.step()
            except (RuntimeError, ValueError) as failure:
                error = f"{type(failure).__name__}: {failure}"
                break
        results.append([param.detach() for param in params])
        if changes:
            options = optimizer.plan.options
            planned_value = {
                "prefetch_count": options.prefetch_count,
                "async_gpu_parallelism": not options.sequential,
                "assign_fn": set(optimizer.plan.owners.values()),
            }.get(field)
    return error, planned_value, all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("field", "expected"),
    [("prefetch_count", 3), ("async_gpu_parallelism", False), ("assign_fn", {(2,)})],
)
def test_fields_of_a_config_that_change_later_take_effect(field, expected):
    answers = run_processes(4, changed_later, field, (0, 1, 2, 3))
    assert answers == [("", expected, True)] * 4
    for error, _, _ in run_processes(4, changed_later, field, (1,)):
        assert error.startswith("PlanMismatchError"), "changed on one rank only"


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("state", "construct a new optimizer"),
        ("wrong", "prefetch_count must be an integer of at least 0"),
    ],
)
def test_changes_of_a_config_that_cannot_take_effect_raise(field, text):
    for ranks in ((0, 1, 2, 3), (3,)):
        outcomes = run_processes(4, changed_later, field, ranks)
        for rank, (error, _, _) in enumerate(outcomes):
            assert text in error if rank in ranks else "Another rank could not take" in error


def owners_that_stay() -> list[str]:
    mesh = mesh_of((4,))
    experts = nn.Parameter(spread(torch.ones(4, 3, 3), mesh, (S0,)))
    matrix = nn.Parameter(spread(torch.ones(8, 3), mesh, (S0,)))
    config = create_devicemesh_config(mesh)
    config.assign_fn = lambda params, state: {0: 2, 1: 2}
    with logged() as lines:
        optimizer = Muon(
            [("experts", experts), ("matrix", matrix)], distributed_config=config, strategy="owned"
        )
    assert optimizer.plan.owners == {"experts": (0, 1, 2, 3), "matrix": (2,)}
    return lines


def test_owners_of_matrices_that_lie_on_other_ranks_log_a_warning():
    first, *other_ranks = run_processes(4, owners_that_stay)
    (line,) = first
    assert "assign_fn names ranks for 1 parameters that do not orthogonalize" in line
    assert "(experts)" in line
    assert other_ranks == [[]] * 3
