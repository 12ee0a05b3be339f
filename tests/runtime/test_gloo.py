"""Real processes over gloo: FSDP2 and TP models, counted bytes, buffers, errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from muon_dtensor import Muon
from muon_dtensor.runtime.torch_private import local_part
from tests.support.cases import Case, Oracle, compare_in_process, mesh_of, spread, tensors_like
from tests.support.pool import run_processes
from tests.support.torchrun import forked_torchrun

R, S0, S1 = Replicate(), Shard(0), Shard(1)
HARD = ((13, 7), (8, 16), (16, 8), (3, 2), (1, 9), (0, 4), (5, 3, 8))


@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [
        pytest.param((1,), (S0,), id="one-rank", marks=pytest.mark.P1),
        pytest.param((4,), (R,), id="replicate", marks=pytest.mark.P1),
        pytest.param((4,), (S0,), id="rows", marks=pytest.mark.P1),
        pytest.param((4,), (S1,), id="cols", marks=pytest.mark.P1),
        pytest.param((2, 2), (R, S0), id="hsdp"),
        pytest.param((2, 2), (S0, S1), id="rows-and-cols", marks=pytest.mark.P1),
        pytest.param((3, 2), (S0, S0), id="rows-twice", marks=pytest.mark.P1),
        pytest.param((2, 2, 2), (R, S0, S1), id="hsdp-tp"),
    ],
)
@pytest.mark.parametrize("bucket_mb", [256, 1e-4])
def test_bitwise_and_as_planned(mesh_shape, placements, bucket_mb):
    """All layouts run on threads in P0 (`test_layouts_bitwise`); two of them here, all in P1."""
    params = tuple((shape, placements) for shape in HARD)
    case = Case(mesh_shape, params, ours={"bucket_mb": bucket_mb})
    outcomes = run_processes(case.num_ranks, compare_in_process, case)
    assert [o.differences for o in outcomes] == [[]] * len(outcomes)
    assert [o.sent_nbytes for o in outcomes] == [o.planned_sent_nbytes for o in outcomes]
    assert sum(o.num_matrices for o in outcomes) == outcomes[0].model_matrices


class Block(nn.Module):
    """Two linear layers; TP cuts `up` by columns and `down` by rows."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def built(
    mesh: Any,
    dims: tuple[int, int],
    shard_dim: int,
    initialize: Callable[[nn.Parameter], None] = lambda parameter: None,
) -> nn.Module:
    """Two blocks, tensor-parallel over `tp`, then fully_shard over the other mesh dims."""
    torch.manual_seed(5)
    model = nn.Sequential(Block(*dims), Block(*dims))
    with torch.no_grad():
        for parameter in model.parameters():
            initialize(parameter)
    names = mesh.mesh_dim_names
    for block in model:
        if "tp" in names:
            # replicated activations between the layers: torch assumes that local ones are even
            up, down = ColwiseParallel(output_layouts=R), RowwiseParallel(input_layouts=R)
            parallelize_module(block, mesh["tp"], {"up": up, "down": down})
        data = tuple(name for name in names if name != "tp")
        fully_shard(block, mesh=mesh[data], shard_placement_fn=lambda p: Shard(shard_dim))
    return model


def full_tensor(tensor: DTensor, numbers: DTensor) -> torch.Tensor:
    """Return the full tensor; `numbers` has the same cuts and holds the index of each element.

    torch 2.9's own full_tensor misplaces uneven strided shards.
    """
    pieces: list[Any] = [None] * dist.get_world_size()
    piece = (local_part(numbers.detach()).flatten().long(), local_part(tensor.detach()).flatten())
    dist.all_gather_object(pieces, piece)
    full = torch.full((tensor.numel(),), torch.nan)
    for places, values in pieces:
        full[places] = values
    return full.view(tensor.shape)


def numbered(parameter: nn.Parameter) -> None:
    parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape))


def train_real_model(
    shape: tuple[int, ...], names: tuple[str, ...], dims: tuple[int, int], shard_dim: int
) -> tuple[list[str], list[str]]:
    """Train; return names that differ from the oracle with full gradients, and placements."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = built(mesh, dims, shard_dim)
    params: dict[str, Any] = dict(model.named_parameters())
    numbers = dict(built(mesh, dims, shard_dim, numbered).named_parameters())
    oracle = Oracle([full_tensor(p, numbers[name]) for name, p in params.items()])
    optimizer = Muon(model.named_parameters())
    for step in range(3):
        x = torch.randn(6, dims[0], generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        oracle.step([full_tensor(p.grad, numbers[name]) for name, p in params.items()])
        optimizer.step()
        optimizer.zero_grad()
    wrong = [
        name
        for (name, param), expected in zip(params.items(), oracle.results(), strict=True)
        if not torch.equal(full_tensor(param, numbers[name]), expected)
    ]
    return wrong, [str(p.placements) for p in params.values()]


EVEN, ROWS_13 = (8, 12), (12, 13)


@pytest.mark.parametrize(
    ("shape", "names", "shard_dim", "dims"),
    [
        pytest.param((4,), ("dp",), 0, EVEN, id="fsdp"),
        pytest.param((4,), ("dp",), 0, ROWS_13, id="fsdp-13"),
        pytest.param((4,), ("dp",), 1, EVEN, id="fsdp-on-cols"),
        pytest.param((2, 2), ("dp_replicate", "dp"), 0, ROWS_13, id="hsdp-13"),
        pytest.param((2, 2), ("dp", "tp"), 0, EVEN, id="fsdp-tp"),
        pytest.param((2, 2), ("dp", "tp"), 0, ROWS_13, id="fsdp-tp-13"),
        pytest.param((3, 2), ("dp", "tp"), 0, ROWS_13, id="fsdp-tp-3x2-13"),
        pytest.param((2, 2), ("dp", "tp"), 1, EVEN, id="fsdp-on-cols-tp"),
        pytest.param((2, 2, 2), ("dp_replicate", "dp", "tp"), 0, EVEN, id="hsdp-tp"),
        pytest.param((2, 2, 2), ("dp_replicate", "dp", "tp"), 0, ROWS_13, id="hsdp-tp-13"),
    ],
)
def test_real_models(shape, names, shard_dim, dims):
    num_ranks = torch.Size(shape).numel()
    outcomes = run_processes(num_ranks, train_real_model, shape, names, dims, shard_dim)
    assert [wrong for wrong, _ in outcomes] == [[]] * num_ranks
    if "tp" in names:
        assert any("_StridedShard" in p for p in outcomes[0][1]), "a strided layout is tested"


def mixed_meshes() -> list[str]:
    """Dense on (dp, tp), a router on dp, experts on a separate mesh, and a plain tensor."""
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    experts = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    homes = [
        ((12, 8), world, (S0, S1)),
        ((8, 6), world["dp"], (S0,)),
        ((8, 12, 4), experts, (S0,)),
        ((6, 6, 4), experts, (S1,)),
        ((9, 8), world["tp"], (R,)),
        ((10, 6), None, ()),
    ]
    shapes = [shape for shape, *_ in homes]
    weights = tensors_like(shapes, 0)

    def place(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [
            t.clone() if mesh is None else spread(t, mesh, placements)
            for t, (_, mesh, placements) in zip(tensors, homes, strict=True)
        ]

    params = [nn.Parameter(p) for p in place(weights)]
    oracle = Oracle(weights)
    optimizer = Muon([(f"p{i}", p) for i, p in enumerate(params)], bucket_mb=1e-4)
    for step in range(3):
        grads = tensors_like(shapes, 1 + step)
        for param, grad in zip(params, place(grads), strict=True):
            param.grad = grad
        oracle.step(grads)
        optimizer.step()
    shards = place(oracle.results())
    return [
        f"p{i}"
        for i, (param, shard) in enumerate(zip(params, shards, strict=True))
        if not torch.equal(local(param), local(shard))
    ]


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def test_mixed_meshes_in_one_optimizer():
    assert run_processes(4, mixed_meshes) == [[]] * 4


def partial_gradient() -> list[bool]:
    """(Partial, Replicate) and (Partial, Partial) gradients of parameters with other placements."""
    mesh = mesh_of((2, 2))
    weights = tensors_like([(6, 8), (7, 5)], 0)
    placements = [(R, R), (S0, S1)]
    params = [nn.Parameter(spread(w, mesh, p)) for w, p in zip(weights, placements, strict=True)]
    oracle = Oracle(weights)
    optimizer = Muon(params)
    for step in range(3):
        along_a, rank = mesh.get_local_rank("a"), dist.get_rank()
        reduced = tensors_like([(6, 8)], 100 * step + along_a)[0]
        parts = tensors_like([(7, 5)], 100 * step + 10 + rank)[0]
        grads = [
            DTensor.from_local(reduced, mesh, (Partial(), R), run_check=False),
            DTensor.from_local(parts, mesh, (Partial(), Partial()), run_check=False),
        ]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        oracle.step([grad.full_tensor() for grad in grads])
        optimizer.step()
    full = [param.full_tensor() for param in params]
    return [torch.equal(a, b) for a, b in zip(full, oracle.results(), strict=True)]


def test_partial_gradients_are_reduced_first():
    assert run_processes(4, partial_gradient) == [[True, True]] * 4


class Recorder(TorchDispatchMode):
    """Names of all c10d ops that reach the dispatcher, with the bytes an all-to-all sends.

    The one of int64 is the comparison before the step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.sent_nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            is_comparison = "alltoall_base" in func._schema.name and args[1].dtype == torch.int64
            self.names.append("comparison" if is_comparison else func._schema.name)
            if "alltoall_base" in func._schema.name and not is_comparison:
                _, send, _group, _, splits = args[:5]
                to_self = splits[dist.get_rank()]  # these tests exchange over all ranks
                self.sent_nbytes += (sum(splits) - to_self) * send.element_size()
        return func(*args, **(kwargs or {}))


def experts_on_one_rank() -> tuple[list[str], int]:
    mesh = mesh_of((4,))
    param = nn.Parameter(spread(tensors_like([(8, 6, 5)], 0)[0], mesh, (S0,)))
    optimizer = Muon([param])
    param.grad = spread(tensors_like([(8, 6, 5)], 1)[0], mesh, (S0,))
    optimizer.step()
    with Recorder() as recorder:
        optimizer.step()
    return recorder.names, optimizer.plan.cost.total_nbytes


def test_experts_on_one_rank_need_no_exchange():
    assert run_processes(4, experts_on_one_rank) == [(["comparison"], 0)] * 4


def exchanged_rows() -> tuple[int, int, list[str]]:
    mesh = mesh_of((4,))
    shapes = [(12, 8), (7, 5), (16, 4)]
    params = [nn.Parameter(spread(w, mesh, (S0,))) for w in tensors_like(shapes, 0)]
    optimizer = Muon(params)
    for param, grad in zip(params, tensors_like(shapes, 1), strict=True):
        param.grad = spread(grad, mesh, (S0,))
    optimizer.step()
    with Recorder() as recorder:
        optimizer.step()
    return recorder.sent_nbytes, optimizer.plan.cost.sent_nbytes[dist.get_rank()], recorder.names


def test_bytes_at_the_dispatcher_are_the_bytes_of_the_plan():
    for sent, planned, names in run_processes(4, exchanged_rows):
        assert sent == planned > 0
        assert names == ["comparison", "c10d::alltoall_base_", "c10d::alltoall_base_"]


DEFAULT_BACKEND = """
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard
from muon_dtensor.cli.shutdown import destroy_process_group
from tests.support.cases import Case, compare_in_process
from tests.support.layouts import ODD

dist.init_process_group()
for shape, placements in (((4,), (Replicate(),)), ((2, 2), (Replicate(), Shard(0)))):
    for strategy in ("owned", "owned_staged"):
        params = tuple((shape, placements) for shape in ODD)
        outcome = compare_in_process(Case(shape, params, num_steps=2, ours={"strategy": strategy}))
        assert outcome.differences == [], outcome.differences
        assert outcome.sent_nbytes == outcome.planned_sent_nbytes
print("equal")
dist.barrier()
destroy_process_group()
"""


@pytest.mark.P1
def test_the_default_backend(tmp_path):
    """torch calls it "undefined"."""
    script = tmp_path / "backend.py"
    script.write_text(DEFAULT_BACKEND)
    output = forked_torchrun(script, 4, PYTHONPATH=str(Path(__file__).parents[2]))
    assert output.count("equal") == 4
