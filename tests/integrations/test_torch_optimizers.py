"""Jobs of torch.optim.AdamW, torch.optim.Muon and pairs of them go on with our Muon."""

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
    """torch.optim.Muon for the matrices, torch.optim.AdamW for the rest."""
    named = dict(model.named_parameters())
    return [
        torch.optim.Muon([(n, named[n]) for n in MATRICES], lr=0.05, momentum=0.9),
        torch.optim.AdamW([(n, p) for n, p in named.items() if n not in MATRICES], **ADAMW),
    ]


def adamw_alone(model: nn.Module) -> list[Any]:
    return [torch.optim.AdamW(model.named_parameters(), **ADAMW)]


def ours(model: nn.Module) -> Muon:
    """With other options than the jobs, which come with their state."""
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


def saved_by(how: str, model: nn.Module, optimizers: list[Any]) -> list[Any]:
    match how:
        case "by-name":
            return [get_optimizer_state_dict(model, each) for each in optimizers]
        case "of-all-at-once":
            return [get_optimizer_state_dict(model, optimizers)]
        case "flattened":
            options = StateDictOptions(flatten_optimizer_state_dict=True)
            return [get_optimizer_state_dict(model, each, options=options) for each in optimizers]
        case _:
            return [each.state_dict() for each in optimizers]


@pytest.mark.parametrize("how", ["by-name", "of-all-at-once", "flattened", "by-number"])
def test_a_pair_goes_on_bitwise(how):
    model, optimizers = job(torch_pair)
    saved = copy.deepcopy(saved_by(how, model, optimizers))
    twin = copy.deepcopy(model)
    optimizer = ours(twin)
    converted = convert_state_dict(optimizer, *saved)
    optimizer.load_state_dict(converted)
    assert optimizer.param_groups[0]["format_version"] == 1
    train(model, optimizers, 2)
    train(twin, [optimizer], 2)
    assert all(map(torch.equal, values(twin), values(model)))


def test_a_job_of_adamw_goes_on_and_its_matrices_start_afresh(caplog):
    model, optimizers = job(adamw_alone)
    twin = copy.deepcopy(model)
    optimizer = ours(twin)
    optimizer.load_state_dict(convert_state_dict(optimizer, optimizers[0].state_dict()))
    assert "2 parameters start without state, for none of their algorithm" in caplog.text
    named = dict(twin.named_parameters())
    for name, param in model.named_parameters():
        kept, mine = optimizers[0].state[param], optimizer.state[named[name]]
        if name in MATRICES:
            assert not mine["momentum_buffer"].any()
        else:
            assert all(torch.equal(kept[key], mine[key]) for key in mine)
    groups = {n: g for g in optimizer.param_groups for n in g["param_names"]}
    assert (groups["up.weight"]["lr"], groups["norm.bias"]["lr"]) == (0.5, ADAMW["lr"])
    train(twin, [optimizer], 2)


def test_numbers_without_names_need_the_names():
    torch.manual_seed(0)
    model = Model()
    unnamed = torch.optim.AdamW(model.parameters(), **ADAMW)
    train(model, [unnamed], 0)
    optimizer = ours(model)
    with pytest.raises(CheckpointError, match=r"pass names=\[name for name, _ in"):
        convert_state_dict(optimizer, unnamed.state_dict())
    names = [name for name, _ in model.named_parameters()]
    optimizer.load_state_dict(convert_state_dict(optimizer, unnamed.state_dict(), names=names))
    assert optimizer.state[model.embed.weight]["exp_avg"].any()
    with pytest.raises(CheckpointError, match="has no names"):
        convert_state_dict(Muon([model.up.weight]), unnamed.state_dict(), names=names)
    other = Muon(group_parameters(nn.ModuleDict({"embed": nn.Embedding(3, 3)})))
    with pytest.raises(CheckpointError, match=r"exp_avg of embed\.weight is \[9, 8\], here it is"):
        convert_state_dict(other, unnamed.state_dict(), names=names)
    with pytest.raises(CheckpointError, match="no state of an optimizer"):
        convert_state_dict(optimizer, {"model.up.weight": torch.ones(1)})


def mesh_of_sizes(sizes: tuple[int, ...]) -> Any:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])


def through_dcp(folder: str, kind: str, apart: bool) -> Any:
    """Saved on a 1-D mesh, gone on with on HSDP; beside torch's optimizers on that."""
    torch.manual_seed(0)
    make = torch_pair if kind == "pair" else adamw_alone
    model = fully_shard(Model(), mesh=mesh_of_sizes((4,)))
    optimizers = make(model)
    train(model, optimizers, 0)
    states = saved_by("by-name" if apart else "of-all-at-once", model, optimizers)
    keys = [f"optimizer{n}" if apart else "optimizer" for n in range(len(states))]
    dcp.save(dict(zip(keys, states, strict=True)), checkpoint_id=folder)
    torch.manual_seed(0)
    twin = Model()
    for name, value in zip(twin.state_dict(), values(model), strict=True):
        twin.state_dict()[name].copy_(value)
    fully_shard(twin, mesh=mesh_of_sizes((2, 2)))
    optimizer = ours(twin)
    for group in optimizer.param_groups:  # options are no tensors: they are the user's to set
        given = ADAMW if group["algorithm"] == "adamw" else {"lr": 0.05, "momentum": 0.9}
        group.update(given)
    for key in keys:
        load_checkpoint(optimizer, folder, key=key)
    try:
        load_checkpoint(optimizer, folder, key="nowhere")
        text = ""
    except CheckpointError as error:
        text = str(error)
    theirs = {n: kept for state in states for n, kept in state["state"].items()}
    wrong = []
    for name, param in twin.named_parameters():
        for key, mine in optimizer.state[param].items():
            saved = theirs[name].get(key)
            whole = mine.full_tensor() if mine.ndim else mine
            if saved is None:
                wrong += [f"{key} of {name} is not zero"] * bool(whole.any())
            elif not torch.equal(whole, saved.full_tensor() if saved.ndim else saved):
                wrong.append(f"{key} of {name}")
    train(twin, [optimizer], 2)
    return wrong, text


@pytest.mark.parametrize(("kind", "apart"), [("pair", True), ("pair", False), ("adamw", False)])
def test_jobs_go_on_through_a_sharded_checkpoint(tmp_path, kind, apart):
    for wrong, text in run_processes(4, through_dcp, str(tmp_path / "a"), kind, apart):
        assert wrong == []
        assert "has no state under 'nowhere'" in text


def test_options_that_mean_the_same_come_along():
    """The scale of the learning rate is one of them."""
    model, _ = job(torch_pair)
    options = {"lr": 3e-3, "adjust_lr_fn": "match_rms_adamw", "momentum": 0.8, "nesterov": False}
    muon = torch.optim.Muon([("up.weight", model.up.weight)], **options)
    model.up.weight.grad = torch.ones_like(model.up.weight)
    muon.step()
    optimizer = Muon([("up.weight", model.up.weight)], lr=0.5)
    optimizer.load_state_dict(convert_state_dict(optimizer, muon.state_dict()))
    assert {name: optimizer.param_groups[0][name] for name in options} == options
