import logging
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
import torch._dynamo  # torch's optimizers import it; imported here once for all forked ranks

from muon_dtensor.algorithms.kernels import log_slow_bfloat16
from tests.support.pool import close_pools, start_fork_server

torch.set_num_threads(1)  # one thread per rank; forked processes must not inherit a thread pool


# logged once per process: done here so that logs do not depend on the order of tests
log_slow_bfloat16(logging.WARNING)
log_slow_bfloat16(logging.INFO)


hypothesis.settings.register_profile("any machine", deadline=None)  # the default is 200 ms
hypothesis.settings.load_profile("any machine")


def _pin_to_core() -> None:
    """Pin each worker of pytest-xdist, with its threads and processes, to one core.

    If all cores are busy, waking a rank on another core is slow: threads take twice, exchanges of
    processes up to eight times as long on a virtual machine.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None or not hasattr(os, "sched_setaffinity"):  # macOS has none
        return
    cores = sorted(os.sched_getaffinity(0))
    if int(os.environ["PYTEST_XDIST_WORKER_COUNT"]) >= len(cores):
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


_pin_to_core()


TIERS = {"P0", "P1", "P2", "slow", "gpu", "integrations"}


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests without a tier as P0, which runs for every commit."""
    for item in items:
        if not TIERS & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.P0)


@pytest.fixture(scope="session", autouse=True)
def _pools() -> Iterator[None]:
    start_fork_server()
    yield
    close_pools()
