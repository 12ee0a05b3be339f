"""Parameters that do not train have no state and no place in the plan, until they begin to.

Adapters (LoRA), alternating training (GANs), progressive unfreezing, and checkpoints of them.
"""

import copy
import logging
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard

from muon_dtensor import (
    CheckpointError,
    Muon,
    create_auto_config,
    group_parameters,
    load_full_state_dict,
)
from muon_dtensor.runtime.gradients import GradientGate
from muon_dtensor.runtime.torch_private import local_part
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.pool import run_processes

R, S0 = Replicate(), Shard(0)


class LoRALinear(nn.Module):
    """A frozen base, quantized or not, and two small trained matrices."""

    def __init__(self, base: nn.Parameter, dim: int, rank: int = 1) -> None:
        super().__init__()
        self.base = base
        self.bias = nn.Parameter(torch.zeros(dim), requires_grad=False)
        self.lora_a = nn.Linear(dim, rank, bias=False)
        self.lora_b = nn.Linear(rank, dim, bias=False)


def lora(dtype: torch.dtype, dim: int = 1024) -> LoRALinear:
    return LoRALinear(nn.Parameter(torch.ones(2 * dim, dim).to(dtype), requires_grad=False), dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int8, torch.bool])
def test_a_frozen_base_has_no_state_and_may_be_anything(dtype):
    """All parameters are handed over, as HF's and torchtune's recipes do."""
    model = lora(dtype)
    optimizer = Muon(model.named_parameters(), lr=0.1)
    assert sum(v.numel() for s in optimizer.state.values() for v in s.values()) == 2048
    assert [spec.fqn for spec in optimizer.plan.params] == ["lora_a.weight", "lora_b.weight"]
    before = model.base.clone()
    for layer in (model.lora_a, model.lora_b):
        layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    assert torch.equal(model.base, before)


def lora_sharded() -> bool:
    """The same under FSDP2: bitwise torch.optim.Muon on the adapters alone."""
    torch.manual_seed(0)
    model, oracle = (
        nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 6, bias=False)) for _ in range(2)
    )
    oracle.load_state_dict(model.state_dict())
    for each in (model, oracle):
        each[0].weight.requires_grad_(False)
    fully_shard(model, mesh=mesh_of((2, 2)))
    optimizer = Muon(model.named_parameters(), lr=0.1, metrics_every=1)
    theirs = torch.optim.Muon([oracle[1].weight], lr=0.1)
    x = torch.randn(4, 8)
    for _ in range(3):
        for each, by in ((model, optimizer), (oracle, theirs)):
            each(x).square().mean().backward()
            by.step()
            by.zero_grad()
    assert "0.weight" not in str(optimizer.plan)
    assert optimizer.metrics()["grad_norm"] > 0
    return torch.equal(model[1].weight.full_tensor(), oracle[1].weight)


def test_adapters_under_hsdp_are_bitwise_torch_s():
    assert all(run_processes(4, lora_sharded))


def two_layers() -> tuple[nn.ModuleList, nn.ModuleList]:
    layers = nn.ModuleList(nn.Linear(6, 5, bias=False) for _ in range(2))
    return layers, copy.deepcopy(layers)


def train_layer(layers: nn.ModuleList, optimizer: Any, active: list[int], seed: int) -> None:
    for index, layer in enumerate(layers):
        layer.weight.requires_grad_(index in active)
        layer.weight.grad = None
    for index in active:
        layers[index].weight.grad = tensors_like([(5, 6)], seed + index)[0]
    optimizer.step()


SCHEDULES = {
    "alternating": [[0], [1], [0], [1], [0]],
    "progressive": [[1], [1], [0, 1], [0, 1]],
    "frozen-later": [[0, 1], [1], [1], [0, 1]],
}


@pytest.mark.parametrize("adamw", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_layers_that_train_by_turns_are_stepped_as_torch_does(schedule, adamw):
    ours, theirs = two_layers()
    for layer in (*ours, *theirs):  # all frozen when the optimizer is made
        layer.weight.requires_grad_(False)
    groups: Any = {"params": ours.parameters(), "lr": 0.1}
    if adamw:
        groups |= {"algorithm": "adamw", "betas": (0.9, 0.999), "weight_decay": 0.01}
    optimizer = Muon([groups])
    make = torch.optim.AdamW if adamw else torch.optim.Muon
    oracle = make(theirs.parameters(), lr=0.1)
    for step, active in enumerate(SCHEDULES[schedule]):
        train_layer(ours, optimizer, active, 10 * step)
        train_layer(theirs, oracle, active, 10 * step)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.weight, b.weight)
        assert len(optimizer.state) == len(oracle.state)


def test_a_parameter_that_trained_once_stays_in_the_plan():
    """Toggling every step, as GANs do, plans once."""
    layers, _ = two_layers()
    optimizer = Muon(layers.parameters())
    digests = set()
    for step in range(4):
        train_layer(layers, optimizer, [step % 2], step)
        digests.add(optimizer.plan.digest)
    assert len(digests) == 1


def unfrozen_on_one_rank() -> tuple[str, str]:
    model = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))
    model[0].weight.requires_grad_(False)
    for layer in model:
        fully_shard(layer, mesh=mesh_of((2,)))
    optimizer = Muon(model.named_parameters())
    model[0].weight.requires_grad_(dist.get_rank() == 0)
    for layer in model:
        if layer.weight.requires_grad:
            layer.weight.grad = torch.ones_like(layer.weight)
    try:
        optimizer.step()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def test_a_parameter_unfrozen_on_one_rank_is_an_error_on_all():
    for name, text in run_processes(2, unfrozen_on_one_rank):
        assert name == "PlanMismatchError"
        assert "0.weight" in text


def plain_shards_unfrozen() -> bool:
    """Under process groups whose ranks tell each other the sizes of plain shards, once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    oracle = copy.deepcopy(model)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    optimizer = Muon(wrapped.named_parameters(), lr=0.1, distributed_config=config)
    theirs = torch.optim.Muon(oracle.parameters(), lr=0.1)
    x = torch.randn(4, 8)
    for _ in range(3):
        for each, by in ((wrapped, optimizer), (oracle, theirs)):
            each(x).square().mean().backward()
            by.step()
            by.zero_grad()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        pairs = zip(wrapped.parameters(), oracle.parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


def test_fsdp1_still_steps_all_that_train():
    assert all(run_processes(2, plain_shards_unfrozen))


def resumed(folder: str, strict: bool) -> Any:
    """Saved with a frozen layer, resumed with it, and with an adapter that is new."""
    torch.manual_seed(0)
    mesh = mesh_of((2,))

    def model(adapter: bool) -> nn.Module:
        parts = [nn.Linear(8, 8, bias=False), nn.Linear(8, 8)]
        parts += [nn.Linear(8, 8, bias=False)] * adapter
        made = nn.Sequential(*parts)
        made[0].weight.requires_grad_(False)
        return fully_shard(made, mesh=mesh)

    def step(model: nn.Module, optimizer: Muon) -> None:
        model(torch.ones(2, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    first = model(False)
    optimizer = Muon(group_parameters(first), lr=0.1)
    step(first, optimizer)
    # the layer trains for a while, and is frozen again: torch saves its state, and never loads it
    optimizer.add_param_group({"params": [("0.weight", first[0].weight)], "algorithm": "muon"})
    first[0].weight.requires_grad_(True)
    step(first, optimizer)
    first[0].weight.requires_grad_(False)
    dcp.save({"optimizer": get_optimizer_state_dict(first, optimizer)}, checkpoint_id=folder)

    second = model(True)
    groups = group_parameters(second)
    groups.append({"params": [("0.weight", second[0].weight)], "algorithm": "muon"})
    other = Muon(groups, lr=0.1)
    template = get_optimizer_state_dict(second, other)
    absent = [name for name in template["state"] if name.startswith("2.")]
    for name in absent:
        del template["state"][name]
    dcp.load({"optimizer": template}, checkpoint_id=folder)
    try:
        options = StateDictOptions(strict=strict)
        set_optimizer_state_dict(second, other, template, options=options)
    except (RuntimeError, CheckpointError) as error:
        return str(error)
    kept = other.state[second[1].weight]["momentum_buffer"].full_tensor()
    saved = optimizer.state[first[1].weight]["momentum_buffer"].full_tensor()
    frozen = other.state.get(second[0].weight, {})
    fresh = other.state[second[2].weight]["momentum_buffer"].full_tensor()
    step(second, other)
    return torch.equal(kept, saved), dict(frozen), bool(fresh.any())


@pytest.mark.parametrize("strict", [False, True])
def test_absent_state_starts_afresh_where_torch_lets_it(tmp_path, strict):
    for found in run_processes(2, resumed, str(tmp_path / str(strict)), strict):
        if strict:
            assert "Missing optimizer state for parameter '2.weight'" in found
        else:
            assert found == (True, {}, False)


def test_state_that_is_missing_by_number_is_still_an_error():
    """As saved by torch.save: nothing but damage can take a trained parameter's state away."""
    layers, _ = two_layers()
    optimizer = Muon(layers.parameters())
    train_layer(layers, optimizer, [0, 1], 0)
    layers[1].weight.requires_grad_(True)
    layers[0].weight.requires_grad_(True)
    saved = optimizer.state_dict()
    del saved["state"][0]
    with pytest.raises(CheckpointError, match="not whole"):
        optimizer.load_state_dict(saved)
    layers[0].weight.requires_grad_(False)
    layers[0].weight.grad = None
    optimizer.load_state_dict(saved)
    assert layers[0].weight not in optimizer.state


def fsdp1_checkpoint() -> list[str]:
    """Ranks that hold nothing of a parameter are given no state of it."""
    model = FullyShardedDataParallel(
        nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    optimizer = Muon(model.named_parameters(), lr=0.1, distributed_config=config)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    momenta = {p: optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own ShardedTensor
        saved = get_optimizer_state_dict(model, optimizer)
        set_optimizer_state_dict(model, optimizer, saved)
    optimizer.zero_grad()
    model(torch.ones(2, 6)).sum().backward()
    wrong = [
        name
        for name, p in model.named_parameters()
        if p.numel() and not torch.equal(optimizer.state[p]["momentum_buffer"], momenta[p])
    ]
    optimizer.step()
    return wrong


def test_fsdp1_checkpoints_load_on_ranks_that_hold_nothing():
    assert run_processes(4, fsdp1_checkpoint) == [[]] * 4


def test_a_step_count_that_is_a_number_is_taken(caplog):
    """Of an old torch.optim.AdamW; its functional code wants tensors."""
    ours, theirs = (nn.Parameter(tensors_like([(5,)], 0)[0]) for _ in range(2))
    oracle = torch.optim.AdamW([theirs], lr=0.1)
    optimizer = Muon([{"params": [ours], "algorithm": "adamw"}])
    theirs.grad = torch.ones(5)
    oracle.step()
    saved = copy.deepcopy(oracle.state_dict())
    saved["state"][0]["step"] = 1
    with caplog.at_level(logging.WARNING):
        optimizer.load_state_dict(saved)
    ours.data.copy_(theirs)
    ours.grad = torch.ones(5)
    for each in (optimizer, oracle):
        each.step()
    assert torch.equal(ours, theirs)
    assert isinstance(optimizer.state[ours]["step"], Tensor)
    assert local_part(optimizer.state[ours]["step"]) == 2


def test_state_that_the_user_clears_starts_afresh():
    """As in torch: `optimizer.state.clear()` is how people reset an optimizer."""
    ours, theirs = two_layers()
    optimizer = Muon(ours.parameters(), lr=0.1)
    oracle = torch.optim.Muon(theirs.parameters(), lr=0.1)
    for step in range(3):
        train_layer(ours, optimizer, [0, 1], step)
        train_layer(theirs, oracle, [0, 1], step)
        optimizer.state.clear()
        oracle.state.clear()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.weight, b.weight)


def frozen_then(path: str) -> Any:
    """Saved while a layer was frozen, loaded once it trains: by number, as torch.save keeps it."""
    layers, twins = two_layers()
    layers[0].weight.requires_grad_(False)
    optimizer = Muon(layers.parameters(), lr=0.1)
    train_layer(layers, optimizer, [1], 0)
    torch.save(optimizer.state_dict(), path)
    other = Muon(twins.parameters(), lr=0.1)
    other.load_state_dict(torch.load(path))
    return optimizer, other, layers, twins


def test_a_layer_that_was_frozen_when_it_was_saved_starts_afresh(tmp_path, caplog):
    optimizer, other, layers, twins = frozen_then(str(tmp_path / "state.pt"))
    assert (
        "the checkpoint has no optimizer state for 1 parameters; theirs starts at zero"
        in caplog.text
    )
    assert not other.state[twins[0].weight]["momentum_buffer"].any()
    mine, theirs = other.state[twins[1].weight], optimizer.state[layers[1].weight]
    assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])
    train_layer(twins, other, [0, 1], 1)


def test_state_follows_a_change_of_algorithm(caplog):
    """And can be saved and loaded after it."""
    layers, _ = two_layers()
    optimizer = Muon(layers.parameters(), lr=0.1, normuon_beta=0.9)
    train_layer(layers, optimizer, [0, 1], 0)
    for changes, keys in (
        ({"normuon_beta": None}, {"momentum_buffer"}),
        ({"algorithm": "adamw"}, {"step", "exp_avg", "exp_avg_sq"}),
        ({"algorithm": "muon"}, {"momentum_buffer"}),
    ):
        optimizer.param_groups[0].update(changes)
        train_layer(layers, optimizer, [0, 1], 1)
        assert optimizer.state[layers[0].weight].keys() == keys
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["algorithm"] = "sgd"
    with pytest.raises(ValueError, match="algorithm must be one of"):
        train_layer(layers, optimizer, [0, 1], 2)
    assert optimizer.state[layers[0].weight].keys() == {"momentum_buffer"}


def changed_on_one_rank(how: str, masked: bool) -> list[str]:
    """What each of three steps raises after rank 0 alone has changed something."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    weight = nn.Parameter(spread(torch.ones(8, 8), mesh, (R, S0)))
    expert = nn.Parameter(spread(torch.ones(8, 8), mesh["ep"], (S0,)), requires_grad=False)
    optimizer = Muon([("w", weight), ("e", expert)], strategy="owned")
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    if masked:
        GradientGate._reads_now = lambda gate: not gate._has_settled  # type: ignore[method-assign]
    if dist.get_rank() == 0:
        match how:
            case "unfreeze":
                expert.requires_grad_(True)
            case "matrix":
                optimizer.param_groups[0]["split_sizes"] = (4, 4)
            case "no pattern":
                optimizer.param_groups[0]["matrix"] = 5
            case "two learning rates":
                optimizer.param_groups[0]["lr"] = torch.tensor([0.1, 0.2])
            case "clear":
                optimizer.state.clear()
            case "algorithm":
                optimizer.param_groups[0]["algorithm"] = "adamw"
            case "add":
                more = nn.Parameter(spread(torch.ones(6, 8), mesh, (R, S0)))
                more.grad = torch.ones_like(more)
                optimizer.add_param_group({"params": [("more", more)]})
    before = local_part(weight.detach()).clone()
    momentum = None
    if how != "clear":
        momentum = local_part(optimizer.state[weight]["momentum_buffer"]).clone()
    raised = []
    for _ in range(3):
        try:
            optimizer.step()
            raised.append("")
        except Exception as error:
            raised.append(type(error).__name__)
    if momentum is not None:
        assert torch.equal(before, local_part(weight.detach()))
        assert torch.equal(momentum, local_part(optimizer.state[weight]["momentum_buffer"]))
    return raised


ON_ONE_RANK = [
    "unfreeze",
    "matrix",
    "no pattern",
    "two learning rates",
    "clear",
    "add",
    "algorithm",
]


def changes_on_one_rank(how: str, masked: bool) -> list[str]:
    original = GradientGate._reads_now
    try:
        return changed_on_one_rank(how, masked)
    finally:
        GradientGate._reads_now = original  # type: ignore[method-assign]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", ON_ONE_RANK)
def test_a_change_on_one_rank_stops_all_or_none(how, masked):
    """Nobody waits for the timeout, also on the road of a GPU, where a bad step is masked."""
    for rank, raised in enumerate(run_processes(4, changes_on_one_rank, how, masked)):
        if how == "clear":
            assert raised == [""] * 3
        else:
            own = {"GroupOptionError", "PlanMismatchError"} if rank == 0 else {"PlanMismatchError"}
            errors = {*own, "RuntimeError"}
            if masked:  # what one step finds the next one raises, before it compares anything
                assert (raised[0], raised[2]) == ("", "")
                assert raised[1] in errors
            else:
                assert set(raised) <= errors


def unfrozen_on_all(masked: bool) -> bool:
    """Under a mask too the new plan is taken in the step that all ranks change it in."""
    mesh = mesh_of((2, 2))
    params = [nn.Parameter(spread(w, mesh, (R, S0))) for w in tensors_like([(8, 6)] * 2, 0)]
    twins = [nn.Parameter(p.full_tensor().detach().clone()) for p in params]
    params[0].requires_grad_(False)
    optimizer, oracle = Muon(params, lr=0.1), torch.optim.Muon(twins, lr=0.1)
    original = GradientGate._reads_now
    try:
        for step in range(4):
            if masked and step:
                GradientGate._reads_now = lambda g: not g._has_settled  # type: ignore[method-assign]
            params[0].requires_grad_(step >= 2)
            for index in (0, 1) if step >= 2 else (1,):
                grad = tensors_like([(8, 6)], 10 * step + index)[0]
                params[index].grad, twins[index].grad = spread(grad, mesh, (R, S0)), grad
            optimizer.step()
            oracle.step()
        optimizer.state_dict()
    finally:
        GradientGate._reads_now = original  # type: ignore[method-assign]
    pairs = zip(params, twins, strict=True)
    return all(torch.equal(p.full_tensor(), t) for p, t in pairs)


@pytest.mark.parametrize("masked", [False, True])
def test_unfreezing_on_all_ranks_loses_no_step(masked):
    assert all(run_processes(4, unfrozen_on_all, masked))


def full_state_of_a_frozen_layer(normuon_beta: float | None) -> bool:
    """Trained and saved whole, loaded into a model in which the layer is frozen."""
    mesh = mesh_of((2, 2))

    def made(frozen: bool) -> tuple[nn.Module, Muon]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Linear(12, 8))
        fully_shard(model, mesh=mesh)
        model[1].requires_grad_(not frozen)
        names = dict(model.named_parameters())
        matrices = [(n, p) for n, p in names.items() if p.ndim == 2]
        vectors = [(n, p) for n, p in names.items() if p.ndim == 1]
        muon = {"params": matrices, "normuon_beta": normuon_beta}
        return model, Muon([muon, {"params": vectors, "algorithm": "adamw"}])

    model, optimizer = made(frozen=False)
    model(torch.ones(4, 8)).square().mean().backward()
    optimizer.step()
    options = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    weights = get_model_state_dict(model, options=options)
    twin, other = made(frozen=True)
    load_full_state_dict(twin, other, weights, saved)
    kept = [optimizer.state[model[1].weight], other.state.get(twin[1].weight, {})]
    twin[1].requires_grad_(True)
    twin(torch.ones(4, 8)).square().mean().backward()
    if normuon_beta is None:
        same = torch.equal(*(local_part(state["momentum_buffer"]) for state in kept))
    else:  # how its row moments are cut is planned when it trains: all its state starts at zero
        same = not kept[1]
    other.step()
    return same


@pytest.mark.parametrize("normuon_beta", [None, 0.9])
def test_full_state_loads_into_frozen_layers(normuon_beta):
    assert all(run_processes(4, full_state_of_a_frozen_layer, normuon_beta))
