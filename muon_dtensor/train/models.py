"""Models and tokenizers of training runs: from a folder or from scratch, sharded, exported."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from muon_dtensor.train.islands import compress_gradients
from muon_dtensor.train.job import TrainConfig
from muon_dtensor.train.ranks import on_rank_0

MODEL_CLASSES = {
    "sft": AutoModelForCausalLM,
    "pretrain": AutoModelForCausalLM,
    "mlm": AutoModelForMaskedLM,
}


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


def write_initial(config: TrainConfig, values: Any, folder: Path) -> None:
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


def load_model(config: TrainConfig, path: str, sizes: Mapping[str, int]) -> nn.Module:
    """Return the model of a folder or of the Hub, sharded over a mesh of these sizes."""
    keywords: dict[str, Any] = {}
    sharding = distributed_config(sizes, config.parallelism.ep)
    wire = config.islands.compress_gradients
    if sharding is not None and wire is None:
        keywords["distributed_config"] = sharding
    model: nn.Module = MODEL_CLASSES[config.task].from_pretrained(
        path, dtype=getattr(torch, config.model.dtype), **keywords
    )
    return model if wire is None else compress_gradients(model, sizes, wire)


def lora_config(config: TrainConfig) -> Any:
    """Return peft's config, or None. Raises ValueError for unknown keys."""
    if config.model.lora is None:
        return None
    from peft import LoraConfig

    kind = "FEATURE_EXTRACTION" if config.task == "mlm" else "CAUSAL_LM"
    values = {"task_type": kind, **config.model.lora}
    check_keys("model.lora", values, LoraConfig)
    return LoraConfig(**values)


def add_adapters(config: TrainConfig, model: nn.Module) -> nn.Module:
    """Return the model with the adapters of `model.lora`, if there are some."""
    lora = lora_config(config)
    if lora is None:
        return model
    from peft import get_peft_model

    result: nn.Module = get_peft_model(model, lora)
    return result


def check_keys(section: str, values: Mapping[str, Any], cls: Any) -> None:
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
