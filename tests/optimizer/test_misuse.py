"""Misuse of an optimizer on several ranks: it raises on all ranks, or is harmless."""

import logging
import multiprocessing
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from muon_dtensor import Muon, StepFailedError
from muon_dtensor.optimizer import params as table
from muon_dtensor.runtime import consistency as agreement
from muon_dtensor.runtime.torch_private import local_part
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.pool import run_processes
from tests.support.threads import run_threads

R, S0 = Replicate(), Shard(0)
SHAPES = [(8, 4), (4, 8)]
ShardedOptimizer = tuple[Any, list[nn.Parameter], Muon]


def sharded_optimizer(**options: Any) -> ShardedOptimizer:
    mesh = mesh_of((4,))
    params = [nn.Parameter(spread(w, mesh, (S0,))) for w in tensors_like(SHAPES, 0)]
    return mesh, params, Muon(params, lr=0.1, strategy="owned", **options)


def set_grads(mesh: Any, params: list[nn.Parameter], step: int) -> None:
    for param, grad in zip(params, tensors_like(SHAPES, 1 + step), strict=False):
        param.grad = spread(grad, mesh, (S0,))


def shards(params: list[nn.Parameter]) -> list[torch.Tensor]:
    return [local_part(p.detach()).clone() for p in params]


def error_of(step: Callable[[], Any], params: list[nn.Parameter]) -> tuple[str, str, bool]:
    """Return type and text of what a step raises, and whether parameters are unchanged."""
    before = shards(params)
    try:
        step()
        name, text = "", ""
    except Exception as error:
        name, text = type(error).__name__, str(error)
    return name, text, all(map(torch.equal, before, shards(params)))


def in_inference_mode() -> bool:
    """Buffers are reused between steps: they must not become inference tensors."""
    mesh, params, optimizer = sharded_optimizer()
    _, oracle_params, oracle = sharded_optimizer()
    for step in range(3):
        set_grads(mesh, params, step)
        set_grads(mesh, oracle_params, step)
        with torch.inference_mode(mode=step != 1):
            optimizer.step()
        oracle.step()
    return all(map(torch.equal, shards(params), shards(oracle_params)))


def test_a_step_in_inference_mode_gives_the_same_result():
    assert all(run_processes(4, in_inference_mode))


def with_the_group_destroyed() -> tuple[str, str, bool]:
    mesh, params, optimizer = sharded_optimizer()
    set_grads(mesh, params, 0)
    optimizer.step()
    dist.barrier()
    dist.destroy_process_group()
    return error_of(optimizer.step, params)


def test_a_destroyed_process_group_raises():
    for name, text, same in run_processes(4, with_the_group_destroyed):
        assert (name, same) == ("RuntimeError", True)
        assert "or the process group was destroyed" in text


def two_in_different_order() -> tuple[str, str, bool]:
    mesh, params, first = sharded_optimizer()
    other = [nn.Parameter(spread(w, mesh, (S0,))) for w in tensors_like(SHAPES[:1], 7)]
    second = Muon(other, lr=0.1, strategy="owned")
    set_grads(mesh, params, 0)
    set_grads(mesh, other, 0)
    first.step()
    second.step()
    order = [first, second] if dist.get_rank() % 2 else [second, first]
    return error_of(lambda: [optimizer.step() for optimizer in order], [*params, *other])


def test_two_optimizers_stepped_in_different_order_raise():
    for name, text, same in run_processes(4, two_in_different_order):
        assert (name, same) == ("PlanMismatchError", True)
        assert "2 ranks (0, 2): no further parameter" in text


def other_version() -> tuple[str, str, bool]:
    version = table.VERSIONS if dist.get_rank() != 3 else "muon_dtensor 9.9, torch 2.13.0"
    with mock.patch.object(table, "VERSIONS", version):
        mesh, params, optimizer = sharded_optimizer()
        set_grads(mesh, params, 0)
        return error_of(optimizer.step, params)


def test_another_version_on_one_rank_raises_on_all():
    for name, text, same in run_processes(4, other_version):
        assert (name, same) == ("PlanMismatchError", True)
        assert "run different versions" in text
        assert "rank 3: muon_dtensor 9.9, torch 2.13.0" in text


def group_changed(how: str) -> tuple[str, str, bool]:
    mesh, params, optimizer = sharded_optimizer()
    set_grads(mesh, params, 0)
    optimizer.step()
    if dist.get_rank() == 2:
        if how == "requires_grad":
            params[0].requires_grad_(False)
            params[0].grad = None
        else:
            vector = nn.Parameter(spread(torch.ones(4), mesh, (S0,)))
            vector.grad = spread(torch.ones(4), mesh, (S0,))
            optimizer.add_param_group({"params": [vector], "algorithm": "adamw"})
    for param, grad in zip(params, tensors_like(SHAPES, 1), strict=True):
        if param.requires_grad:
            param.grad = spread(grad, mesh, (S0,))
    return error_of(optimizer.step, params)


@pytest.mark.parametrize(
    ("how", "error"), [("requires_grad", "RuntimeError"), ("added", "PlanMismatchError")]
)
def test_a_group_changed_on_one_rank_raises_on_all_at_the_next_step(how, error):
    answers = run_processes(4, group_changed, how)
    assert all(same for _, _, same in answers)
    assert {name for name, _, _ in answers} <= {error, "MissingGradientError"}
    assert "" not in {name for name, _, _ in answers}


def without_gradients() -> tuple[bool, bool]:
    mesh, params, optimizer = sharded_optimizer()
    set_grads(mesh, params, 0)
    optimizer.step()
    optimizer.zero_grad()
    before = shards(params)
    optimizer.step()
    optimizer.step()
    return all(map(torch.equal, before, shards(params))), optimizer.state_dict() is not None


def test_steps_without_gradients_change_nothing():
    assert run_processes(4, without_gradients) == [(True, True)] * 4


ODD_GRADIENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zero": torch.zeros_like,
    "huge": lambda g: g * 1e30,
    "tiny": lambda g: g * 1e-30,
    "strided": lambda g: g.mT.contiguous().mT,
    "expanded": lambda g: g[:1].expand(g.shape),
}


def odd_gradient(kind: str) -> tuple[bool, bool]:
    """Return whether the result is finite, and equals that of a contiguous gradient."""
    results = []
    for contiguous in (False, True):
        _, params, optimizer = sharded_optimizer()
        for step in range(2):
            for param, grad in zip(params, tensors_like(SHAPES, 1 + step), strict=True):
                local = ODD_GRADIENTS[kind](local_part(spread(grad, param.device_mesh, (S0,))))
                param.grad = DTensor.from_local(
                    local.contiguous() if contiguous else local,
                    param.device_mesh,
                    (S0,),
                    run_check=False,
                    shape=param.shape,
                    stride=param.stride(),
                )
            optimizer.step()
        results.append(shards(params))
    finite = all(p.isfinite().all() for p in results[0])
    return bool(finite), all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", ODD_GRADIENTS)
def test_unusual_gradients_are_stepped(kind):
    assert run_processes(4, odd_gradient, kind) == [(True, True)] * 4


def gradient_elsewhere() -> tuple[str, str, bool]:
    """On one rank a gradient lives on a mesh with other dims."""
    mesh, params, optimizer = sharded_optimizer()
    other = init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "y"))
    set_grads(mesh, params, 0)
    if dist.get_rank() == 1:
        (grad,) = tensors_like(SHAPES[:1], 1)
        params[0].grad = spread(grad, other, (S0, S0))
    return error_of(optimizer.step, params)


def test_a_gradient_on_another_mesh_raises_on_all_ranks():
    answers = run_processes(4, gradient_elsewhere)
    assert all(name and same for name, _, same in answers), answers
    assert all("param.0" in text for _, text, _ in answers)
    assert "its gradient on" in answers[1][1]
    assert "Redistribute the gradient" in answers[1][1]


def without_synchronized_gradients() -> tuple[str, str, bool, bool]:
    """Gradient accumulation of FSDP2: without synchronized gradients nothing is stepped."""
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    fully_shard(model, mesh=mesh_of((4,)))
    params = list(model.parameters())
    optimizer = Muon(model.named_parameters(), lr=0.1)
    model.set_requires_gradient_sync(False)
    model(torch.ones(2, 8)).sum().backward()
    unsynchronized = error_of(optimizer.step, params)
    model.set_requires_gradient_sync(True)
    model(torch.ones(2, 8)).sum().backward()
    before = shards(params)
    optimizer.step()
    return *unsynchronized, all(map(torch.equal, before, shards(params)))


def test_a_step_before_gradients_are_synchronized_changes_nothing():
    for name, _, same, still_same in run_processes(4, without_synchronized_gradients):
        assert (name, same, still_same) == ("", True, False)


def moved_away(movers: tuple[int, ...], masked: bool) -> tuple[str, str, bool, bool]:
    """Move the model to the meta device, the only other device without a GPU, and back.

    `masked`: check as on a GPU, where a step reads the results of the step before.
    """
    mesh = mesh_of((4,))
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(8, 4, bias=False), mesh=mesh)
    optimizer = Muon(model.named_parameters(), lr=0.1, deferred_checks=masked)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    weight, momentum = model.weight, optimizer.state[model.weight]["momentum_buffer"]
    before = [local_part(t.detach()).clone() for t in (weight, momentum)]
    if dist.get_rank() in movers:
        model.to("meta")
    name, text, _ = error_of(optimizer.step, [])
    assert model.weight is weight
    if local_part(weight).is_meta:
        model.to_empty(device="cpu")
        model.weight.grad = None
        local_part(model.weight.detach()).copy_(before[0])
    same = all(map(torch.equal, before, [local_part(weight.detach()), local_part(momentum)]))
    weight.grad = None
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return name, text, same, bool(local_part(weight).isfinite().all())


@pytest.mark.parametrize(
    ("movers", "masked"),
    [((2,), False), ((0, 1, 2, 3), False), ((0, 1, 2, 3), True)],
    ids=["one-rank", "all", "masked"],
)
def test_parameters_moved_to_another_device_raise_and_may_be_moved_back(movers, masked):
    answers = run_processes(4, moved_away, movers, masked)
    for rank, (name, text, same, finite) in enumerate(answers):
        assert (name, same, finite) == ("RuntimeError", True, True)
        expected = "weight is on the meta device and has no values" if rank in movers else "rank"
        assert expected in text


def made_on_the_meta_device() -> bool:
    """An optimizer of sharded meta parameters makes a new plan when they get a device."""
    mesh = mesh_of((4,))
    with torch.device("meta"):
        model = nn.Linear(8, 6)
    fully_shard(model, mesh=mesh)
    optimizer = Muon(_weight_and_bias(model), lr=0.1)
    model.to_empty(device="cpu")
    full_model = nn.Linear(8, 6)
    oracle = Muon(_weight_and_bias(full_model), lr=0.1)
    for param, oracle_param in zip(model.parameters(), full_model.parameters(), strict=True):
        value, grad = tensors_like([tuple(oracle_param.shape)] * 2, 0)
        with torch.no_grad():
            local_part(param).copy_(local_part(spread(value, mesh, (S0,))))
            oracle_param.copy_(value)
        param.grad, oracle_param.grad = spread(grad, mesh, (S0,)), grad
    optimizer.step()
    oracle.step()
    pairs = zip(model.parameters(), full_model.parameters(), strict=True)
    return all(torch.equal(param.full_tensor(), oracle_param) for param, oracle_param in pairs)


def _weight_and_bias(model: nn.Linear) -> list[dict[str, Any]]:
    return [
        {"params": [("weight", model.weight)], "normuon_beta": 0.9},
        {"params": [("bias", model.bias)], "algorithm": "adamw"},
    ]


def test_an_optimizer_made_on_the_meta_device_steps_after_to_empty():
    assert all(run_processes(4, made_on_the_meta_device))


def stepping_in_a_fork(optimizer: Muon, pipe: Any) -> None:
    optimizer.step()
    pipe.send(optimizer.param_groups[0]["params"][0].sum().item())


def test_a_forked_worker_steps_a_copy_of_its_own():
    """Data loaders fork; a step in a child must not change the parent."""
    param = nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([param], lr=0.1)
    param.grad = torch.ones(3, 4)
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=stepping_in_a_fork, args=(optimizer, sender)
    )
    process.start()
    assert receiver.poll(30)
    assert receiver.recv() != 12.0
    process.join(10)
    assert torch.equal(param, torch.ones(3, 4))
    optimizer.step()
    assert not torch.equal(param, torch.ones(3, 4))


def sharded_after_the_optimizer() -> tuple[str, str, bool]:
    """fully_shard after the optimizer was made: it holds parameters that never get gradients."""
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    optimizer = Muon(model.named_parameters(), lr=0.1)
    fully_shard(model, mesh=mesh_of((2,)))
    model(torch.ones(2, 8)).sum().backward()
    return error_of(optimizer.step, list(model.parameters()))


def test_sharding_after_the_optimizer_was_made_is_an_error():
    for name, text, same in run_processes(2, sharded_after_the_optimizer):
        assert (name, same) == ("RuntimeError", True)
        assert "the optimizer was made before fully_shard" in text


def without_any_gradient() -> list[str]:
    """Legal, as in torch; logged once, and on rank 0 only."""
    _, _, optimizer = sharded_optimizer()
    lines: list[str] = []

    def log(level: int, text: str, *_: Any) -> None:
        lines.extend([text] if level == logging.WARNING else [])

    with mock.patch("muon_dtensor.optimizer.planned_step.logger.log", log):
        optimizer.step()
        optimizer.step()
    return lines


def test_a_step_without_gradients_is_logged_once():
    first, *other_ranks = run_processes(4, without_any_gradient)
    assert [line.split(",")[0] for line in first] == [
        "no parameter of this optimizer has a gradient"
    ]
    assert other_ranks == [[], [], []]


def test_a_failure_of_adamw_names_adamw():
    """AdamW steps while the first exchanges are in flight; the error must not name a phase."""
    matrix, vector = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
    optimizer = Muon([{"params": [matrix]}, {"params": [vector], "algorithm": "adamw"}])
    matrix.grad, vector.grad = torch.ones(3, 3), torch.ones(3)
    failing = mock.patch(
        "muon_dtensor.optimizer.planned_step.adamw_step", side_effect=RuntimeError("no memory")
    )
    with failing, pytest.raises(StepFailedError, match=r"failed in AdamW's groups: no memory"):
        optimizer.step()


@pytest.mark.parametrize(
    ("error", "is_renamed"),
    [
        (RuntimeError("Timed out waiting 40000ms for recv operation to complete"), True),
        (RuntimeError("Connection closed by peer [127.0.0.1]:1"), True),
        (ValueError("Invalid process group specified"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"), False),
        (RuntimeError("output tensor must have the same type as input tensor"), False),
    ],
    ids=lambda value: str(value)[:20],
)
def test_only_errors_of_unreachable_ranks_are_renamed(error, is_renamed):
    for name, text in run_threads(2, with_failing_reduction, error):
        assert name == (RuntimeError.__name__ if is_renamed else type(error).__name__)
        assert ("one has died, hangs" in text) == is_renamed
        assert str(error) in text


def with_failing_reduction(error: Exception) -> tuple[str, str]:
    mesh = mesh_of((2,))
    params = [nn.Parameter(spread(w, mesh, (S0,))) for w in tensors_like(SHAPES, 0)]
    optimizer = Muon(params, lr=0.1, strategy="owned")
    set_grads(mesh, params, 0)
    with FAILING_LOCK:
        before = agreement.maximum_of_all

        def fail(*_: Any) -> None:
            raise error

        agreement.maximum_of_all = fail
        try:
            optimizer.step()
        except Exception as raised:
            return type(raised).__name__, str(raised)
        finally:
            agreement.maximum_of_all = before
    return "", ""


FAILING_LOCK = threading.Lock()


def beside_a_sharded_teacher() -> tuple[str, str, bool]:
    """A plain student without gradients, legal in torch, beside a sharded model of its shapes."""
    teacher, student = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
    fully_shard(teacher, mesh=mesh_of((2,)))
    optimizer = Muon(student.named_parameters())
    return error_of(optimizer.step, list(student.parameters()))


def test_a_step_without_gradients_beside_a_sharded_model_is_harmless():
    for name, _, same in run_processes(2, beside_a_sharded_teacher):
        assert (name, same) == ("", True)


def test_complex_parameters_raise_with_their_name():
    param = nn.Parameter(torch.ones(4, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    optimizer = Muon([{"params": [("w", param)], "algorithm": "adamw"}])
    with pytest.raises(RuntimeError, match="w is complex; this package steps real parameters"):
        optimizer.step()


def test_a_failed_step_still_raises_after_a_group_is_added():
    param = nn.Parameter(torch.ones(3, 2))
    param.grad = torch.ones(3, 2)
    fails = [False]

    def orthogonalizer(x: torch.Tensor) -> torch.Tensor:
        if fails[0]:
            raise ArithmeticError
        return x

    optimizer = Muon([param], orthogonalizer=orthogonalizer)
    fails[0] = True
    with pytest.raises(StepFailedError):
        optimizer.step()
    fails[0] = False
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    for action in (optimizer.step, optimizer.state_dict):
        with pytest.raises(StepFailedError, match="failed halfway"):
            action()
