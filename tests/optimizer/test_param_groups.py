"""Param groups: unknown keys, values that schedulers write, and defaults."""

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import lr_scheduler as schedulers

from muon_dtensor import GroupOptionError, Muon, MuonConfig, group_parameters
from muon_dtensor.integrations.transformers import MuonFactory
from muon_dtensor.optimizer.options import ADAMW_DEFAULTS, DEFAULTS
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.pool import run_processes

SHAPES = [(6, 4), (5,)]


class Unequal:
    """An object that differs between ranks."""


FOREIGN: dict[str, Any] = {
    "name": "hidden",
    "lr_scale": 0.5,
    "use_muon": True,
    "moe": False,
    "wd_mult": 1.0,
    "device": torch.device("cpu"),
    "callback": Unequal(),
    "max_lr": 1.0,
    "base_momentum": 0.85,
}


def params_and_grads() -> list[nn.Parameter]:
    params = [nn.Parameter(t) for t in tensors_like(SHAPES, 0)]
    for param, grad in zip(params, tensors_like(SHAPES, 1), strict=True):
        param.grad = grad
    return params


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_unknown_keys_are_kept_as_in_torch(algorithm, caplog):
    params = params_and_grads()[:1]
    optimizer = Muon([{"params": params, "algorithm": algorithm, **FOREIGN}])
    optimizer.step()
    group = optimizer.param_groups[0]
    assert {name: group[name] for name in FOREIGN} == FOREIGN
    saved = optimizer.state_dict()
    assert {name: saved["param_groups"][0][name] for name in FOREIGN} == FOREIGN
    other = Muon([{"params": params_and_grads()[:1], "algorithm": algorithm}])
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr_scale"] == 0.5
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("key", "option"),
    [("momentun", "momentum"), ("weight_decy", "weight_decay"), ("split_size", "split_sizes")],
)
def test_a_misspelled_option_is_kept_with_a_warning(key, option, caplog):
    optimizer = Muon([{"params": params_and_grads()[:1], key: (1,)}])
    assert optimizer.param_groups[0][key] == (1,)
    assert f"'{key}' in a param group is not an option" in caplog.text
    assert f"Did you mean '{option}'?" in caplog.text


def foreign_on_ranks() -> tuple[str, bool]:
    """Step with keys that differ between ranks; return the error after momentum differs."""
    mesh = mesh_of((2,))
    param = nn.Parameter(spread(torch.ones(4, 4), mesh, mesh_placements()))
    param.grad = spread(torch.ones(4, 4), mesh, mesh_placements())
    rank = dist.get_rank()
    foreign_keys = {"device": f"cuda:{rank}", "callback": Unequal(), "initial_lr": 0.1 * rank}
    optimizer = Muon([{"params": [param], **foreign_keys}])
    optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.1 * rank, 0.5)  # Muon does not read betas
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.5 + 0.1 * rank
    try:
        optimizer.step()
    except Exception as error:
        return type(error).__name__, "momentum=0.6" in str(error)
    return "", False


def mesh_placements() -> Any:
    return (torch.distributed.tensor.Shard(0),)


def test_ranks_compare_only_what_a_step_reads():
    assert run_processes(2, foreign_on_ranks) == [("PlanMismatchError", True)] * 2


NUMPY = {
    "lr": np.float32(0.1),
    "weight_decay": np.float64(0.2),
    "momentum": np.float32(0.5),
    "ns_steps": np.int64(4),
    "eps": np.float16(1e-6),
}


def test_numbers_of_numpy_are_accepted():
    """Also if a scheduler writes them between steps."""
    plain = {name: value.item() for name, value in NUMPY.items()}
    results = []
    for options in (NUMPY, plain):
        params = params_and_grads()
        groups: list[Any] = [
            {"params": params[:1], **options},
            {"params": params[1:], "algorithm": "adamw", "lr": options["lr"]},
        ]
        optimizer = Muon(groups)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = options["weight_decay"]
            group["momentum"] = options["momentum"]
        optimizer.step()
        results.append(params)
    for numpy_param, plain_param in zip(*results, strict=True):
        assert torch.equal(numpy_param, plain_param)


CYCLES: dict[str, Any] = {
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.3, total_steps=9),
    "OneCycleLR-two-phases": lambda o: schedulers.OneCycleLR(
        o, [0.3] * len(o.param_groups), total_steps=9, three_phase=True, base_momentum=0.7
    ),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.2, 2, cycle_momentum=True),
}


@pytest.mark.parametrize("name", CYCLES)
def test_cyclic_momentum_changes_both_algorithms_as_in_torch(name):
    params, torch_params = params_and_grads(), params_and_grads()
    optimizer = Muon([{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw"}])
    oracles = [
        torch.optim.Muon(torch_params[:1]),
        torch.optim.AdamW(torch_params[1:], weight_decay=0.1, betas=(0.9, 0.95)),
    ]
    cycles = [CYCLES[name](stepper) for stepper in (optimizer, *oracles)]
    for step in range(6):
        for group_params in (params, torch_params):
            for param, grad in zip(group_params, tensors_like(SHAPES, 1 + step), strict=True):
                param.grad = grad
        for stepper in (optimizer, *oracles):
            stepper.step()
        for cycle in cycles:
            cycle.step()
        if step == 2:  # load a checkpoint between the scheduler's step and the optimizer's
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["momentum"] == oracles[0].param_groups[0]["momentum"]
        optimizer.state_dict()
        beta1 = optimizer.param_groups[1]["betas"][0]
        assert beta1 == oracles[1].param_groups[0]["betas"][0]
        assert beta1 == optimizer.param_groups[1]["momentum"]
        for a, b in zip(params, torch_params, strict=True):
            assert torch.equal(a, b)


def test_beta1_after_five_steps_of_one_cycle_lr():
    """Five steps of OneCycleLR over 50 change beta1 from 0.95 to 0.9217, as in torch."""
    param = params_and_grads()[1]
    optimizer = Muon([{"params": [param], "algorithm": "adamw"}])
    cycle = schedulers.OneCycleLR(optimizer, 0.1, total_steps=50)
    torch_optimizer = torch.optim.AdamW([params_and_grads()[1]])
    other = schedulers.OneCycleLR(torch_optimizer, 0.1, total_steps=50)
    for _ in range(5):
        optimizer.step()
        torch_optimizer.step()
        cycle.step()
        other.step()
    optimizer.step()
    beta1 = optimizer.param_groups[0]["betas"][0]
    assert beta1 == torch_optimizer.param_groups[0]["betas"][0] == pytest.approx(0.9217, abs=1e-4)


def test_momentum_of_an_adamw_group_is_its_beta1():
    param = params_and_grads()[1]
    optimizer = Muon([{"params": [param], "algorithm": "adamw", "momentum": 0.8}])
    assert optimizer.param_groups[0]["betas"] == (0.8, ADAMW_DEFAULTS["betas"][1])
    optimizer.param_groups[0]["betas"] = (0.7, 0.9)
    optimizer.step()
    assert optimizer.param_groups[0]["momentum"] == 0.7
    with pytest.raises(GroupOptionError, match=r"its momentum is betas\[0\]"):
        Muon([{"params": [param], "algorithm": "adamw", "momentum": 0.8, "betas": (0.9, 0.95)}])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", "0.02", "lr must be a number, got '0.02', a str"),
        ("momentum", -1.0, "momentum must be 0 or more"),
        ("ns_steps", 100, "ns_steps"),
        ("split_sizes", (1, 1), "sum to 2"),
        ("betas", (0.9, 1.5), "betas"),
        ("algorithm", "sgd", "algorithm must be one of"),
        ("nesterov", "no", "nesterov must be True or False, got 'no'"),
    ],
)
def test_an_invalid_value_between_steps_raises_before_anything_changes(name, value, message):
    params = params_and_grads()
    optimizer = Muon([{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw"}])
    optimizer.step()
    before = [p.detach().clone() for p in params]
    index = int(name == "betas")
    valid = optimizer.param_groups[index][name]
    optimizer.param_groups[index][name] = value
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(map(torch.equal, before, params))
    optimizer.param_groups[index][name] = valid
    optimizer.step()
    assert not any(map(torch.equal, before, params))


def wrong_on_one_rank(name: str, value: Any) -> tuple[str, bool]:
    mesh = mesh_of((2, 2))
    placements = (torch.distributed.tensor.Replicate(), *mesh_placements())
    param = nn.Parameter(spread(torch.ones(4, 4), mesh, placements))
    param.grad = spread(torch.ones(4, 4), mesh, placements)
    optimizer = Muon([param])
    optimizer.step()
    before = param.to_local().clone()
    if dist.get_rank() == 1:
        optimizer.param_groups[0][name] = value
    try:
        optimizer.step()
    except Exception as error:
        return type(error).__name__, torch.equal(before, param.to_local())
    return "", False


@pytest.mark.parametrize(("name", "value"), [("lr", "0.1"), ("split_sizes", (3, 3))])
def test_an_invalid_value_on_one_rank_raises_on_all(name, value):
    for rank, (error, same) in enumerate(run_processes(4, wrong_on_one_rank, name, value)):
        assert same
        if rank == 1:
            assert error in ("GroupOptionError", "PlanError", "PlanMismatchError")
        else:
            assert error in ("PlanMismatchError", "RuntimeError")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.up = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 7, bias=False)


OPTIONS = ("algorithm", "lr", "weight_decay", "momentum", "betas", "eps", "adjust_lr_fn")


def by_name(optimizer: Any) -> dict[str, dict[str, Any]]:
    return {
        name: {option: group[option] for option in OPTIONS}
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def test_all_entry_points_have_the_same_defaults():
    optimizers = {
        "group_parameters": Muon(group_parameters(Model())),
        "MuonConfig": MuonConfig().build_optimizer(Model()),
        "MuonFactory": MuonFactory()(Model()),
    }
    first, *other_options = [by_name(optimizer) for optimizer in optimizers.values()]
    for options in other_options:
        assert options == first
    assert (
        first["up.weight"]["lr"]
        == DEFAULTS["lr"]
        == torch.optim.Muon([params_and_grads()[0]]).defaults["lr"]
    )
    for name in ("embed.weight", "lm_head.weight"):
        assert {k: first[name][k] for k in ADAMW_DEFAULTS} == ADAMW_DEFAULTS
    for name in ("up.bias", "norm.weight", "norm.bias"):
        assert {k: first[name][k] for k in ADAMW_DEFAULTS} == {
            **ADAMW_DEFAULTS,
            "weight_decay": 0.0,
        }
    raw = Muon([{"params": [params_and_grads()[1]], "algorithm": "adamw"}]).param_groups[0]
    assert {k: raw[k] for k in ADAMW_DEFAULTS} == ADAMW_DEFAULTS


def test_the_learning_rate_of_adamw_is_independent_of_muon_s():
    options = by_name(Muon(group_parameters(Model(), lr=0.02), weight_decay=0.3))
    assert (options["up.weight"]["lr"], options["up.weight"]["weight_decay"]) == (0.02, 0.3)
    for name in ("embed.weight", "up.bias", "norm.weight"):
        assert options[name]["lr"] == ADAMW_DEFAULTS["lr"]
    raw = Muon([{"params": [params_and_grads()[1]], "algorithm": "adamw"}], lr=0.02)
    assert raw.param_groups[0]["lr"] == ADAMW_DEFAULTS["lr"]


def test_weight_decay_is_set_by_class():
    decays = {"norm": 0.3, "embedding": 0.0, "matrix": 0.4}
    all_options = by_name(Muon(group_parameters(Model(), weight_decay=decays)))
    assert {name: options["weight_decay"] for name, options in all_options.items()} == {
        "embed.weight": 0.0,
        "up.weight": 0.4,
        "up.bias": 0.0,
        "norm.weight": 0.3,
        "norm.bias": 0.3,
        "lm_head.weight": 0.1,
    }
    table = {
        "optimizer": {"weight_decay": 0.4, "class_weight_decay": {"norm": 0.3, "embedding": 0}}
    }
    assert by_name(MuonConfig.from_dict(table).build_optimizer(Model())) == all_options
    with pytest.raises(GroupOptionError, match=r"names \['norms'\]; classes of parameters are"):
        group_parameters(Model(), weight_decay={"norms": 0.1})


def test_an_exhausted_generator_raises():
    names = Model().named_parameters()
    assert list(names)
    with pytest.raises(ValueError, match="exhausted generator"):
        Muon(names)
    assert Muon([]).plan.params == ()
    assert Muon(nn.ReLU().parameters()).plan.params == (), "a stage without parameters"


def test_a_trace_that_was_not_recorded_raises():
    optimizer = Muon([params_and_grads()[0]])
    with pytest.raises(RuntimeError, match="construct Muon with trace=True"):
        optimizer.trace.save("rank0.json")


def test_sequential_mode_is_an_option_of_muon():
    optimizer = Muon([params_and_grads()[0]], async_gpu_parallelism=False)
    assert optimizer.plan.options.sequential
    assert not Muon([params_and_grads()[0]]).plan.options.sequential


def test_explain_suggests_the_nearest_name():
    plan = Muon(group_parameters(Model())).plan
    with pytest.raises(ValueError, match=r"no parameter 'up.wieght'.* Did you mean 'up.weight'\?"):
        plan.explain("up.wieght")


def test_a_transformer_without_groups_raises_one_short_error():
    layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(40))
    with pytest.raises(ValueError, match=r"group_parameters\(model\)") as caught:
        Muon(layers.named_parameters())
    text = str(caught.value)
    assert "320 of 480 parameters cannot be planned" in text
    assert "and 317 more, for the same reason" in text
    assert len(text.splitlines()) < 10


def test_an_embedding_in_a_muon_group_logs_a_warning(caplog):
    model = Model()
    matrices = [(n, p) for n, p in model.named_parameters() if p.ndim == 2]
    with caplog.at_level(logging.WARNING):
        Muon(matrices)
    assert "2 parameters that are embeddings or output heads" in caplog.text
    assert "embed.weight, lm_head.weight" in caplog.text
    caplog.clear()
    Muon(group_parameters(model))
    assert caplog.text == ""


def test_a_deleted_option_gets_its_default():
    optimizer = Muon([params_and_grads()[0]])
    del optimizer.param_groups[0]["momentum"]
    optimizer.step()
    assert optimizer.param_groups[0]["momentum"] == DEFAULTS["momentum"]


ADAMW_OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.05},
    {"betas": (0.6, 0.7)},
    {"betas": (0.9, 0.5)},
    {"eps": 0.3},
    {"weight_decay": 0.7},
]


@pytest.mark.parametrize("options", ADAMW_OPTIONS, ids=str)
def test_adamw_reads_each_of_its_options(options):
    """Values and state are bitwise those of torch.optim.AdamW, over three steps."""
    adamw_options = {**ADAMW_DEFAULTS, **options}
    params, torch_params = (
        [nn.Parameter(t) for t in tensors_like([(5, 3), (7,)], 0)] for _ in range(2)
    )
    optimizer = Muon([{"params": params, "algorithm": "adamw", **options}])
    oracle = torch.optim.AdamW(torch_params, **adamw_options)
    for step in range(3):
        for a, b, grad in zip(
            params, torch_params, tensors_like([(5, 3), (7,)], 1 + step), strict=True
        ):
            a.grad, b.grad = grad.clone(), grad
        optimizer.step()
        oracle.step()
        for a, b in zip(params, torch_params, strict=True):
            assert torch.equal(a, b)
            assert all(
                torch.equal(optimizer.state[a][k], oracle.state[b][k]) for k in oracle.state[b]
            )
