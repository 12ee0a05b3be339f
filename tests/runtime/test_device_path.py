"""Steps on an accelerator never wait for it: every read of a value by the host would raise."""

import json
import sys

import pytest

from tests.support.deadlines import run_program
from tests.support.fake_device import CASES, IS_AVAILABLE, NUM_MATRICES, cases_on

pytestmark = pytest.mark.skipif(not IS_AVAILABLE, reason="this torch registers no device in Python")


@pytest.fixture(scope="module")
def launches() -> dict[str, dict[str, int]]:
    """Per case, the operators of a step that launch a kernel, and how often."""
    run = run_program([sys.executable, "-m", "tests.support.fake_device"], 120)
    assert run.returncode == 0, run.stderr[-3000:]
    counts: dict[str, dict[str, int]] = json.loads(run.stdout.splitlines()[-1])
    return counts


def test_no_case_waits_for_the_device(launches):
    assert launches.keys() == CASES.keys() | cases_on(None).keys()
    assert all(launches.values())


ITERATION = ("bmm", "baddbmm", "mm.out", "addmm")
PREPARATION = 20
"""Launches for all matrices of a batch: norms, scales, the check of gradients, the mask."""


def test_launches_of_a_batched_step(launches):
    """Beside the iteration, per matrix."""
    counts = launches["default"]
    others = sum(n for name, n in counts.items() if not any(part in name for part in ITERATION))
    assert (others - PREPARATION) / NUM_MATRICES <= 4
