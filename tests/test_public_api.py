"""Public API: exported names, compatibility with torch.optim.Muon, keys of param groups."""

import copy
import inspect
import math
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Shard

import muon_dtensor
from muon_dtensor import GroupOptionError, Muon, PlanError
from tests.support.cases import mesh_of, tensors_like
from tests.support.deadlines import run_program
from tests.support.threads import run_threads

PUBLIC = {
    "AssignmentError",
    "CheckpointError",
    "GroupOptionError",
    "MissingGradientError",
    "Muon",
    "MuonConfig",
    "NonFiniteGradientError",
    "Plan",
    "PlanError",
    "PlanMismatchError",
    "PlanReport",
    "StepFailedError",
    "__version__",
    "DistributedConfig",
    "create_auto_config",
    "create_devicemesh_config",
    "create_dtensor_config",
    "create_processgroup_config",
    "checkpointable",
    "clip_grad_norm_",
    "clone_state",
    "group_parameters",
    "load_full_state_dict",
}

GROUP_KEYS = {
    *("params", "lr", "weight_decay", "momentum", "nesterov", "ns_coefficients"),
    *("eps", "ns_steps", "adjust_lr_fn", "algorithm", "betas", "orthogonalizer"),
    *("capturable", "normuon_beta", "cautious_weight_decay", "format_version"),
    *("momentum_bits", "weight_rounding", "rounding_seed", "rounding_step"),
    *("matrix", "matrix_axes", "split_sizes", "split_dim"),
}


def test_exported_names():
    assert set(muon_dtensor.__all__) == set(dir(muon_dtensor)) == PUBLIC
    assert all(getattr(muon_dtensor, name).__doc__ for name in PUBLIC)


def test_who_does_not_use_islands_does_not_import_them():
    program = (
        "import sys, torch, muon_dtensor\n"
        "muon_dtensor.Muon([torch.nn.Parameter(torch.ones(2, 2))])\n"
        "names = [n for n in sys.modules if n.startswith(('muon_dtensor.islands', 'torchft'))]\n"
        "assert not names, names"
    )
    done = run_program([sys.executable, "-c", program], 60)
    assert done.returncode == 0, done.stderr


def test_the_signature_begins_with_that_of_torch_s_muon():
    params = list(inspect.signature(Muon).parameters.values())
    torch_params = list(inspect.signature(torch.optim.Muon).parameters.values())
    for param, expected in zip(params, torch_params, strict=False):
        assert (param.name, param.default) == (expected.name, expected.default)
        assert param.kind == expected.kind
    assert all(p.kind is p.KEYWORD_ONLY for p in params[len(torch_params) :])


def test_group_keys_are_frozen():
    optimizer = Muon([nn.Parameter(torch.ones(2, 2))])
    assert set(optimizer.param_groups[0]) == GROUP_KEYS


def weight(*shape: int, **kwargs) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape, **kwargs))


@pytest.mark.parametrize(
    ("param", "words"),
    [
        (weight(4), ["norm", "one tensor dim", "Give it to AdamW"]),
        (nn.Parameter(torch.tensor(1.0)), ["norm", "no tensor dims", "group_parameters(model)"]),
        (weight(2, 3, 4, 5), ["4 tensor dims", "[2, 3, 4, 5]", "Declare them", "AdamW"]),
        (weight(3, 3, dtype=torch.complex64), ["complex64", "real floating dtype"]),
        (nn.Parameter(torch.ones(3, 1).expand(3, 4)), ["share memory", "clone()"]),
    ],
    ids=["1-D", "0-D", "4-D", "complex", "expanded"],
)
def test_parameters_that_muon_cannot_step(param, words):
    with pytest.raises(PlanError) as caught:
        Muon([("fine", weight(3, 3)), ("norm", param), ("fine2", weight(2, 2))])
    assert "1 of 3 parameters cannot be planned" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def partial_parameter() -> str:
    mesh = mesh_of((2, 2))
    param = DTensor.from_local(torch.ones(4, 4), mesh, (Partial(), Shard(0)), run_check=False)
    with pytest.raises(PlanError) as caught:
        Muon([("w", nn.Parameter(param))])
    return str(caught.value)


def test_a_partial_parameter_raises_on_every_rank():
    for text in run_threads(4, partial_parameter):
        assert "w  [8, 4] (Partial(sum), Shard(dim=0)) on (a=2, b=2)" in text
        assert "no value yet on mesh dim 'a'" in text
        assert "redistribute(placements=[Replicate(), Shard(dim=0)])" in text


def test_one_error_names_all_invalid_parameters():
    with pytest.raises(PlanError, match="2 of 3") as caught:
        Muon([("a", weight(3)), ("b", weight(2, 2)), ("c", weight(5))])
    assert [problem.fqn for problem in caught.value.problems] == ["a", "c"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be 0 or more"),
        ({"lr": float("nan")}, "lr must be 0 or more"),
        ({"lr": torch.ones(2)}, "one element"),
        ({"momentum": -0.1}, "momentum must be 0 or more"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more"),
        ({"eps": -1e-8}, "eps must be 0 or more"),
        ({"adjust_lr_fn": "spectral"}, "adjust_lr_fn must be one of"),
        ({"ns_steps": 100}, "ns_steps must be an integer in 0..99"),
        ({"ns_coefficients": (1.0, 2.0)}, "three numbers"),
        ({"ns_coefficients": [5, "b", 3]}, "three numbers"),
        ({"ns_coefficients": 5}, "three numbers"),
        ({"lr": "0.02"}, "lr must be a number, got '0.02', a str"),
        ({"ns_dtype": torch.int32}, "ns_dtype must be one of"),
        ({"missing_grad": "ignore"}, "missing_grad must be"),
        ({"nonfinite": "ignore"}, "nonfinite must be"),
    ],
    ids=str,
)
def test_values_out_of_range(options, message):
    with pytest.raises(GroupOptionError, match=message):
        Muon([weight(2, 2)], **options)


@pytest.mark.parametrize(
    "options",
    [
        *({"bucket_mb": value} for value in (0, -1, math.inf, math.nan, "big")),
        *({"prefetch_count": value} for value in (-1, 1.5)),
    ],
    ids=str,
)
def test_plan_options_out_of_range(options):
    with pytest.raises(ValueError, match="must be"):
        Muon([weight(2, 2)], **options)


def test_unknown_algorithms_are_rejected():
    with pytest.raises(GroupOptionError, match="algorithm must be one of muon, adamw"):
        Muon([{"params": [weight(2, 2)], "algorithm": "sgd"}])


def test_an_invalid_group_is_not_added():
    optimizer = Muon([weight(2, 2)])
    digest = optimizer.plan.digest
    with pytest.raises(PlanError):
        optimizer.add_param_group({"params": [weight(3)]})
    assert len(optimizer.param_groups) == 1
    assert optimizer.plan.digest == digest
    optimizer.add_param_group({"params": [weight(3)], "algorithm": "adamw"})
    optimizer.add_param_group({"params": [weight(4, 3)], "lr": 0.5})
    assert [spec.shape for spec in optimizer.plan.params] == [(2, 2), (4, 3)]


def test_an_empty_optimizer_steps():
    optimizer = Muon([])
    optimizer.step()
    assert optimizer.step(lambda: 3.0) == 3.0
    assert str(optimizer.plan) == "no parameters, nothing to do"


def test_adamw_groups_are_bitwise_torch_s_adamw():
    shapes = [(5,), (4, 3), (2, 3, 4, 5)]
    params = [nn.Parameter(w) for w in tensors_like(shapes, 0)]
    oracle_params = [nn.Parameter(w) for w in tensors_like(shapes, 0)]
    options = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.3}
    optimizer = Muon([{"params": params, "algorithm": "adamw", **options}])
    oracle = torch.optim.AdamW(oracle_params, **options)
    assert optimizer.param_groups[0]["eps"] == oracle.param_groups[0]["eps"]
    for step in range(4):
        grads = tensors_like(shapes, 1 + step)
        for a, b, grad in zip(params, oracle_params, grads, strict=True):
            a.grad, b.grad = grad, grad.clone()
        optimizer.step()
        oracle.step()
    for a, b in zip(params, oracle_params, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["exp_avg"], oracle.state[b]["exp_avg"])


def test_schedulers_closures_hooks_and_pickles():
    param = nn.Parameter(torch.randn(4, 6))
    optimizer = Muon([("w", param)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=4)
    lrs: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: lrs.append(optimizer.param_groups[0]["lr"]))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        loss = optimizer.step(closure)
        scheduler.step()
    assert loss > 0
    assert lrs == pytest.approx([0.05, 0.0625, 0.075])
    twins = []
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        twin_param = twin.param_groups[0]["params"][0]
        twin_param.grad = param.grad.clone()
        twin.step()
        twins.append(twin_param)
    optimizer.step()
    assert all(torch.equal(twin_param, param) for twin_param in twins)


def test_resuming_is_bitwise():
    def fresh() -> tuple[nn.Parameter, nn.Parameter, Muon]:
        a, b = (nn.Parameter(w) for w in tensors_like([(6, 4), (4,)], 0))
        return a, b, Muon([{"params": [a]}, {"params": [b], "algorithm": "adamw"}])

    def train(a: nn.Parameter, b: nn.Parameter, optimizer: Muon, steps: range) -> None:
        for step in steps:
            a.grad, b.grad = tensors_like([(6, 4), (4,)], 10 + step)
            optimizer.step()

    a, b, optimizer = fresh()
    train(a, b, optimizer, range(3))
    c, d, resumed = fresh()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    c.data.copy_(a.data)
    d.data.copy_(b.data)
    train(a, b, optimizer, range(3, 6))
    train(c, d, resumed, range(3, 6))
    assert torch.equal(a, c)
    assert torch.equal(b, d)


def test_a_step_with_lr_0_and_zero_gradients_changes_nothing():
    """torch's checkpoint functions and torchtitan initialize optimizer state by such a step."""
    a, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))
    optimizer = Muon([{"params": [a]}, {"params": [b], "algorithm": "adamw"}])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = a.clone(), b.clone()
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    optimizer.step()
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_a_checkpoint_of_torch_s_muon_loads():
    param, oracle_param = (nn.Parameter(tensors_like([(6, 4)], 0)[0]) for _ in range(2))
    oracle, optimizer = torch.optim.Muon([oracle_param]), Muon([param], lr=0.5)
    for step in range(4):
        oracle_param.grad = tensors_like([(6, 4)], 1 + step)[0]
        if step == 2:
            optimizer.load_state_dict(copy.deepcopy(oracle.state_dict()))
            param.data.copy_(oracle_param)
        if step >= 2:
            param.grad = oracle_param.grad.clone()
            optimizer.step()
        oracle.step()
    assert torch.equal(param, oracle_param)


def test_parameters_with_equal_names_are_distinguished():
    """Two pipeline chunks on one rank may have parameters with equal names; torch allows it."""
    params = [nn.Parameter(w) for w in tensors_like([(4, 3), (3,), (4, 3)], 0)]
    optimizer = Muon(
        [
            {"params": [("w", params[0])], "lr": 0.1},
            {"params": [("w", params[1])], "algorithm": "adamw"},
            {"params": [("w", params[2])], "lr": 0.2},
        ]
    )
    assert [spec.fqn for spec in optimizer.plan.params] == ["w", "3:w"]
    assert [group["param_names"] for group in optimizer.param_groups] == [["w"]] * 3
    oracle_params = [nn.Parameter(params[i].detach().clone()) for i in (0, 2)]
    oracles = [
        torch.optim.Muon([p], lr=lr) for p, lr in zip(oracle_params, (0.1, 0.2), strict=True)
    ]
    for param in (*params, *oracle_params):
        param.grad = torch.ones_like(param)
    for each in (optimizer, *oracles):
        each.step()
    assert torch.equal(params[0], oracle_params[0])
    assert torch.equal(params[2], oracle_params[1])


def test_loading_keeps_the_algorithm_of_a_group():
    param, oracle_param = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = Muon([{"params": [param], "algorithm": "adamw"}])
    oracle = torch.optim.AdamW([oracle_param], lr=0.3)
    oracle_param.grad = torch.ones(4)
    oracle.step()
    optimizer.load_state_dict(copy.deepcopy(oracle.state_dict()))
    assert optimizer.param_groups[0]["algorithm"] == "adamw"
    param.data.copy_(oracle_param)
    param.grad = torch.ones(4)
    optimizer.step()
    oracle.step()
    assert torch.equal(param, oracle_param)


def test_one_cycle_lr_changes_the_momentum_as_with_torch_s_muon():
    values = []
    for optimizer_class in (Muon, torch.optim.Muon):
        optimizer = optimizer_class([nn.Parameter(torch.ones(2, 2))], lr=0.1)
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=9)
        values.append((optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["lr"]))
    assert values[0] == values[1]


def test_a_single_tensor_as_params_raises():
    with pytest.raises(TypeError, match="params argument"):
        Muon(torch.ones(3, 4, 4))


@pytest.mark.parametrize("options", [{"algorithm": "sgd"}, {"adjust_lr_fn": "typo"}, {"betas": 5}])
def test_a_checkpoint_with_options_out_of_range_changes_nothing(options):
    optimizer = Muon([weight(2, 2)])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(options)
    with pytest.raises(GroupOptionError):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"][0]["algorithm"] == "muon"


def test_a_learning_rate_may_be_a_tensor():
    for value in (0.1, 0.0137, 0.3):
        params = [nn.Parameter(tensors_like([(6, 4)], 0)[0]) for _ in range(2)]
        optimizers = (
            Muon([params[0]], lr=torch.tensor(value)),
            torch.optim.Muon([params[1]], torch.tensor(value)),
        )
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = tensors_like([(6, 4)], 1)[0]
            optimizer.step()
        assert torch.equal(*params)
