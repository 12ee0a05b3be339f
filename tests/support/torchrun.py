"""Runs scripts under torchrun, or under torchrun's agent in forked processes."""

import os
import re
import runpy
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.support.deadlines import Deadline, run_program
from tests.support.pool import FORK_SERVER

EXAMPLES = Path(__file__).parents[2] / "examples"
SECONDS = 120
"""Seconds on an idle machine; see `tests.support.deadlines`."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    # otherwise restarted gloo ranks read the addresses of the ended ranks (torch 2.13)
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def torchrun(script: Path, num_ranks: int, *arguments: str, max_restarts: int = 0) -> str:
    """Return the output of a script on all ranks. It must exit with 0 and without warnings."""
    # --standalone: 127.0.0.1 and a free port, chosen by torchrun
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), "--max-restarts", str(max_restarts)]
    done = run_program([*command, str(script), *arguments], SECONDS, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert max_restarts or "Warning" not in done.stderr, done.stderr
    return done.stdout


def forked_torchrun(
    script: Path, num_ranks: int, *arguments: str, num_nodes: int = 1, **environment: str
) -> str:
    """Like `torchrun`, but agents and ranks are forks that need not import torch again.

    `num_ranks`: ranks of each node. Each node has an agent of its own, as with --nnodes.
    """
    settings: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    if num_nodes > 1:
        settings = {"rdzv_backend": "static", "rdzv_endpoint": f"localhost:{_free_port()}"}
    with tempfile.TemporaryDirectory() as folder:
        agents = []
        for node in range(num_nodes):
            config = LaunchConfig(
                min_nodes=num_nodes,
                max_nodes=num_nodes,
                nproc_per_node=num_ranks,
                run_id="none",
                rdzv_configs={"rank": node},
                start_method="fork",
                **settings,
            )
            paths = [Path(folder) / f"{node}.{name}" for name in ("stdout", "stderr")]
            launch_args = (config, script, arguments, environment, paths)
            agents.append(FORK_SERVER.Process(target=_launch, args=launch_args))
            agents[-1].start()
        deadline = Deadline(SECONDS)
        for agent in agents:
            join_or_kill(agent, deadline)
        stdout, stderr = (
            "".join(path.read_text() for path in sorted(Path(folder).glob(f"*.{name}")))
            for name in ("stdout", "stderr")
        )
    assert [agent.exitcode for agent in agents] == [0] * num_nodes, stdout[-4000:] + stderr[-4000:]
    assert "Warning" not in stderr, stderr
    return stdout


def become_program(paths: Sequence[Path]) -> None:
    """Write the output of this fork to files: stdout, stderr. Give it a process group."""
    os.setsid()  # so that it can be killed with all its processes
    for number, path in enumerate(paths, 1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))


def join_or_kill(process: Any, deadline: Deadline) -> None:
    """Wait for a process that has called `become_program`. Kill its group at the deadline."""
    while process.is_alive() and (patience := deadline.patience()):
        process.join(patience)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
        return port


def _launch(
    config: LaunchConfig,
    script: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    paths: Sequence[Path],
) -> None:
    """Launch the ranks of one node, as torchrun's main does."""
    become_program(paths)
    os.environ.update(ENVIRONMENT | environment)
    elastic_launch(config, _as_main)(str(script), *arguments)


def _as_main(script: str, *arguments: str) -> None:
    warnings.resetwarnings()  # pytest turned warnings into errors
    dist.set_debug_level_from_env()  # torch read it on import, before the variable was set
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def run_example(name: str, num_ranks: int, *arguments: str, **environment: str) -> str:
    """Return the output of the example on all ranks. Its loss must decrease."""
    output = forked_torchrun(EXAMPLES / f"{name}.py", num_ranks, *arguments, **environment)
    losses = re.findall(r"^loss (\S+) -> (\S+)$", output, re.MULTILINE)
    assert losses, output
    assert all(float(last) < float(first) for first, last in losses)
    return output
