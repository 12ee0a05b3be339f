"""One rank of examples/train_gpt.py that may kill itself. Argument: `settings` as JSON.

Rank 0 writes the losses and a digest of all parameters and state at the end of the training.
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

settings = json.loads(sys.argv[1])
spec = importlib.util.spec_from_file_location("train_gpt", settings["script"])
train_gpt: Any = importlib.util.module_from_spec(spec)
sys.modules["train_gpt"] = train_gpt
spec.loader.exec_module(train_gpt)


def digest_of(result: Any) -> str:
    """Return the SHA-256 of the full parameters and the full optimizer state."""
    full = StateDictOptions(full_state_dict=True)
    model = get_model_state_dict(result.model, options=full)
    state = get_optimizer_state_dict(result.model, result.optimizer, options=full)["state"]
    tensors = {**model, **{f"{n} {k}": v for n, values in state.items() for k, v in values.items()}}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        data = tensors[name].contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode() + data.numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(settings["folder"])
    config = train_gpt.Config(**{**settings["config"], "checkpoint": folder / "checkpoints"})
    mesh = train_gpt.make_mesh(config, "cpu")
    killed_marker = folder / "killed"

    def on_step(step: int, loss: float, rate: float) -> None:
        if step == settings["kill_at"] and dist.get_rank() == 1 and not killed_marker.exists():
            killed_marker.touch()
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
