import logging
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
import torch._dynamo  # torch's optimizers import it; here, so that forked ranks need not, each

from muon_dtensor.algorithms.kernels import log_slow_bfloat16
from tests.support.pool import close_pools

torch.set_num_threads(1)  # one thread per rank; and a forked process must not inherit a team


# told once per process: here, lest a test's log depend on the processor and on who came first
log_slow_bfloat16(logging.WARNING)
log_slow_bfloat16(logging.INFO)


hypothesis.settings.register_profile("any machine", deadline=None)  # its own are 200 ms
hypothesis.settings.load_profile("any machine")


def _take_a_core() -> None:
    """A core for each worker of pytest-xdist, its threads and its processes.

    Where all cores are taken anyway, ranks that wake each other on another one only wait longer:
    threads twice, exchanges of processes up to eight times on a virtual machine.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None or not hasattr(os, "sched_setaffinity"):  # macOS has none
        return
    cores = sorted(os.sched_getaffinity(0))
    if int(os.environ["PYTEST_XDIST_WORKER_COUNT"]) >= len(cores):
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


_take_a_core()


TIERS = {"P0", "P1", "P2", "slow", "gpu", "integrations"}


@pytest.hookimpl(tryfirst=True)  # before pytest takes out what -m leaves out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What names no tier is P0: it runs for every commit."""
    for item in items:
        if not TIERS & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.P0)


@pytest.fixture(scope="session", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()
