"""Runs a training job: builds model, data and trainer from a `TrainConfig`, trains and evaluates.

Needs the extra `train`. Hugging Face's Trainer or TRL's SFTTrainer runs the loop; this module gives
it Muon, and checkpoints of sharded models, which it refuses.
"""

import base64
import contextlib
import dataclasses
import json
import logging
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
import transformers
from accelerate import ParallelismConfig
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig
from trl import SFTConfig, SFTTrainer

from muon_dtensor import CheckpointError, Muon, clip_grad_norm_
from muon_dtensor.train.checkpoints import (
    Checkpoints,
    Restored,
    apply_training_state,
    training_state,
)
from muon_dtensor.train.data import Split, load_data
from muon_dtensor.train.evaluation import (
    IGNORED,
    Part,
    generate_answers,
    perplexity,
    text_scores,
)
from muon_dtensor.train.islands import Membership, compress_gradients
from muon_dtensor.train.job import TrainConfig, differences
from muon_dtensor.train.report import Progress, write_report

logger = logging.getLogger(__name__)

SIGTERM_STATUS = 128 + signal.SIGTERM
"""Exit status of a run that SIGTERM ended after a checkpoint."""

MODEL_CLASSES = {
    "sft": AutoModelForCausalLM,
    "pretrain": AutoModelForCausalLM,
    "mlm": AutoModelForMaskedLM,
}


class RunFailedError(RuntimeError):
    """A run ended without what was asked for: the message says what is missing, and what is not."""


def start_processes() -> None:
    """Initialize torch.distributed under torchrun: nccl with GPUs, else gloo.

    Progress bars of the libraries are switched off.
    """
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")  # FSDP2, of embeddings
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if "RANK" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


def is_rank_0() -> bool:
    """Return whether this is rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_rank_0(write: Callable[[], None]) -> None:
    """Call a function on rank 0 that writes files; the others wait. A collective of all ranks.

    Raises RunFailedError on every rank where it failed.
    """
    problem = ""
    if is_rank_0():
        try:
            write()
        except Exception as error:  # safetensors has its own errors
            problem = f"{type(error).__name__}: {error}"
    if dist.is_initialized():
        message = [problem]
        dist.broadcast_object_list(message, src=0)
        (problem,) = message
    if problem:
        raise RunFailedError(f"rank 0 could not write a file: {problem}")


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


@dataclass
class Job:
    """Model, tokenizer and rows of a run on this rank."""

    config: TrainConfig
    model: nn.Module
    tokenizer: Any
    split: Split
    part: Part


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
        if is_rank_0():  # before any collective
            values = model_config(config, tokenizer)

        def write_initial() -> None:
            if not (folder / "initial" / "config.json").exists():
                _write_initial(config, values, Path(path))

        on_rank_0(write_initial)
    model = _load_model(config, path, sizes)
    return Job(config, model, tokenizer, split, Part.of(sizes["tp"]))


def load_tokenizer(config: TrainConfig) -> Any:
    """Return the tokenizer; it has a pad token and, for task sft, a chat template.

    Raises ValueError if it has no chat template, or no mask token for task mlm.
    """
    path = config.model.tokenizer or config.model.path
    assert path is not None, "checked by TrainConfig"
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    template = config.training.get("chat_template_path")
    if template is not None and Path(template).is_file():
        tokenizer.chat_template = Path(template).read_text()
    elif template is not None:
        tokenizer.chat_template = AutoTokenizer.from_pretrained(template).chat_template
    if config.task == "sft" and tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer {path} has no chat template: set training.chat_template_path to a "
            ".jinja file, or to a model whose template fits"
        )
    if config.task == "mlm" and tokenizer.mask_token is None:
        raise ValueError(f"the tokenizer {path} has no mask token, which task mlm needs")
    return tokenizer


def model_config(config: TrainConfig, tokenizer: Any) -> Any:
    """Return the transformers config of a model from scratch.

    Vocabulary size and special tokens are those of the tokenizer unless given. Raises ValueError.
    """
    values = dict(config.model.config)
    kind = values.pop("model_type")
    defaults = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        result = AutoConfig.for_model(kind, **{**defaults, **values})
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.config: {error}") from error
    known = type(result)()
    for key in values:
        # transformers accepts any key, and models may read undeclared ones
        similar = get_close_matches(key, known.to_dict(), n=1, cutoff=0.8)
        if similar and not hasattr(known, key):
            raise ValueError(f"unknown key 'model.config.{key}'. Did you mean '{similar[0]}'?")
    return result


def _write_initial(config: TrainConfig, values: Any, folder: Path) -> None:
    """Write the initial weights of a model from scratch: equal on every mesh."""
    part = folder.with_name("initial.part")
    shutil.rmtree(part, ignore_errors=True)
    transformers.set_seed(config.training.get("seed", 42))
    model = MODEL_CLASSES[config.task].from_config(values)
    model.to(getattr(torch, config.model.dtype)).save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def distributed_config(sizes: Mapping[str, int], ep: int) -> DistributedConfig | None:
    """Return transformers' config of a mesh; None where no parameter is sharded."""
    if sizes["dp_shard"] * sizes["tp"] == 1:
        return None
    return DistributedConfig(
        tp_size=sizes["tp"],
        fsdp_size=sizes["dp_shard"],
        dp_replicate_size=sizes["dp_replicate"],
        ep_size=ep if ep > 1 else None,
    )


def _load_model(config: TrainConfig, path: str, sizes: Mapping[str, int]) -> nn.Module:
    """Return the model of a folder, sharded, with adapters if asked for."""
    keywords: dict[str, Any] = {}
    sharding = distributed_config(sizes, config.parallelism.ep)
    wire = config.islands.compress_gradients
    if sharding is not None and wire is None:
        keywords["distributed_config"] = sharding
    model: nn.Module = MODEL_CLASSES[config.task].from_pretrained(
        path, dtype=getattr(torch, config.model.dtype), **keywords
    )
    return model if wire is None else compress_gradients(model, sizes, wire)


def _lora(config: TrainConfig) -> Any:
    """Return peft's config, or None. Raises ValueError for unknown keys."""
    if config.model.lora is None:
        return None
    from peft import LoraConfig

    kind = "FEATURE_EXTRACTION" if config.task == "mlm" else "CAUSAL_LM"
    values = {"task_type": kind, **config.model.lora}
    _check_keys("model.lora", values, LoraConfig)
    return LoraConfig(**values)


def add_adapters(config: TrainConfig, model: nn.Module) -> nn.Module:
    """Return the model with the adapters of `model.lora`, if there are some."""
    lora = _lora(config)
    if lora is None:
        return model
    from peft import get_peft_model

    result: nn.Module = get_peft_model(model, lora)
    return result


def training_arguments(config: TrainConfig) -> Any:
    """Return SFTConfig or TrainingArguments. Raises ValueError for what they do not accept."""
    cls: Any = TrainingArguments if config.task == "mlm" else SFTConfig
    _check_keys("training", config.training, cls)
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
        with _without_known_warnings():
            return cls(**{**defaults, **config.training, **ours})
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"training: {error}") from error


def _check_keys(section: str, values: Mapping[str, Any], cls: Any) -> None:
    """Raise ValueError for keys that a dataclass does not have, and texts for numbers."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            similar = get_close_matches(key, fields, n=1)
            hint = f" Did you mean '{similar[0]}'?" if similar else ""
            raise ValueError(f"unknown key '{section}.{key}' of {cls.__name__}.{hint}")
        default = fields[key].default
        is_number = isinstance(default, (int, float)) and not isinstance(default, bool)
        if (is_number and not isinstance(value, (int, float))) or (
            isinstance(default, bool) and not isinstance(value, bool)
        ):
            raise ValueError(f"{section}.{key}: expected a value as {default!r}, got {value!r}")


class MuonTraining:
    """A mixin before Trainer or SFTTrainer: Muon, its checkpoints, its metrics.

    Set `checkpoints` before `train`.
    """

    job: Job
    evaluation: "Evaluation"
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
        step = this.state.global_step
        notes = {
            "config": self.job.config.to_dict(),
            "trainer": dataclasses.asdict(this.state),
            "scheduler": this.lr_scheduler.state_dict(),
            "loss": _mean_over_ranks(this._tr_loss),
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
            this._total_train_tokens = notes.get("train_tokens", _last(history, "num_tokens"))
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


def _last(history: list[dict[str, Any]], key: str) -> Any:
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
    with _cpu_allows_tp(), _without_known_warnings():
        if config.task == "mlm":
            trainer: Any = _mlm_trainer(job, arguments)
        else:
            keywords |= {"train_dataset": job.split.train, "processing_class": job.tokenizer}
            keywords |= {"eval_dataset": eval_rows, "peft_config": _lora(config)}
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
        compute_loss_func=_masked_loss,
    )
    trainer.add_callback(collator)
    return trainer


class MaskedBatches(TrainerCallback):  # type: ignore[misc]
    """A collator whose masks depend on the rows and the epoch, so that a resumed run repeats them.

    Batches are loaded ahead of the steps: the random state of a checkpoint is not that of the next
    batch.
    """

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self._mask = DataCollatorForLanguageModeling(tokenizer)
        self._seed, self._epoch = seed, 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._epoch = int(state.epoch or 0)

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """Return a batch: ids, labels and attention mask, [rows, tokens]."""
        text = repr([self._seed, self._epoch, [list(row["input_ids"]) for row in rows]])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(text.encode()))
            return self._mask(rows)


def _masked_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return the mean loss per masked token of all ranks and accumulated batches.

    Models that ignore `num_items_in_batch`, such as BERT, return the mean of one batch, which the
    Trainer (transformers 5.24) would multiply by the number of ranks.
    """
    total = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


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
def _without_known_warnings() -> Iterator[None]:
    """A context without the libraries' advice that this module has already followed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


class Evaluation:
    """Evaluates a trainer's model on the test rows."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.step = -1
        self.metrics: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        """Return `eval_...` metrics of the model, and log them; once for each step."""
        trainer, job = self.trainer, self.trainer.job
        if self.step == trainer.state.global_step or job.split.test is None:
            return self.metrics
        section = job.config.evaluation
        seconds = time.perf_counter()
        self.metrics = {
            f"eval_{name}": value
            for name, value in perplexity(
                trainer.model,
                _test_rows(trainer),
                part=job.part,
                batch_size=section.batch_size,
                pad_id=job.tokenizer.pad_token_id,
                shift=job.config.task != "mlm",
            ).items()
        }
        if set(section.metrics) - {"perplexity"}:
            rows = job.split.test.select(range(min(section.samples, len(job.split.test))))
            answers = generate_answers(
                trainer.model,
                job.tokenizer,
                list(rows),
                part=job.part,
                batch_size=section.batch_size,
                max_new_tokens=section.max_new_tokens,
            )
            scores = text_scores(answers, section.metrics)
            self.metrics |= {f"eval_{name}": value for name, value in scores.items()}
            lines = [json.dumps(dataclasses.asdict(answer)) + "\n" for answer in answers]
            path = Path(job.config.output) / "answers.jsonl"
            with contextlib.suppress(OSError):  # a full disk does not end a run; saves report it
                if is_rank_0():
                    path.write_text("".join(lines))
        self.step = trainer.state.global_step
        was_training = trainer.model.training
        trainer.model.eval()  # in training mode SFTTrainer adds its metrics of training
        trainer.log({**self.metrics, "eval_seconds": time.perf_counter() - seconds})
        trainer.model.train(was_training)
        return self.metrics


def _test_rows(trainer: Any) -> list[dict[str, Any]]:
    """Return the tokenized test rows; for masked models, with the same masks on every call."""
    rows = trainer.eval_dataset
    if trainer.job.config.task != "mlm":
        return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    collator = MaskedBatches(trainer.job.tokenizer, trainer.args.seed)
    batches = [collator([row]) for row in rows]
    return [
        {name: batch[name][0].tolist() for name in ("input_ids", "labels")} for batch in batches
    ]


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
        RunFailedError: the last checkpoint could not be written.
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
    with _without_known_warnings(), _trainer_state(restored) as state_folder:
        if restored is None or restored.step < _max_steps(trainer):
            result = trainer.train(resume_from_checkpoint=state_folder)
        else:
            _print(f"{restored.path.name} is the last step of this run")
            trainer.state = transformers.TrainerState.load_from_json(f"{state_folder}/{STATE_FILE}")
            trainer.apply_checkpoint(restored.state)
    step = trainer.state.global_step
    if result is not None and trainer.last_saved != step:
        trainer._save_checkpoint(trainer.model)
    trainer.wait_for_save()
    if trainer.membership is not None:
        trainer.membership.leave()
    problem = trainer.save_problem
    if stopping.stopped:
        _print(f"stopped by SIGTERM after step {step}")
        return 1 if problem else SIGTERM_STATUS
    metrics = trainer.evaluation.run()
    if result is not None:
        metrics = {"train_loss": result.training_loss, **metrics}
    else:
        metrics = {"train_loss": _last(trainer.state.log_history, "train_loss"), **metrics}
    metrics = {"step": step, "loss": _last(trainer.state.log_history, "loss"), **metrics}
    for name, value in metrics.items():
        _print(f"{name} {value:.6g}")
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
    single = dataclasses.replace(config, parallelism=type(config.parallelism)())
    checkpoints = Checkpoints(Path(config.output) / "checkpoints")
    path = Path(config.output) / "initial" if config.model.path is None else config.model.path
    model = _load_model(single, str(path), single.mesh_sizes(1))
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


def export_model(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a model, or its adapters, as a folder for `from_pretrained`. A collective of all ranks.

    Rank 0 holds the model in host memory and writes.
    """
    this: Any = model
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)

    def write() -> None:
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        with _plain_config(this):
            this.save_pretrained(part, state_dict=state)
        tokenizer.save_pretrained(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)

    on_rank_0(write)


@contextlib.contextmanager
def _plain_config(model: Any) -> Iterator[None]:
    """A context in which a sharded model is saved as a plain one: its full tensors are given."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    sharding = base.config.__dict__.pop("distributed_config", None)
    loaded = base._is_distributed_loading_by_transformers
    base._is_distributed_loading_by_transformers = False
    try:
        yield
    finally:
        base._is_distributed_loading_by_transformers = loaded
        if sharding is not None:
            base.config.distributed_config = sharding


STATE_FILE = "trainer_state.json"


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
        _print(f"warning: {line}")
    _print(f"resuming from {restored.path}")
    for line in differences(restored.notes["config"], trainer.job.config.to_dict()):
        _print(f"  changed since: {line}")
    if restored.rank_notes is None:
        _print("  another number of ranks wrote it: dropout continues with other random numbers")
    return restored


def _max_steps(trainer: Any) -> int:
    """Return the number of steps of the whole run."""
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    values = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return int(values[-1])


def _mean_over_ranks(value: Tensor) -> float:
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return float(value)


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


def _print(text: str) -> None:
    if is_rank_0():
        print(text, flush=True)
