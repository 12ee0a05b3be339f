"""Differences between processors: which dtype is fast, and the order of rounding."""

import logging
import platform
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from muon_dtensor import Muon
from muon_dtensor.algorithms import kernels
from tests.support.deadlines import run_program
from tests.support.logs import logged

ROOT = Path(__file__).parents[2]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "DNNL_MAX_CPU_ISA": "AVX2"}
"""Makes torch compute as on a processor without AVX512 and AMX."""

EXACT = (
    "runtime/test_layouts_bitwise",
    *("algorithms/test_newton_schulz", "algorithms/test_update", "algorithms/test_polar_express"),
)


@pytest.mark.P1
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 needs x86")
def test_updates_are_exact_with_avx2_only():
    """The full suite passes there too; these are the tests that compare bits."""
    tests = [f"tests/{name}.py" for name in EXACT]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *tests]
    command += ["-k", "not many_ranks"]  # more ranks than the other layouts, not other sums
    done = run_program(command, 600, env=AVX2, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.fixture
def _not_logged(monkeypatch):
    kernels.log_slow_bfloat16.cache_clear()
    yield
    kernels.log_slow_bfloat16.cache_clear()
    monkeypatch.undo()
    for level in (logging.WARNING, logging.INFO):  # as in tests/conftest.py
        kernels.log_slow_bfloat16(level)


def param() -> nn.Parameter:
    return nn.Parameter(torch.ones(3, 2))


@pytest.mark.usefixtures("_not_logged")
def test_slow_bfloat16_is_logged_once_with_its_ratio_and_the_option(monkeypatch):
    monkeypatch.setattr(kernels, "bfloat16_slowdown", lambda: 7.04)
    with logged() as lines:
        Muon([param()], ns_dtype=torch.float32)
        Muon([nn.Parameter(torch.ones(3, 2, device="meta"))])
    assert lines == []
    with logged() as lines:
        Muon([param()])
        Muon([param()])
    (line,) = lines
    assert "take 7.0 times as long as float32" in line
    assert "Muon(..., ns_dtype=torch.float32)" in line


@pytest.mark.usefixtures("_not_logged")
def test_fast_bfloat16_is_not_logged(monkeypatch):
    monkeypatch.setattr(kernels, "bfloat16_slowdown", lambda: 1.4)
    with logged() as lines:
        Muon([param()])
    assert lines == []


def test_the_ratio_is_measured():
    """With AVX2 only it is about 7, with AVX512-BF16 below 1."""
    code = (
        "import torch; torch.set_num_threads(1); "
        "from muon_dtensor.algorithms.kernels import bfloat16_slowdown; "
        "print(bfloat16_slowdown())"
    )
    done = run_program([sys.executable, "-c", code], 60, env=AVX2)
    assert done.returncode == 0, done.stderr
    ratio = float(done.stdout)
    assert 1 / 50 < ratio < 200
    if platform.machine() == "x86_64":
        assert ratio > kernels.SLOW
