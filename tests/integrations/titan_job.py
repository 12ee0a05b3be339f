"""A job of engine torchtitan on CPUs, under torchrun: the config's dict as JSON in a file.

Importing titan_trainer replaces the parts of torchtitan that do not run on a CPU.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import titan_trainer
import torch
from torch.distributed.fsdp import FSDPModule
from torchtitan.components import metrics as titan_metrics
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

from muon_dtensor.train import titan
from muon_dtensor.train.job import TrainConfig

losses: dict[int, float] = {}


def recipe() -> Trainer.Config:
    """Return torchtitan's smallest Llama, with parts that run on a CPU."""
    config = llama3_debugmodel()
    for _, _, parent, attribute in config.model_spec.model.traverse(FlexAttention.Config):
        setattr(parent, attribute, ScaledDotProductAttention.Config())
    config.training.disable_cuda_graphs = True
    config.parallelism.spmd_backend = "partial_dtensor"
    config.parallelism.pipeline_parallel_schedule = "1F1B"
    config.activation_checkpoint = None
    config.lr_scheduler.min_lr_factor = 1.0  # the same rates in runs of other lengths
    return config


def main(path: str) -> None:
    """Run the job; rank 0 writes the losses by step."""
    log, build = titan_metrics.MetricsProcessor.log, Trainer.__init__

    def log_and_record(self: Any, step: int, loss: float, *args: Any, **kwargs: Any) -> None:
        losses[step] = loss
        log(self, step, loss, *args, **kwargs)

    def init(self: Any, config: Any) -> None:
        build(self, config)
        for part in self.model_parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):  # gloo has no PREMUL_SUM
                    module.set_force_sum_reduction_for_comms(True)

    config = TrainConfig.from_dict(json.loads(Path(path).read_text()))
    with (
        mock.patch.object(titan_metrics.MetricsProcessor, "log", log_and_record),
        mock.patch.object(titan_metrics, "build_device_memory_monitor", titan_trainer._NoMemory),
        mock.patch.object(Trainer, "__init__", init),
        mock.patch.object(titan, "_recipe", return_value=recipe()),
    ):
        titan.run_titan(config)
    if torch.distributed.get_rank() == 0:
        Path(path).with_suffix(".losses").write_text(json.dumps(losses))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
