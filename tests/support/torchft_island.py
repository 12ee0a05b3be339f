"""One rank of an island under torchft, as a program of its own: trains, and writes a line a round.

    python -m tests.support.torchft_island JSON

The JSON holds the fields of `Job`. A line of the log is a JSON object: round, digest of the base
values of this rank, and metrics.
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from muon_dtensor import Muon
from muon_dtensor.islands import DiLoCo, TorchFT
from muon_dtensor.islands.exchange import digest_of
from tests.support.cases import spread, tensors_like

SHAPES = ((8, 12), (12, 8), (7, 5))
SYNC_EVERY = 2


@dataclass
class Job:
    """What one rank does.

    `fault`: (round, signal, phase): this rank sends itself SIGKILL or SIGSTOP once, in a phase
    ("begin", "start", "finish" or "commit") of that round, or of its first one if it joins later.
    `log`: a file.
    """

    island: int
    rank: int
    port: int
    lighthouse: str
    log: str
    islands: int = 3
    ranks: int = 2
    fault: tuple[int, str, str] | None = None
    outer: dict[str, Any] = field(default_factory=dict)


def gradients(island: int, step: int) -> list[torch.Tensor]:
    return tensors_like(SHAPES, 1000 * island + step)


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    import torchft

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job.port))
    dist.init_process_group("gloo", rank=job.rank, world_size=job.ranks)
    mesh = init_device_mesh("cpu", (job.ranks,), mesh_dim_names=("dp",))
    params = [nn.Parameter(spread(w, mesh, (Shard(0),))) for w in tensors_like(SHAPES, 0)]
    optimizer = Muon([(f"w{i}", p) for i, p in enumerate(params)], lr=0.02)
    group = torchft.ProcessGroupGloo(timeout=timedelta(seconds=6))
    manager = torchft.Manager(
        pg=group,
        load_state_dict=None,
        state_dict=None,
        min_replica_size=1,
        use_async_quorum=False,
        timeout=timedelta(seconds=10),
        quorum_timeout=timedelta(seconds=60),
        rank=job.rank,
        world_size=job.ranks,
        store_addr="127.0.0.1",
        store_port=job.port,
        lighthouse_addr=job.lighthouse,
        replica_id=f"island{job.island}",
    )
    islands = TorchFT(manager, group, islands=job.islands)
    outer = DiLoCo(optimizer, islands, sync_every=SYNC_EVERY, **job.outer)
    plant(job, outer)
    logged = 0
    step = 0
    while True:  # the test ends it
        step += 1
        time.sleep(0.05)
        for param, grad in zip(params, gradients(job.island, step), strict=True):
            param.grad = spread(grad, mesh, (Shard(0),))
        optimizer.step()
        metrics = outer.metrics()
        if metrics["rounds"] != logged:
            logged = int(metrics["rounds"])
            line = {
                "round": outer._rounds[0],
                "digest": digest_of([shard.base for shard in outer._shards]),
                **metrics,
            }
            with Path(job.log).open("a") as log:
                log.write(json.dumps(line) + "\n")


def plant(job: Job, outer: DiLoCo) -> None:
    """Let this rank die, or stop, in a phase of a round."""
    if job.fault is None:
        return
    number, name_of_signal, phase = job.fault
    was_sent = False

    def before(function: Any) -> Any:
        def body(*args: Any, **kwargs: Any) -> Any:
            nonlocal was_sent
            if outer._rounds[0] >= number and not was_sent:
                was_sent = True
                os.kill(os.getpid(), getattr(signal, name_of_signal))
                time.sleep(0.01)
            return function(*args, **kwargs)

        return body

    names = {
        "begin": (outer._islands, "begin"),
        "start": (outer._exchanges[0], "start"),
        "finish": (outer._exchanges[0], "finish"),
        "commit": (outer._islands, "commit"),
    }
    target, name = names[phase]
    setattr(target, name, before(getattr(target, name)))


if __name__ == "__main__":
    main()
