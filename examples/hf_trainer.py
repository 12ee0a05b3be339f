"""Hugging Face's Trainer: a Llama with two layers, checkpoints and a resumed run.

python examples/hf_trainer.py
torchrun --nproc-per-node 2 examples/hf_trainer.py     # DDP: ranks share the matrices
"""

import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging as hf_logging

from muon_dtensor.integrations.transformers import MuonFactory

warnings.filterwarnings("ignore")  # warnings of the Trainer
hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()
STEPS = 6


def make_trainer(folder: str) -> Trainer:
    """Return a Trainer with Muon; the optimizer is the last argument."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    tokens = torch.randint(0, 64, (16, 17), generator=torch.Generator().manual_seed(1))
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return Trainer(
        model,
        TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=16 // num_ranks,
            save_steps=STEPS // 2,
            logging_steps=1,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
            ddp_backend="gloo" if num_ranks > 1 and not torch.cuda.is_available() else None,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        optimizer_cls_and_kwargs=(
            MuonFactory,
            {"lr": 0.02, "adamw": {"lr": 0.01}, "metrics_every": 1},
        ),
    )


def main() -> None:
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    job = os.environ.get("TORCHELASTIC_RUN_ID", os.getpid())  # all ranks save in one folder
    folder = str(Path(tempfile.gettempdir()) / f"hf_trainer_{job}")
    trainer = make_trainer(folder)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    resumed = make_trainer(folder)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
    same = all(
        torch.equal(a, b)
        for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True)
    )
    if trainer.is_world_process_zero():
        optimizer = trainer.optimizer.optimizer
        print(optimizer.plan)
        print(f"gradient norm {optimizer.metrics()['grad_norm']:.3f}")
        print(f"resumed from step {STEPS // 2}: {'bitwise equal' if same else 'DIFFERENT'}")
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
        shutil.rmtree(folder)
    if dist.is_initialized():
        dist.barrier()  # a rank may abort if Python exits while gloo still works
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
