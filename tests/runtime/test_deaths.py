"""Ranks that die or stop before, during and after an exchange: the others are told in time.

Real processes, a process group with a short timeout, SIGKILL and SIGSTOP.
"""

import contextlib
import multiprocessing
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

pytestmark = pytest.mark.P1

TIMEOUT, GRACE = 4.0, 5.0
NUM_RANKS, VICTIM = 4, 1
SHAPES = [(12, 8), (8, 12), (8, 8)]


@dataclass(frozen=True)
class Told:
    """What a surviving rank says of the second step, or the third."""

    error: str
    text: str
    seconds: float
    saving: str
    same: bool


def survive(
    connection: Connection, rank: int, store: str, timeout: float, when: str, how: int
) -> None:
    """One good step; in the second the victim gets a signal at the given moment."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=timeout),
    )
    mesh = mesh_of((2, 2))
    where = (Replicate(), Shard(0))
    params = [nn.Parameter(spread(w, mesh, where)) for w in tensors_like(SHAPES, 0)]
    optimizer = Muon(params, lr=0.1, strategy="owned")

    def set_grads(step: int) -> None:
        for param, grad in zip(params, tensors_like(SHAPES, 1 + step), strict=True):
            param.grad = spread(grad, mesh, where)

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
        if when == "APPLY":  # which ends the second
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
    connection.send(Told(error, text, seconds, saving, same))
    os._exit(0)  # a dead group cannot be left in good order


@contextlib.contextmanager
def struck(when: str, strike: Callable[[], None]) -> Iterator[None]:
    """Strike at the agreement, or when a phase begins."""
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


def survivors_of(when: str, how: int) -> list[Told]:
    """What the other three say, within the timeout and the grace of a machine as busy as this."""
    timeout = TIMEOUT * slowness()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks: list[tuple[Any, Connection]] = []
        for rank in range(NUM_RANKS):
            here, there = context.Pipe()
            process = context.Process(target=survive, args=(there, rank, store, timeout, when, how))
            process.start()
            there.close()
            ranks.append((process, here))
        told: dict[int, Told] = {}
        pending = {c: rank for rank, (_, c) in enumerate(ranks) if rank != VICTIM}
        deadline = Deadline(60)
        try:
            while pending:
                patience = deadline.patience()
                ready = wait(list(pending), timeout=patience)
                assert ready or patience, f"ranks {sorted(pending.values())} hang; others: {told}"
                for connection in ready:
                    told[pending.pop(connection)] = connection.recv()
        finally:
            for process, connection in ranks:
                process.kill()
                process.join(5)
                connection.close()
    limit = timeout + GRACE * slowness()
    assert max(one.seconds for one in told.values()) < limit, told
    return [told[rank] for rank in sorted(told)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda s: s.name)
@pytest.mark.parametrize("when", ["AGREEMENT", "UNSHARD", "ORTHOGONALIZE", "RESHARD"])
def test_the_others_are_told_when_a_rank_is_lost(when, how):
    for told in survivors_of(when, how):
        if when == "AGREEMENT":
            assert told.error == "RuntimeError"
            assert "could not agree before the step, which has changed nothing" in told.text
            assert "one has died, hangs, or did not call step()," in told.text
            assert told.same
            assert told.saving == "", "nothing has changed: what there is may be saved"
            continue
        assert told.error == "StepFailedError", told
        # ranks of the other replica notice only when results are handed back
        phases = "WRA" if when == "UNSHARD" else "A"
        assert any(f"failed in phase {letter}0 (" in told.text for letter in phases), told
        assert "failed halfway" in told.saving
        assert "Load the last checkpoint" in told.saving


def test_a_rank_that_dies_after_its_part_stops_the_next_step():
    """Where the step could still be finished, the next one finds nobody and changes nothing."""
    for told in survivors_of("APPLY", signal.SIGKILL):
        assert told.error in ("RuntimeError", "StepFailedError"), told
        assert (told.error == "StepFailedError") == ("failed halfway" in told.saving)
        if told.error == "RuntimeError":
            assert "could not agree before the step, which has changed nothing" in told.text
            assert told.same
