"""Ranks as forked gloo processes, reused between tests, with a fresh process group per job.

Note [Fork server]
    Ranks are forked by a server process, which imports torch and runs nothing. A test process may
    have run a backward, and CUDA builds of torch 2.15 refuse backward in a fork of such a process.
"""

import contextlib
import gc
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import debug

from tests.support.deadlines import Deadline, slowness

COLLECTIVE_SECONDS = 40
DEADLINE_SECONDS = 150
"""Seconds on an idle machine; see `tests.support.deadlines`."""
MAX_THREADS = 16 if torch.__version__ >= "2.11" else 0
"""A rank with more threads after a job is replaced: each gloo thread wakes 100 times a second.

0 replaces every rank: torch 2.9's tensor parallelism may hang in a process that had other process
groups before.
"""


FORK_SERVER = multiprocessing.get_context("forkserver")
"""Context of processes with torch and the test support imported; see Note [Fork server]."""


def start_fork_server() -> None:
    """Start the server now, in the root of the repository, before a test changes the folder."""
    FORK_SERVER.set_forkserver_preload(["tests.conftest"])
    forkserver.ensure_running()


class RankError(RuntimeError):
    """A rank raised; the text is its traceback."""


def _serve(connection: Connection, filters: list[Any]) -> None:
    """Run jobs. `filters`: of warnings, as pytest has set them for the first test with ranks."""
    torch.set_num_threads(1)
    warnings.filters[:] = filters  # type: ignore[index]
    gc.freeze()  # the collection after each job skips imported objects
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
        # If a rank destroys its group while another rank still connects to it, that rank hangs.
        connection.recv()
        if dist.is_initialized():
            dist.destroy_process_group()
        del job, body, args, answer
        forget_meshes()
        gc.collect()  # models hold meshes, meshes hold groups, and each holds three threads
        connection.send(_num_threads())


def forget_meshes() -> None:
    """Clear torch's caches of DTensor operators, which hold meshes with destroyed process groups.

    Meshes are compared by value, so an equal mesh of a later job would use the destroyed groups.
    """
    debug._clear_sharding_prop_cache()


def _num_threads() -> int:
    """Return the number of threads, including C++ threads; 1 on systems without /proc."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 1


class Pool:
    """Processes that wait for jobs. If one dies or hangs, all are replaced."""

    def __init__(self) -> None:
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, num_ranks: int, body: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `body(*args)` on every rank; return the results in rank order. Raises RankError."""
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
        """Run `body(*args)`; return (True, result) or (False, traceback text) of each rank."""
        while len(self._ranks) < num_ranks:
            connection, rank_connection = FORK_SERVER.Pipe()
            process = FORK_SERVER.Process(
                target=_serve, args=(rank_connection, list(warnings.filters)), daemon=True
            )
            process.start()
            rank_connection.close()
            self._ranks.append((process, connection))
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
                errors = [value for worked, value in answers.values() if not worked]
                raise TimeoutError(f"ranks {missing} hang; errors of other ranks: {errors}")
            for connection in ready:
                rank = rank_of[connection]
                try:
                    answers[rank] = connection.recv()
                except EOFError:
                    answers[rank] = (False, "the process died")
        for connection in rank_of:
            with contextlib.suppress(OSError):
                connection.send("destroy the process group")
        died = any(value == "the process died" for _, value in answers.values())
        if died or not all(_is_reusable(connection) for connection in rank_of):
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


def _is_reusable(connection: Connection) -> bool:
    """Whether a rank has ended its job, is alive, and runs at most MAX_THREADS threads."""
    try:
        return connection.poll(COLLECTIVE_SECONDS * slowness()) and connection.recv() <= MAX_THREADS
    except (EOFError, OSError):
        return False


_pools: dict[int, Pool] = {}


def run_processes(num_ranks: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `body(*args)` on ranks of this process's pool; see `Pool.run`."""
    return _pools.setdefault(os.getpid(), Pool()).run(num_ranks, body, *args)


def process_outcomes(
    num_ranks: int,
    body: Callable[..., Any],
    *args: Any,
    collective_seconds: int = COLLECTIVE_SECONDS,
) -> list[tuple[bool, Any]]:
    """Run `body(*args)` on ranks of this process's pool; see `Pool.outcomes`.

    `collective_seconds`: timeout of the process group; short where a rank must reach it.
    """
    pool = _pools.setdefault(os.getpid(), Pool())
    return pool.outcomes(num_ranks, body, *args, collective_seconds=collective_seconds)


def close_pools() -> None:
    """End the processes of this process's pool."""
    if pool := _pools.pop(os.getpid(), None):
        pool.close()
