"""Islands that die, hang, go on without others, and return: real processes under torchft."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from muon_dtensor.islands import TorchFT
from tests.support.deadlines import Deadline

torchft = pytest.importorskip("torchft")
coordination = pytest.importorskip("torchft.coordination")
pytestmark = pytest.mark.P1

RANKS = 2


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Island:
    """The processes of one island."""

    number: int
    processes: list[subprocess.Popen]
    logs: list[Path]

    def lines(self, rank: int = 0) -> list[dict[str, Any]]:
        if not self.logs[rank].exists():
            return []
        text = self.logs[rank].read_text()
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    @property
    def round(self) -> int:
        lines = self.lines()
        return lines[-1]["round"] if lines else 0

    def kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()


class Run:
    """Islands under one Lighthouse."""

    def __init__(self, folder: Path, **outer: Any) -> None:
        self.lighthouse = coordination.LighthouseServer(
            bind="0.0.0.0:0",
            min_replicas=1,
            join_timeout_ms=2000,
            heartbeat_timeout_ms=3000,
        )
        self.folder, self.outer = folder, outer
        self.islands: list[Island] = []
        self._count = 0

    def launch(self, number: int, fault: tuple[int, str, str] | None = None) -> Island:
        port = free_port()
        processes, logs = [], []
        self._count += 1
        for rank in range(RANKS):
            logs.append(self.folder / f"{self._count}-{number}-{rank}.log")
            job = {
                "island": number,
                "rank": rank,
                "port": port,
                "lighthouse": self.lighthouse.address(),
                "log": str(logs[-1]),
                "fault": fault if rank == 0 or (fault and fault[1] == "SIGSTOP") else None,
                "outer": self.outer,
            }
            command = [sys.executable, "-m", "tests.support.torchft_island", json.dumps(job)]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            with (self.folder / f"{self._count}-{number}-{rank}.err").open("w") as errors:
                process = subprocess.Popen(command, env=env, stdout=errors, stderr=errors)
            processes.append(process)
        island = Island(number, processes, logs)
        self.islands.append(island)
        return island

    def wait(self, condition: Any, seconds: float = 90.0) -> None:
        deadline = Deadline(seconds)
        while not condition():
            if not deadline.patience():
                texts = [p.read_text()[-600:] for p in sorted(self.folder.glob("*.err"))]
                raise AssertionError(
                    "\n".join([str([i.lines()[-1:] for i in self.islands]), *texts])
                )
            time.sleep(0.05)

    def hold_digests(self) -> None:
        """After each round all islands that took part have equal base values."""
        for rank in range(RANKS):
            by_round: dict[int, set[int]] = {}
            for island in self.islands:
                for line in island.lines(rank):
                    by_round.setdefault(line["round"], set()).add(line["digest"])
            differing = {number for number, digests in by_round.items() if len(digests) > 1}
            assert not differing, f"rounds {differing} ended with different base values"


@pytest.fixture
def run(tmp_path) -> Iterator[Any]:
    runs: list[Run] = []

    def make(**outer: Any) -> Run:
        runs.append(Run(tmp_path, **outer))
        return runs[-1]

    yield make
    for made in runs:
        for island in made.islands:
            island.kill()
        made.lighthouse.shutdown()


def complete(*islands: Island) -> bool:
    """Whether all three islands took part in the last round of each of these."""
    return all(i.lines() and i.lines()[-1]["islands"] == 3 for i in islands)


@pytest.mark.parametrize(
    "phase",
    ["finish", *(pytest.param(p, marks=pytest.mark.P2) for p in ("start", "begin", "commit"))],
)
def test_an_island_dies_in_a_phase_of_a_round_and_returns(run, phase):
    islands = run()
    first, second = islands.launch(0), islands.launch(1)
    third = islands.launch(2, fault=(2, "SIGKILL", phase))
    islands.wait(lambda: third.processes[0].poll() is not None)
    third.kill()
    at_death = max(first.round, second.round)
    islands.wait(lambda: min(first.round, second.round) >= at_death + 3)
    assert first.lines()[-1]["islands"] == 2, "the others go on"
    again = islands.launch(2)
    islands.wait(lambda: complete(first, second, again))
    joined = again.round
    islands.wait(lambda: min(first.round, second.round, again.round) >= joined + 3)
    islands.hold_digests()
    changed = [line["round"] for line in again.lines() if line["accepted"]]
    assert changed[0] > at_death, "it begins where the others are"


@pytest.mark.parametrize(
    "phase",
    ["start", *(pytest.param(p, marks=pytest.mark.P2) for p in ("begin", "finish", "commit"))],
)
def test_an_island_that_hangs_returns_with_its_late_work(run, phase):
    islands = run(max_staleness=10**6)
    first, second = islands.launch(0), islands.launch(1)
    third = islands.launch(2, fault=(2, "SIGSTOP", phase))
    islands.wait(lambda: min(first.round, second.round) >= 6)
    for process in third.processes:
        process.send_signal(signal.SIGCONT)
    islands.wait(lambda: complete(first, second, third))
    joined = third.round
    islands.wait(lambda: min(first.round, second.round, third.round) >= joined + 2)
    islands.hold_digests()
    assert third.lines()[-1]["late_accepted"] >= 1
    assert third.lines()[-1]["late_dropped"] == 0


def test_one_island_alone_waits_for_a_majority(run):
    islands = run()
    first = islands.launch(0)
    islands.wait(lambda: len(first.lines()) >= 2)
    assert first.round == 0
    assert first.lines()[-1]["failed"] >= 2, "rounds of one island of three change nothing"
    second = islands.launch(1)
    islands.wait(lambda: min(first.round, second.round) >= 3)
    islands.hold_digests()


@pytest.mark.P2
def test_50_rounds_with_random_kills(run):
    generator = random.Random(0)
    islands = run()
    alive = {n: islands.launch(n) for n in range(3)}
    islands.wait(lambda: complete(*alive.values()))
    num_kills = 0
    while max(i.round for i in alive.values()) < 50 or num_kills < 5:
        victim = generator.randrange(3)
        time.sleep(generator.random())
        alive[victim].kill()
        num_kills += 1
        alive[victim] = islands.launch(victim)
        islands.wait(lambda: complete(*alive.values()))
    islands.hold_digests()


class Stub:
    """A manager with the attributes that TorchFT reads."""

    def __init__(self, *, is_async: bool) -> None:
        self._use_async_quorum = is_async


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"islands": 0}, "islands must be 1 or more"),
        ({"islands": 3, "min_islands": 4}, "min_islands 1 to it, got 3 and 4"),
        ({"islands": 3, "is_async": True}, "use_async_quorum=False"),
    ],
    ids=str,
)
def test_wrong_arguments_raise(arguments, message):
    manager = Stub(is_async=arguments.pop("is_async", False))
    with pytest.raises(ValueError, match=message):
        TorchFT(manager, None, **arguments)


def test_the_names_of_torchft_that_are_used_exist():
    manager_names = (
        *("start_quorum", "participating_rank", "num_participants", "should_commit"),
        *("report_error", "register_state_dict_fn"),
    )
    assert all(callable(getattr(torchft.Manager, name)) for name in manager_names)
    group_names = ("allgather", "alltoall_base", "errored")
    assert all(callable(getattr(torchft.ProcessGroupGloo, name)) for name in group_names)
    import inspect

    source = inspect.getsource(torchft.Manager.__init__)
    assert "self._use_async_quorum" in source
