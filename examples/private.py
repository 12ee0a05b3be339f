"""Differential privacy of single examples: Opacus clips the gradient of each one, Muon steps.

    pip install "muon_dtensor[privacy]"
    torchrun --nproc-per-node 2 examples/private.py

With FSDP2 and ghost clipping (`grad_sample_mode="ghost_fsdp"`) Opacus adds the noise to sharded
gradients, and Muon orthogonalizes the noisy matrices as any others.
"""

import warnings

import torch
import torch.distributed as dist
from common import DIM, finish, mean_over_ranks, print_losses, print_rank_0, start
from opacus import PrivacyEngine
from opacus.utils.fsdp_utils import FSDP2Wrapper
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from muon_dtensor import Muon, group_parameters

EXAMPLES, BATCH, CLASSES = 64, 16, 4


def main() -> None:
    warnings.filterwarnings("ignore")  # Opacus' advice about secure random numbers
    device = start()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(DIM, 2 * DIM, bias=False), nn.Tanh(), nn.Linear(2 * DIM, CLASSES, bias=False)
    )
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, DIM, generator=generator)
    y = (x[:, :2] > 0).long() @ torch.tensor([2, 1])
    model = FSDP2Wrapper(model.to(device))
    optimizer = Muon(group_parameters(model, lr=0.02, adamw={"lr": 3e-3}))
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH)
    engine = PrivacyEngine()
    model, optimizer, loss_fn, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=0.5,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode="ghost_fsdp",
    )
    losses = []
    for _ in range(10):
        total = []
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = loss_fn(model(inputs.to(device)), targets.to(device))
            loss.backward()
            optimizer.step()
            total.append(float(loss.item()))
        losses.append(mean_over_ranks(torch.tensor(sum(total) / len(total))))
    print_losses(losses)
    print_rank_0(f"epsilon {engine.get_epsilon(1e-3):.2f} on {dist.get_world_size()} ranks")
    finish()


if __name__ == "__main__":
    main()
