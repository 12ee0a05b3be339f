"""Resuming jobs of torch.optim.AdamW and torch.optim.Muon with our Muon."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muon_dtensor import CheckpointError, Muon, group_parameters
from muon_dtensor.integrations.torch_optimizers import convert_state_dict, load_checkpoint
from tests.support.pool import run_processes


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.up = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.down = nn.Linear(12, 8, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(self.norm(self.up(self.embed(tokens))))


MATRICES = ("up.weight", "down.weight")
ADAMW = {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.0}


def torch_pair(model: nn.Module) -> list[Any]:
    """torch.optim.Muon for the matrices, torch.optim.AdamW for all other parameters."""
    params = dict(model.named_parameters())
    return [
        torch.optim.Muon([(n, params[n]) for n in MATRICES], lr=0.05, momentum=0.9),
        torch.optim.AdamW([(n, p) for n, p in params.items() if n not in MATRICES], **ADAMW),
    ]


def torch_adamw(model: nn.Module) -> list[Any]:
    return [torch.optim.AdamW(model.named_parameters(), **ADAMW)]


def new_muon(model: nn.Module) -> Muon:
    """Our Muon with options other than those of the saved jobs."""
    return Muon(group_parameters(model, lr=0.5))


def train(model: nn.Module, optimizers: list[Any], first: int, num_steps: int = 2) -> None:
    for step in range(first, first + num_steps):
        tokens = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(step))
        model(tokens).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def values(model: nn.Module) -> list[Tensor]:
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]


def job(make: Any) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = Model()
    optimizers = make(model)
    train(model, optimizers, 0)
    return model, optimizers


def state_dicts(form: str, model: nn.Module, optimizers: list[Any]) -> list[Any]:
    match form:
        case "by-name":
            return [get_optimizer_state_dict(model, optimizer) for optimizer in optimizers]
        case "joint":
            return [get_optimizer_state_dict(model, optimizers)]
        case "flattened":
            options = StateDictOptions(flatten_optimizer_state_dict=True)
            return [get_optimizer_state_dict(model, opt, options=options) for opt in optimizers]
        case _:
            return [optimizer.state_dict() for optimizer in optimizers]


@pytest.mark.parametrize("form", ["by-name", "joint", "flattened", "by-number"])
def test_a_pair_resumes_bitwise(form):
    model, optimizers = job(torch_pair)
    saved = copy.deepcopy(state_dicts(form, model, optimizers))
    twin = copy.deepcopy(model)
    optimizer = new_muon(twin)
    converted = convert_state_dict(optimizer, *saved)
    optimizer.load_state_dict(converted)
    assert optimizer.param_groups[0]["format_version"] == 1
    train(model, optimizers, 2)
    train(twin, [optimizer], 2)
    assert all(map(torch.equal, values(twin), values(model)))


def test_a_job_of_adamw_resumes_with_zero_momentum_of_matrices(caplog):
    model, optimizers = job(torch_adamw)
    twin = copy.deepcopy(model)
    optimizer = new_muon(twin)
    optimizer.load_state_dict(convert_state_dict(optimizer, optimizers[0].state_dict()))
    assert "2 parameters start without state, because no state of their algorithm" in caplog.text
    twin_params = dict(twin.named_parameters())
    for name, param in model.named_parameters():
        saved, loaded = optimizers[0].state[param], optimizer.state[twin_params[name]]
        if name in MATRICES:
            assert not loaded["momentum_buffer"].any()
        else:
            assert all(torch.equal(saved[key], loaded[key]) for key in loaded)
    groups = {n: g for g in optimizer.param_groups for n in g["param_names"]}
    assert (groups["up.weight"]["lr"], groups["norm.bias"]["lr"]) == (0.5, ADAMW["lr"])
    train(twin, [optimizer], 2)


def test_state_by_number_requires_names():
    torch.manual_seed(0)
    model = Model()
    unnamed = torch.optim.AdamW(model.parameters(), **ADAMW)
    train(model, [unnamed], 0)
    optimizer = new_muon(model)
    with pytest.raises(CheckpointError, match=r"pass names=\[name for name, _ in"):
        convert_state_dict(optimizer, unnamed.state_dict())
    names = [name for name, _ in model.named_parameters()]
    optimizer.load_state_dict(convert_state_dict(optimizer, unnamed.state_dict(), names=names))
    assert optimizer.state[model.embed.weight]["exp_avg"].any()
    with pytest.raises(CheckpointError, match="has no names"):
        convert_state_dict(Muon([model.up.weight]), unnamed.state_dict(), names=names)
    other = Muon(group_parameters(nn.ModuleDict({"embed": nn.Embedding(3, 3)})))
    message = r"exp_avg of embed\.weight is \[9, 8\] in the saved state, \[3, 3\] in the optimizer"
    with pytest.raises(CheckpointError, match=message):
        convert_state_dict(other, unnamed.state_dict(), names=names)
    with pytest.raises(CheckpointError, match="the saved state is not that of an optimizer"):
        convert_state_dict(optimizer, {"model.up.weight": torch.ones(1)})


def mesh_of_sizes(sizes: tuple[int, ...]) -> Any:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])


def resume_from_dcp(folder: str, kind: str, separate_keys: bool) -> Any:
    """Save torch's optimizers on a 1-D mesh, load on an HSDP mesh, and compare the state."""
    torch.manual_seed(0)
    make = torch_pair if kind == "pair" else torch_adamw
    model = fully_shard(Model(), mesh=mesh_of_sizes((4,)))
    optimizers = make(model)
    train(model, optimizers, 0)
    states = state_dicts("by-name" if separate_keys else "joint", model, optimizers)
    keys = [f"optimizer{n}" if separate_keys else "optimizer" for n in range(len(states))]
    dcp.save(dict(zip(keys, states, strict=True)), checkpoint_id=folder)
    torch.manual_seed(0)
    twin = Model()
    for name, value in zip(twin.state_dict(), values(model), strict=True):
        twin.state_dict()[name].copy_(value)
    fully_shard(twin, mesh=mesh_of_sizes((2, 2)))
    optimizer = new_muon(twin)
    for group in optimizer.param_groups:  # load_checkpoint does not load options
        options = ADAMW if group["algorithm"] == "adamw" else {"lr": 0.05, "momentum": 0.9}
        group.update(options)
    for key in keys:
        load_checkpoint(optimizer, folder, key=key)
    try:
        load_checkpoint(optimizer, folder, key="missing")
        text = ""
    except CheckpointError as error:
        text = str(error)
    saved_by_name = {n: values for state in states for n, values in state["state"].items()}
    differences = []
    for name, param in twin.named_parameters():
        for key, value in optimizer.state[param].items():
            saved = saved_by_name[name].get(key)
            loaded = value.full_tensor() if value.ndim else value
            if saved is None:
                differences += [f"{key} of {name} is not zero"] * bool(loaded.any())
            elif not torch.equal(loaded, saved.full_tensor() if saved.ndim else saved):
                differences.append(f"{key} of {name}")
    train(twin, [optimizer], 2)
    return differences, text


@pytest.mark.parametrize(
    ("kind", "separate_keys"), [("pair", True), ("pair", False), ("adamw", False)]
)
def test_jobs_resume_from_a_sharded_checkpoint(tmp_path, kind, separate_keys):
    outcomes = run_processes(4, resume_from_dcp, str(tmp_path / "a"), kind, separate_keys)
    for differences, text in outcomes:
        assert differences == []
        assert "has no state under 'missing'" in text


def test_options_with_the_same_meaning_are_converted():
    model, _ = job(torch_pair)
    options = {"lr": 3e-3, "adjust_lr_fn": "match_rms_adamw", "momentum": 0.8, "nesterov": False}
    muon = torch.optim.Muon([("up.weight", model.up.weight)], **options)
    model.up.weight.grad = torch.ones_like(model.up.weight)
    muon.step()
    optimizer = Muon([("up.weight", model.up.weight)], lr=0.5)
    optimizer.load_state_dict(convert_state_dict(optimizer, muon.state_dict()))
    assert {name: optimizer.param_groups[0][name] for name in options} == options
