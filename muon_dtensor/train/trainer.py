"""Hugging Face's Trainer and TRL's SFTTrainer with Muon, its checkpoints and its evaluation."""

import base64
import contextlib
import dataclasses
import logging
import random
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from accelerate import ParallelismConfig
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from muon_dtensor import CheckpointError, Muon, clip_grad_norm_
from muon_dtensor.train.checkpoints import (
    Checkpoints,
    Restored,
    apply_training_state,
    training_state,
)
from muon_dtensor.train.data import Split
from muon_dtensor.train.evaluation import Evaluation, Part
from muon_dtensor.train.islands import Membership
from muon_dtensor.train.job import TrainConfig
from muon_dtensor.train.masked import MaskedBatches, masked_loss
from muon_dtensor.train.models import add_adapters, check_keys, lora_config
from muon_dtensor.train.ranks import is_rank_0, mean_over_ranks

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """Model, tokenizer and rows of a run on this rank."""

    config: TrainConfig
    model: nn.Module
    tokenizer: Any
    split: Split
    part: Part


def training_arguments(config: TrainConfig) -> Any:
    """Return SFTConfig or TrainingArguments. Raises ValueError for what they do not accept."""
    cls: Any = TrainingArguments if config.task == "mlm" else SFTConfig
    check_keys("training", config.training, cls)
    on_gpu = torch.cuda.is_available()
    evaluates = config.evaluation.every > 0 and config.data.test is not None
    defaults: dict[str, Any] = {
        "bf16": on_gpu,
        "dataloader_pin_memory": on_gpu,
        "logging_nan_inf_filter": False,
    }
    if config.training.get("fp16"):
        defaults["bf16"] = False
    ours: dict[str, Any] = {
        "output_dir": config.output,
        "learning_rate": config.optimizer.lr,
        "weight_decay": config.optimizer.weight_decay,
        "save_strategy": "no" if config.checkpoint.every == 0 else "steps",
        "save_steps": max(config.checkpoint.every, 1),
        "save_only_model": True,  # for the Trainer's check; the checkpoints are ours
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": config.evaluation.every or None,
        "logging_steps": config.logging.every,
        "logging_first_step": config.training.get("logging_first_step", True),
        "report_to": list(config.logging.to) or "none",
        "run_name": config.logging.run_name,
        "use_cpu": not on_gpu,
        "disable_tqdm": True,
    }
    if dist.is_initialized() and not on_gpu:
        ours["ddp_backend"] = "gloo"
    if config.task == "mlm":
        defaults["include_num_input_tokens_seen"] = "non_padding"
    try:
        with without_known_warnings():
            return cls(**{**defaults, **config.training, **ours})
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"training: {error}") from error


class MuonTraining:
    """A mixin before Trainer or SFTTrainer: Muon, its checkpoints, its metrics.

    Set `checkpoints` before `train`.
    """

    job: Job
    evaluation: Evaluation
    checkpoints: Checkpoints
    membership: Membership | None = None
    restored: Restored | None = None
    save_problem: str = ""
    last_saved: int = 0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the optimizer of the config, built on first use."""
        this: Any = self
        if this.optimizer is None:
            this.optimizer = self.job.config.build_optimizer(this.model)
            if self.job.config.islands.count > 1:
                self.membership = Membership(self.job.config.islands, this.optimizer)
        return this.optimizer  # type: ignore[no-any-return]

    @property
    def muon(self) -> Muon:
        """The optimizer without Accelerate's wrapper."""
        this: Any = self
        optimizer = getattr(this.optimizer, "optimizer", this.optimizer)
        assert isinstance(optimizer, Muon)
        return optimizer

    def checkpoint_state(self) -> dict[str, Any]:
        """Return the tensors of a checkpoint; of adapters, only what is trained."""
        this: Any = self
        is_lora = self.job.config.model.lora is not None
        state = training_state(this.model, self.muon, trainable_only=is_lora)
        if self.membership is not None:
            state["islands"] = self.membership.state()
        return state

    def apply_checkpoint(self, state: dict[str, Any]) -> None:
        """Set model and optimizer to the tensors of a checkpoint, and free these."""
        this: Any = self
        apply_training_state(this.model, self.muon, state)
        if self.membership is not None:
            self.membership.load(state["islands"])
        state.clear()

    def _get_learning_rate(self) -> float:
        """Return the learning rate of the matrices. Overrides the Trainer's method."""
        groups = self.muon.param_groups
        matrices = [g["lr"] for g in groups if g["algorithm"] != "adamw"]
        return float([*matrices, groups[0]["lr"]][0])

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, **_: Any) -> dict[str, float]:
        """Evaluate, after the log and before the checkpoint. Overrides the Trainer's method."""
        return self.evaluation.run()

    def _clip_grad_norm(self, model: Any) -> Tensor:
        """Clip by the norm over all meshes. Overrides the Trainer's method."""
        this: Any = self
        if this.args.fp16:
            this.accelerator.unscale_gradients()
        return clip_grad_norm_(this.model.parameters(), this.args.max_grad_norm)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Save with `Checkpoints`. Overrides the Trainer's method.

        A failed save is logged; the next one is tried at its time.
        """
        this: Any = self
        this.store_flos()
        step, scaler = this.state.global_step, this.accelerator.scaler
        notes = {
            "config": self.job.config.to_dict(),
            "trainer": dataclasses.asdict(this.state),
            "scheduler": this.lr_scheduler.state_dict(),
            "loss": mean_over_ranks(this._tr_loss),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        rank_notes = {
            "random": _random_state(),
            "loss": float(this._tr_loss),
            "total_loss": this._total_loss_scalar,
            "last_logged": this._globalstep_last_logged,
            "train_tokens": getattr(this, "_total_train_tokens", 0),
            "metrics": {
                mode: dict(values) for mode, values in getattr(this, "_metrics", {}).items()
            },
        }
        self.wait_for_save()
        try:
            self.checkpoints.save(self.checkpoint_state(), step, notes, rank_notes)
            self.save_problem = ""
            self.last_saved = step
        except CheckpointError as error:
            self._save_failed(error)

    def wait_for_save(self) -> None:
        """Wait for the save in progress; if it fails, log that and keep it in `save_problem`."""
        try:
            self.checkpoints.wait()
        except CheckpointError as error:
            self._save_failed(error)

    def _save_failed(self, error: CheckpointError) -> None:
        self.save_problem = str(error)
        self.last_saved = 0
        if is_rank_0():
            logger.error("%s", error)

    def restore(self, path: str | None) -> Restored | None:
        """Read a checkpoint, the newest by default; `train` then continues from it."""
        self.create_optimizer()
        self.restored = self.checkpoints.load(self.checkpoint_state, path)
        return self.restored

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: `_load_optimizer_and_scheduler` sets the model too."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Set model, optimizer and scheduler to `restored`. Overrides the Trainer's method."""
        this: Any = self
        if checkpoint is None or self.restored is None:
            return
        self.apply_checkpoint(self.restored.state)
        this.lr_scheduler.load_state_dict(self.restored.notes["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Set the gradient scaler of `training.fp16`. Overrides the Trainer's method."""
        this: Any = self
        if self.restored is not None and this.accelerator.scaler is not None:
            this.accelerator.scaler.load_state_dict(self.restored.notes["scaler"] or {})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Set the random number generators. Overrides the Trainer's method."""
        if self.restored is not None and self.restored.rank_notes is not None:
            _set_random_state(self.restored.rank_notes["random"])

    def restore_sums(self) -> None:
        """Set the sums of losses since the last logged step, which `train` has just reset."""
        this: Any = self
        restored = self.restored
        if restored is None:
            return
        this._initial_global_step = 0
        notes = restored.rank_notes or {"loss": restored.notes["loss"]}
        this._tr_loss += notes["loss"]
        history = restored.notes["trainer"]["log_history"]
        logged = [entry["step"] for entry in history if "loss" in entry]
        this._globalstep_last_logged = notes.get("last_logged", max(logged, default=0))
        if "total_loss" in notes:
            this._total_loss_scalar = notes["total_loss"]
        else:
            steps = [0, *logged]
            losses = [entry["loss"] for entry in history if "loss" in entry]
            this._total_loss_scalar = sum(
                loss * (last - first)
                for loss, first, last in zip(losses, steps, steps[1:], strict=False)
            )
        if hasattr(this, "_total_train_tokens"):
            this._total_train_tokens = notes.get("train_tokens", last_logged(history, "num_tokens"))
            for mode, values in notes.get("metrics", {}).items():
                for name, entries in values.items():
                    this._metrics[mode][name] = list(entries)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log values with the optimizer's metrics, if it computes some."""
        if "loss" in logs and self.job.config.optimizer.metrics_every:
            with contextlib.suppress(RuntimeError):  # none yet
                logs.update({f"optimizer/{k}": v for k, v in self.muon.metrics().items()})
        if "loss" in logs and self.membership is not None:
            metrics = self.membership.outer.metrics()
            logs.update({f"islands/{k}": float(v) for k, v in metrics.items()})
        super().log(logs, start_time)  # type: ignore[misc]


def last_logged(history: list[dict[str, Any]], key: str) -> Any:
    """Return the last logged value of a key; 0 if there is none."""
    return next((entry[key] for entry in reversed(history) if key in entry), 0)


class MuonTrainer(MuonTraining, Trainer):  # type: ignore[misc]
    """Hugging Face's Trainer with Muon."""


class MuonSFTTrainer(MuonTraining, SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer with Muon."""


def build_trainer(job: Job) -> Any:
    """Return the trainer of a job. Raises ValueError for arguments that TRL does not accept."""
    config = job.config
    arguments = training_arguments(config)
    keywords: dict[str, Any] = {"model": job.model, "args": arguments}
    eval_rows = job.split.test
    with _cpu_allows_tp(), without_known_warnings():
        if config.task == "mlm":
            trainer: Any = _mlm_trainer(job, arguments)
        else:
            keywords |= {"train_dataset": job.split.train, "processing_class": job.tokenizer}
            keywords |= {"eval_dataset": eval_rows, "peft_config": lora_config(config)}
            try:
                trainer = MuonSFTTrainer(**keywords)
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"training: {error}") from error
    trainer.job, trainer.evaluation = job, Evaluation(trainer)
    trainer.remove_callback(transformers.PrinterCallback)
    job.model = trainer.model
    return trainer


def _mlm_trainer(job: Job, arguments: Any) -> Any:
    """Return the trainer of masked language modeling on tokenized rows."""
    length = min(job.tokenizer.model_max_length, job.model.config.max_position_embeddings)  # type: ignore[union-attr]

    def tokenize(rows: dict[str, list[str]]) -> Any:
        return job.tokenizer(
            rows["text"], truncation=True, max_length=length, return_special_tokens_mask=True
        )

    def tokenized(rows: Any) -> Any:
        return rows.map(tokenize, batched=True, remove_columns=["text"])

    collator = MaskedBatches(job.tokenizer, arguments.seed)
    trainer = MuonTrainer(
        model=add_adapters(job.config, job.model),
        args=arguments,
        train_dataset=tokenized(job.split.train),
        eval_dataset=None if job.split.test is None else tokenized(job.split.test),
        data_collator=collator,
        processing_class=job.tokenizer,
        compute_loss_func=masked_loss,
    )
    trainer.add_callback(collator)
    return trainer


@contextlib.contextmanager
def _cpu_allows_tp() -> Iterator[None]:
    """A context in which Accelerate accepts TP on CPUs.

    Accelerate 1.15 knows TP on GPUs only; the model is sharded already, and its check is all that
    stands in the way.
    """
    if torch.cuda.is_available():
        yield
        return
    original = ParallelismConfig._validate_accelerator
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    try:
        yield
    finally:
        ParallelismConfig._validate_accelerator = original


@contextlib.contextmanager
def without_known_warnings() -> Iterator[None]:
    """A context without the libraries' advice that this module has already followed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def _random_state() -> dict[str, Any]:
    """Return the states of this process's random number generators as values for JSON."""
    name, keys, *rest = np.random.get_state()
    devices = [] if not torch.cuda.is_available() else [torch.cuda.get_rng_state()]
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": [_text(state) for state in (torch.get_rng_state(), *devices)],
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, *rest = state["numpy"]
    np.random.set_state((name, np.array(words, dtype=np.uint32), *rest))
    host, *devices = state["torch"]
    torch.set_rng_state(_bytes(host))
    if devices and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(devices[0]))


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
