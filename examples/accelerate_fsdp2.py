"""Accelerate with FSDP2: the optimizer is built first; `prepare` then shards its parameters.

torchrun --nproc-per-node 4 examples/accelerate_fsdp2.py
"""

import torch
import torch.nn.functional as F  # noqa: N812
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from common import CONTEXT, SEQUENCES, STEPS, VOCAB, Block, finish, make_model

from muon_dtensor import Muon, clip_grad_norm_, group_parameters


def main() -> None:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[Block.__name__],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), fsdp_plugin=plugin)
    if accelerator.device.type == "cpu":  # Accelerate enables FSDP only on GPUs by default
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    model = make_model(accelerator.device)
    optimizer = Muon(group_parameters(model, lr=0.02, adamw={"lr": 0.01}))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2 * STEPS)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    generator = torch.Generator().manual_seed(accelerator.process_index)
    tokens = torch.randint(0, VOCAB, (SEQUENCES // 4, CONTEXT + 1), generator=generator)
    losses = []
    for _ in range(STEPS):
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        accelerator.backward(loss)
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    if accelerator.is_main_process:
        print(optimizer.optimizer.plan)
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    finish()


if __name__ == "__main__":
    main()
