"""Train a byte-level GPT on help texts from Python's standard library, on any 3-D mesh.

    torchrun --nproc-per-node 4 examples/train_gpt.py --dp-shard 2 --tp 2

Runs on CPU (gloo) or GPUs (NCCL). Only `make_optimizer` uses muon_dtensor for training; all other
code is standard PyTorch. With `--checkpoint FOLDER` it saves every few steps. When it is restarted
by hand or by torchrun (`--max-restarts 3`; with gloo set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1), it
resumes from the last complete checkpoint. `--tensorboard FOLDER` and `--wandb FOLDER` (offline) log
metrics.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from muon_dtensor import Muon, clip_grad_norm_, group_parameters
from muon_dtensor.algorithms.kernels import SLOW, bfloat16_slowdown
from muon_dtensor.train.checkpoints import Checkpoints, apply_training_state, training_state


@dataclass(frozen=True)
class Config:
    """Model, training and mesh."""

    optimizer: Literal["muon", "adamw"] = "muon"
    steps: int = 120
    dp_replicate: int = 1
    dp_shard: int = 2
    tp: int = 2
    batch: int = 16
    """Sequences per step, over all ranks."""
    context: int = 128
    dim: int = 128
    layers: int = 4
    heads: int = 4
    muon_lr: float = 0.06
    """Learning rate of the hidden matrices under Muon; best of 0.01, 0.02, 0.04, 0.06, 0.08."""
    rest_lr: float = 6e-3
    """Learning rate of embeddings, head and norms with Muon; best of 3e-3, 6e-3, 1.2e-2."""
    adamw_lr: float = 1.5e-3
    """Learning rate with `--optimizer adamw`; best of 5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 6e-3,
    1.2e-2."""
    clip: float = math.inf
    """Maximum norm of all gradients."""
    checkpoint: Path | None = None
    """Folder of checkpoints; the last two are kept."""
    checkpoint_every: int = 10
    log_every: int = 10
    """Steps between metrics of the optimizer in the logs."""
    tensorboard: Path | None = None
    wandb: Path | None = None
    warmup: int = 10
    val_batches: int = 8
    seed: int = 0


class Attention(nn.Module):
    """Causal self-attention. TP shards it by heads."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, dim, bias=False)
        self.wv = nn.Linear(dim, dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [batch, context, dim]
        batch, context, _ = x.shape
        q, k, v = (
            w(x).view(batch, context, -1, self.head_dim).transpose(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(mixed.transpose(1, 2).reshape(batch, context, -1))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp_norm = nn.RMSNorm(dim)
        self.fc = nn.Linear(dim, 4 * dim, bias=False)
        self.out = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.out(F.gelu(self.fc(self.mlp_norm(x))))


class GPT(nn.Module):
    """Computes logits of the next byte from bytes."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(256, config.dim)
        self.pos_embeddings = nn.Embedding(config.context, config.dim)
        self.layers = nn.ModuleList(Block(config.dim, config.heads) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.output = nn.Linear(config.dim, 256, bias=False)
        for param in self.parameters():
            if param.ndim == 2:
                nn.init.normal_(param, std=0.02)
        for block in self.layers:
            for last in (block.attention.wo, block.out):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * config.layers))

    def forward(self, tokens: Tensor) -> Tensor:  # [batch, context]
        positions = torch.arange(tokens.size(1), device=tokens.device)
        x = self.tok_embeddings(tokens) + self.pos_embeddings(positions)
        for block in self.layers:
            x = block(x)
        return self.output(self.norm(x))


def make_mesh(config: Config, device: str) -> DeviceMesh:
    """Return the mesh (dp_replicate, dp_shard, tp)."""
    return init_device_mesh(
        device,
        (config.dp_replicate, config.dp_shard, config.tp),
        mesh_dim_names=("dp_replicate", "dp_shard", "tp"),
    )


def make_model(config: Config, mesh: DeviceMesh) -> nn.Module:
    """Return the model, sharded by TP and then by FSDP2 or HSDP; equal weights on any mesh."""
    torch.manual_seed(config.seed)
    model = GPT(config).to(mesh.device_type)
    plan = {
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(),
        "fc": ColwiseParallel(),
        "out": RowwiseParallel(),
    }
    data = mesh["dp_replicate", "dp_shard"] if config.dp_replicate > 1 else mesh["dp_shard"]
    for block in model.layers:
        if config.tp > 1:
            parallelize_module(block, mesh["tp"], plan)
        fully_shard(block, mesh=data)
    return fully_shard(model, mesh=data)


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Return Muon with AdamW for all but the hidden matrices, or AdamW for all parameters."""
    adamw = {"lr": config.rest_lr, "betas": (0.9, 0.95), "weight_decay": 0.01}
    rules = []
    if config.optimizer == "adamw":
        adamw["lr"] = config.adamw_lr
        rules.append((".", {"algorithm": "adamw"}))
    is_logged = config.tensorboard is not None or config.wandb is not None
    return Muon(
        group_parameters(model, lr=config.muon_lr, adamw=adamw, rules=rules),
        ns_dtype=iteration_dtype(next(model.parameters()).device),
        metrics_every=config.log_every if is_logged else 0,
    )


def iteration_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16, or float32 on hosts where it is faster; rank 0 decides for all ranks."""
    is_slow = [device.type == "cpu" and bfloat16_slowdown() >= SLOW]
    dist.broadcast_object_list(is_slow)
    return torch.float32 if is_slow[0] else torch.bfloat16


class Text:
    """Help texts of Python's documentation as bytes; the last tenth is for validation."""

    def __init__(self, config: Config, mesh: DeviceMesh) -> None:
        text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        cut = len(tokens) * 9 // 10
        self.train, self.val = tokens[:cut], tokens[cut:]
        self.config, self.device = config, mesh.device_type
        self.num_parts = config.dp_replicate * config.dp_shard
        if config.batch % self.num_parts:
            raise ValueError(f"batch {config.batch} does not divide over {self.num_parts} ranks")
        replica, shard, _ = mesh.get_coordinate()
        self.part = replica * config.dp_shard + shard

    def batch(self, tokens: Tensor, seed: int) -> Tensor:
        """Return this data-parallel rank's part of a batch: [batch / parts, context + 1]."""
        generator = torch.Generator().manual_seed(seed)
        high = len(tokens) - self.config.context - 1
        starts = torch.randint(high, (self.config.batch,), generator=generator)
        starts = starts.chunk(self.num_parts)[self.part]
        rows = [tokens[start : start + self.config.context + 1] for start in starts.tolist()]
        return torch.stack(rows).to(self.device)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next byte, in nats."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def mean_over_ranks(value: Tensor) -> float:
    """Return the mean over all ranks; ranks of one TP group hold the same value."""
    value = value.detach().clone()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def state_of(result: "Result", scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict[str, Any]:
    """Return the contents of a checkpoint; tensors are this rank's shards."""
    state = training_state(result.model, result.optimizer)
    return {**state, "scheduler": scheduler.state_dict()}


def resume(
    checkpoints: Checkpoints, result: "Result", scheduler: torch.optim.lr_scheduler.LRScheduler
) -> None:
    """Continue from the newest checkpoint that can be read, if there is one."""
    restored = checkpoints.load(lambda: state_of(result, scheduler))
    if restored is None:
        return
    apply_training_state(result.model, result.optimizer, restored.state)
    scheduler.load_state_dict(restored.state["scheduler"])
    result.losses = restored.notes["losses"]
    if dist.get_rank() == 0:
        for line in (*restored.damaged, f"resuming from {restored.path.name}"):
            print(line, flush=True)


@contextlib.contextmanager
def loggers(config: Config) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Yield a function that logs (step, values) on rank 0 to TensorBoard and Weights & Biases."""
    sinks: list[Callable[[int, dict[str, float]], None]] = []
    with contextlib.ExitStack() as stack:
        if config.tensorboard and dist.get_rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(config.tensorboard)
            stack.callback(writer.close)
            sinks.append(
                lambda step, values: [
                    writer.add_scalar(name, value, step) for name, value in values.items()
                ]
            )
        if config.wandb and dist.get_rank() == 0:
            import wandb

            config.wandb.mkdir(parents=True, exist_ok=True)
            run = wandb.init(mode="offline", dir=config.wandb, project="train_gpt")
            stack.callback(run.finish)
            sinks.append(lambda step, values: run.log(values, step=step))

        def log(step: int, values: dict[str, float]) -> None:
            for sink in sinks:
                sink(step, values)

        yield log


@dataclass
class Result:
    """Model, optimizer and measurements of a run."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    val_loss: float = math.nan


def train(
    config: Config,
    mesh: DeviceMesh,
    on_start: Callable[[Result], None] = lambda result: None,
    on_step: Callable[[int, float, float], None] = lambda step, loss, rate: None,
) -> Result:
    """Train on all ranks. Every rank calls `on_step(step, loss, tokens per second)`."""
    text = Text(config, mesh)
    model = make_model(config, mesh)
    result = Result(model, make_optimizer(config, model))
    on_start(result)

    def scale(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        progress = (step - config.warmup) / max(1, config.steps - config.warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    scheduler = torch.optim.lr_scheduler.LambdaLR(result.optimizer, scale)
    checkpoints = Checkpoints(config.checkpoint) if config.checkpoint else None
    if checkpoints is not None:
        resume(checkpoints, result, scheduler)
    for step in range(len(result.losses), config.steps):
        start = time.perf_counter()
        loss = loss_of(model, text.batch(text.train, seed=1 + step))
        loss.backward()
        if config.clip < math.inf:
            clip_grad_norm_(model.parameters(), config.clip)
        before = time.perf_counter()
        result.optimizer.step()
        result.optimizer_seconds.append(time.perf_counter() - before)
        result.optimizer.zero_grad()
        scheduler.step()
        result.losses.append(mean_over_ranks(loss))
        seconds = time.perf_counter() - start
        on_step(step + 1, result.losses[-1], config.batch * config.context / seconds)
        if checkpoints is not None and (step + 1) % config.checkpoint_every == 0:
            state = state_of(result, scheduler)
            checkpoints.save(state, step + 1, {"losses": result.losses})
    with torch.no_grad():
        losses = [
            loss_of(model, text.batch(text.val, seed=10**6 + index))
            for index in range(config.val_batches)
        ]
    result.val_loss = mean_over_ranks(torch.stack(losses).mean())
    return result


@contextlib.contextmanager
def progress_of(config: Config) -> Iterator[Callable[[int, str], None]]:
    """Yield a function that shows (step, text) on rank 0.

    Shows a progress bar on a terminal, else prints every tenth step.
    """
    from rich.progress import Progress

    with Progress(disable=dist.get_rank() != 0) as bar:
        task = bar.add_task(config.optimizer, total=config.steps)

        def advance(step: int, text: str) -> None:
            bar.update(task, completed=step, description=text)
            is_due = step % 10 == 0 or step in (1, config.steps)
            if is_due and not bar.console.is_terminal and dist.get_rank() == 0:
                print(f"step {step}  {text}", flush=True)

        yield advance


def metrics_of(result: Result) -> dict[str, float]:
    """Return the optimizer's metrics; empty if it has none yet after a restart."""
    assert isinstance(result.optimizer, Muon)
    try:
        return result.optimizer.metrics()
    except RuntimeError:
        return {}


def main() -> None:
    """Train under torchrun; rank 0 prints."""
    import tyro

    config = tyro.cli(Config, description=__doc__)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = "cuda"
    else:
        torch.set_num_threads(1)
        device = "cpu"
    mesh = make_mesh(config, device)
    is_rank_0 = dist.get_rank() == 0

    running: list[Result] = []

    def on_start(result: Result) -> None:
        running.append(result)
        if is_rank_0 and config.optimizer == "muon":
            print(result.optimizer.plan, flush=True)

    with loggers(config) as log, progress_of(config) as advance:

        def on_step(step: int, loss: float, rate: float) -> None:
            advance(step, f"loss {loss:.4f}  {rate:,.0f} tokens/s")
            if (step - 1) % config.log_every == 0 and (config.tensorboard or config.wandb):
                log(step, {"loss": loss, "tokens_per_second": rate, **metrics_of(running[0])})

        result = train(config, mesh, on_start, on_step)
    if is_rank_0:
        print(f"validation loss {result.val_loss:.4f}", flush=True)
    time.sleep(0.1)  # gloo's threads release the last tensors shortly after they arrived
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
