"""Islands that come and go: one of three is killed, the others go on, it returns and catches up.

    pip install "muon_dtensor[torchft]"
    python examples/islands_torchft.py

This program starts torchft's Lighthouse and three islands of one process each. On a cluster the
Lighthouse is a program of its own (`torchft_lighthouse`), and each island is started by torchrun.
"""

import argparse
import subprocess
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torchft
from common import cross_entropy, data, make_model
from torchft.coordination import LighthouseServer

from muon_dtensor import Muon, group_parameters
from muon_dtensor.islands import DiLoCo, TorchFT

NUM_ISLANDS = 3


def island(number: int, lighthouse: str) -> None:
    """Train as one island until the parent ends this process."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # a free port
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)  # the ranks of this island
    model = make_model(torch.device("cpu"))
    optimizer = Muon(group_parameters(model, lr=0.02, adamw={"lr": 3e-3}))
    group = torchft.ProcessGroupGloo(timeout=timedelta(seconds=10))
    manager = torchft.Manager(
        pg=group,
        load_state_dict=None,
        state_dict=None,
        min_replica_size=1,
        use_async_quorum=False,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=f"island{number}",
    )
    outer = DiLoCo(
        optimizer, TorchFT(manager, group, islands=NUM_ISLANDS), sync_every=4, momentum=0.6
    )
    x, target = data(torch.device("cpu"), number, NUM_ISLANDS)
    rounds = 0
    while True:
        loss = cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.05)  # a step of a larger model
        metrics = outer.metrics()
        if metrics["rounds"] - metrics["failed"] > rounds:
            rounds = int(metrics["rounds"] - metrics["failed"])
            base = sum(float(v.double().sum()) for v in outer.state_dict()["base"].values())
            members = f"{metrics['islands']:.0f} islands"
            number_of_round = outer.state_dict()["counters"]["rounds"][0]
            print(f"round {number_of_round} island {number} {members} {loss:.4f} {base:.9f}")
            sys.stdout.flush()


def launch(number: int, lighthouse: str) -> subprocess.Popen:
    """Start an island in a process of its own."""
    arguments = ["--island", str(number), "--lighthouse", lighthouse]
    command = [sys.executable, "-W", "ignore", __file__, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def next_round(processes: list[subprocess.Popen], number: int, members: int) -> str:
    """Return the first line of an island about a round of this many islands."""
    stdout = processes[number].stdout
    assert stdout is not None
    for line in stdout:
        if f" {members} islands " in line:
            return line.strip()
        if sum(process.poll() is None for process in processes) < members:
            raise RuntimeError("an island has ended")
    raise RuntimeError(f"island {number} has ended")


def main() -> None:
    lighthouse = LighthouseServer(
        bind="0.0.0.0:0", min_replicas=1, join_timeout_ms=2000, heartbeat_timeout_ms=2000
    )
    processes = [launch(number, lighthouse.address()) for number in range(NUM_ISLANDS)]
    try:
        print(next_round(processes, 0, 3))
        print("island 2 is killed")
        processes[2].kill()
        print(next_round(processes, 0, 2))
        print("island 2 is started again")
        processes[2] = launch(2, lighthouse.address())
        lines = {line.split()[1]: line for line in [next_round(processes, 2, 3)]}
        (number,) = lines
        while True:  # the same round on the first island
            line = next_round(processes, 0, 3)
            if int(line.split()[1]) >= int(number):
                break
        print(lines[number], line, sep="\n")
        equal = line.split()[1] == number and line.split()[-1] == lines[number].split()[-1]
        print(f"equal base values: {equal}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
        lighthouse.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--island", type=int)
    parser.add_argument("--lighthouse", default="")
    options = parser.parse_args()
    if options.island is None:
        main()
    else:
        island(options.island, options.lighthouse)
