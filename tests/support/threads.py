"""Ranks as threads of one process: fast, 32 ranks in milliseconds.

Does not detect missing waits and size mismatches; `tests.support.pool` does.
"""

import os
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

from tests.support.deadlines import Deadline

DEADLINE_SECONDS = 120
"""Seconds on an idle machine; see `tests.support.deadlines`."""


def run_threads(num_ranks: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `body(*args)` on every rank; return the results in rank order.

    Raises the error of the lowest rank that raised.
    """
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    ProcessLocalGroup.reset()
    _install_threaded_pg()
    store = dist.HashStore()
    results: list[Any] = [None] * num_ranks
    errors: dict[int, BaseException] = {}

    def main(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=num_ranks, store=store)
            results[rank] = body(*args)
        except BaseException as error:
            errors[rank] = error
            ProcessLocalGroup.exception_handle(error)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    try:
        threads = [threading.Thread(target=main, args=(r,), daemon=True) for r in range(num_ranks)]
        for thread in threads:
            thread.start()
        deadline = Deadline(DEADLINE_SECONDS)
        for thread in threads:
            while thread.is_alive() and (patience := deadline.patience()):
                thread.join(patience)
        stuck = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    finally:
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        _uninstall_threaded_pg()
    if errors:
        rank = min(errors, key=lambda r: (isinstance(errors[r], SystemExit), r))
        errors[rank].add_note(f"on rank {rank} of {num_ranks}, pid {os.getpid()}")
        raise errors[rank]
    assert not stuck, f"ranks {stuck} did not end within {DEADLINE_SECONDS} s"
    return results
