"""Share of the optimizer in training steps of `muon-dtensor train`, and the same runs with AdamW.

    python -m benchmarks.bench_train --json train.json

Runs alternate between Muon and AdamW. Times are medians over the steps of all repeats. Needs the
extra `train`.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import provenance
from muon_dtensor.train.sample_data import make_sample_data

MESHES = {1: {}, 2: {"dp_shard": 2}, 4: {"dp_shard": 2, "tp": 2}}
SKIPPED = 3
"""First steps of a run that are not measured."""


@dataclass(frozen=True)
class Config:
    """Options of the measurement."""

    steps: int = 15
    repeats: int = 2
    dim: int = 256
    layers: int = 4
    batch: int = 8
    """Rows of a step, over all ranks."""
    length: int = 128
    json: Path | None = None


@dataclass(frozen=True)
class Row:
    """Median seconds of rank 0: of a training step, and of `optimizer.step()` in it."""

    ranks: int
    optimizer: str
    step_seconds: float
    optimizer_seconds: float


def job(config: Config, data: Path, ranks: int, optimizer: str) -> dict[str, Any]:
    """Return the job of one run; AdamW is the same optimizer with a rule for all parameters."""
    rules = [{"pattern": ".", "algorithm": "adamw"}] if optimizer == "adamw" else []
    data_ranks = MESHES[ranks].get("dp_shard", 1)
    return {
        "task": "pretrain",
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": config.dim,
                "intermediate_size": 4 * config.dim,
                "num_hidden_layers": config.layers,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
            },
            "tokenizer": str(data / "tokenizer"),
        },
        "data": {"train": str(data / "text.txt"), "format": "text"},
        "optimizer": {"lr": 0.02, "adamw": {"lr": 1e-3}, "rules": rules},
        "parallelism": MESHES[ranks],
        "training": {
            "max_steps": config.steps,
            "max_length": config.length,
            "packing": True,
            "packing_strategy": "wrapped",
            "per_device_train_batch_size": config.batch // data_ranks,
        },
        "checkpoint": {"every": 0},
        "logging": {"every": 1000},
    }


def measure(config: Config, data: Path, ranks: int, optimizer: str) -> dict[str, list[float]]:
    """Return the seconds of each step of a run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.yaml"
        values = {**job(config, data, ranks, optimizer), "output": f"{folder}/output"}
        path.write_text(json.dumps(values))
        command = [sys.executable, "-m", "muon_dtensor.cli.main", "train", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = json.loads(Path(folder, "output", "timings.json").read_text())
    return {name: values[SKIPPED:] for name, values in seconds.items()}


def main() -> None:
    """Measure, print a table, and write JSON."""
    config = tyro.cli(Config, description=__doc__)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        data = make_sample_data(folder)
        for ranks in MESHES:
            times: dict[str, dict[str, list[float]]] = {
                name: {"step": [], "optimizer": []} for name in ("muon", "adamw")
            }
            for _ in range(config.repeats):
                for name, lists in times.items():
                    for key, seconds in measure(config, data, ranks, name).items():
                        lists[key] += seconds
            for name, lists in times.items():
                medians = {key: statistics.median(values) for key, values in lists.items()}
                rows.append(Row(ranks, name, medians["step"], medians["optimizer"]))
    table = Table("ranks", "optimizer", "step ms", "optimizer ms", "share", "step / AdamW's step")
    adamw = {row.ranks: row.step_seconds for row in rows if row.optimizer == "adamw"}
    for row in rows:
        table.add_row(
            str(row.ranks),
            row.optimizer,
            f"{1e3 * row.step_seconds:.0f}",
            f"{1e3 * row.optimizer_seconds:.0f}",
            f"{row.optimizer_seconds / row.step_seconds:.0%}",
            f"{row.step_seconds / adamw[row.ranks]:.2f}",
        )
    Console().print(table)
    if config.json is not None:
        values = {**provenance(), "config": {**asdict(config), "json": None}}
        values["rows"] = [asdict(row) for row in rows]
        config.json.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
