"""`muon-dtensor calibrate`: what this machine's links, devices and host cost, as a JSON file.

Checks the flags and starts the ranks; `calibrate_worker` is what they run.
"""

import os
import subprocess
import sys
from pathlib import Path


def calibrate(ranks: int = 4, out: Path = Path("topology.json"), name: str = "") -> int:
    """Measure this machine and write a topology that `plan --topology` and `Muon(topology=)` take.

    Takes the ranks that torchrun started, on one node or several; else starts `--ranks` processes
    here. Measures GPUs over nccl where each rank of a node has one, else the host over gloo. A
    minute or two; nothing else should run overlapped.

    Args:
        ranks: processes to start.
        out: the file to write.
        name: of the machine, for people; by default the name of the file.
    """
    if ranks < 1:
        print(f"muon-dtensor calibrate: --ranks must be 1 or more, got {ranks}", file=sys.stderr)
        return 2
    if out.is_dir() or not out.parent.is_dir():
        why = "a folder, not a file" if out.is_dir() else "in no folder that exists"
        print(f"muon-dtensor calibrate: --out {out} is {why}", file=sys.stderr)
        return 2
    command = [sys.executable]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
        command += torchrun
    command += ["-m", "muon_dtensor.cli.calibrate_worker", str(out), name or out.stem]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return 0 if subprocess.run(command, env=environment).returncode == 0 else 1
