"""Deadlines that guard against hangs, and not against load.

They are told in seconds of a machine that does nothing else, and come later on a busy one.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic

ASK_AGAIN = 5.0
"""Seconds after which the load is looked at anew."""


def slowness() -> float:
    """How many times as long as alone a job takes now: tasks that want a core, by cores."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Deadline:
    """So many seconds from now, of a machine that does nothing else."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._asked = monotonic()

    def patience(self) -> float:
        """How many seconds to wait before asking again; 0 once the deadline has passed."""
        now = monotonic()
        self._left -= (now - self._asked) / slowness()
        self._asked = now
        return min(max(self._left, 0.0), ASK_AGAIN)


def run_program(
    command: Sequence[str],
    seconds: float,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """What a program prints, and how it ended. `env`: beside the variables that are set here.

    Raises TimeoutExpired at the deadline, after it was killed.
    """
    variables = {**os.environ, **(env or {})}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
        cwd=cwd,
    ) as process:
        deadline = Deadline(seconds)
        while True:
            patience = deadline.patience()
            try:
                out, err = process.communicate(timeout=patience)
                return subprocess.CompletedProcess(command, process.returncode, out, err)
            except subprocess.TimeoutExpired:
                if not patience:
                    process.kill()
                    raise
            except BaseException:
                process.kill()
                raise
