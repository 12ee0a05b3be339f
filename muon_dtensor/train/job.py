"""`TrainConfig`: everything about a training run as one value, from a YAML or TOML file."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal, Self

import torch.distributed as dist

from muon_dtensor import MuonConfig, __version__
from muon_dtensor.config_file import Section, parse_yaml

METRICS = ("perplexity", "bleu", "rouge")

OUR_KEYS = {
    "output_dir": "output",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.adamw.betas",
    "adam_beta2": "optimizer.adamw.betas",
    "adam_epsilon": "optimizer.adamw.eps",
    "optim": "optimizer",
    "optim_args": "optimizer",
    "optim_target_modules": "optimizer.rules",
    "save_steps": "checkpoint.every",
    "save_strategy": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "save_only_model": "checkpoint",
    "load_best_model_at_end": "checkpoint",
    "resume_from_checkpoint": "the option --resume",
    "eval_strategy": "evaluation.every",
    "eval_steps": "evaluation.every",
    "eval_on_start": "evaluation.every",
    "do_eval": "evaluation.every",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "eval_packing": "evaluation",
    "logging_steps": "logging.every",
    "logging_strategy": "logging.every",
    "report_to": "logging.to",
    "run_name": "logging.run_name",
    "use_cpu": "the devices of the machine",
    "ddp_backend": "the devices of the machine",
    "fsdp": "parallelism",
    "fsdp_config": "parallelism",
    "deepspeed": "parallelism",
    "parallelism_config": "parallelism",
    "auto_find_batch_size": "training.per_device_train_batch_size (ranks would disagree)",
}
"""Keys of SFTConfig and TrainingArguments that this package sets, and where to set them instead."""


TITAN_TRAINING_KEYS = (
    *("max_steps", "max_length", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_grad_norm", "warmup_steps", "seed"),
)
"""Keys of `training` that engine torchtitan takes."""


@dataclass(frozen=True, kw_only=True)
class ModelSection(Section):
    """`model`: `path` for a pretrained model, or `config` and `tokenizer` for one from scratch."""

    path: str | None = None
    """Folder of `save_pretrained`, or a name on the Hugging Face Hub."""
    config: dict[str, Any] = field(default_factory=dict)
    """Keys of a transformers config, with `model_type`."""
    tokenizer: str | None = None
    """Folder or name on the Hub; default: that of `path`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the parameters. Mixed precision is `training.bf16`."""
    lora: dict[str, Any] | None = None
    """Keys of peft's LoraConfig: trains adapters instead of the model."""


@dataclass(frozen=True, kw_only=True)
class DataSection(Section):
    """`data`: files of JSON lines (`.jsonl`), a JSON list (`.json`), or lines of text (`.txt`)."""

    train: str | tuple[str, ...] = ()
    test: str | float | None = None
    """File, or share of the training rows above 0 and below 1: those at evenly spaced positions."""
    format: Literal["alpaca", "sharegpt", "messages", "text"] = "alpaca"
    streaming: bool = False
    """Read rows as training proceeds. Needs `training.max_steps`."""
    shuffle_buffer: int = 1000
    """Rows of a stream among which the next one is drawn; 0: in the order of the file."""
    on_bad_row: Literal["raise", "skip"] = "raise"


@dataclass(frozen=True, kw_only=True)
class EvaluationSection(Section):
    """`evaluation` on the test rows."""

    every: int = 0
    """Steps between evaluations; 0: only at the end."""
    metrics: tuple[Literal["perplexity", "bleu", "rouge"], ...] = ("perplexity",)
    max_new_tokens: int = 64
    batch_size: int = 8
    """Rows of a forward pass on each rank."""
    samples: int = 64
    """Test rows whose answers are generated for BLEU and ROUGE."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSection(Section):
    """`checkpoint`: see `Checkpoints`."""

    every: int = 500
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    asynchronous: bool = True


@dataclass(frozen=True, kw_only=True)
class LoggingSection(Section):
    """`logging`."""

    every: int = 10
    """Steps between logged values."""
    to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """W&B reads WANDB_PROJECT, WANDB_MODE and its other variables."""
    run_name: str | None = None
    artifacts: bool = False
    """Upload the exported model to W&B as an artifact."""


@dataclass(frozen=True, kw_only=True)
class IslandsSection(Section):
    """`islands`: jobs with meshes of their own, whose updates DiLoCo combines over torchft."""

    count: int = 1
    index: int = 0
    """Of this job; give it on the command line: `--islands.index 1`."""
    lighthouse: str = ""
    """Address of torchft's Lighthouse, http://host:port."""
    sync_every: int = 30
    wire: str = "float32"
    lr: float = 0.9
    momentum: float = 0.8
    min_islands: int | None = None
    timeout_seconds: float = 60.0
    compress_gradients: str | None = None
    """Wire format of the gradients between the replicas of one job (dp_replicate)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(MuonConfig):
    """A training run: the sections of `MuonConfig`, and those of the trainer.

    `training` is passed to TRL's SFTConfig (task sft, pretrain) or to TrainingArguments (mlm),
    which check it.
    """

    task: Literal["sft", "pretrain", "mlm"] = "sft"
    output: str = "output"
    """Folder of checkpoints, metrics, report and the exported model."""
    engine: Literal["transformers", "torchtitan"] = "transformers"
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    islands: IslandsSection = field(default_factory=IslandsSection)

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, str] | None = None) -> Self:
        """Return the config of a file.

        Args:
            path: a YAML file, or a TOML file by its suffix.
            overrides: values by dotted key, as {"training.max_steps": "200"}, read as YAML.

        Raises:
            ValueError: unknown keys, values of a wrong type, sections that contradict each other.
            OSError: the file cannot be read.
            ImportError: pydantic or PyYAML is not installed.
        """
        return cls.from_dict(read_values(path, overrides))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, others: Sequence[str] = ()) -> Self:
        """Return the config of nested dicts. Raises the errors of `load`."""
        config = super().from_dict(values, others=others)
        problems = list(config._problems())
        if problems:
            raise ValueError("\n".join(problems))
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts of plain values, defaults included; the argument of `from_dict`."""
        values = dataclasses.asdict(self)
        values["optimizer"]["rules"] = [  # flat, as in files
            {"pattern": rule["pattern"], **rule["options"]} for rule in values["optimizer"]["rules"]
        ]
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain

    def num_ranks(self) -> int | None:
        """Return the number of ranks of the mesh; None if a size is -1 (all remaining ranks)."""
        sizes = list(self.sizes.values())
        return None if -1 in sizes else prod(sizes)

    def mesh_sizes(self, world_size: int) -> dict[str, int]:
        """Return the size of every mesh dim.

        Raises ValueError unless the sizes multiply to the world size.
        """
        sizes = dict.fromkeys(("dp_replicate", "dp_shard", "cp", "tp", "pp"), 1) | self.sizes
        free = [name for name, size in sizes.items() if size == -1]
        given = prod(size for size in sizes.values() if size > 0)
        if len(free) == 1 and world_size % given == 0:
            sizes[free[0]] = world_size // given
        if len(free) > 1 or prod(sizes.values()) != world_size:
            text = ", ".join(f"{name}={size}" for name, size in self.sizes.items()) or "1 rank"
            raise ValueError(
                f"parallelism ({text}) does not fit {world_size} ranks: pass --nproc or change "
                "its sizes"
            )
        ep = self.parallelism.ep
        if (sizes["dp_shard"] * sizes["tp"]) % ep:
            raise ValueError(
                f"parallelism.ep={ep} does not divide dp_shard x tp = "
                f"{sizes['dp_shard'] * sizes['tp']}"
            )
        return sizes

    def _problems(self) -> list[str]:
        """Return what is wrong between keys, one line each."""
        model, data, evaluation = self.model, self.data, self.evaluation
        lines = [
            f"training.{key} is set by {ours}; remove it from training"
            for key, ours in OUR_KEYS.items()
            if key in self.training
        ]
        is_titan = self.engine == "torchtitan"
        if is_titan:
            lines += self._titan_problems()
        elif (model.path is None) == (not model.config):
            lines.append("model needs either path, or config (with model_type) and tokenizer")
        if model.config and not is_titan and "model_type" not in model.config:
            lines.append("model.config needs model_type, as in {model_type: llama, ...}")
        if model.config and model.tokenizer is None:
            lines.append("model.tokenizer is needed for a model from scratch")
        if model.lora is not None and model.path is None:
            lines.append("model.lora trains adapters of a pretrained model: set model.path")
        if model.lora is not None and self.parallelism.tp != 1:
            lines.append("model.lora needs parallelism.tp: 1 (peft's adapters are not TP's)")
        if not data.train:
            lines.append("data.train needs a file")
        if isinstance(data.test, float) and not 0 < data.test < 1:
            lines.append(f"data.test is a file or a share between 0 and 1, got {data.test}")
        if data.streaming and self.training.get("max_steps", -1) < 1:
            lines.append("data.streaming needs training.max_steps: a stream has no length")
        if self.task != "sft" and data.format != "text":
            lines.append(f"task {self.task} needs data.format: text, got {data.format}")
        if self.task == "sft" and data.format == "text":
            lines.append("task sft needs questions and answers; for plain text set task: pretrain")
        needs_answers = [name for name in evaluation.metrics if name != "perplexity"]
        if self.task != "sft" and needs_answers:
            lines.append(f"evaluation.metrics {', '.join(needs_answers)} need task: sft")
        positive = {
            "evaluation.batch_size": evaluation.batch_size,
            "evaluation.max_new_tokens": evaluation.max_new_tokens,
            "evaluation.samples": evaluation.samples,
            "checkpoint.keep": self.checkpoint.keep,
            "logging.every": self.logging.every,
            "islands.count": self.islands.count,
            "islands.sync_every": self.islands.sync_every,
        }
        lines += [f"{name} must be 1 or more, got {v}" for name, v in positive.items() if v < 1]
        not_negative = {
            "evaluation.every": evaluation.every,
            "checkpoint.every": self.checkpoint.every,
            "data.shuffle_buffer": data.shuffle_buffer,
        }
        lines += [f"{name} must be 0 or more, got {v}" for name, v in not_negative.items() if v < 0]
        islands = self.islands
        sizes = self.parallelism
        if islands.compress_gradients is not None and (
            sizes.dp_replicate == 1 or sizes.tp * sizes.ep != 1 or self.task == "mlm"
        ):
            lines.append(
                "islands.compress_gradients needs parallelism.dp_replicate above 1, tp and ep of "
                "1, and task sft or pretrain"
            )
        if self.logging.artifacts and "wandb" not in self.logging.to:
            lines.append("logging.artifacts needs wandb in logging.to")
        if islands.count > 1 and not islands.lighthouse:
            lines.append(
                "islands.lighthouse needs the address of torchft_lighthouse, http://host:port"
            )
        if not 0 <= islands.index < max(1, islands.count):
            lines.append(f"islands.index must be below {islands.count}, got {islands.index}")
        if not is_titan:
            lines += [
                f"parallelism.{name} needs engine: torchtitan"
                for name in ("cp", "pp")
                if getattr(self.parallelism, name) != 1
            ]
        return lines

    def _titan_problems(self) -> list[str]:
        """Return what engine torchtitan does not have, one line each."""
        lines = []
        if set(self.model.config) != {"recipe"}:
            lines.append(
                "engine torchtitan needs model.config: {recipe: pkg.mod:function}, such as "
                "torchtitan.models.llama3.config_registry:llama3_8b"
            )
        lines += [
            f"training.{key} is not a key of engine torchtitan; it takes "
            f"{', '.join(TITAN_TRAINING_KEYS)}"
            for key in self.training
            if key not in TITAN_TRAINING_KEYS and key not in OUR_KEYS
        ]
        if self.task == "mlm" or self.model.lora is not None:
            lines.append("engine torchtitan has no task mlm and no model.lora")
        if self.data.test is not None or self.evaluation.every:
            lines.append(
                "engine torchtitan does not evaluate: leave out data.test and evaluation.every"
            )
        if self.islands.count > 1 or self.islands.compress_gradients is not None:
            lines.append("islands need engine: transformers")
        return lines


def read_values(path: str | Path, overrides: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the nested dicts of a config file, with overrides; see `TrainConfig.load`."""
    path = Path(path)
    if path.suffix == ".toml":
        import tomllib

        values: Any = tomllib.loads(path.read_text())
    else:
        values = parse_yaml(path.read_text()) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a config file has sections with keys, got {values!r}")
    for key, text in (overrides or {}).items():
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ValueError(f"--{key}: {part} is not a section but {section!r}")
        section[name] = parse_yaml(text)
    return values


def shared_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> TrainConfig:
    """Return the config that rank 0 reads, on every rank. A collective of all ranks.

    Raises ValueError on every rank where rank 0 cannot read it, or where the ranks run different
    versions of this package.
    """
    if not dist.is_initialized():
        return TrainConfig.load(path, overrides)
    message: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        try:
            message = [TrainConfig.load(path, overrides).to_dict(), ""]
        except (ValueError, OSError, ImportError) as error:
            message = [None, str(error)]
    dist.broadcast_object_list(message, src=0)
    values, problem = message
    if problem:
        raise ValueError(problem)
    config = TrainConfig.from_dict(values)
    text = json.dumps([__version__, config.to_dict()], sort_keys=True)
    digests = [""] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(text.encode()).hexdigest())
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ValueError(
            f"ranks {others} resolve the config of rank 0 to other values: install the same "
            f"version of muon_dtensor on every node (this rank has {__version__})"
        )
    return config


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return a line `key: old -> new` for each value that differs between two nested dicts."""
    lines: list[str] = []
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return lines
