"""Five steps of torchtitan's trainer with its smallest Llama on CPUs, under torchrun.

Replaces only the parts of torchtitan 0.3.0 that do not run on a CPU.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

STEPS, VOCAB = 5, 2048


class _Kernels(ModuleType):
    """Stand-in for triton kernels of an expert-parallel dispatcher, which are never called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


_KERNELS = "torchtitan.distributed.minimal_async_ep.kernels"
sys.modules[_KERNELS] = _Kernels(_KERNELS)

from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torchtitan.tools import utils  # noqa: E402


class _Cpu(ModuleType):
    """torch.cpu with stand-ins for functions of device modules that it lacks."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("synchronize", "set_device", "Stream", "current_stream", "device_count"):
            return getattr(torch.cpu, name)
        return lambda *args, **kwargs: 0


if not hasattr(torch.distributed, "set_timeout"):  # torch 2.13 has no public name for it
    torch.distributed.set_timeout = lambda *_: None  # type: ignore[attr-defined]
utils.device_type, utils.device_module = "cpu", _Cpu("cpu")
utils.get_local_device = lambda: torch.device("cpu")

from torchtitan.components import metrics as titan_metrics  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.models.common.attention import (  # noqa: E402
    FlexAttention,
    ScaledDotProductAttention,
)
from torchtitan.models.llama3.config_registry import llama3_debugmodel  # noqa: E402
from torchtitan.tools.logging import init_logger  # noqa: E402


class Words(BaseDataLoader):
    """Repeats one batch, so that the loss decreases in five steps."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """`build` returns a `Words`."""

    def __init__(
        self, config: Config, *, dp_rank: int, seq_len: int, local_batch_size: int, **_: Any
    ) -> None:
        generator = torch.Generator().manual_seed(dp_rank)
        rows = torch.randint(0, 32, (local_batch_size, seq_len + 1), generator=generator)
        self.rows = rows

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            yield {"input": self.rows[:, :-1].clone()}, self.rows[:, 1:].clone()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert not state_dict


class Bytes(BaseTokenizer):
    """Tokenizer with one token per byte."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """`build` returns a `Bytes`."""

    def __init__(self, config: Config, *, tokenizer_path: str) -> None:
        super().__init__()

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int], **_: Any) -> str:
        return bytes(tokens).decode(errors="replace")

    def get_vocab_size(self) -> int:
        return VOCAB


class _NoMemory:
    """Memory monitor that reports zeros."""

    device_name, device_capacity = "cpu", 1

    def reset_peak_stats(self) -> None:
        """Do nothing."""

    def get_peak_stats(self) -> titan_metrics.DeviceMemStats:
        numbers = [0.0] * len(titan_metrics.DeviceMemStats._fields)
        return titan_metrics.DeviceMemStats(*numbers)


def main(folder: str) -> None:
    init_logger()
    config = llama3_debugmodel()
    for _, _, parent, attribute in config.model_spec.model.traverse(FlexAttention.Config):
        setattr(parent, attribute, ScaledDotProductAttention.Config())
    config.dump_folder = folder
    config.dataloader, config.tokenizer = Words.Config(), Bytes.Config()
    config.training.steps, config.training.seq_len = STEPS, 32
    config.training.local_batch_size = 4
    config.training.disable_cuda_graphs = True
    config.parallelism.spmd_backend = "partial_dtensor"
    config.parallelism.tensor_parallel_degree = 2
    config.parallelism.data_parallel_shard_degree = 2
    config.validator.enable = False
    config.checkpoint.enable = False
    config.activation_checkpoint = None
    config.lr_scheduler.warmup_steps = 1
    target = "muon_dtensor.integrations.torchtitan.use_muon"
    options = {
        "lr": 0.01,
        "splits": {
            "wqkv": {"matrix": "(head dim) model -> head dim model", "matrix_axes": {"dim": 16}}
        },
    }
    config.override.imports = [(target, options)]
    losses: list[float] = []
    log = titan_metrics.MetricsProcessor.log

    def log_and_record(self: Any, step: int, loss: float, *args: Any, **kwargs: Any) -> None:
        losses.append(loss)
        log(self, step, loss, *args, **kwargs)

    with (
        mock.patch.object(titan_metrics.MetricsProcessor, "log", log_and_record),
        mock.patch.object(titan_metrics, "build_device_memory_monitor", _NoMemory),
    ):
        trainer = config.build()
        for module in trainer.model_parts[0].modules():
            if isinstance(module, FSDPModule):  # gloo has no PREMUL_SUM
                module.set_force_sum_reduction_for_comms(True)
        trainer.train()
    (optimizer,) = trainer.optimizers
    if torch.distributed.get_rank() == 0:
        report = {
            "losses": losses,
            "optimizer": type(optimizer).__name__,
            "container": type(trainer.optimizers).__qualname__,
            "plan": str(optimizer.plan),
        }
        (Path(folder) / "report.json").write_text(json.dumps(report))
    trainer.close()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
