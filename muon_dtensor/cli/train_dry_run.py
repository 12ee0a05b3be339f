"""`muon-dtensor train --dry-run`: what a run would do, on the meta device and without processes."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from muon_dtensor.cli.plan_table import print_plan
from muon_dtensor.planning.render import duration, quantity
from muon_dtensor.runtime.torch_private import fake_process_group, local_part
from muon_dtensor.train.data import check_data
from muon_dtensor.train.job import TrainConfig
from muon_dtensor.train.models import (
    MODEL_CLASSES,
    add_adapters,
    distributed_config,
    load_tokenizer,
    model_config,
)
from muon_dtensor.train.trainer import training_arguments


def print_dry_run(config: TrainConfig, ranks: int) -> None:
    """Print mesh, data, grouping, plan and memory of a run. Raises the errors of a run's start."""
    sizes = config.mesh_sizes(ranks)
    _check_writable(Path(config.output))
    counts = check_data(config.data)
    arguments = training_arguments(config)
    tokenizer = load_tokenizer(config)
    data_ranks = sizes["dp_replicate"] * sizes["dp_shard"]
    rows_per_step = (
        arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * data_ranks
    )
    print(f"task {config.task}, {ranks} ranks: {_text(sizes)}")
    print(
        f"data: {counts['train']:,} training rows, {counts['test']:,} test rows, "
        f"{counts['bad']:,} bad rows are left out; {rows_per_step} rows a step"
    )
    with fake_process_group(ranks):
        model = _meta_model(config, tokenizer, sizes)
        optimizer = config.build_optimizer(model)
        for line in _grouping(optimizer.param_groups):
            print(line)
        report = optimizer.plan
        print_plan(report)
        numel, shard = _numels(model)
    width = torch.tensor([], dtype=getattr(torch, config.model.dtype)).element_size()
    peak = max(report.cost.peak_nbytes, default=0)
    state = sum(local_numel * copies for local_numel, copies in _states(optimizer))
    print(
        f"model: {numel:,} parameters, {shard:,} on rank 0\n"
        f"memory of rank 0: parameters {quantity(shard * width, 'B')}, gradients "
        f"{quantity(shard * width, 'B')}, optimizer state {quantity(state * 4, 'B')}, exchange "
        f"buffers {quantity(peak, 'B')} at most; activations are not counted\n"
        f"optimizer step: {duration(report.prediction.seconds)} predicted"
    )


def _meta_model(config: TrainConfig, tokenizer: Any, sizes: dict[str, int]) -> nn.Module:
    """Return the model on the meta device, sharded as transformers shards it."""
    path = config.model.path
    values = model_config(config, tokenizer) if path is None else AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model: Any = MODEL_CLASSES[config.task].from_config(values)
    sharding = distributed_config(sizes, config.parallelism.ep)
    if sharding is not None:
        sharding, _, meshes = model.prepare_distribute_model(sharding)
        model.config.distributed_config = sharding
        model = model.maybe_distribute_model(model, sharding, meshes)
    with torch.device("meta"):
        result: nn.Module = add_adapters(config, model)
    return result


def _grouping(groups: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for group in groups:
        names = group["param_names"]
        kinds = Counter(name.split(".")[-2] for name in names if "." in name)
        text = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(8))
        lines.append(f"{group['algorithm']}, lr {group['lr']:g}: {len(names)} parameters: {text}")
    return lines


def _numels(model: nn.Module) -> tuple[int, int]:
    params = list(model.parameters())
    return sum(p.numel() for p in params), sum(local_part(p).numel() for p in params)


def _states(optimizer: Any) -> list[tuple[int, int]]:
    """Return the elements of each parameter on rank 0, and its float32 states: 1, AdamW 2."""
    return [
        (local_part(param).numel(), 2 if group["algorithm"] == "adamw" else 1)
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def _check_writable(folder: Path) -> None:
    """Raise OSError if a folder cannot be created or written."""
    parent = folder
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryDirectory(dir=parent):
            return
    except OSError as error:
        raise OSError(f"output {folder}: {parent} cannot be written: {error}") from error


def _text(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "one process"
