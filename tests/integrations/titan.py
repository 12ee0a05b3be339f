"""Bodies of ranks that use torchtitan's components. Imports torchtitan, so tests import it late."""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torchtitan.components.optimizer import (
    LRSchedulersContainer,
    OptimizersContainer,
    ParamGroupConfig,
    default_adamw,
)
from torchtitan.config import OverrideConfig, apply_overrides
from torchtitan.experiments.torchft import optimizer as torchft_optimizer

from muon_dtensor.distributed_config.full_tensor import cut_like
from muon_dtensor.integrations.torchtitan import (
    MuonMixin,
    muon_optimizers,
    use_muon,
)
from muon_dtensor.runtime.torch_private import local_part
from tests.support.cases import tensors_like

DIM, HEADS = 8, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.wo = nn.Linear(DIM, DIM, bias=False)
        self.sinks = nn.Parameter(torch.zeros(HEADS))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.attention_norm = nn.RMSNorm(DIM)
        self.w1 = nn.Linear(DIM, 2 * DIM, bias=True)


class Titan(nn.Module):
    """A small model with the parameter names of torchtitan's models."""

    def __init__(self, with_embedding: bool = True) -> None:
        super().__init__()
        if with_embedding:
            self.tok_embeddings = nn.Embedding(16, DIM)
        self.layers = nn.ModuleDict({str(i): Layer() for i in range(2)})
        self.norm = nn.RMSNorm(DIM)
        self.lm_head = nn.Linear(DIM, 16, bias=False)


SPLITS = {
    "wqkv": {"matrix": "(head dim) model -> head dim model", "matrix_axes": {"dim": DIM // HEADS}}
}


def sharded(dims: tuple[int, int]) -> Titan:
    """Return the model under FSDP and TP, with torchtitan's names of mesh dims."""
    torch.manual_seed(0)
    model = Titan()
    mesh = init_device_mesh("cpu", dims, mesh_dim_names=("fsdp", "tp"))
    for layer in model.layers.values():
        parallelize_module(
            layer, mesh["tp"], {"attention.wqkv": ColwiseParallel(), "w1": ColwiseParallel()}
        )
        fully_shard(layer, mesh=mesh["fsdp"])
    fully_shard(model, mesh=mesh["fsdp"])
    return model


def built(dims: tuple[int, int]) -> tuple[Titan, Any, Any]:
    model = sharded(dims)
    config = muon_optimizers(lr=0.02, adamw={"lr": 3e-3}, splits=SPLITS, metrics_every=1)
    optimizers = config.build(model_parts=[model])
    schedulers = LRSchedulersContainer.Config(warmup_steps=2, decay_ratio=0.5).build(
        optimizers=optimizers, training_steps=10
    )
    return model, optimizers, schedulers


def train(model: nn.Module, optimizers: Any, schedulers: Any, steps: range) -> None:
    for step in steps:
        for index, param in enumerate(model.parameters()):
            (grad,) = tensors_like([tuple(param.shape)], 50 * step + index)
            param.grad = cut_like(grad, param) if isinstance(param, DTensor) else grad
        optimizers.step()
        schedulers.step()
        optimizers.zero_grad()


def values(model: nn.Module, optimizers: Any) -> dict[str, Tensor]:
    result = {n: local_part(p.detach()).clone() for n, p in model.named_parameters()}
    for key, value in optimizers.state_dict().items():
        if isinstance(value, Tensor):
            result[key] = local_part(value).clone()
    return result


@dataclass
class Report:
    """Results of one rank."""

    param_names: list[str]
    algorithms: dict[str, str]
    num_optimizers: int
    num_schedulers: int
    lr_metrics: list[str]
    keys: list[str]
    group_keys: list[str]
    resumed: bool
    lrs: list[float]
    has_metrics: bool


def container_scheduler_and_checkpoint(folder: Path) -> Report:
    """Build, train with a scheduler, save torchtitan's flat keys with DCP, load and resume."""
    model, optimizers, schedulers = built((2, 2))
    (optimizer,) = optimizers
    algorithms = {
        name: group["algorithm"]
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    train(model, optimizers, schedulers, range(3))
    lrs = [group["lr"] for group in optimizer.param_groups]
    state = {"model": model.state_dict(), **_prefixed(optimizers.state_dict())}
    state |= {"scheduler": schedulers.state_dict()}
    dcp.save(state, checkpoint_id=folder / "step-3")
    train(model, optimizers, schedulers, range(3, 5))
    expected = values(model, optimizers)

    resumed_model, resumed_optimizers, resumed_schedulers = built((2, 2))
    state = {"model": resumed_model.state_dict(), **_prefixed(resumed_optimizers.state_dict())}
    state |= {"scheduler": resumed_schedulers.state_dict()}
    dcp.load(state, checkpoint_id=folder / "step-3")
    resumed_model.load_state_dict(state["model"])
    resumed_optimizers.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("opt.")})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of torchtitan's call of get_lr
        resumed_schedulers.load_state_dict(state["scheduler"])
    train(resumed_model, resumed_optimizers, resumed_schedulers, range(3, 5))
    resumed = values(resumed_model, resumed_optimizers)
    keys = sorted(optimizers.state_dict())
    return Report(
        param_names=sorted(algorithms),
        algorithms=algorithms,
        num_optimizers=len(optimizers),
        num_schedulers=len(schedulers),
        lr_metrics=sorted(schedulers.get_metrics()),
        keys=[k for k in keys if k.startswith("state.")],
        group_keys=[k for k in keys if k.startswith("param_groups.layers.0.w1.weight.")],
        resumed=all(torch.equal(resumed[key], value) for key, value in expected.items()),
        lrs=lrs,
        has_metrics=optimizer.metrics()["grad_norm"] > 0,
    )


def _prefixed(state: dict[str, Any]) -> dict[str, Any]:
    return {f"opt.{key}": value for key, value in state.items()}


def one_process(steps: int) -> dict[str, Tensor]:
    """Train an unsharded model with torchtitan's container: the oracle of the sharded one."""
    torch.manual_seed(0)
    model = Titan()
    config = muon_optimizers(lr=0.02, adamw={"lr": 3e-3}, splits=SPLITS)
    optimizers = config.build(model_parts=[model])
    schedulers = LRSchedulersContainer.Config(warmup_steps=2, decay_ratio=0.5).build(
        optimizers=optimizers, training_steps=10
    )
    train(model, optimizers, schedulers, range(steps))
    return {name: p.detach() for name, p in model.named_parameters()}


def equals_one_process() -> bool:
    model, optimizers, schedulers = built((2, 2))
    train(model, optimizers, schedulers, range(4))
    expected = one_process(4)
    return all(
        torch.equal(local_part(p.detach()), local_part(cut_like(expected[n], p.detach())))
        for n, p in model.named_parameters()
    )


def pipeline_stage(with_embedding: bool) -> list[str]:
    """Return the optimizer's parameter names for a stage that has only, or no, embedding."""
    model: nn.Module = Titan(False) if not with_embedding else nn.Sequential()
    if with_embedding:
        model.tok_embeddings = nn.Embedding(16, DIM)
    (optimizer,) = muon_optimizers(splits=SPLITS).build(model_parts=[model])
    return sorted(name for group in optimizer.param_groups for name in group["param_names"])


def other_optimizers() -> list[tuple[str, list[str]]]:
    """Build a container with torchtitan's AdamW for the embedding and Muon."""
    model = Titan()
    adamw = ParamGroupConfig(
        pattern="tok_embeddings", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.1}
    )
    config = muon_optimizers(param_groups=[adamw])
    config.implementation = "fused"  # adds fused and foreach to every group
    optimizers = config.build(model_parts=[model])
    return [
        (type(optimizer).__name__, [n for g in optimizer.param_groups for n in g["param_names"]])
        for optimizer in optimizers
    ]


def overridden() -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Apply `--override.imports` to a config tree, as torchtitan's trainer does."""

    @dataclass(kw_only=True, slots=True)
    class Root(OptimizersContainer.Config.__mro__[1]):  # type: ignore[misc]
        optimizer: OptimizersContainer.Config

    root = Root(optimizer=default_adamw(lr=5e-4, weight_decay=0.3))
    target = f"{use_muon.__module__}.{use_muon.__name__}"
    apply_overrides(OverrideConfig(imports=[(target, {"lr": 0.07})]), root)
    by_pattern = {g.pattern: g.optimizer_kwargs for g in root.optimizer.param_groups}
    adamw = next(kwargs for kwargs in by_pattern.values() if kwargs.get("algorithm") == "adamw")
    return type(root.optimizer).__qualname__, by_pattern[".*"], adamw


class Wrapper:
    """Stand-in for torchft.Optimizer: its step calls the container's."""

    def __init__(self, manager: Any, container: Any) -> None:
        self.container, self.num_steps = container, 0

    def step(self) -> None:
        self.num_steps += 1
        self.container.step()

    def zero_grad(self, *args: Any) -> None:
        self.container.zero_grad(*args)


def with_torchft() -> tuple[int, bool, list[str]]:
    """Combine the mixin with torchtitan's torchft container; torchft itself is a stand-in."""
    torchft_optimizer.torchft = SimpleNamespace(Optimizer=Wrapper)
    base = torchft_optimizer.TorchFTOptimizersContainer

    class Container(MuonMixin, base):  # type: ignore[misc, valid-type]
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):  # type: ignore[name-defined]
            """`build` returns the enclosing class; torchtitan connects them."""

    model = Titan()
    plain = muon_optimizers(splits=SPLITS)
    config = Container.Config(param_groups=plain.param_groups, implementation="for-loop")
    manager = SimpleNamespace(manager=None, use_async_quorum=True)
    container = config.build(model_parts=[model], ft_manager=manager)
    container.init_cache_state_dict()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = copy.deepcopy(model.state_dict())
    container.step()
    moved = all(not torch.equal(before[n], p) for n, p in model.named_parameters())
    return container._ft_optimizer.num_steps, moved, sorted(container.state_dict())[:2]
