"""Models of 10 and 100 million parameters: one step, compared with one process. Runs weekly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from muon_dtensor import Muon
from tests.support.cases import mesh_of, spread
from tests.support.pool import run_processes

pytestmark = [pytest.mark.P2, pytest.mark.timeout(3600)]

R, S0, S1 = Replicate(), Shard(0), Shard(1)


def shapes_of(dim: int, layers: int) -> list[tuple[int, int]]:
    """Return the shapes of a transformer's matrices: 12 dim^2 parameters in each layer."""
    return [(dim, dim)] * 4 * layers + [(4 * dim, dim), (dim, 4 * dim)] * layers


def random_tensor(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step_on_one_process(shapes: list[tuple[int, int]], ns_dtype: torch.dtype, folder: Path) -> None:
    """Save one step of one process, by torch.optim.Muon if it iterates in this dtype."""
    params = [nn.Parameter(random_tensor(shape, seed)) for seed, shape in enumerate(shapes)]
    for seed, param in enumerate(params):
        param.grad = random_tensor(tuple(param.shape), 1000 + seed)
    if ns_dtype == torch.bfloat16:
        torch.optim.Muon(params, lr=0.02).step()
    else:
        Muon(params, lr=0.02, ns_dtype=ns_dtype).step()
    torch.save([param.detach() for param in params], folder / "expected.pt")


def step_on_mesh(
    shapes: list[tuple[int, int]], ns_dtype: torch.dtype, layout: Any, folder: Path
) -> float:
    """Run the same step on a mesh; return the largest difference on this rank."""
    mesh = mesh_of(layout[0])
    params = []
    for seed, shape in enumerate(shapes):
        params.append(nn.Parameter(spread(random_tensor(shape, seed), mesh, layout[1])))
        params[-1].grad = spread(random_tensor(shape, 1000 + seed), mesh, layout[1])
    Muon(params, lr=0.02, ns_dtype=ns_dtype).step()
    expected = torch.load(folder / "expected.pt", mmap=True)
    return max(
        float(
            (param.detach().to_local() - spread(full_weight, mesh, layout[1]).to_local())
            .abs()
            .max()
        )
        for param, full_weight in zip(params, expected, strict=True)
    )


@pytest.mark.parametrize(
    "layout", [((4,), (S0,)), ((2, 2), (R, S0)), ((2, 2), (S0, S1))], ids=["fsdp", "hsdp", "tp"]
)
def test_ten_million_parameters_are_bitwise(layout, tmp_path):
    shapes = shapes_of(648, 2)
    assert 10e6 < sum(rows * cols for rows, cols in shapes) < 11e6
    run_processes(1, step_on_one_process, shapes, torch.bfloat16, tmp_path)
    assert run_processes(4, step_on_mesh, shapes, torch.bfloat16, layout, tmp_path) == [0.0] * 4


def test_a_hundred_million_parameters_in_float32(tmp_path):
    """The tolerance is the document's 1e-5: float32 products depend on strides of operands."""
    shapes = shapes_of(1024, 8)
    assert sum(rows * cols for rows, cols in shapes) > 100e6
    run_processes(1, step_on_one_process, shapes, torch.float32, tmp_path)
    for difference in run_processes(
        2, step_on_mesh, shapes, torch.float32, ((2,), (S0,)), tmp_path
    ):
        assert difference <= 1e-5
