"""Runs `muon-dtensor` and the programs that it starts in forks, which need not import torch again.

On a slow machine an import takes 2 to 4 seconds of each process. A few tests start real programs.
"""

import importlib.util
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from muon_dtensor.cli.main import main
from tests.support.deadlines import Deadline
from tests.support.pool import FORK_SERVER
from tests.support.torchrun import ENVIRONMENT, become_program, join_or_kill

ROOT = Path(__file__).parents[2]


def muon_dtensor(*arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """Return the exit status and the output of a command; stdout and stderr of all processes."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("stdout", "stderr")]
        process = FORK_SERVER.Process(target=_command, args=(arguments, paths))
        process.start()
        join_or_kill(process, Deadline(seconds))
        out, err = (path.read_text() for path in paths)
    assert process.exitcode is not None
    return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def _command(arguments: Sequence[str], paths: Sequence[Path]) -> None:
    become_program(paths)
    os.environ.update(ENVIRONMENT | {"COLUMNS": "120"})
    sys.path.insert(0, str(ROOT))
    warnings.resetwarnings()  # pytest turned warnings into errors
    sys.argv = ["muon-dtensor", *arguments]
    with mock.patch("subprocess.run", _run_in_fork):
        main()


def _run_in_fork(
    command: Sequence[str], env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Do what `python -m module ...` does, under torchrun or not."""
    assert command[:2] == [sys.executable, "-m"], command
    module, arguments = command[2], command[3:]
    target: Callable[..., Any] = _run_module
    prefix: tuple[Any, ...] = ()
    if module == "torch.distributed.run":
        settings, (module, *arguments) = _split(arguments)
        target, prefix = _run_ranks, (int(settings[settings.index("--nproc-per-node") + 1]),)
    process = multiprocessing.get_context("fork").Process(
        target=target, args=(*prefix, module, arguments, dict(env or {}))
    )
    process.start()
    process.join()
    return subprocess.CompletedProcess(command, process.exitcode or 0)


def _split(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Return the options of torchrun, and the module with its arguments."""
    index = arguments.index("-m")
    return arguments[:index], arguments[index + 1 :]


def _run_module(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    dist.set_debug_level_from_env()  # torch read it on import, before the variable was set
    found = importlib.util.find_spec(module)
    assert found is not None, module
    sys.argv = [module, *arguments]
    runpy.run_path(str(found.origin), run_name="__main__")


def _run_ranks(
    num_ranks: int, module: str, arguments: Sequence[str], environment: Mapping[str, str]
) -> None:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id="none",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
    )
    try:
        elastic_launch(config, _run_module)(module, arguments, environment)
    except ChildFailedError as error:
        raise SystemExit(1) from error
