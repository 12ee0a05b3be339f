"""One rank of examples/train_gpt.py that may kill itself. Arguments: JSON of what `told` reads.

Writes the losses, and a digest of all parameters and state, when the training has ended.
"""

import hashlib
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

told = json.loads(sys.argv[1])
spec = importlib.util.spec_from_file_location("train_gpt", told["script"])
train_gpt: Any = importlib.util.module_from_spec(spec)
sys.modules["train_gpt"] = train_gpt
spec.loader.exec_module(train_gpt)


def digest_of(result: Any) -> str:
    """Of every bit of parameters and optimizer state, whole."""
    full = StateDictOptions(full_state_dict=True)
    model = get_model_state_dict(result.model, options=full)
    state = get_optimizer_state_dict(result.model, result.optimizer, options=full)["state"]
    tensors = {**model, **{f"{n} {k}": v for n, kept in state.items() for k, v in kept.items()}}
    found = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].contiguous().reshape(-1).view(torch.uint8)
        found.update(name.encode() + values.numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(told["folder"])
    config = train_gpt.Config(**{**told["config"], "checkpoint": folder / "checkpoints"})
    mesh = train_gpt.make_mesh(config, "cpu")
    killed = folder / "killed"

    def on_step(step: int, loss: float, rate: float) -> None:
        if step == told["kill_at"] and dist.get_rank() == 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    result = train_gpt.train(config, mesh, on_step=on_step)
    digest = digest_of(result)
    if dist.get_rank() == 0:
        report = {"losses": result.losses, "digest": digest, "val_loss": result.val_loss}
        (folder / "report.json").write_text(json.dumps(report))
    time.sleep(0.1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
