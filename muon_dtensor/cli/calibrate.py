"""`muon-dtensor calibrate`: measures links, devices and host of this machine into a JSON file.

Checks the flags and starts the ranks, which run `calibrate_worker`.
"""

import os
import subprocess
import sys
from pathlib import Path


def calibrate(ranks: int = 4, out: Path = Path("topology.json"), name: str = "") -> int:
    """Measure this machine and write a topology that `plan --topology` and `Muon(topology=)` read.

    Uses the ranks that torchrun started, on one node or several. Without torchrun it starts
    `--ranks` processes on this machine. Measures GPUs over nccl if every rank of a node has a GPU,
    else the host over gloo. Takes one or two minutes. Run nothing else on the machine meanwhile.

    Args:
        ranks: number of processes to start.
        out: path of the topology file to write.
        name: name of the machine in printed plans; default: the file name without its suffix.
    """
    if ranks < 1:
        print(f"muon-dtensor calibrate: --ranks must be 1 or more, got {ranks}", file=sys.stderr)
        return 2
    if out.is_dir() or not out.parent.is_dir():
        reason = "a folder, not a file" if out.is_dir() else "in a folder that does not exist"
        print(f"muon-dtensor calibrate: --out {out} is {reason}", file=sys.stderr)
        return 2
    command = [sys.executable]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
        command += torchrun
    command += ["-m", "muon_dtensor.cli.calibrate_worker", str(out), name or out.stem]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return 0 if subprocess.run(command, env=environment).returncode == 0 else 1
