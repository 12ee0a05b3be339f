"""One process of `muon-dtensor validate`: trains the model; rank 0 saves its parameters."""

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
from muon_dtensor.cli.load_object import load_function
from muon_dtensor.cli.shutdown import destroy_process_group
from muon_dtensor.cli.validate import params_file
from muon_dtensor.grouping import clean_names

WrappedModel = (
    tuple[nn.Module, DistributedConfig | None]
    | tuple[nn.Module, DistributedConfig | None, DeviceMesh]
)

FP16_SCALE = 1024.0
"""Factor of the loss in float16, where averages of small gradients over ranks would lose bits."""

SAME_DATA_DIMS = (
    *("tp", "cp", "ep", "pp"),
    *("tensor", "context", "expert", "pipe", "pipeline", "model"),
)
"""Mesh dims whose ranks see the same samples."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TinyModel(nn.Module):
    """Two linear layers and a norm, with biases; `input_dim` features in and out."""

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
    """Return the default model."""
    return TinyModel()


def random_batch(model: nn.Module, step: int) -> Tensor:
    """Return a batch [32, model.input_dim], the same on every rank.

    Raises ValueError if the model has no `input_dim`.
    """
    input_dim = getattr(model, "input_dim", None)
    if input_dim is None:
        raise ValueError("the model has no input_dim: pass a function with --batch pkg.mod:fn")
    return torch.randn(32, input_dim, generator=torch.Generator().manual_seed(step))


def wrap_model(setup: str, model: nn.Module) -> WrappedModel:
    """Apply the setup: return the wrapped model and the config of its optimizer."""
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
            result: WrappedModel = load_function(setup)(model)
            if not isinstance(result, tuple) or len(result) not in (2, 3):
                raise ValueError(
                    f"{setup} must return (wrapped model, DistributedConfig or None), and may add "
                    f"the DeviceMesh of the data ranks; it returned {type(result).__name__}"
                )
            return result


def mean_square(output: Tensor, batch: Any) -> Tensor:
    """Return the default loss, the mean square of the output. `batch` is not used."""
    return output.float().square().mean()


@dataclass(frozen=True)
class Settings:
    """Training flags of `validate`, which documents them."""

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
    """Train on a share (index, number of shares) of each batch. Raises ValueError.

    Gradients of shares are averaged in another order than those of the full batch. Only in float32
    is the difference below the tolerance. In other precisions every rank trains on the full batch;
    data ranks with odd index double their loss and the others, including rank 0, multiply theirs
    by zero. This average is exact if the number of data ranks is a power of two, and gradients
    without an average are still detected.
    """
    optimizer = optimizer_of(model, config, settings)
    if dist.is_initialized() and dist.get_world_size() > 1:
        _check_parallel(optimizer)
    loss_of = load_function(settings.loss)
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
                f"two, so that averages over them are exact; this setup has {count} data ranks"
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
    """Return the optimizer of `settings.optimizer`.

    Default: Muon for matrices and AdamW for all other parameters, at one learning rate.
    """
    if settings.optimizer.endswith((".toml", ".yaml", ".yml")):
        read = (
            MuonConfig.from_toml if settings.optimizer.endswith(".toml") else MuonConfig.from_yaml
        )
        return read(settings.optimizer).build_optimizer(model, distributed_config=config)
    if settings.optimizer:
        optimizer: Optimizer = load_function(settings.optimizer)(model, config)
        return optimizer
    eps = {"eps": 1e-4} if settings.precision == "fp16" else {}  # 1e-8 is zero in float16
    return Muon(
        group_parameters(model, lr=settings.lr, adamw={"lr": settings.lr, **eps}),
        distributed_config=config,
        ns_dtype=getattr(torch, settings.iteration_dtype),
    )


def _check_parallel(optimizer: Optimizer) -> None:
    """Raise ValueError if the plan has no mesh, so that every rank steps all matrices."""
    if not isinstance(optimizer, Muon):
        return
    try:
        params = optimizer.plan.params
    except RuntimeError:  # a user-written transport has no plan
        return
    if params and not any(spec.layout.mesh.dim_names for spec in params):
        raise ValueError(
            "the setup is not parallel: the optimizer's plan has 'this rank alone' for every "
            "matrix. Shard the model, or return create_devicemesh_config(mesh) with it (DDP)."
        )


def _share_of(batch: Any, share: tuple[int, int], dtype: torch.dtype) -> Any:
    """Return this rank's samples, floating-point tensors in `dtype`.

    Integer tensors keep their dtype. Values other than tensors and 0-D tensors stay unchanged.
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
            f"a batch of {len(tensor)} samples does not divide over {count} data ranks: return a "
            "batch of another size, or return the DeviceMesh of the data ranks from --setup"
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
    """Return this rank's share of each batch as (index, number of shares).

    `mesh`: mesh of the data ranks, if the setup returned one. See `validate` for the default.
    """
    if mesh is None:
        meshes = [p.device_mesh for p in model.parameters() if isinstance(p, DTensor)]
        meshes += [config.mesh] if config is not None and config.mesh is not None else []
        mesh = max(meshes, key=lambda m: m.ndim, default=None)
        if mesh is not None and mesh.mesh_dim_names and mesh.ndim > 1:
            names = tuple(n for n in mesh.mesh_dim_names if n not in SAME_DATA_DIMS)
            mesh = mesh[names] if names else None
            if mesh is None:
                return 0, 1
        elif mesh is not None and mesh.mesh_dim_names and mesh.mesh_dim_names[0] in SAME_DATA_DIMS:
            return 0, 1
    if mesh is None:
        return dist.get_rank(), dist.get_world_size()
    ranks = mesh.mesh.flatten().tolist()
    return ranks.index(dist.get_rank()), len(ranks)


def full_params(model: nn.Module) -> dict[str, Tensor]:
    """Return the full parameters by name without wrapper prefixes. A collective of all ranks."""
    params = {}
    has_fsdp1 = any(isinstance(m, FullyShardedDataParallel) for m in model.modules())
    gathered = (
        FullyShardedDataParallel.summon_full_params(model)
        if has_fsdp1
        else contextlib.nullcontext()
    )
    with gathered:
        for name, param in clean_names(model):
            value = param.full_tensor() if isinstance(param, DTensor) else param
            params[name] = value.detach().clone()
    return params


def main(mode: str, arguments: list[str]) -> None:
    """Train in one mode. `arguments`: the list that `validate` builds."""
    model_path, setup, batch_path, model_name, num_steps, lr, *options, out = arguments
    settings = Settings(int(num_steps), float(lr), *options)
    torch.manual_seed(42)
    dtype = DTYPES.get(settings.precision, torch.float32)
    model: nn.Module = load_function(model_path)().to(dtype)
    unwrapped_model, make_batch = model, load_function(batch_path)
    config, share = None, (0, 1)
    if mode == "distributed":
        dist.init_process_group("gloo")
        model, config, *data_meshes = wrap_model(setup, model)
        share = data_share(model, config, data_meshes[0] if data_meshes else None)
        if dist.get_rank() == 0:
            print(f"distributed: each batch is shared by {share[1]} data ranks", flush=True)
    train(model, config, lambda step: make_batch(unwrapped_model, step), settings, share)
    params = full_params(model)
    if mode == "baseline" or dist.get_rank() == 0:
        path = params_file(Path(out), model_name, mode)
        torch.save(params, path)
        print(f"{mode}: parameters saved to {path}")
    if mode == "distributed":
        destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except ValueError as error:
        print(f"muon-dtensor validate: {error}", file=sys.stderr)
        raise SystemExit(2) from error
