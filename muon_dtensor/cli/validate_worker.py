"""One process of `muon-dtensor validate`: trains the model and, on rank 0, saves its parameters.

Compares nothing; `validate` does.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from muon_dtensor import (
    DistributedConfig,
    Muon,
    MuonConfig,
    create_auto_config,
    create_devicemesh_config,
    group_parameters,
)
from muon_dtensor.cli.load_object import named
from muon_dtensor.cli.shutdown import leave
from muon_dtensor.cli.validate import params_file
from muon_dtensor.grouping import clean_names

Wrapped = (
    tuple[nn.Module, DistributedConfig | None]
    | tuple[nn.Module, DistributedConfig | None, DeviceMesh]
)

FP16_SCALE = 1024.0
"""Of the loss in float16, whose small gradients would lose bits in the average over ranks."""

SAME_DATA = ("tp", "cp", "ep", "pp", "tensor", "model", "context", "expert", "pipe", "pipeline")
"""Mesh dims whose ranks see the same samples."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TinyModel(nn.Module):
    """Three layers with a norm and biases; `input_dim` features in and out."""

    def __init__(self, input_dim: int = 48) -> None:
        super().__init__()
        self.input_dim = input_dim
        self.up = nn.Linear(input_dim, 3 * input_dim)
        self.norm = nn.LayerNorm(3 * input_dim)
        self.down = nn.Linear(3 * input_dim, input_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.up(x))
        out: Tensor = x + self.down(nn.functional.gelu(hidden))
        return out


def tiny_model() -> nn.Module:
    """The model that is validated when the user names none."""
    return TinyModel()


def random_batch(model: nn.Module, step: int) -> Tensor:
    """[32, model.input_dim], the same on every rank. Raises ValueError without `input_dim`."""
    input_dim = getattr(model, "input_dim", None)
    if input_dim is None:
        raise ValueError("the model has no input_dim: name a function with --batch pkg.mod:fn")
    return torch.randn(32, input_dim, generator=torch.Generator().manual_seed(step))


def wrapped(setup: str, model: nn.Module) -> Wrapped:
    """The model as this setup runs it on all ranks, and the config of its optimizer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    match setup:
        case "fsdp":
            fully_shard(model, mesh=mesh)
            return model, None
        case "fsdp1":
            module = FullyShardedDataParallel(
                model, use_orig_params=True, device_id=torch.device("cpu")
            )
            return module, create_auto_config(fsdp_process_group=dist.group.WORLD)
        case "ddp":
            return DistributedDataParallel(model), create_devicemesh_config(mesh)
        case _:
            result: Wrapped = named(setup)(model)
            if not isinstance(result, tuple) or len(result) not in (2, 3):
                raise ValueError(
                    f"{setup} must return (wrapped model, DistributedConfig or None), and may add "
                    f"the DeviceMesh of the data ranks; it returned {type(result).__name__}"
                )
            return result


def mean_square(output: Tensor, batch: Any) -> Tensor:
    """The loss where the user names none; `batch` is not looked at."""
    return output.float().square().mean()


@dataclass(frozen=True)
class Settings:
    """What `validate` was told of the training, as `validate` lists it."""

    num_steps: int
    lr: float
    precision: str
    iteration_dtype: str
    loss: str
    optimizer: str


def train(
    model: nn.Module,
    config: DistributedConfig | None,
    batches: Callable[[int], Any],
    settings: Settings,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Train on the share (index, of how many) of each batch. Raises ValueError; see `validate`.

    Gradients of shares are averaged in another order than those of the whole batch, which only
    float32 takes without a difference over its tolerance. In narrow precisions every rank sees the
    whole batch, and every other rank doubles its loss while the rest, rank 0 with them, drop
    theirs: the average is exact, and gradients that nobody averages show as well. For that the
    number of data ranks must be a power of two.
    """
    optimizer = optimizer_of(model, config, settings)
    if dist.is_initialized() and dist.get_world_size() > 1:
        _must_be_parallel(optimizer)
    loss_of = named(settings.loss)
    mixed = torch.autocast("cpu", dtype=torch.bfloat16)
    dtype = DTYPES.get(settings.precision, torch.float32)
    index, count = share
    weight, scale = 1.0, 1.0
    if settings.precision == "fp16":
        scale = FP16_SCALE
    if settings.precision != "fp32" and count > 1:
        if count & (count - 1):
            raise ValueError(
                f"--precision {settings.precision} needs a number of data ranks that is a power of "
                f"two, so that averages over them are exact; this setup has {count}"
            )
        weight, share = 2.0 * (index % 2), (0, 1)
    for step in range(settings.num_steps):
        batch = _share_of(batches(step), share, dtype)
        with mixed if settings.precision == "mixed" else contextlib.nullcontext():
            out = _forward(model, batch)
        (loss_of(out, batch) * weight * scale).backward()
        for param in model.parameters():
            if scale != 1 and param.grad is not None:
                param.grad /= scale
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(
    model: nn.Module, config: DistributedConfig | None, settings: Settings
) -> Optimizer:
    """The user's, or Muon for matrices and AdamW for the rest at one learning rate."""
    if settings.optimizer.endswith((".toml", ".yaml", ".yml")):
        read = (
            MuonConfig.from_toml if settings.optimizer.endswith(".toml") else MuonConfig.from_yaml
        )
        return read(settings.optimizer).build_optimizer(model, distributed_config=config)
    if settings.optimizer:
        made: Optimizer = named(settings.optimizer)(model, config)
        return made
    eps = {"eps": 1e-4} if settings.precision == "fp16" else {}  # 1e-8 is zero in float16
    return Muon(
        group_parameters(model, lr=settings.lr, adamw={"lr": settings.lr, **eps}),
        distributed_config=config,
        ns_dtype=getattr(torch, settings.iteration_dtype),
    )


def _must_be_parallel(optimizer: Optimizer) -> None:
    """Raise ValueError where every rank steps all matrices on its own."""
    if not isinstance(optimizer, Muon):
        return
    try:
        params = optimizer.plan.params
    except RuntimeError:  # functions of the user's move matrices, without a plan
        return
    if params and not any(spec.layout.mesh.dim_names for spec in params):
        raise ValueError(
            "the setup is not parallel to the optimizer: its plan says 'this rank alone' of every "
            "matrix. Shard the model, or return create_devicemesh_config(mesh) with it (DDP)."
        )


def _share_of(batch: Any, share: tuple[int, int], dtype: torch.dtype) -> Any:
    """This rank's samples; floating ones in the dtype of the model.

    Integer tensors keep their dtype; what is no tensor of samples is passed on.
    """
    if isinstance(batch, dict):
        return {name: _share_of(tensor, share, dtype) for name, tensor in batch.items()}
    if type(batch) is tuple:
        return tuple(_share_of(tensor, share, dtype) for tensor in batch)
    if not isinstance(batch, Tensor) or not batch.ndim:
        return batch
    tensor: Tensor = batch
    index, count = share
    if len(tensor) % count:
        raise ValueError(
            f"a batch of {len(tensor)} samples does not divide over {count} data ranks: return "
            "another batch, or from setup the DeviceMesh of the ranks that see other data"
        )
    part = tensor.chunk(count)[index]
    return part.to(dtype) if part.is_floating_point() else part


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def data_share(
    model: nn.Module, config: DistributedConfig | None, mesh: DeviceMesh | None
) -> tuple[int, int]:
    """Which share of each batch this rank trains on: (index, of how many); see `validate`.

    `mesh`: of the ranks that see other data, if the setup says so.
    """
    if mesh is None:
        meshes = [p.device_mesh for p in model.parameters() if isinstance(p, DTensor)]
        meshes += [config.mesh] if config is not None and config.mesh is not None else []
        mesh = max(meshes, key=lambda m: m.ndim, default=None)
        if mesh is not None and mesh.mesh_dim_names and mesh.ndim > 1:
            names = tuple(n for n in mesh.mesh_dim_names if n not in SAME_DATA)
            mesh = mesh[names] if names else None
            if mesh is None:
                return 0, 1
        elif mesh is not None and mesh.mesh_dim_names and mesh.mesh_dim_names[0] in SAME_DATA:
            return 0, 1
    if mesh is None:
        return dist.get_rank(), dist.get_world_size()
    ranks = mesh.mesh.flatten().tolist()
    return ranks.index(dist.get_rank()), len(ranks)


def whole_params(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name without wrappers, whole; every rank takes part."""
    whole = {}
    has_fsdp1 = any(isinstance(m, FullyShardedDataParallel) for m in model.modules())
    gathered = (
        FullyShardedDataParallel.summon_full_params(model)
        if has_fsdp1
        else contextlib.nullcontext()
    )
    with gathered:
        for name, param in clean_names(model):
            value = param.full_tensor() if isinstance(param, DTensor) else param
            whole[name] = value.detach().clone()
    return whole


def main(mode: str, arguments: list[str]) -> None:
    """`arguments`: as `validate` lists them."""
    model_path, setup, batch_path, model_name, *rest, out = arguments
    num_steps, lr, *others = rest
    settings = Settings(int(num_steps), float(lr), *others)
    torch.manual_seed(42)
    dtype = DTYPES.get(settings.precision, torch.float32)
    model: nn.Module = named(model_path)().to(dtype)
    bare, make_batch = model, named(batch_path)
    config, share = None, (0, 1)
    if mode == "distributed":
        dist.init_process_group("gloo")
        model, config, *data = wrapped(setup, model)
        share = data_share(model, config, data[0] if data else None)
        if dist.get_rank() == 0:
            print(f"distributed: each batch is shared by {share[1]} data ranks", flush=True)
    train(model, config, lambda step: make_batch(bare, step), settings, share)
    whole = whole_params(model)
    if mode == "baseline" or dist.get_rank() == 0:
        path = params_file(Path(out), model_name, mode)
        torch.save(whole, path)
        print(f"{mode}: parameters saved to {path}")
    if mode == "distributed":
        leave()


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except ValueError as error:
        print(f"muon-dtensor validate: {error}", file=sys.stderr)
        raise SystemExit(2) from error
