"""Network namespaces of this machine as nodes with slow links, for benchmarks. Needs root."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

LINK, ADDRESS = "muonlink", "10.77.0.{}"
"""Name of the link inside each node, and addresses of the nodes, from 1."""


@contextmanager
def nodes(rate: str, count: int = 2) -> Iterator[list[str]]:
    """Create network namespaces, and yield their names.

    A bridge connects them. Each sends at most `rate`, in tc's notation.
    """
    switch = f"muon-switch-{os.getpid()}"
    names = [f"muon-node{i}-{os.getpid()}" for i in range(count)]
    with ExitStack() as stack:
        for name in (switch, *names):
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for index, name in enumerate(names):
            ends = [f"mdt{os.getpid()}{side}{index}"[-15:] for side in "ab"]
            _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            _ip("link", "set", ends[0], "netns", name, "name", LINK)
            _ip("link", "set", ends[1], "netns", switch, "name", f"port{index}")
            _ip("-n", switch, "link", "set", f"port{index}", "master", "bridge", "up")
            inside = ("-n", name)
            _ip(*inside, "addr", "add", ADDRESS.format(index + 1) + "/24", "dev", LINK)
            _ip(*inside, "link", "set", LINK, "up")
            _ip(*inside, "link", "set", "lo", "up")
            limit = ("tbf", "rate", rate, "burst", "256kb", "latency", "100ms")
            command = ["tc", *inside, "qdisc", "add", "dev", LINK, "root", *limit]
            subprocess.run(command, check=True)
        yield names


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def skip_reason() -> str:
    """Return the reason why this machine cannot create the nodes; empty if it can."""
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{', '.join(missing)} of iproute2 not found" if missing else ""


def sent_nbytes() -> int:
    """Return the bytes that this node has sent over its link, headers included."""
    return int(Path(f"/sys/class/net/{LINK}/statistics/tx_bytes").read_text())


def launch(module: str, rate: str, count: int, ranks_per_node: int, seconds: float) -> int:
    """Run a module with `--worker` as all ranks, in nodes. Returns 0 if all exit with 0.

    Prints why, and returns 0, where the nodes cannot be created.
    """
    if reason := skip_reason():
        print(f"skipped: {reason}")
        return 0
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    with nodes(rate, count) as names:
        processes = []
        for rank in range(count * ranks_per_node):
            env = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(count * ranks_per_node),
                "MASTER_ADDR": ADDRESS.format(1),
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": LINK,
                "OMP_NUM_THREADS": "1",
            }
            command = ["ip", "netns", "exec", names[rank // ranks_per_node], sys.executable, "-m"]
            command += [module, *sys.argv[1:], "--worker"]
            processes.append(subprocess.Popen(command, env=env))
        try:
            return max(abs(p.wait(seconds)) for p in processes)
        finally:
            for process in processes:
                process.kill()
