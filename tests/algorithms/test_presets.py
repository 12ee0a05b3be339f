"""Orthogonalizers by name: their coefficients, their margin, and the same step on every layout."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from muon_dtensor import Muon
from muon_dtensor.algorithms import PRESETS
from muon_dtensor.algorithms.newton_schulz import (
    KELLER_JORDAN,
    almost_orthogonal_scales,
    iterate,
)
from muon_dtensor.algorithms.polar_express import SAFETY
from muon_dtensor.algorithms.presets import CANS, DEEPSEEK_V4_LAST, LOWEST, Rows, cubic_rows
from tests.algorithms.test_polar_express import (
    GAUSSIAN,
    HARMONIC,
    LOW_RANK,
    exact_polar_factor,
    minimax_quintic,
    value,
)
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.layouts import LAYOUTS
from tests.support.pool import run_processes
from tests.support.threads import run_threads

NAMES = ("newton_schulz", *PRESETS)
SAFE = [name for name in NAMES if name == "newton_schulz" or not PRESETS[name].warning]


def rows_of(name: str) -> Rows:
    if name == "newton_schulz":
        return (KELLER_JORDAN,) * 5
    return PRESETS[name].rows(PRESETS[name].num_iterations)


def composed(rows: Rows, values: Tensor) -> Tensor:
    """Return the polynomial that the rows compose, at these singular values."""
    for a, b, c in rows:
        values = a * values + b * values**3 + c * values**5
    return values


def margin(rows: Rows) -> float:
    """Return the largest value up to which the polynomial stays in [0.3, 1.5] above 0.1."""
    points = torch.linspace(0.1, 1.2, 110_001, dtype=torch.float64)
    values = composed(rows, points)
    outside = ((values < 0.3) | (values > 1.5) | values.isnan()).nonzero()
    return float(points[int(outside[0]) - 1]) if len(outside) else float(points[-1])


def test_cans_is_the_minimax_composition_without_a_margin():
    low, high = LOWEST, 1.0
    for stored in CANS:
        row = minimax_quintic(low, high)
        assert row.tolist() == pytest.approx(stored, abs=6e-5)
        low = value(row, low)
        high = 2 - low
    assert PRESETS["cans"].rows(7)[5:] == ((15 / 8, -10 / 8, 3 / 8),) * 2


def test_the_cubics_are_minimax():
    """Each differs from its mean by the same amount at both ends of its interval and inside."""
    low = LOWEST
    for a, b, c in cubic_rows(10):
        a, b = a * SAFETY, b * SAFETY**3
        assert c == 0
        peak = (-a / (3 * b)) ** 0.5
        values = [a * x + b * x**3 for x in (low, peak, 1.0)]
        assert values[0] == pytest.approx(values[2], abs=1e-12)
        assert values[1] == pytest.approx(1.0, abs=1e-12)
        low = values[0]
    assert low > 0.999


def test_deepseek_v4_ends_at_a_double_root():
    a, b, c = DEEPSEEK_V4_LAST
    assert a + b + c == 1
    assert a + 3 * b + 5 * c == 0
    rows = PRESETS["deepseek_v4"].rows
    assert rows(10) == (KELLER_JORDAN,) * 8 + (DEEPSEEK_V4_LAST,) * 2
    assert rows(1) == (DEEPSEEK_V4_LAST,)
    assert rows(0) == ()


def test_names_without_a_warning_have_a_margin_of_one_percent():
    margins = {name: margin(rows_of(name)) for name in NAMES}
    assert {name for name, most in margins.items() if most >= SAFETY} == set(SAFE)
    assert margins["cans"] < 1.001
    assert margins["turbo_muon"] < 0.9


def test_turbo_muon_goes_uphill_where_the_warning_says():
    def turbo(x: Tensor) -> Tensor:
        rows = rows_of("turbo_muon")
        return iterate(x, rows, dtype=torch.float32, is_preconditioned=True)

    (rank_one,) = tensors_like([(1, 24)], 0)
    assert torch.sum(turbo(rank_one) * rank_one) < 0
    orthogonal = exact_polar_factor(GAUSSIAN[:, :64])
    assert torch.sum(turbo(orthogonal) * orthogonal) < 0
    assert torch.sum(turbo(GAUSSIAN) * GAUSSIAN) > 0


@pytest.mark.parametrize("x", [GAUSSIAN, HARMONIC, LOW_RANK, LOW_RANK.mT], ids=["g", "h", "l", "t"])
def test_the_scaling_of_rows_bounds_the_spectral_norm(x):
    scaled = x.double() * almost_orthogonal_scales(x.double())
    assert torch.linalg.matrix_norm(scaled, ord=2) <= 1 + 1e-12


@pytest.mark.parametrize("name", PRESETS)
def test_zero_and_any_scale(name):
    preset = PRESETS[name]
    rows, precondition = rows_of(name), preset.is_preconditioned

    def run(x: Tensor) -> Tensor:
        return iterate(x, rows, dtype=torch.float32, is_preconditioned=precondition)

    assert run(torch.zeros(3, 5)).abs().max() == 0
    assert run(torch.zeros(0, 5)).shape == (0, 5)
    for scale in (2.0**-100, 2.0**100):
        torch.testing.assert_close(run(GAUSSIAN * scale), run(GAUSSIAN), rtol=1e-4, atol=1e-4)
    with_a_zero_row = torch.cat([GAUSSIAN, torch.zeros(1, 96)])
    assert run(with_a_zero_row).isfinite().all()


def error(name: str, x: Tensor) -> float:
    """Return ||X^T X - I||_F / sqrt(r) in float64."""
    preset = PRESETS.get(name)
    precondition = preset is not None and preset.is_preconditioned
    result = iterate(x.double(), rows_of(name), dtype=torch.float64, is_preconditioned=precondition)
    gram = result @ result.mT - torch.eye(len(result), dtype=torch.float64)
    return float(gram.norm() / len(result) ** 0.5)


def table() -> Iterator[str]:
    """Yield the rows of the table in docs/options.md."""
    yield "| name | `ns_steps` | error: Gaussian | 1/i | cond 1000 | margin | source |"
    yield "|---|---|---|---|---|---|---|"
    for name in NAMES:
        rows = rows_of(name)
        errors = " | ".join(f"{error(name, x):.3f}" for x in (GAUSSIAN, HARMONIC, LOW_RANK))
        source = PRESETS[name].source if name in PRESETS else "Jordan 2024"
        most = margin(rows)
        text = "20 % or more" if most >= 1.2 else f"{100 * (most - 1):.1f} %"
        yield f"| `{name}` | {len(rows)} | {errors} | {text} | {source} |"


def test_the_documented_errors():
    assert "\n".join(table()) in Path("docs/options.md").read_text()


def steps_are_equal(mesh_shape: tuple[int, ...], placements: tuple, names: list[str]) -> list[bool]:
    """Step matrices on this mesh and whole, with each name, in bfloat16 and in groups of Muon."""
    mesh = mesh_of(mesh_shape)
    shapes = [(12, 10), (7, 20), (20, 6)]
    weights, grads = tensors_like(shapes, 0), tensors_like(shapes, 1)
    results = []
    for name in names:
        sharded = [nn.Parameter(spread(w, mesh, placements)) for w in weights]
        whole = [nn.Parameter(w.clone()) for w in weights]
        steps = len(rows_of(name))
        for params in (sharded, whole):
            optimizer = Muon(params, orthogonalizer=name, ns_steps=steps)
            for param, grad in zip(params, grads, strict=True):
                param.grad = spread(grad, mesh, placements) if params is sharded else grad.clone()
            optimizer.step()
        results.append(
            all(
                torch.equal(a.to_local(), spread(b.detach(), mesh, placements).to_local())
                for a, b in zip(sharded, whole, strict=True)
            )
        )
    return results


@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS)
def test_a_step_is_the_same_on_every_layout(mesh_shape, placements):
    num_ranks = torch.Size(mesh_shape).numel()
    names = [*PRESETS]
    results = run_threads(num_ranks, steps_are_equal, mesh_shape, placements, names)
    assert results == [[True] * len(names)] * num_ranks


@pytest.mark.P1
@pytest.mark.parametrize(("mesh_shape", "placements"), [LAYOUTS[2].values, LAYOUTS[-1].values])
def test_over_gloo(mesh_shape, placements):
    num_ranks = torch.Size(mesh_shape).numel()
    names = [*PRESETS]
    results = run_processes(num_ranks, steps_are_equal, mesh_shape, placements, names)
    assert results == [[True] * len(names)] * num_ranks


def test_unsafe_names_log_their_warning_and_are_not_distributed(caplog):
    for name in PRESETS:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="muon_dtensor"):
            optimizer = Muon([nn.Parameter(torch.ones(4, 4))], orthogonalizer=name)
        assert (f"orthogonalizer='{name}': it maps" in caplog.text) == (name not in SAFE)
        (spec,) = optimizer.plan.params
        assert spec.can_distribute == (not PRESETS[name].is_preconditioned)
