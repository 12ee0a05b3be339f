"""One rank of `muon-dtensor train` and `evaluate`: `python -m muon_dtensor.train.worker SETTINGS`.

Settings are JSON: path, overrides, resume, mode, and status_folder, where a rank that ends in an
orderly way writes its exit status and message.
"""

import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

from muon_dtensor import (
    CheckpointError,
    MissingGradientError,
    NonFiniteGradientError,
    PlanMismatchError,
    StepFailedError,
)
from muon_dtensor.train.data import BadRowError
from muon_dtensor.train.job import TrainConfig, shared_config
from muon_dtensor.train.ranks import RunFailedError, is_rank_0, start_processes
from muon_dtensor.train.run import evaluate, run

FAILURES = (
    *(BadRowError, CheckpointError, MissingGradientError, NonFiniteGradientError),
    *(PlanMismatchError, RunFailedError, StepFailedError),
)
"""Errors of a run that had started: their message is what a user needs."""


def main(settings: dict[str, Any]) -> int:
    """Run on this rank. Returns 0, 1 (the run failed), 2 (it cannot start) or 143 (SIGTERM)."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    start_processes()
    status, message = 0, ""
    try:
        config = shared_config(settings["path"], settings["overrides"])
        if config.engine == "torchtitan":
            status = _run_titan(config, settings)
        elif settings["mode"] == "train":
            status = run(config, settings["resume"])
        else:
            metrics = evaluate(config, settings["resume"])
            if is_rank_0():
                text = json.dumps(metrics, indent=1)
                (Path(config.output) / "evaluation.json").write_text(text)
                print(text)
    except FAILURES as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        status, message = 1, str(error)
    except (ValueError, OSError, ImportError) as error:
        status, message = 2, str(error)
    rank = os.environ.get("RANK", "0")
    report = Path(settings["status_folder"]) / f"rank-{rank.zfill(8)}"
    if report.parent.is_dir():  # not on other nodes
        report.write_text(json.dumps([status, message]))
    return status


def _run_titan(config: TrainConfig, settings: dict[str, Any]) -> int:
    if settings["mode"] != "train":
        raise ValueError(f"{settings['mode']} needs engine: transformers")
    try:
        from muon_dtensor.train.titan import run_titan
    except ImportError as error:
        raise ImportError(f"engine torchtitan: {error}: pip install torchtitan==0.3.0") from error
    return run_titan(config, settings["resume"])


if __name__ == "__main__":
    exit_status = main(json.loads(sys.argv[1]))
    if dist.is_initialized() and exit_status in (0, 143):
        time.sleep(0.1)  # gloo's threads release the last tensors shortly after they arrived
        dist.destroy_process_group()
    sys.exit(exit_status)
