"""Runs a training job: builds it from a `TrainConfig`, trains, evaluates and exports.

Needs the extra `train`. Hugging Face's Trainer or TRL's SFTTrainer runs the loop, see `trainer`.
"""

import contextlib
import dataclasses
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from transformers import TrainerCallback

from muon_dtensor import CheckpointError
from muon_dtensor.train.checkpoints import Checkpoints, Restored
from muon_dtensor.train.data import BadRowError, load_data
from muon_dtensor.train.evaluation import Part
from muon_dtensor.train.job import TrainConfig, differences
from muon_dtensor.train.models import (
    add_adapters,
    export_model,
    load_model,
    load_tokenizer,
    model_config,
    write_initial,
)
from muon_dtensor.train.ranks import (
    RunFailedError,
    is_rank_0,
    on_rank_0,
    print_on_rank_0,
    world_size,
)
from muon_dtensor.train.report import Progress, write_report
from muon_dtensor.train.trainer import Job, build_trainer, last_logged, without_known_warnings

SIGTERM_STATUS = 128 + signal.SIGTERM
"""Exit status of a run that SIGTERM ended after a checkpoint."""

STATE_FILE = "trainer_state.json"
"""Of the Trainer, in its checkpoints."""


def build_job(config: TrainConfig) -> Job:
    """Return the sharded model and the data of a config. A collective of all ranks.

    Raises ValueError where model, tokenizer, data and mesh do not fit each other.
    """
    sizes = config.mesh_sizes(world_size())
    tokenizer = load_tokenizer(config)
    split = load_data(
        config.data,
        seed=config.training.get("seed", 42),
        island=(config.islands.index, config.islands.count),
    )
    folder = Path(config.output)
    path = config.model.path
    if path is None:
        path = str(folder / "initial")
        values = model_config(config, tokenizer)

        def write() -> None:
            if not (folder / "initial" / "config.json").exists():
                write_initial(config, values, Path(path))

        on_rank_0(write)
    model = load_model(config, path, sizes)
    return Job(config, model, tokenizer, split, Part.of(sizes["tp"]))


class Stopping(TrainerCallback):
    """Restores sums at the start; after SIGTERM on any rank, saves a checkpoint and stops."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.requested = False
        self.stopped = False
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self.requested = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.restore_sums()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        flag = torch.tensor([float(self.requested)])
        if self._group is not None:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        if flag.item():
            self.stopped = control.should_training_stop = control.should_save = True


def run(config: TrainConfig, resume: str = "auto") -> int:
    """Train, evaluate and export. A collective of all ranks; see `start_processes`.

    Writes into `config.output`: checkpoints, metrics.json, answers.jsonl, report.html and model.

    Args:
        config: equal on all ranks.
        resume: "auto": continue from the newest checkpoint that can be read, if there is one;
            "never"; or the path of a checkpoint.

    Returns:
        0, or 143 if SIGTERM ended the run after a checkpoint.

    Raises:
        ValueError: config, data and model do not fit.
        CheckpointError: checkpoints exist and none can be read.
        NonFiniteGradientError: with `optimizer.nonfinite: raise`.
        RunFailedError: the last checkpoint could not be written, or training raised another error.
    """
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    if "wandb" in config.logging.to:
        os.environ.setdefault("WANDB_DIR", str(folder))
    job = build_job(config)
    trainer = build_trainer(job)
    asynchronous = config.checkpoint.asynchronous
    trainer.checkpoints = Checkpoints(
        folder / "checkpoints", keep=config.checkpoint.keep, asynchronous=asynchronous
    )
    stopping = Stopping(trainer)
    trainer.add_callback(stopping)
    trainer.add_callback(Progress(config, trainer))
    restored = _restore(trainer, resume)
    if is_rank_0():
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1))
    started = time.perf_counter()
    result: Any = None
    with without_known_warnings(), _trainer_state(restored) as state_folder:
        if restored is None or restored.step < _max_steps(trainer):
            result = _trained(trainer, state_folder)
        else:
            print_on_rank_0(f"{restored.path.name} is the last step of this run")
            trainer.state = transformers.TrainerState.load_from_json(f"{state_folder}/{STATE_FILE}")
            trainer.state.is_world_process_zero = is_rank_0()  # the file is that of rank 0
            trainer.apply_checkpoint(restored.state)
    step = trainer.state.global_step
    if result is not None and trainer.last_saved != step:
        trainer._save_checkpoint(trainer.model)
    trainer.wait_for_save()
    if trainer.membership is not None:
        trainer.membership.leave()
    problem = trainer.save_problem
    if stopping.stopped:
        print_on_rank_0(f"stopped by SIGTERM after step {step}")
        return 1 if problem else SIGTERM_STATUS
    metrics = trainer.evaluation.run()
    if result is not None:
        metrics = {"train_loss": result.training_loss, **metrics}
    else:
        metrics = {"train_loss": last_logged(trainer.state.log_history, "train_loss"), **metrics}
    metrics = {"step": step, "loss": last_logged(trainer.state.log_history, "loss"), **metrics}
    for name, value in metrics.items():
        print_on_rank_0(f"{name} {value:.6g}")
    if problem:
        raise RunFailedError(f"the last checkpoint is missing: {problem}")

    def write_results() -> None:
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
        write_report(folder, config, trainer, time.perf_counter() - started)

    on_rank_0(write_results)
    export_model(trainer.model, job.tokenizer, folder / "model")
    if config.logging.artifacts and is_rank_0():
        import wandb

        artifact = wandb.Artifact(folder.absolute().name, type="model", metadata=metrics)
        artifact.add_dir(str(folder / "model"))
        wandb.log_artifact(artifact)
        wandb.finish()
    return 0


def evaluate(config: TrainConfig, checkpoint: str = "auto") -> dict[str, float]:
    """Return the metrics of a run's newest checkpoint, or of one by its path. Trains nothing.

    Without a checkpoint the model itself is evaluated. A collective of all ranks. Raises ValueError
    without test rows.
    """
    if config.data.test is None:
        raise ValueError("data.test has the rows of an evaluation: set a file or a share")
    trainer = build_trainer(build_job(config))
    trainer.checkpoints = Checkpoints(Path(config.output) / "checkpoints")
    restored = _restore(trainer, checkpoint)
    if restored is not None:
        trainer.apply_checkpoint(restored.state)
        trainer.state.global_step = restored.step
    metrics: dict[str, float] = trainer.evaluation.run()
    return metrics


def export_checkpoint(config: TrainConfig, folder: Path, checkpoint: str = "auto") -> Path:
    """Write a checkpoint as a folder for `from_pretrained`, in one process; return the folder.

    Raises CheckpointError if there is no checkpoint that can be read.
    """
    single = dataclasses.replace(
        config, parallelism=type(config.parallelism)(), islands=type(config.islands)()
    )
    checkpoints = Checkpoints(Path(config.output) / "checkpoints")
    path = Path(config.output) / "initial" if config.model.path is None else config.model.path
    model = load_model(single, str(path), single.mesh_sizes(1))
    model = add_adapters(config, model)
    options = StateDictOptions(ignore_frozen_params=config.model.lora is not None)
    restored = checkpoints.load(
        lambda: {"model": get_model_state_dict(model, options=options)},
        None if checkpoint == "auto" else checkpoint,
    )
    if restored is None:
        raise CheckpointError(f"{checkpoints.folder} has no checkpoint")
    set_model_state_dict(model, restored.state["model"], options=StateDictOptions(strict=False))
    export_model(model, load_tokenizer(config), folder)
    return folder


def _trained(trainer: Any, state_folder: str | None) -> Any:
    """Return the result of `train`.

    Raises RunFailedError for errors that before training mean that a run cannot start.
    """
    try:
        return trainer.train(resume_from_checkpoint=state_folder)
    except BadRowError:
        raise
    except (ValueError, OSError, ImportError) as error:
        step = trainer.state.global_step
        raise RunFailedError(f"after step {step}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _trainer_state(restored: Restored | None) -> Iterator[str | None]:
    """Yield a folder with the Trainer's state of a checkpoint, as its `train` expects it."""
    if restored is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / STATE_FILE).write_text(json.dumps(restored.notes["trainer"]))
        yield folder


def _restore(trainer: Any, resume: str) -> Restored | None:
    """Read the checkpoint to continue from, and print what differs from its config."""
    if resume == "never":
        return None
    restored: Restored | None = trainer.restore(None if resume == "auto" else resume)
    if restored is None:
        return None
    trainer.last_saved = restored.step
    for line in restored.damaged:
        print_on_rank_0(f"warning: {line}")
    print_on_rank_0(f"resuming from {restored.path}")
    for line in differences(restored.notes["config"], trainer.job.config.to_dict()):
        print_on_rank_0(f"  changed since: {line}")
    if restored.rank_notes is None:
        print_on_rank_0(
            "  another number of ranks wrote it: dropout continues with other random numbers"
        )
    return restored


def _max_steps(trainer: Any) -> int:
    """Return the number of steps of the whole run."""
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    values = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return int(values[-1])
