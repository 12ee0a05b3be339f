"""Runs `muon-dtensor train` on the sample data, in real processes over gloo."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.deadlines import run_program

SECONDS = 150
"""Seconds on an idle machine; see `tests.support.deadlines`."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "1",
}

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@dataclass
class Run:
    """A finished command and the folder of its output."""

    status: int
    stdout: str
    stderr: str
    folder: Path

    @property
    def metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = json.loads((self.folder / "metrics.json").read_text())
        return metrics

    def losses(self) -> dict[int, float]:
        """Return the logged training losses of the newest checkpoint by step."""
        newest = max(
            (self.folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:])
        )
        notes = json.loads((newest / "manifest.json").read_text())["notes"]
        history = notes["trainer"]["log_history"]
        return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def job(data: Path, folder: Path, /, **sections: Any) -> dict[str, Any]:
    """Return a job of a small Llama on the questions; `sections` are merged into it.

    Iterations in float32, so that processors with and without bfloat16 units agree.
    """
    values: dict[str, Any] = {
        "task": "sft",
        "output": str(folder),
        "model": {"config": LLAMA, "tokenizer": str(data / "tokenizer")},
        "data": {"train": str(data / "questions.jsonl"), "test": 0.01, "format": "alpaca"},
        "optimizer": {"lr": 0.02, "adamw": {"lr": 6e-3}, "ns_dtype": "float32"},
        "training": {"max_steps": 9, "per_device_train_batch_size": 4, "max_length": 96},
        "checkpoint": {"every": 3},
        "logging": {"every": 1},
    }
    values["training"] |= {"lr_scheduler_type": "constant", "gradient_checkpointing": False}
    for name, section in sections.items():
        if isinstance(section, dict) and isinstance(values.get(name), dict):
            values[name] = {**values[name], **section}
        else:
            values[name] = section
    return values


def write_job(values: dict[str, Any], path: Path) -> Path:
    """Write a job as YAML (JSON is YAML)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path


def muon_dtensor(*arguments: str, folder: Path, **environment: str) -> Run:
    """Return a finished `muon-dtensor` command."""
    command = [sys.executable, "-m", "muon_dtensor.cli.main", *arguments]
    done = run_program(command, SECONDS, env={**ENVIRONMENT, **environment})
    return Run(done.returncode, done.stdout, done.stderr, folder)


def train(values: dict[str, Any], *arguments: str, **environment: str) -> Run:
    """Return a finished run of a job, whatever its exit status."""
    folder = Path(values["output"])
    path = write_job(values, folder.with_suffix(".yaml"))
    return muon_dtensor("train", str(path), *arguments, folder=folder, **environment)


def trained(values: dict[str, Any], *arguments: str) -> Run:
    """Return a run that must succeed."""
    run = train(values, *arguments)
    assert run.status == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return run


def interrupted(values: dict[str, Any], at: str, number: signal.Signals) -> Run:
    """Return a run of which one process got a signal when rank 0 printed a line with `at`.

    SIGKILL goes to the rank that was started last, SIGTERM to the command.
    """
    folder = Path(values["output"])
    path = write_job(values, folder.with_suffix(".yaml"))
    command = [sys.executable, "-m", "muon_dtensor.cli.main", "train", str(path)]
    lines = []
    with subprocess.Popen(
        command,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(4 * SECONDS, process.kill)
        watchdog.start()
        for line in process.stdout:
            lines.append(line)
            if at in line:
                target = process.pid if number == signal.SIGTERM else max(ranks_of(path))
                os.kill(target, number)
                at = "\0"  # once
        status = process.wait()
        watchdog.cancel()
    assert at == "\0", "".join(lines)
    return Run(status, "".join(lines), "", folder)


def ranks_of(path: Path) -> list[int]:
    """Return the process ids of the ranks of a running job."""
    ids = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        is_rank = "muon_dtensor.train.worker" in words and "torch.distributed.run" not in words
        if is_rank and any(str(path) in word for word in words):
            ids.append(int(entry.name))
    return ids
