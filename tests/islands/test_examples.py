"""The examples of islands, run as users run them."""

import sys

import pytest

from tests.support.deadlines import run_program
from tests.support.torchrun import EXAMPLES, run_example

pytestmark = pytest.mark.P1


def falls(output: str) -> bool:
    """Whether a line says that the loss has fallen."""
    (line,) = (line for line in output.splitlines() if line.startswith("loss "))
    _, first, _, last = line.split()
    return float(last) < float(first)


def test_islands():
    output = run_example("islands", 4)
    assert "2 islands of 2 ranks: every 2 steps, 19 parameters in 1 fragment, mean, int8" in output
    assert "2 rounds, " in output
    assert falls(output)


def test_islands_under_torchft():
    pytest.importorskip("torchft")
    run = run_program([sys.executable, "islands_torchft.py"], 120, cwd=EXAMPLES)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = run.stdout.splitlines()
    assert " 3 islands " in lines[0]
    assert " 2 islands " in lines[2], "two go on"
    assert lines[-1] == "equal base values: True"


def test_privacy_of_single_examples():
    pytest.importorskip("opacus")
    output = run_example("private", 2)
    assert falls(output)
    assert "epsilon " in output
