"""The torchtitan engine: the sections of a `TrainConfig` as a torchtitan Trainer, for PP and CP.

    engine: torchtitan
    model:
      config: {recipe: torchtitan.models.llama3.config_registry:llama3_8b}
      tokenizer: meta-llama/Llama-3.1-8B

The recipe is any function that returns torchtitan's `Trainer.Config`; the other sections replace
its optimizer, meshes, data, checkpoints and logs. Needs torchtitan 0.3 and GPUs.
"""

import importlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from transformers import AutoTokenizer

from muon_dtensor.integrations.torchtitan import muon_optimizers
from muon_dtensor.train.data import load_data
from muon_dtensor.train.job import TrainConfig
from muon_dtensor.train.masked import IGNORED

DEFAULT_TRAINING = {
    "max_steps": 1000,
    "max_length": 2048,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
    "warmup_steps": 0,
    "seed": 42,
}
"""Values of the keys of `training` that are not given."""


class Tokenizer(BaseTokenizer):  # type: ignore[misc]
    """A tokenizer of transformers for torchtitan."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):  # type: ignore[misc]
        """`build` returns a `Tokenizer`; `path`: folder or name on the Hub."""

        path: str = ""

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()
        self.of_transformers = AutoTokenizer.from_pretrained(config.path)
        self.eos_id = self.of_transformers.eos_token_id

    def encode(self, text: str, **_: Any) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = self.of_transformers(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        """Return the text of ids."""
        return str(self.of_transformers.decode(tokens))

    def get_vocab_size(self) -> int:
        """Return the number of tokens."""
        return len(self.of_transformers)


class Rows(BaseDataLoader):  # type: ignore[misc]
    """Packed batches of the training rows of a `TrainConfig`, for one data-parallel rank.

    Each row is one document: positions begin at 0, and only answers have labels, in all turns of a
    conversation (torchtitan 0.3.0's own processor takes one turn). Its state continues at the next
    row, also on another number of ranks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):  # type: ignore[misc]
        """`build` returns a `Rows`; `job`: the result of `TrainConfig.to_dict`."""

        job: dict[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: Tokenizer,
        seq_len: int,
        local_batch_size: int,
        **_: Any,
    ) -> None:
        job = TrainConfig.from_dict(config.job)
        seed = job.training.get("seed", DEFAULT_TRAINING["seed"])
        self._rows = load_data(job.data, seed=int(seed)).train
        self._seed, self._rank, self._num_ranks = int(seed), dp_rank, dp_world_size
        self._tokenizer = tokenizer.of_transformers
        self._length, self._batch_size = seq_len, local_batch_size
        self._num_rows = 0  # read by this rank
        self._buffer: list[tuple[int, int, int]] = []  # id, label, position

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yield {"input", "positions"} and labels, each [batch, tokens], without end."""
        size = self._batch_size * self._length
        for row in self._examples():
            self._num_rows += 1
            self._buffer += _document(row, self._tokenizer, self._length)
            while len(self._buffer) >= size:
                values = torch.tensor(self._buffer[:size])
                del self._buffer[:size]
                ids, labels, positions = values.view(self._batch_size, self._length, 3).unbind(-1)
                yield {"input": ids, "positions": positions}, labels

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the rows, for a checkpoint."""
        state = {"num_rows": self._num_rows, "buffer": self._buffer, "ranks": self._num_ranks}
        return {f"rank_{self._rank}": json.dumps(state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the place of a state of this rank, or of rank 0 of other numbers of ranks."""
        text = state_dict.get(f"rank_{self._rank}", state_dict.get("rank_0"))
        if text is None:
            return
        state = json.loads(text)
        self._num_rows = state["num_rows"] * state["ranks"] // self._num_ranks
        is_same = state["ranks"] == self._num_ranks
        self._buffer = [tuple(item) for item in state["buffer"]] if is_same else []

    def _examples(self) -> Iterator[dict[str, Any]]:
        """Yield this rank's rows from the current one, in a new order in each pass."""
        if not hasattr(self._rows, "__len__"):
            while True:
                for number, row in enumerate(self._rows):
                    is_next = number // self._num_ranks >= self._num_rows
                    if number % self._num_ranks == self._rank and is_next:
                        yield row
                self._num_rows = 0
        per_pass = len(self._rows) // self._num_ranks
        while per_pass:
            number, index = divmod(self._num_rows, per_pass)
            order = list(range(len(self._rows)))
            random.Random(self._seed + number).shuffle(order)
            yield self._rows[order[index * self._num_ranks + self._rank]]


def _document(row: dict[str, Any], tokenizer: Any, length: int) -> list[tuple[int, int, int]]:
    """Return id, label of the next token, and position of each token of a row.

    Raises ValueError where the chat template changes earlier messages when one is added.
    """
    if "text" in row:
        ids = [*tokenizer(row["text"], add_special_tokens=False)["input_ids"]]
        ids.append(tokenizer.eos_token_id)
        labels = list(ids)
    else:
        messages = row.get("messages") or [*row["prompt"], *row["completion"]]
        ids = _template_ids(tokenizer, messages)
        labels = [IGNORED] * len(ids)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = _template_ids(tokenizer, messages[:number], add_generation_prompt=True)
            end = _template_ids(tokenizer, messages[: number + 1])
            if ids[: len(end)] != end or end[: len(start)] != start:
                raise ValueError(
                    "the tokenizer's chat template changes earlier messages of a conversation: "
                    "answers cannot be told from questions; set training.chat_template_path"
                )
            labels[len(start) : len(end)] = end[len(start) :]
    ids, labels = ids[: length + 1], labels[: length + 1]
    return list(zip(ids[:-1], labels[1:], range(len(ids) - 1), strict=True))


def _template_ids(tokenizer: Any, messages: Sequence[dict[str, str]], **options: Any) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def titan_config(config: TrainConfig) -> Any:
    """Return torchtitan's `Trainer.Config` of a config.

    Raises ValueError for a recipe that does not exist, and what this engine does not have.
    """
    titan = _recipe(config.model.config["recipe"])
    options = config.to_dict()["optimizer"]
    rules = {rule.pop("pattern"): rule for rule in options.pop("rules")}
    splits = {
        pattern: {n: tuple(v) if isinstance(v, list) else v for n, v in rule.items()}
        for pattern, rule in rules.items()
    }
    for name in ("name", "class_weight_decay"):
        options.pop(name)
    for name in ("ns_dtype", "momentum_dtype"):
        if options[name] is not None:
            options[name] = getattr(torch, options[name])
    options["adamw"]["betas"] = tuple(options["adamw"]["betas"])
    titan.optimizer = muon_optimizers(splits=splits or None, **_tuples(options))
    values = {**DEFAULT_TRAINING, **config.training}
    sizes = config.parallelism
    titan.parallelism.data_parallel_replicate_degree = sizes.dp_replicate
    titan.parallelism.data_parallel_shard_degree = sizes.dp_shard
    titan.parallelism.context_parallel_degree = sizes.cp
    titan.parallelism.tensor_parallel_degree = sizes.tp
    titan.parallelism.pipeline_parallel_degree = sizes.pp
    titan.parallelism.expert_parallel_degree = sizes.ep
    titan.training.steps = values["max_steps"]
    titan.training.seq_len = values["max_length"]
    titan.training.local_batch_size = values["per_device_train_batch_size"]
    titan.training.max_norm = values["max_grad_norm"]
    titan.lr_scheduler.warmup_steps = values["warmup_steps"]
    titan.debug.seed = values["seed"]
    if values["gradient_accumulation_steps"] > 1 and config.num_ranks() is not None:
        data_ranks = sizes.dp_replicate * sizes.dp_shard
        titan.training.global_batch_size = (
            data_ranks
            * values["per_device_train_batch_size"]
            * values["gradient_accumulation_steps"]
        )
    titan.tokenizer = Tokenizer.Config(path=str(config.model.tokenizer))
    titan.dataloader = Rows.Config(job=config.to_dict())
    titan.dump_folder = config.output
    titan.validator.enable = False
    titan.checkpoint.enable = True
    titan.checkpoint.interval = config.checkpoint.every or values["max_steps"]
    titan.checkpoint.keep_latest_k = max(config.checkpoint.keep, 2)  # torchtitan's least
    titan.checkpoint.last_save_model_only = False
    if config.checkpoint.asynchronous:
        titan.checkpoint.async_mode = "async"
    if config.model.path is not None:
        titan.hf_assets_path = titan.checkpoint.initial_load_path = config.model.path
        titan.checkpoint.initial_load_in_hf = True
    titan.metrics.log_freq = config.logging.every
    titan.metrics.enable_tensorboard = "tensorboard" in config.logging.to
    titan.metrics.enable_wandb = "wandb" in config.logging.to
    return titan


def run_titan(config: TrainConfig, resume: str = "auto") -> int:
    """Train with torchtitan; it resumes from its newest checkpoint. A collective of all ranks.

    Returns 0. Raises ValueError for what this engine does not have.
    """
    if resume != "auto":
        raise ValueError("engine torchtitan resumes from its newest checkpoint: --resume auto")
    titan = titan_config(config)
    Path(config.output).mkdir(parents=True, exist_ok=True)
    trainer = titan.build()
    try:
        trainer.train()
    finally:
        trainer.close()
    return 0


def _recipe(path: str) -> Any:
    """Return the `Trainer.Config` of `pkg.mod:function`. Raises ValueError."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model.config.recipe {path}: {error}") from error
    return function()


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}
