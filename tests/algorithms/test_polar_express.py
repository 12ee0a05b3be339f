"""Polar Express and Newton-Schulz: derivation of coefficients, accuracy, a user's own function."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from muon_dtensor import GroupOptionError, Muon
from muon_dtensor.algorithms import newton_schulz
from muon_dtensor.algorithms.newton_schulz import iterate
from muon_dtensor.algorithms.polar_express import POLAR_EXPRESS, SAFETY, polar_express_rows
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.threads import run_threads

CUSHION = 0.02407327424182761


def minimax_quintic(low: float, high: float) -> Tensor:
    """Return (a, b, c) of the odd quintic with the least maximal distance from 1 on [low, high].

    Remez: at four points, the ends and the two extrema in between, the best quintic differs from 1
    by the same amount with alternating signs.
    """
    inner = torch.tensor([(3 * low + high) / 4, (low + 3 * high) / 4], dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    error = math.inf
    while True:
        points = torch.cat([inner.new_tensor([low]), inner, inner.new_tensor([high])])
        system = torch.stack([points, points**3, points**5, signs], dim=1)
        a, b, c, new_error = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64))
        root = (9 * b * b - 20 * a * c).sqrt()
        inner = torch.stack([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)]).sqrt()
        if abs(float(new_error) - error) < 1e-15:
            return torch.stack([a, b, c])
        error = float(new_error)


def value(row: Tensor, x: float) -> float:
    a, b, c = row.tolist()
    return a * x + b * x**3 + c * x**5


def composition(low: float, num_rows: int) -> list[Tensor]:
    """Compute the greedy composition of the paper's algorithm 1, with its cushion."""
    high, rows = 1.0, []
    for _ in range(num_rows):
        row = minimax_quintic(max(low, CUSHION * high), high)
        if low < CUSHION * high:
            row = row * (2 / (value(row, low) + value(row, high)))
        rows.append(row)
        low = value(row, low)
        high = 2 - low
    return rows


def test_the_coefficients_follow_from_their_definition():
    rows = composition(1e-3, 7)
    for row, stored in zip(rows, POLAR_EXPRESS[:7], strict=True):
        powers = torch.tensor([SAFETY, SAFETY**3, SAFETY**5], dtype=torch.float64)
        derived = row / powers
        torch.testing.assert_close(
            derived, torch.tensor(stored, dtype=torch.float64), rtol=1e-9, atol=0
        )
    # the last row is the limit: the Taylor polynomial of the inverse square root at 1
    assert POLAR_EXPRESS[7] == (15 / 8, -10 / 8, 3 / 8)
    assert polar_express_rows(11) == (*POLAR_EXPRESS, *[POLAR_EXPRESS[7]] * 3)


def gaussian(rows: int, cols: int) -> Tensor:
    return tensors_like([(rows, cols)], 5)[0]


def with_spectrum(values: Tensor, cols: int) -> Tensor:
    """Return a matrix with these singular values."""
    rows = len(values)
    u = torch.linalg.qr(gaussian(rows, rows).double())[0]
    v = torch.linalg.qr(gaussian(cols, rows).double())[0]
    return (u * values.double() @ v.T).float()


def low_rank(rows: int, cols: int) -> Tensor:
    """Return a matrix with four singular values of 1 and noise from a hundredth to a thousandth."""
    noise = torch.logspace(-2, -3, rows - 4)
    return with_spectrum(torch.cat([torch.ones(4), noise]), cols)


# The farther a Gaussian is from square, the more of its singular values are where KELLER_JORDAN
# gives least: its E is .35 at 1 : 1.5 and .44 at 1 : 16. This is a property of the coefficients.
GAUSSIAN = gaussian(64, 96)
HARMONIC = with_spectrum(1 / torch.arange(1, 65), 96)
LOW_RANK = low_rank(64, 96)
WIDE = gaussian(96, 256)
WIDE_HARMONIC = with_spectrum(1 / torch.arange(1, 97), 256)


def measured(polar_factor: Tensor) -> tuple[float, float, float]:
    """Return smin, smax, and E = ||X X^T - I||_F / sqrt(r)."""
    x = polar_factor.double()
    values = torch.linalg.svdvals(x)
    gram = x @ x.mT - torch.eye(len(x), dtype=torch.float64)
    return values.min().item(), values.max().item(), (gram.norm() / len(x) ** 0.5).item()


def express(num_iterations: int) -> Callable[..., Tensor]:
    return lambda x, dtype: iterate(x, polar_express_rows(num_iterations), dtype=dtype)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("x", [GAUSSIAN, HARMONIC, LOW_RANK], ids=["gaussian", "1/i", "low-rank"])
def test_keller_jordan_five(x, dtype):
    smin, smax, error = measured(newton_schulz(x, dtype=dtype))
    assert smax <= 1.22
    if x is not LOW_RANK:
        assert smin >= 0.65
        assert error <= 0.37


@DTYPES
@pytest.mark.parametrize("x", [GAUSSIAN, HARMONIC, LOW_RANK], ids=["gaussian", "1/i", "low-rank"])
def test_polar_express_five(x, dtype):
    smin, smax, _ = measured(express(5)(x, dtype=dtype))
    assert smax <= 1.15
    assert smin >= (0.30 if x is LOW_RANK else 0.85)


@DTYPES
@pytest.mark.parametrize("x", [WIDE, WIDE_HARMONIC], ids=["gaussian", "1/i"])
def test_wide_matrices(x, dtype):
    """All bounds but that for E of Keller Jordan's coefficients, see above."""
    smin, smax, _ = measured(newton_schulz(x, dtype=dtype))
    assert (smin >= 0.65, smax <= 1.22) == (True, True)
    smin, smax, _ = measured(express(5)(x, dtype=dtype))
    assert (smin >= 0.85, smax <= 1.15) == (True, True)
    *_, error = measured(express(6)(x, dtype=dtype))
    assert error <= (0.004 if dtype == torch.float32 else 0.006)


@DTYPES
@pytest.mark.parametrize("x", [GAUSSIAN, HARMONIC], ids=["gaussian", "1/i"])
def test_polar_express_six(x, dtype):
    *_, error = measured(express(6)(x, dtype=dtype))
    assert error <= (0.004 if dtype == torch.float32 else 0.006)


def test_polar_express_converges_and_stays():
    u, _, vh = torch.linalg.svd(GAUSSIAN.double(), full_matrices=False)
    for num_iterations in (8, 12):
        result = express(num_iterations)(GAUSSIAN, dtype=torch.float64)
        assert (result - u @ vh).norm() / (u @ vh).norm() < 1e-5


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 2)], ids=str)
def test_empty_and_zero(shape):
    assert express(5)(torch.zeros(shape), dtype=torch.bfloat16).shape == shape
    assert express(5)(torch.zeros(4, 6), dtype=torch.bfloat16).abs().max() == 0


def stepped(orthogonalizer: Any, **options: Any) -> tuple[bool, bool]:
    """Whether a step on four ranks equals that of one rank, and that of Newton-Schulz."""
    mesh, placements = mesh_of((2, 2)), (Shard(0), Shard(1))
    weight, grad = tensors_like([(12, 10), (12, 10)], 0)

    def step(param: nn.Parameter, grad: Tensor, kind: Any) -> nn.Parameter:
        optimizer = Muon([("w", param)], orthogonalizer=kind, **options)
        param.grad = grad
        optimizer.step()
        return param

    def shard(tensor: Tensor) -> Tensor:
        return spread(tensor, mesh, placements)

    sharded = step(nn.Parameter(shard(weight)), shard(grad), orthogonalizer).to_local()
    expected = step(nn.Parameter(weight.clone()), grad.clone(), orthogonalizer)
    other = step(nn.Parameter(shard(weight)), shard(grad), "newton_schulz").to_local()
    return torch.equal(sharded, shard(expected.detach()).to_local()), torch.equal(sharded, other)


def exact_polar_factor(x: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x.float(), full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("orthogonalizer", ["polar_express", exact_polar_factor])
def test_every_mesh_gives_the_same_step(orthogonalizer):
    assert run_threads(4, stepped, orthogonalizer) == [(True, False)] * 4


def test_a_group_selects_its_orthogonalizer():
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(3)]
    optimizer = Muon(
        [
            {"params": params[:1]},
            {"params": params[1:2], "orthogonalizer": "polar_express", "ns_steps": 8},
            {"params": params[2:], "orthogonalizer": "newton_schulz"},
        ],
        orthogonalizer=exact_polar_factor,
        weight_decay=0.0,
        lr=1.0,
    )
    orthogonalizers = [group["orthogonalizer"] for group in optimizer.param_groups]
    assert orthogonalizers == ["custom", "polar_express", "newton_schulz"]
    grad = tensors_like([(4, 4)], 3)[0]
    for param in params:
        param.grad = grad.clone()
    optimizer.step()
    direction = (0.05 + 0.95 * 0.05) * grad  # Nesterov's, of a first step
    exact = torch.ones(4, 4) - exact_polar_factor(direction.bfloat16()).bfloat16()
    assert (params[0] - exact).abs().max().item() < 0.01
    assert (params[1] - exact).abs().max().item() < 0.02
    assert (params[2] - exact).abs().max().item() > 0.05


def test_custom_without_a_function_and_wrong_functions_raise():
    param = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(GroupOptionError, match="pass the function to the constructor"):
        Muon([{"params": [param], "orthogonalizer": "custom"}])
    for function, words in (
        (lambda x: x.mT, r"returned \[3, 2\] for \[2, 3\]"),
        (lambda x: None, "returned None"),
        (torch.linalg.svd, "fails on"),
    ):
        with pytest.raises(GroupOptionError, match=words):
            Muon([param], orthogonalizer=function)


@dataclass
class Falsy:
    """A function that is not hashable and false."""

    def __len__(self) -> int:
        return 0

    def __call__(self, x: Tensor) -> Tensor:
        return exact_polar_factor(x)


def test_any_callable_is_accepted():
    param = nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([param], orthogonalizer=Falsy())
    param.grad = torch.randn(4, 4)
    optimizer.step()
    assert not torch.equal(param, torch.ones(4, 4))


def only_on_meta(x: torch.Tensor) -> torch.Tensor:
    """Fail on the host, as a Triton kernel does."""
    if x.device.type != "meta":
        raise RuntimeError("needs a device")
    return torch.empty_like(x)


def test_an_orthogonalizer_is_checked_on_the_device_of_its_parameters(monkeypatch):
    """A kernel for a device is accepted although it fails on the host."""
    monkeypatch.setattr(
        "muon_dtensor.optimizer.planned_step.META", torch.device("cuda")
    )  # meta stands for cuda
    param = nn.Parameter(torch.ones(4, 4, device="meta"))
    assert Muon([param], orthogonalizer=only_on_meta).plan.params
    with pytest.raises(GroupOptionError, match=r"fails on \[2, 3\] of torch.bfloat16 on cpu"):
        Muon([nn.Parameter(torch.ones(4, 4))], orthogonalizer=only_on_meta)
    vector = nn.Parameter(torch.ones(4))
    Muon([{"params": [vector], "algorithm": "adamw"}], orthogonalizer=only_on_meta)
