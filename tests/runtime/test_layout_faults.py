"""Wrong layouts: uneven shards, replicas that differ, stale tensors."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from muon_dtensor import Muon, create_devicemesh_config, create_processgroup_config
from muon_dtensor.distributed_config import manual_transport as by_hand
from muon_dtensor.runtime import process_groups as groups
from muon_dtensor.runtime.dtensors import LayoutCache, describe_mesh
from muon_dtensor.runtime.process_groups import Groups
from muon_dtensor.runtime.torch_private import local_part
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.logs import logged
from tests.support.pool import run_processes

R, S0, S1 = Replicate(), Shard(0), Shard(1)


def outcome(optimizer: Muon, params: list[nn.Parameter]) -> tuple[str, str, bool]:
    """Return type and text of a step's error, and whether parameters and state are unchanged."""

    def values() -> list[Tensor]:
        states = [v for p in params for v in optimizer.state[p].values()]
        return [local_part(v.detach()).clone() for v in (*params, *states)]

    before = values()
    try:
        optimizer.step()
    except Exception as error:
        return type(error).__name__, str(error), all(map(torch.equal, before, values()))
    return "", "", False


def ragged(sizes: tuple[int, ...], algorithm: str) -> tuple[str, str, bool]:
    """A DTensor of 12 rows whose shards differ from torch.chunk's."""
    mesh = mesh_of((4,))
    rows = sizes[dist.get_rank()]

    def uneven(value: float) -> DTensor:
        return DTensor.from_local(
            torch.full((rows, 4), value), mesh, (S0,), run_check=False, shape=(12, 4), stride=(4, 1)
        )

    param = nn.Parameter(uneven(1.0))
    other = nn.Parameter(spread(torch.ones(8, 4), mesh, (S0,)))
    optimizer = Muon([{"params": [("odd", param), ("even", other)], "algorithm": algorithm}])
    param.grad, other.grad = uneven(2.0), spread(torch.ones(8, 4), mesh, (S0,))
    return outcome(optimizer, [param, other])


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
@pytest.mark.parametrize("sizes", [(6, 2, 2, 2), (4, 2, 3, 3), (0, 6, 3, 3)], ids=str)
def test_ragged_shards_are_an_error_on_all_ranks_before_anything_changes(sizes, algorithm):
    """Also on ranks whose shard has the right size."""
    outcomes = run_processes(4, ragged, sizes, algorithm)
    for rank, (name, text, same) in enumerate(outcomes):
        assert same
        if sizes[rank] == 3:
            assert name == "PlanMismatchError"
            assert f"but stores [{sizes[1]}, 4]" in text
        else:
            assert name == "PlanError"
            assert f"Rank {rank} stores [{sizes[rank]}, 4]" in text
            assert "but a shard with these placements is [3, 4]" in text
            assert "create_processgroup_config" in text


def ragged_plain(sizes: tuple[int, ...]) -> bool:
    """The advice of the message: the same shards as plain tensors, bitwise torch's Muon."""
    weight, grad = tensors_like([(12, 4), (12, 4)], 3)
    rank = dist.get_rank()
    config = create_processgroup_config(fsdp_pg=dist.group.WORLD)
    param = nn.Parameter(weight.split(sizes)[rank].clone())
    optimizer = Muon([("odd", param)], lr=0.1, distributed_config=config)
    param.grad = grad.split(sizes)[rank].clone()
    optimizer.step()
    expected = nn.Parameter(weight.clone())
    expected.grad = grad
    torch.optim.Muon([expected], lr=0.1).step()
    return torch.equal(param, expected.detach().split(sizes)[rank])


def test_ragged_plain_shards_are_stepped():
    assert all(run_processes(4, ragged_plain, (6, 2, 2, 2)))


def on_one_rank() -> str:
    mesh = mesh_of((1,))
    odd = DTensor.from_local(
        torch.ones(2, 4), mesh, (S0,), run_check=False, shape=(3, 4), stride=(4, 1)
    )
    try:
        Muon([nn.Parameter(odd)])
    except ValueError as error:
        return str(error)
    return ""


def test_on_a_mesh_of_one_rank_the_constructor_raises():
    (text,) = run_processes(1, on_one_rank)
    assert "Rank 0 stores [2, 4], but a shard with these placements is [3, 4]" in text


def other_replicas(layout: Any, odd: int, check: bool) -> tuple[str, str, bool]:
    """One rank holds other values, as with a different seed."""
    mesh = init_device_mesh("cpu", layout[0], mesh_dim_names=("a", "b", "c")[: len(layout[0])])
    params = [nn.Parameter(spread(w, mesh, layout[1])) for w in tensors_like([(8, 6), (4, 9)], 0)]
    vector = nn.Parameter(spread(torch.ones(8), mesh, layout[1]))
    if dist.get_rank() == odd:
        local_part(params[1].detach()).add_(1e-3)
    groups: list[Any] = [
        {"params": [("first", params[0]), ("second", params[1])]},
        {"params": [("third", vector)], "algorithm": "adamw"},
    ]
    optimizer = Muon(groups, check_replicas=check)
    for param in (*params, vector):
        param.grad = spread(torch.ones(param.shape), mesh, layout[1])
    return outcome(optimizer, [*params, vector])


@pytest.mark.parametrize(
    "layout", [((4,), (R,)), ((2, 2), (R, S0)), ((2, 2), (S0, R)), ((2, 2), (R, R))], ids=str
)
def test_replicas_that_differ_are_an_error_on_all_ranks(layout):
    outcomes = run_processes(4, other_replicas, layout, 3, True)
    assert [same for _, _, same in outcomes] == [True] * 4
    names = {name for name, _, _ in outcomes}
    assert "PlanMismatchError" in names
    assert names <= {"PlanMismatchError", "RuntimeError"}
    messages = [text for name, text, _ in outcomes if name == "PlanMismatchError"]
    assert all("Replicas of 1 parameters" in text and "second" in text for text in messages)
    assert all("Another rank" in text for name, text, _ in outcomes if name == "RuntimeError")


def test_the_check_of_replicas_can_be_disabled():
    for name, _, _ in run_processes(4, other_replicas, ((4,), (R,)), 3, False):
        assert name == ""


def equal_replicas(dtype: torch.dtype) -> str:
    """Equal replicas pass in every dtype, with NaN, empty shards, and scalars of AdamW."""
    mesh = mesh_of((2, 2))
    shapes = [(1, 4), (5, 3)]
    params = [nn.Parameter(spread(w, mesh, (R, S0))) for w in tensors_like(shapes, 0, dtype)]
    with torch.no_grad():
        local_part(params[1]).fill_(float("nan"))
    scalar = nn.Parameter(spread(torch.ones((), dtype=dtype), mesh, (R, R)))
    groups: list[Any] = [{"params": params}, {"params": [scalar], "algorithm": "adamw"}]
    optimizer = Muon(groups)
    for param in (*params, scalar):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    return "stepped"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equal_replicas_pass(dtype):
    assert run_processes(4, equal_replicas, dtype) == ["stepped"] * 4


def plain_replicas() -> tuple[str, str, bool]:
    """Plain tensors that are replicas by the config (DDP)."""
    param = nn.Parameter(torch.full((4, 4), 1.0 + dist.get_rank()))
    config = create_devicemesh_config(mesh_of((2,)))
    optimizer = Muon([("w", param)], distributed_config=config)
    param.grad = torch.ones(4, 4)
    return outcome(optimizer, [param])


def test_plain_replicas_that_differ_are_an_error():
    for name, text, same in run_processes(2, plain_replicas):
        assert (name, same) == ("PlanMismatchError", True)
        assert "Replicas of 1 parameters hold different values" in text


def wrapped_afterwards() -> tuple[str, str, bool]:
    """FSDP1 changes the parameters of an existing optimizer in place."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    optimizer = Muon(model.named_parameters())
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    wrapped(torch.ones(2, 8)).sum().backward()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return outcome(optimizer, params)


def test_a_parameter_that_changed_its_shape_is_an_error_before_anything_changes():
    for name, text, same in run_processes(2, wrapped_afterwards):
        assert (name, same) == ("RuntimeError", True)
        assert "stored [8, 8] on this rank when the optimizer was made" in text


def replaced() -> tuple[bool, int]:
    """Whether old parameters are alive after they were replaced, as in Accelerate, and a step."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    config = create_devicemesh_config(mesh_of((2,)))
    optimizer = Muon(model.parameters(), distributed_config=config)
    old = [weakref.ref(param) for param in model.parameters()]
    mesh = mesh_of((2,))
    fully_shard(model, mesh=mesh)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    del param
    optimizer.step()
    gc.collect()
    return any(reference() is not None for reference in old), len(optimizer.state)


def test_replaced_parameters_are_freed():
    assert run_processes(2, replaced) == [(False, 2)] * 2


def test_plain_tensors_are_held_weakly():
    """Also on one process, where another plain parameter replaces the first."""
    first, second = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimizer = Muon([first])
    optimizer.param_groups[0]["params"] = [second]
    second.grad = torch.ones(3, 3)
    optimizer.step()
    reference = weakref.ref(first)
    del first
    gc.collect()
    assert reference() is None


def copied_on_one_rank() -> str:
    """A copy under process groups takes over layouts without a collective."""
    config = create_processgroup_config(fsdp_pg=dist.group.WORLD)
    shard = torch.ones(4 + dist.get_rank(), 6)
    optimizer = Muon([("w", nn.Parameter(shard))], distributed_config=config)
    text = "not copied"
    if dist.get_rank() == 0:
        twin = copy.deepcopy(optimizer)
        twin = pickle.loads(pickle.dumps(twin))
        text = str(twin.plan) == str(optimizer.plan) and "copied"
    dist.barrier()
    return str(text)


def test_a_copy_on_one_rank_does_not_wait_for_the_others():
    assert run_processes(2, copied_on_one_rank) == ["copied", "not copied"]


def plain_without_config(config: bool) -> list[str]:
    with logged() as lines:
        mesh_config = create_devicemesh_config(mesh_of((2,))) if config else None
        Muon([("w", nn.Parameter(torch.ones(3, 3)))], distributed_config=mesh_config)
    return lines


def test_one_rank_warns_of_plain_tensors_without_a_config():
    first, second = run_processes(2, plain_without_config, False)
    assert len(first) == 1
    assert "create_devicemesh_config(mesh)" in first[0]
    assert second == []
    assert run_processes(2, plain_without_config, True) == [[], []]


def registries_after_destruction(folder: str) -> list[tuple[int, int]]:
    """Return sizes of module-level registries under three consecutive default groups."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    before = len(groups._own), len(by_hand._meshes)
    sizes = []
    for life in range(3):
        if life:
            dist.barrier()
            dist.destroy_process_group()
            gc.collect()
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/{life}", rank=rank, world_size=num_ranks
            )
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        spec = describe_mesh(mesh)
        Groups({spec: mesh}, rank).over(spec, ("a", "b"))
        state = {"fsdp_pg": dist.new_group(list(range(num_ranks))), "rank": rank, "world_size": 4}
        by_hand.gather_to_one(torch.ones(2, 2), 0, state)
        del mesh, spec, state
        gc.collect()
        sizes.append((len(groups._own) - before[0], len(by_hand._meshes) - before[1]))
    return sizes


def test_registries_drop_destroyed_groups(tmp_path):
    """Process groups under a destroyed default group, and values that hold them."""
    for first, *later in run_processes(4, registries_after_destruction, str(tmp_path)):
        assert first[0] == 1
        assert max(later) <= first


def test_equal_meshes_are_one_object_and_different_meshes_are_not():
    """Layouts are cached by the mesh, not by its address."""
    for same, other in run_processes(4, meshes_by_value):
        assert same
        assert other


def meshes_by_value() -> tuple[bool, bool]:
    layout_cache = LayoutCache()
    first = layout_cache.mesh(mesh_of((2, 2)))
    gc.collect()
    second = layout_cache.mesh(init_device_mesh("cpu", (4, 1), mesh_dim_names=("a", "b")))
    return layout_cache.mesh(mesh_of((2, 2))) is first, second.shape == (4, 1)
