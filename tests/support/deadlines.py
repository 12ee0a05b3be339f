"""Deadlines that detect hangs but are not reached because of load.

Seconds count on an idle machine. On a busy machine the deadline is later.
"""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic

POLL_SECONDS = 5.0
"""Maximum seconds between two readings of the load."""


def slowness() -> float:
    """Return the factor by which the load slows a job down: load average by cores, at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Deadline:
    """A number of seconds from now, as an idle machine would count them."""

    def __init__(self, seconds: float) -> None:
        self._remaining = seconds
        self._last_poll = monotonic()

    def patience(self) -> float:
        """Return the seconds to wait before the next call; 0 after the deadline."""
        now = monotonic()
        self._remaining -= (now - self._last_poll) / slowness()
        self._last_poll = now
        return min(max(self._remaining, 0.0), POLL_SECONDS)


def run_program(
    command: Sequence[str],
    seconds: float,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program; return its exit status and output. `env` is added to this environment.

    Kills the program and its own processes at the deadline, and raises TimeoutExpired.
    """

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    variables = {**os.environ, **(env or {})}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
        cwd=cwd,
        start_new_session=True,
    ) as process:
        deadline = Deadline(seconds)
        while True:
            patience = deadline.patience()
            try:
                out, err = process.communicate(timeout=patience)
                return subprocess.CompletedProcess(command, process.returncode, out, err)
            except subprocess.TimeoutExpired:
                if not patience:
                    kill()
                    raise
            except BaseException:
                kill()
                raise
