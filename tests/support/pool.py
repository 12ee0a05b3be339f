"""Ranks as forked gloo processes, reused between tests, with a fresh process group per job."""

import contextlib
import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import debug

from tests.support.deadlines import Deadline, slowness

COLLECTIVE_SECONDS = 40
DEADLINE_SECONDS = 150
"""Of a machine that does nothing else; see `tests.support.deadlines`."""
MAX_THREADS = 16 if torch.__version__ >= "2.11" else 0
"""A rank with more after a job is replaced: gloo's threads wake a hundred times a second each.

torch 2.9's tensor parallelism may wait forever in a process that had other groups before.
"""


class RankError(RuntimeError):
    """A rank raised; the text is its traceback."""


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is not looked through after each job
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        if job is None:
            return
        body, args, rank, num_ranks, store, seconds = job
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=num_ranks,
                timeout=timedelta(seconds=seconds),
            )
            answer = (True, body(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
            if dist.is_initialized():
                dist.destroy_process_group()
        connection.send(answer)
        # A rank that leaves while another still connects to it makes that one hang.
        connection.recv()
        if dist.is_initialized():
            dist.destroy_process_group()
        del job, body, args, answer
        forget_meshes()
        gc.collect()  # models hold meshes, meshes hold groups, and each holds three threads
        connection.send(_num_threads())


def forget_meshes() -> None:
    """Clear torch's caches of operators on DTensors, whose results hold meshes of groups now gone.

    Meshes are compared by value, so an equal one of a later job would get an old one's groups.
    """
    debug._clear_sharding_prop_cache()


def _num_threads() -> int:
    """Those of C++ too; on systems without /proc nothing is known of them."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 1


class Pool:
    """Processes that wait for jobs. One that dies or hangs is replaced, with all the others."""

    def __init__(self) -> None:
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, num_ranks: int, body: Callable[..., Any], *args: Any) -> list[Any]:
        """`body(*args)` on every rank; results in rank order. Raises RankError."""
        answers = self.outcomes(num_ranks, body, *args)
        for rank, (worked, value) in enumerate(answers):
            if not worked:
                raise RankError(f"rank {rank}:\n{value}")
        return [value for _, value in answers]

    def outcomes(
        self,
        num_ranks: int,
        body: Callable[..., Any],
        *args: Any,
        collective_seconds: int = COLLECTIVE_SECONDS,
    ) -> list[tuple[bool, Any]]:
        """Per rank (True, result) or (False, traceback text)."""
        context = multiprocessing.get_context("fork")
        while len(self._ranks) < num_ranks:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            seconds = collective_seconds * slowness()
            for rank in range(num_ranks):
                job = (body, args, rank, num_ranks, store, seconds)
                self._ranks[rank][1].send(job)
            return self._collect(num_ranks)

    def _collect(self, num_ranks: int) -> list[tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        rank_of = {self._ranks[rank][1]: rank for rank in range(num_ranks)}
        deadline = Deadline(DEADLINE_SECONDS)
        while len(answers) < num_ranks:
            pending = [c for c, rank in rank_of.items() if rank not in answers]
            patience = deadline.patience()
            ready = wait(pending, timeout=patience)
            if not ready and not patience:
                self.close()
                missing = sorted(set(range(num_ranks)) - set(answers))
                told = [value for worked, value in answers.values() if not worked]
                raise TimeoutError(f"ranks {missing} hang; others said: {told}")
            for connection in ready:
                rank = rank_of[connection]
                try:
                    answers[rank] = connection.recv()
                except EOFError:
                    answers[rank] = (False, "the process died")
        for connection in rank_of:
            with contextlib.suppress(OSError):
                connection.send("leave")
        died = any(value == "the process died" for _, value in answers.values())
        if died or not all(_has_left(connection) for connection in rank_of):
            self.close()
        return [answers[rank] for rank in range(num_ranks)]

    def close(self) -> None:
        """End all processes."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            with contextlib.suppress(ValueError, OSError):
                process.join(5)
        self._ranks.clear()


def _has_left(connection: Connection) -> bool:
    """Whether a rank has ended its job, is alive, and has let go of nearly all process groups."""
    try:
        return connection.poll(COLLECTIVE_SECONDS * slowness()) and connection.recv() <= MAX_THREADS
    except (EOFError, OSError):
        return False


_pools: dict[int, Pool] = {}


def run_processes(num_ranks: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """`body(*args)` on ranks of this process's pool; see `Pool.run`."""
    return _pools.setdefault(os.getpid(), Pool()).run(num_ranks, body, *args)


def process_outcomes(
    num_ranks: int,
    body: Callable[..., Any],
    *args: Any,
    collective_seconds: int = COLLECTIVE_SECONDS,
) -> list[tuple[bool, Any]]:
    """As `run_processes`, with the traceback of a rank that raised.

    `collective_seconds`: the process group's timeout, short where a rank is to wait in vain.
    """
    pool = _pools.setdefault(os.getpid(), Pool())
    return pool.outcomes(num_ranks, body, *args, collective_seconds=collective_seconds)


def close_pools() -> None:
    """End the processes of this process's pool."""
    if pool := _pools.pop(os.getpid(), None):
        pool.close()
