"""Checkpoints on disk: saved in one layout, loaded in another, resumed, rejected.

Ranks are processes; models are sharded by parallelize_module and fully_shard.
"""

import copy
import itertools
import pickle
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from muon_dtensor import (
    CheckpointError,
    GroupOptionError,
    Muon,
    checkpointable,
    group_parameters,
    load_full_state_dict,
)
from muon_dtensor.distributed_config.full_tensor import cut_like
from muon_dtensor.integrations import dion
from muon_dtensor.optimizer import full_state
from muon_dtensor.optimizer.options import DECLARED, DEFAULTS
from muon_dtensor.runtime.dtensors import can_place_shards
from muon_dtensor.runtime.torch_private import local_part
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.logs import logged
from tests.support.options import OTHER_VALUES
from tests.support.pool import run_processes
from tests.support.threads import run_threads

DIM, VOCAB = 8, 16


@dataclass(frozen=True)
class Setup:
    """The sizes and names of a mesh's dims; without names the model is not sharded."""

    name: str
    sizes: tuple[int, ...]
    dims: tuple[str, ...]

    @property
    def num_ranks(self) -> int:
        return torch.Size(self.sizes).numel()


SETUPS = [
    Setup("fsdp-4", (4,), ("dp",)),
    Setup("hsdp", (2, 2), ("rep", "dp")),
    Setup("fsdp-tp", (2, 2), ("dp", "tp")),
    Setup("hsdp-tp", (2, 2, 2), ("rep", "dp", "tp")),
    Setup("fsdp-2", (2,), ("dp",)),
    Setup("one", (1,), ("dp",)),
    Setup("plain", (1,), ()),
]
BY_NAME = {setup.name: setup for setup in SETUPS}


class Net(nn.Module):
    """Embedding, two matrices, a fused one, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.up = nn.Linear(DIM, 2 * DIM, bias=True)
        self.down = nn.Linear(2 * DIM, DIM, bias=False)
        self.wqkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(self.up(x).relu())
        q, k, v = self.wqkv(x).chunk(3, -1)
        return self.norm(x + q * k.sigmoid() * v)


def built(setup: Setup, **options: Any) -> tuple[nn.Module, Muon]:
    """Return the sharded model with seeded weights, and its optimizer."""
    torch.manual_seed(0)
    model = Net()
    if setup.dims:
        mesh = init_device_mesh("cpu", setup.sizes, mesh_dim_names=setup.dims)
        if "tp" in setup.dims:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(model, mesh["tp"], plan)
        names = tuple(name for name in setup.dims if name != "tp")
        fully_shard(model, mesh=mesh[names])
    rules: list[Any] = [
        ("wqkv", {"split_sizes": (DIM, DIM, DIM), "normuon_beta": 0.9}),
    ]
    groups = group_parameters(model, lr=0.02, adamw={"lr": 3e-3}, rules=rules)
    return model, Muon(groups, **options)


def set_grads(model: nn.Module, step: int) -> None:
    """Set gradients that are the same in every layout."""
    for index, param in enumerate(model.parameters()):
        (grad,) = tensors_like([tuple(param.shape)], 100 * step + index)
        param.grad = cut_like(grad, param) if isinstance(param, DTensor) else grad


def train(model: nn.Module, optimizer: Muon, scheduler: Any, steps: range) -> None:
    for step in steps:
        set_grads(model, step)
        optimizer.step()
        scheduler.step()


def scheduled(optimizer: Muon) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)


def saved_state(model: nn.Module, optimizer: Muon, *, flat: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def full_values(model: nn.Module, optimizer: Muon) -> dict[str, Tensor]:
    """Return all parameters and state as full tensors, by name."""

    def full(tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    values = {name: full(p.detach()).clone() for name, p in model.named_parameters()}
    for name, param in model.named_parameters():
        for key, value in optimizer.state[param].items():
            values[f"{name} {key}"] = full(value).clone()
    return values


@pytest.mark.parametrize(("source", "target"), [("fsdp-tp", "hsdp"), ("hsdp-tp", "plain")])
def test_flattened_state_dicts_reshard(source, target, tmp_path):
    """Two pairs of layouts; the test of all pairs is marked slow."""
    num_ranks = BY_NAME[source].num_ranks
    expected = run_processes(num_ranks, trained_and_saved, source, tmp_path, True)[0]
    num_ranks = BY_NAME[target].num_ranks
    for values in run_processes(num_ranks, loaded_and_trained, target, source, tmp_path, True):
        assert values.keys() == expected.keys()
        assert all(torch.equal(values[key], value) for key, value in expected.items())


def trained_and_saved(name: str, folder: Path, flat: bool) -> dict[str, Tensor]:
    model, optimizer = built(BY_NAME[name])
    scheduler = scheduled(optimizer)
    train(model, optimizer, scheduler, range(3))
    state = saved_state(model, optimizer, flat=flat)
    if name == "hsdp":  # one layout is saved asynchronously
        dcp.async_save(state, checkpoint_id=folder / name).result()
    else:
        dcp.save(state, checkpoint_id=folder / name)
    if dist.get_rank() == 0:
        torch.save(scheduler.state_dict(), folder / f"{name}.scheduler")
    expected = full_values(model, optimizer)
    train(model, optimizer, scheduler, range(3, 5))
    return expected | {f"later {k}": v for k, v in full_values(model, optimizer).items()}


def loaded_and_trained(name: str, source: str, folder: Path, flat: bool) -> dict[str, Tensor]:
    model, optimizer = built(BY_NAME[name])
    scheduler = scheduled(optimizer)
    with torch.no_grad():
        for param in model.parameters():
            local_part(param).fill_(7.0)
    state = saved_state(model, optimizer, flat=flat)
    dcp.load(state, checkpoint_id=folder / source)
    set_model_state_dict(model, state["model"])
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    path = folder / f"{source}.scheduler"
    scheduler.load_state_dict(torch.load(path, weights_only=True))
    values = full_values(model, optimizer)
    train(model, optimizer, scheduler, range(3, 5))
    return values | {f"later {k}": v for k, v in full_values(model, optimizer).items()}


@pytest.fixture(
    scope="module",
    params=[False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["nested", "flat"],
)
def saves(request, tmp_path_factory) -> tuple[Path, bool, dict[str, dict[str, Tensor]]]:
    """Checkpoints of every layout, with the values at saving and two steps later."""
    folder = tmp_path_factory.mktemp("saves")
    expected = {
        setup.name: run_processes(
            setup.num_ranks, trained_and_saved, setup.name, folder, request.param
        )[0]
        for setup in SETUPS
    }
    return folder, request.param, expected


@pytest.mark.parametrize("target", [setup.name for setup in SETUPS])
def test_save_on_one_layout_and_load_on_another(saves, target):
    """Parameters, momenta, row moments and AdamW state are bitwise equal, also two steps later."""
    folder, flat, expected = saves
    for source in expected:
        ranks = run_processes(
            BY_NAME[target].num_ranks, loaded_and_trained, target, source, folder, flat
        )
        for values in ranks:
            wrong = [k for k, v in expected[source].items() if not torch.equal(values[k], v)]
            assert not wrong, f"{source} to {target}: {wrong}"
            assert values.keys() == expected[source].keys()


def test_layouts_give_equal_values_and_cover_all_kinds_of_state(saves):
    _, _, expected = saves
    for a, b in itertools.pairwise(expected.values()):
        assert all(torch.equal(a[key], b[key]) for key in a), "gradients do not depend on layout"
    keys = {key.split()[-1] for key in expected["fsdp-tp"]}
    assert {"momentum_buffer", "row_second_moment", "step", "exp_avg", "exp_avg_sq"} <= keys


def momentum_is_kept(param_dtype: torch.dtype, momentum_dtype: torch.dtype | None) -> bool:
    mesh = mesh_of((2, 2))

    def fresh() -> tuple[nn.Parameter, Muon]:
        (weight,) = tensors_like([(6, 4)], 0, param_dtype)
        param = nn.Parameter(spread(weight, mesh, (Replicate(), Shard(0))))
        return param, Muon([("w", param)], momentum_dtype=momentum_dtype)

    param, optimizer = fresh()
    for step in range(3):
        param.grad = spread(tensors_like([(6, 4)], step, param_dtype)[0], *_where(param))
        optimizer.step()
    other, resumed = fresh()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loaded_momentum, momentum = (
        local_part(o.state[p]["momentum_buffer"]) for o, p in ((resumed, other), (optimizer, param))
    )
    return loaded_momentum.dtype == (momentum_dtype or param_dtype) and torch.equal(
        loaded_momentum, momentum
    )


def _where(param: Any) -> tuple[Any, Any]:
    return param.device_mesh, param.placements


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_the_momentum_keeps_its_dtype_through_loading(param_dtype, momentum_dtype):
    """torch's load_state_dict would round float32 momenta of bfloat16 parameters."""
    assert all(run_threads(4, momentum_is_kept, param_dtype, momentum_dtype))


def pair() -> tuple[nn.Parameter, nn.Parameter, Muon]:
    a, b = (nn.Parameter(w) for w in tensors_like([(6, 4), (4,)], 0))
    groups = [{"params": [("a", a)]}, {"params": [("b", b)], "algorithm": "adamw"}]
    return a, b, Muon(groups, lr=0.1)


def stepped_pair() -> tuple[nn.Parameter, nn.Parameter, Muon]:
    a, b, optimizer = pair()
    a.grad, b.grad = tensors_like([(6, 4), (4,)], 1)
    optimizer.step()
    return a, b, optimizer


def damaged(kind: str) -> dict[str, Any]:
    _, _, optimizer = stepped_pair()
    saved = copy.deepcopy(optimizer.state_dict())
    match kind:
        case "half a state":
            del saved["state"][1]["exp_avg"]
        case "no parameter":
            del saved["state"][1]
        case "another shape":
            saved["state"][0]["momentum_buffer"] = torch.zeros(4, 6)
        case "fewer groups":
            del saved["param_groups"][1]
        case "fewer parameters":
            saved["param_groups"][0]["params"] = []
        case "no state dict":
            saved = {"model": {}}
        case "newer":
            saved["param_groups"][0]["format_version"] = 2
        case "amsgrad":
            saved["param_groups"][1]["amsgrad"] = True
        case "foreign":
            saved["state"][0]["momentum"] = saved["state"][0].pop("momentum_buffer")
            del saved["param_groups"][0]["format_version"]
    return saved


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("half a state", CheckpointError, "incomplete: it has no exp_avg of b. Nothing was"),
        ("no parameter", CheckpointError, "no exp_avg and no exp_avg_sq and no step of b"),
        ("another shape", CheckpointError, r"'momentum_buffer' of a is \[4, 6\]"),
        ("fewer groups", CheckpointError, r"groups of \[1\] parameters, the optimizer of \[1, 1\]"),
        ("fewer parameters", CheckpointError, r"groups of \[0, 1\] parameters"),
        ("no state dict", CheckpointError, r"'state' and 'param_groups', this one has \['model'\]"),
        ("newer", GroupOptionError, "another release of muon_dtensor wrote this checkpoint"),
        ("amsgrad", GroupOptionError, "amsgrad=True"),
        ("foreign", CheckpointError, "momentum of a, which muon does not use.*converts Dion's"),
    ],
)
def test_damaged_and_foreign_state_raises_and_changes_nothing(kind, error, text):
    a, b, optimizer = stepped_pair()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=text):
        optimizer.load_state_dict(damaged(kind))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for number, values in before["state"].items():
        assert all(torch.equal(value, after["state"][number][key]) for key, value in values.items())
    a.grad, b.grad = tensors_like([(6, 4), (4,)], 2)
    optimizer.step()


def test_a_user_s_hook_can_repair_a_state_dict():
    _, _, optimizer = stepped_pair()
    bad = damaged("foreign")

    def repair(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        param_state = {**state_dict["state"][0]}
        param_state["momentum_buffer"] = param_state.pop("momentum")
        return {**state_dict, "state": {**state_dict["state"], 0: param_state}}

    optimizer.register_load_state_dict_pre_hook(repair)
    optimizer.load_state_dict(bad)
    assert torch.equal(
        optimizer.state_dict()["state"][0]["momentum_buffer"], bad["state"][0]["momentum"]
    )


class DionLike:
    """The elementwise part of dion.Muon, and its state dict."""

    def __init__(self, weight: Tensor, *, lr: float, mu: float, nesterov: bool) -> None:
        self.weight, self.lr, self.mu, self.nesterov = weight.clone(), lr, mu, nesterov
        self.momentum, self.num_steps = torch.zeros_like(weight), 0

    def direction(self, grad: Tensor) -> Tensor:
        self.momentum = self.mu * self.momentum + grad
        self.num_steps += 1
        return self.mu * self.momentum + grad if self.nesterov else self.momentum

    def state_dict(self) -> dict[str, Any]:
        group = {
            "lr": self.lr,
            "mu": self.mu,
            "beta1": 0.9,
            "beta2": 0.95,
            "weight_decay": 0.0,
            "algorithm": "muon",
            "step": self.num_steps,
            "epsilon": 1e-8,
            "flatten": False,
            "nesterov": self.nesterov,
            "adjust_lr": "spectral_norm",
            "params": [0],
        }
        return {"state": {0: {"momentum": self.momentum}}, "param_groups": [group]}


@pytest.mark.parametrize("nesterov", [True, False])
def test_dion_s_checkpoints_are_converted(nesterov):
    (weight,) = tensors_like([(6, 4)], 0)
    dion_optimizer = DionLike(weight, lr=0.03, mu=0.9, nesterov=nesterov)
    for step in range(4):
        direction = dion_optimizer.direction(tensors_like([(6, 4)], 1 + step)[0])
        if step == 2:
            saved = copy.deepcopy(dion_optimizer.state_dict())
    param = nn.Parameter(weight.clone())
    optimizer = Muon([param], ns_dtype=torch.float32)
    optimizer.load_state_dict(dion.convert_state_dict(saved))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.03, 0.9, nesterov)
    assert (group["adjust_lr_fn"], group["weight_decay"]) == ("spectral_norm", 0.0)
    assert group["format_version"] == 1
    param.grad = tensors_like([(6, 4)], 4)[0]
    optimizer.step()
    expected = nn.Parameter(weight.clone())
    plain = Muon(
        [expected],
        ns_dtype=torch.float32,
        momentum=0.0,
        nesterov=False,
        **{key: group[key] for key in ("lr", "weight_decay", "adjust_lr_fn")},
    )
    expected.grad = direction
    plain.step()
    torch.testing.assert_close(param, expected)


def test_dion_s_adamw_is_converted_and_unsupported_options_raise():
    (weight,) = tensors_like([(5,)], 0)
    group = {
        "lr": 0.1,
        "mu": 0.95,
        "beta1": 0.9,
        "beta2": 0.99,
        "weight_decay": 0.1,
        "step": 7,
        "algorithm": "adamw",
        "epsilon": 1e-9,
        "nesterov": True,
        "adjust_lr": None,
        "params": [0],
    }
    state = {0: {"momentum": weight, "variance": weight.square()}}
    param = nn.Parameter(weight.clone())
    optimizer = Muon([{"params": [param], "algorithm": "adamw"}])
    optimizer.load_state_dict(dion.convert_state_dict({"state": state, "param_groups": [group]}))
    param_state = optimizer.state[param]
    assert (float(param_state["step"]), optimizer.param_groups[0]["betas"]) == (7.0, (0.9, 0.99))
    assert torch.equal(param_state["exp_avg"], weight)
    for bad, text in (
        ({**group, "algorithm": "lion"}, "'lion'"),
        ({**group, "algorithm": "muon"}, "adjust_lr=None"),
    ):
        with pytest.raises(CheckpointError, match=text):
            dion.convert_state_dict({"state": state, "param_groups": [bad]})


class Uneven(nn.Module):
    """One matrix whose rows two mesh dims cut but do not divide."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.up = nn.Linear(4, rows, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


def uneven_model(rows: int, how: str = "fsdp-3-tp-2", **options: Any) -> tuple[nn.Module, Muon]:
    """Return the model on six ranks, sharded as `how` says, and its optimizer."""
    torch.manual_seed(0)
    model = Uneven(rows)
    if how.startswith("fsdp-"):
        dp, tp = (int(part) for part in how.split("-")[1::2])
        mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    elif how == "rows":
        fully_shard(model, mesh=init_device_mesh("cpu", (6,)))
    elif how == "cols":
        mesh = init_device_mesh("cpu", (6,))
        parallelize_module(model, mesh, {"up": RowwiseParallel()})
    elif how == "hsdp-tp":
        mesh = init_device_mesh("cpu", (1, 3, 2), mesh_dim_names=("rep", "dp", "tp"))
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel()})
        fully_shard(model, mesh=mesh["rep", "dp"])
    return model, Muon(model.named_parameters(), lr=0.1, **options)


def saving_uneven(rows: int, folder: Path) -> tuple[str, str, bool]:
    """Return the errors of `check_saveable` and of torch, and whether a full state dict resumes."""
    model, optimizer = uneven_model(rows)
    set_grads(model, 0)
    optimizer.step()
    message = torch_error = ""
    try:
        optimizer.check_saveable()
    except CheckpointError as error:
        message = str(error)
    path = folder / f"sharded{rows}"
    before = local_part(model.up.weight.detach()).clone()
    try:
        dcp.save(saved_state(model, optimizer, flat=False), checkpoint_id=path)
        with torch.no_grad():
            local_part(model.up.weight).zero_()
        dcp.load(saved_state(model, optimizer, flat=False), checkpoint_id=path)
        if not torch.equal(before, local_part(model.up.weight.detach())):
            torch_error = "another value was loaded"
    except (Exception, CheckpointException) as error:  # the latter is not an Exception
        torch_error = f"{type(error).__name__}: {error}"
    with torch.no_grad():
        local_part(model.up.weight).copy_(before)
    full = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=full)
    weights = get_model_state_dict(model, options=full)
    if dist.get_rank() == 0:
        torch.save({"optimizer": saved, "model": weights}, folder / "full.pt")
    dist.barrier()
    loaded = torch.load(folder / "full.pt", weights_only=True)
    other, resumed = uneven_model(rows)
    load_full_state_dict(other, resumed, loaded["model"], loaded["optimizer"])
    for which, by in ((model, optimizer), (other, resumed)):
        set_grads(which, 1)
        by.step()
    a, b = (local_part(m.up.weight.detach()) for m in (model, other))
    return message, torch_error, torch.equal(a, b)


@pytest.mark.parametrize("rows", [7, 13])
def test_check_saveable_raises_for_shards_that_torch_would_misplace(rows, tmp_path):
    ranks = run_processes(6, saving_uneven, rows, tmp_path)
    for message, _, resumes in ranks:
        assert "takes shards of 1 weights for others (up.weight)" in message
        assert "checkpointable" in message
        assert resumes
    assert any(torch_error for _, torch_error, _ in ranks), "torch saves these now: drop this check"


def saveable(rows: int) -> str:
    _, optimizer = uneven_model(rows)
    optimizer.check_saveable()
    return "yes"


@pytest.mark.parametrize("rows", [6, 12])
def test_shards_that_torch_places_correctly_are_saveable(rows):
    assert run_processes(6, saveable, rows) == ["yes"] * 6


def warned(rows: int) -> list[str]:
    with logged() as lines:
        _, optimizer = uneven_model(rows)
        optimizer.state_dict()
        optimizer.state_dict()
    return lines


def test_state_dict_warns_once_of_misplaced_shards():
    first, *other_ranks = run_processes(6, warned, 13)
    assert len(first) == 1
    assert "up.weight" in first[0]
    assert other_ranks == [[]] * 5  # their warnings would be the same


def steps_after(model: nn.Module, optimizer: Muon) -> tuple[Tensor, Tensor]:
    """Return the full weight and momentum after one more step."""
    set_grads(model, 1)
    optimizer.step()
    weight = model.up.weight
    return tuple(
        t.full_tensor() if isinstance(t, DTensor) else t.clone()
        for t in (weight.detach(), optimizer.state[weight]["momentum_buffer"])
    )


def resharded(rows: int, before: str, after: str, folder: Path, *, in_background: bool) -> str:
    """Save in one layout and load into another; return what differs, or the error."""
    model, optimizer = uneven_model(rows, before)
    set_grads(model, 0)
    optimizer.step()
    state = saved_state(model, optimizer, flat=False)
    is_dtensor = isinstance(model.up.weight, DTensor)
    with checkpointable(state):
        if in_background:
            dcp.async_save(state, checkpoint_id=folder).result()
        else:
            dcp.save(state, checkpoint_id=folder)
    assert isinstance(state["model"]["up.weight"], DTensor) == is_dtensor
    other, resumed = uneven_model(rows, after)
    with torch.no_grad():
        local_part(other.up.weight).zero_()
    state = saved_state(other, resumed, flat=False)
    with checkpointable(state):
        dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state["model"])
    set_optimizer_state_dict(other, resumed, state["optimizer"])
    values, resumed_values = steps_after(model, optimizer), steps_after(other, resumed)
    differ = [
        n for n, a, b in zip("wm", values, resumed_values, strict=True) if not torch.equal(a, b)
    ]
    return ", ".join(differ)


HOWS = ["fsdp-3-tp-2", "fsdp-2-tp-3", "rows", "cols", "hsdp-tp", "whole"]


@pytest.mark.parametrize("after", HOWS)
@pytest.mark.parametrize("rows", [7, 13])
def test_misplaced_shards_are_saved_at_their_true_offsets(rows, after, tmp_path):
    """Checkpoints of uneven strided shards load into every layout, bitwise."""
    outcomes = run_processes(
        6, partial(resharded, in_background=False), rows, HOWS[0], after, tmp_path
    )
    assert outcomes == [""] * 6


@pytest.mark.parametrize("before", HOWS[1:])
def test_checkpoints_load_into_misplaced_shards(before, tmp_path):
    outcomes = run_processes(
        6, partial(resharded, in_background=False), 13, before, HOWS[0], tmp_path
    )
    assert outcomes == [""] * 6


def plainly_saved(rows: int, before: str, after: str, options: Any, folder: Path) -> str:
    """Save and load the optimizer's state alone by plain dcp; return what differs."""
    model, optimizer = uneven_model(rows, before, **options)
    set_grads(model, 0)
    optimizer.step()
    flat = StateDictOptions(flatten_optimizer_state_dict=rows == 13)
    dcp.save(get_optimizer_state_dict(model, optimizer, options=flat), checkpoint_id=folder)
    other, resumed = uneven_model(rows, after, **options)
    state = get_optimizer_state_dict(other, resumed, options=flat)
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(other, resumed, state, options=flat)
    differing = []
    for key, value in optimizer.state[model.up.weight].items():
        loaded = resumed.state[other.up.weight][key]
        full = [t.full_tensor() if isinstance(t, DTensor) else t for t in (value, loaded)]
        if not torch.equal(*full):
            differing.append(key)
    pickle.loads(pickle.dumps(local_part(optimizer.state[model.up.weight]["momentum_buffer"])))
    return ", ".join(differing)


@pytest.mark.parametrize("options", [{}, {"normuon_beta": 0.95}], ids=["muon", "normuon"])
@pytest.mark.parametrize(
    ("before", "after"),
    [(HOWS[0], HOWS[0]), (HOWS[0], HOWS[1]), (HOWS[0], HOWS[2]), (HOWS[3], HOWS[0])],
)
@pytest.mark.parametrize("rows", [7, 13])
def test_the_state_of_misplaced_shards_is_saved_by_plain_dcp(
    rows, before, after, options, tmp_path
):
    outcomes = run_processes(6, plainly_saved, rows, before, after, options, tmp_path)
    assert outcomes == [""] * 6


def test_misplaced_shards_are_saved_in_the_background(tmp_path):
    if not can_place_shards():
        pytest.skip("torch 2.14 has CheckpointableTensor")
    outcomes = run_processes(
        6, partial(resharded, in_background=True), 13, HOWS[0], HOWS[1], tmp_path
    )
    assert outcomes == [""] * 6


UNKNOWN_TO_TORCH = (
    *("orthogonalizer", "capturable", "normuon_beta", "cautious_weight_decay"),
    *("momentum_bits", "weight_rounding", "rounding_seed"),
)


def of_options(**options: Any) -> Muon:
    dtype = torch.bfloat16 if "weight_rounding" in options else torch.float32
    param = nn.Parameter(torch.ones(3, 2, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = Muon([param], **options)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_options_are_restored_from_a_checkpoint(name):
    saved = copy.deepcopy(of_options(**{name: OTHER_VALUES[name]}).state_dict())
    default = {name: DEFAULTS[name]} if name == "weight_rounding" else {}  # in bfloat16, too
    optimizer = of_options(**default)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][name] == OTHER_VALUES[name]


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_checkpoints_of_torch_do_not_change_options_that_they_lack(name):
    optimizer = of_options(**{name: OTHER_VALUES[name]})
    oracle = torch.optim.Muon([torch.ones_like(optimizer.param_groups[0]["params"][0])])
    optimizer.load_state_dict(oracle.state_dict())
    value = optimizer.param_groups[0][name]
    torch_value = oracle.param_groups[0].get(name)
    assert value == (OTHER_VALUES[name] if name in UNKNOWN_TO_TORCH else torch_value)


def test_every_option_is_in_the_tests_above():
    elsewhere = {"algorithm", "betas", "format_version", "rounding_step", *DECLARED}
    assert DEFAULTS.keys() - elsewhere == OTHER_VALUES.keys()


def placed_shards() -> list[Any]:
    """Return what `checkpointable` makes of two tensors, one of which torch misplaces."""
    model, _ = uneven_model(13)
    even, _ = uneven_model(12)
    state = {"a": [{"w": model.up.weight}], "b": even.up.weight, "c": 3}
    with mock.patch.object(full_state, "can_place_shards", return_value=True):
        with checkpointable(state):
            inside = state["a"][0]["w"]
            outcomes = [type(inside) is Tensor, state["b"] is even.up.weight, inside.global_shape]
            outcomes += [inside.global_offsets, inside.local_sizes, tuple(inside.shape)]
        with pytest.raises(KeyError), checkpointable(state):
            raise KeyError
    return [*outcomes, state["a"][0]["w"] is model.up.weight, state["c"]]


def test_checkpointable_sets_offsets_and_restores_dtensors():
    """13 rows over tp=2 and then dp=3: pieces of 3, 3, 1 rows of 7, and 2, 2, 2 rows of 6."""
    rows = [(0, 3), (7, 2), (3, 3), (9, 2), (6, 1), (11, 2)]
    for (first, count), outcomes in zip(rows, run_processes(6, placed_shards), strict=True):
        offsets = [((first, 0),), ((count, 4),), (count, 4)]
        assert outcomes == [True, True, (13, 4), *offsets, True, 3]


def full_of_another(shape: str) -> str:
    model, optimizer = uneven_model(12)
    full = StateDictOptions(full_state_dict=True)
    weights = get_model_state_dict(model, options=full)
    saved = get_optimizer_state_dict(model, optimizer, options=full)
    if dist.get_rank() == 0:
        payload: list[Any] = [(weights, saved)]
    else:
        payload = [None]
    dist.broadcast_object_list(payload)
    weights, saved = payload[0]
    wrong = torch.ones(12, 5)
    match shape:
        case "weight":
            weights["up.weight"] = wrong
        case "momentum":
            saved["state"]["up.weight"]["momentum_buffer"] = wrong
        case "name":
            weights["down.weight"] = weights.pop("up.weight")
    before = local_part(model.up.weight.detach()).clone()
    try:
        load_full_state_dict(model, optimizer, weights, saved)
    except CheckpointError as error:
        same = torch.equal(before, local_part(model.up.weight.detach()))
        return f"{error} {same}"
    return ""


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            "weight",
            r"up.weight has shape \[12, 5\] in the state dict and \[12, 4\] in the model or "
            "optimizer",
        ),
        (
            "momentum",
            r"momentum_buffer of up.weight has shape \[12, 5\] in the state dict and \[12, 4\] in "
            "the model or optimizer",
        ),
        ("name", "only in the model or only in its state dict: down.weight, up.weight"),
    ],
)
def test_full_state_that_does_not_fit_raises(kind, text):
    for outcome in run_processes(6, full_of_another, kind):
        assert re.match(rf"{text} True", outcome), outcome
