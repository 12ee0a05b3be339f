"""Lightning: `configure_optimizers` returns Muon and a scheduler; DDP ranks share the matrices.

python examples/lightning_module.py
torchrun --nproc-per-node 2 examples/lightning_module.py
"""

import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from common import CONTEXT, SEQUENCES, VOCAB, make_model
from torch.utils.data import DataLoader

from muon_dtensor import Muon, create_devicemesh_config, group_parameters

warnings.filterwarnings("ignore")  # warnings of the Trainer about workers and loggers
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
STEPS = 6


class Language(lightning.LightningModule):
    """A small language model with its loss and optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model(torch.device("cpu"))
        self.losses: list[float] = []

    def training_step(self, tokens: torch.Tensor, _: int) -> torch.Tensor:
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        is_ddp = dist.is_initialized() and dist.get_world_size() > 1
        config = create_devicemesh_config(dp_replicate=-1) if is_ddp else None
        groups = group_parameters(self.model, lr=0.02, adamw={"lr": 0.01})
        optimizer = Muon(groups, distributed_config=config)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2 * STEPS)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def fit(folder: str, steps: int, ckpt_path: str | None = None) -> Language:
    """Train on a fixed set of sequences. Lightning clips gradients, saves and resumes."""
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    tokens = torch.randint(
        0, VOCAB, (SEQUENCES, CONTEXT + 1), generator=torch.Generator().manual_seed(0)
    )
    module = Language()
    trainer = lightning.Trainer(
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=num_ranks,
        strategy="ddp" if num_ranks > 1 else "auto",
        max_steps=steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=True,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(tokens, SEQUENCES // num_ranks), ckpt_path=ckpt_path)
    trainer.save_checkpoint(f"{folder}/step-{steps}.ckpt")
    return module


def main() -> None:
    job = os.environ.get("TORCHELASTIC_RUN_ID", os.getpid())  # all ranks save in one folder
    folder = str(Path(tempfile.gettempdir()) / f"lightning_{job}")
    uninterrupted = fit(folder, STEPS)
    fit(folder, STEPS // 2)
    resumed = fit(folder, STEPS, ckpt_path=f"{folder}/step-{STEPS // 2}.ckpt")
    same = all(map(torch.equal, uninterrupted.parameters(), resumed.parameters()))
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(uninterrupted.optimizers().optimizer.plan)
        print(f"resumed from step {STEPS // 2}: {'bitwise equal' if same else 'DIFFERENT'}")
        print(f"loss {uninterrupted.losses[0]:.4f} -> {uninterrupted.losses[-1]:.4f}")
    if dist.is_initialized():
        dist.barrier()  # a rank may abort if Python exits while gloo still works
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
