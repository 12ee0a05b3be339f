"""If a rank dies or stops before, during or after an exchange, the others raise in time.

Real processes, a process group with a short timeout, SIGKILL and SIGSTOP.
"""

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from muon_dtensor import Muon, StepFailedError
from muon_dtensor.runtime import consistency as agreement
from muon_dtensor.runtime.executor import Executor
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.deadlines import Deadline, slowness
from tests.support.pool import FORK_SERVER

pytestmark = pytest.mark.P1

TIMEOUT, GRACE = 4.0, 5.0
NUM_RANKS, VICTIM = 4, 1
PHASES = ("AGREEMENT", "UNSHARD", "ORTHOGONALIZE", "RESHARD")
SHAPES = [(12, 8), (8, 12), (8, 8)]


@dataclass(frozen=True)
class Report:
    """What a surviving rank reports about the second step, or the third."""

    error: str
    text: str
    seconds: float
    saving: str
    same: bool


def survive(
    connection: Connection, rank: int, store: str, timeout: float, when: str, how: int
) -> None:
    """Take a good step; in the second the victim receives a signal at the given moment."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=timeout),
    )
    mesh = mesh_of((2, 2))
    placements = (Replicate(), Shard(0))
    params = [nn.Parameter(spread(w, mesh, placements)) for w in tensors_like(SHAPES, 0)]
    optimizer = Muon(params, lr=0.1, strategy="owned")

    def set_grads(step: int) -> None:
        for param, grad in zip(params, tensors_like(SHAPES, 1 + step), strict=True):
            param.grad = spread(grad, mesh, placements)

    set_grads(0)
    optimizer.step()
    set_grads(1)
    before = [p.detach().to_local().clone() for p in params]
    if rank == VICTIM:
        with struck(when, lambda: os.kill(os.getpid(), how)):
            optimizer.step()
        time.sleep(600)  # stopped, and then killed by the test
    start = time.monotonic()
    try:
        optimizer.step()
        if when in ("PASS_ON", "APPLY"):  # a rank that needs nothing more finishes the second step
            before = [p.detach().to_local().clone() for p in params]
            start = time.monotonic()
            optimizer.step()
        error, text = "", ""
    except Exception as failure:
        error, text = type(failure).__name__, str(failure)
    seconds = time.monotonic() - start
    saving = ""
    try:
        optimizer.state_dict()
    except StepFailedError as failure:
        saving = str(failure)
    same = all(torch.equal(p.detach().to_local(), b) for p, b in zip(params, before, strict=True))
    connection.send(Report(error, text, seconds, saving, same))
    os._exit(0)  # a broken group cannot be destroyed cleanly


@contextlib.contextmanager
def struck(when: str, strike: Callable[[], None]) -> Iterator[None]:
    """Call `strike` in the comparison before the step, or when a phase begins."""
    act, reduce = Executor._act, agreement.maximum_of_all

    def acting(self: Any, action: Any, *args: Any) -> None:
        if action.phase.name == when:
            strike()
        act(self, action, *args)

    def reducing(*args: Any) -> None:
        if when == "AGREEMENT":
            strike()
        reduce(*args)

    with (
        mock.patch.object(Executor, "_act", acting),
        mock.patch.object(agreement, "maximum_of_all", reducing),
    ):
        yield


def survivors_of(when: str, how: int) -> list[Report]:
    """Return the reports of the other three ranks; the limit depends on the machine's load."""
    timeout = TIMEOUT * slowness()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks: list[tuple[Any, Connection]] = []
        for rank in range(NUM_RANKS):
            receiver, sender = FORK_SERVER.Pipe()
            process = FORK_SERVER.Process(
                target=survive, args=(sender, rank, store, timeout, when, how)
            )
            process.start()
            sender.close()
            ranks.append((process, receiver))
        reports: dict[int, Report] = {}
        pending = {c: rank for rank, (_, c) in enumerate(ranks) if rank != VICTIM}
        deadline = Deadline(60)
        try:
            while pending:
                patience = deadline.patience()
                ready = wait(list(pending), timeout=patience)
                assert ready or patience, (
                    f"ranks {sorted(pending.values())} hang; others: {reports}"
                )
                for connection in ready:
                    reports[pending.pop(connection)] = connection.recv()
        finally:
            for process, connection in ranks:
                process.kill()
                process.join(5)
                connection.close()
    limit = timeout + GRACE * slowness()
    assert max(report.seconds for report in reports.values()) < limit, reports
    return [reports[rank] for rank in sorted(reports)]


@pytest.mark.parametrize(
    ("when", "how"),
    [
        *((when, signal.SIGKILL) for when in PHASES),
        *((when, signal.SIGSTOP) for when in PHASES[::2]),
        *(pytest.param(when, signal.SIGSTOP, marks=pytest.mark.P2) for when in PHASES[1::2]),
    ],
)
def test_the_others_raise_when_a_rank_is_lost(when, how):
    for report in survivors_of(when, how):
        if when == "AGREEMENT":
            assert report.error == "RuntimeError"
            assert "could not agree before the step, which has changed nothing" in report.text
            assert "one has died, hangs, or did not call step()," in report.text
            assert report.same
            assert report.saving == "", "nothing has changed: state may be saved"
            continue
        assert report.error == "StepFailedError", report
        # ranks of the other replica raise only when results are sent back
        phases = "WRPA" if when == "UNSHARD" else "PA"
        assert any(f"failed in phase {letter}0 (" in report.text for letter in phases), report
        assert "failed halfway" in report.saving
        assert "Load the last checkpoint" in report.saving


@pytest.mark.parametrize("when", ["PASS_ON", "APPLY"])
def test_a_rank_that_dies_after_its_part_stops_the_next_step(when):
    """If the step could be finished, the next one misses the rank and changes nothing."""
    for report in survivors_of(when, signal.SIGKILL):
        assert report.error in ("RuntimeError", "StepFailedError"), report
        assert (report.error == "StepFailedError") == ("failed halfway" in report.saving)
        if report.error == "RuntimeError":
            assert "could not agree before the step, which has changed nothing" in report.text
            assert report.same
