"""One process of `muon-dtensor validate`: trains the model and, on rank 0, saves its parameters.

Compares nothing; `validate` does.
"""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from muon_dtensor import (
    DistributedConfig,
    Muon,
    create_auto_config,
    create_devicemesh_config,
    group_parameters,
)
from muon_dtensor.cli.leaving import leave
from muon_dtensor.cli.named import named
from muon_dtensor.cli.validate import params_file

Wrapped = tuple[nn.Module, DistributedConfig | None]

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
            return result


def train(
    model: nn.Module,
    config: DistributedConfig | None,
    batches: Callable[[int], Tensor],
    settings: tuple[int, float, str, str],
) -> None:
    """`settings`: steps, learning rate, precision, dtype of the iteration."""
    num_steps, lr, precision, iteration_dtype = settings
    optimizer = Muon(
        group_parameters(model, lr=lr, adamw={"lr": lr}),
        distributed_config=config,
        ns_dtype=getattr(torch, iteration_dtype),
    )
    mixed = torch.autocast("cpu", dtype=torch.bfloat16)
    for step in range(num_steps):
        with mixed if precision == "mixed" else contextlib.nullcontext():
            out = model(batches(step).to(DTYPES.get(precision, torch.float32)))
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole_params(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name without wrappers, whole; every rank takes part."""
    whole = {}
    gathered = (
        FullyShardedDataParallel.summon_full_params(model)
        if isinstance(model, FullyShardedDataParallel)
        else contextlib.nullcontext()
    )
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    with gathered:
        for name, param in inner.named_parameters():
            value = param.full_tensor() if isinstance(param, DTensor) else param
            whole[name.replace("_fsdp_wrapped_module.", "")] = value.detach().clone()
    return whole


def main(mode: str, arguments: list[str]) -> None:
    """`arguments`: as `validate` lists them."""
    model_path, setup, batch_path, model_name, num_steps, lr, precision, dtype, out = arguments
    torch.manual_seed(42)
    model: nn.Module = named(model_path)().to(DTYPES.get(precision, torch.float32))
    bare, make_batch = model, named(batch_path)
    config = None
    if mode == "distributed":
        dist.init_process_group("gloo")
        model, config = wrapped(setup, model)
    settings = (int(num_steps), float(lr), precision, dtype)
    train(model, config, lambda step: make_batch(bare, step), settings)
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
