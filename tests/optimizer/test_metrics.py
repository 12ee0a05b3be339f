"""`optimizer.metrics()` gives the numbers of one process in every layout."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from muon_dtensor import DistributedConfig, GroupOptionError, Muon, create_devicemesh_config
from muon_dtensor.algorithms import newton_schulz
from muon_dtensor.algorithms.residual import orthogonality_residual
from muon_dtensor.optimizer.metrics import Measurement
from muon_dtensor.optimizer.settings import Settings
from muon_dtensor.runtime import normuon_state as row_moments
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.pool import run_processes
from tests.support.threads import run_threads

R, S0, S1 = Replicate(), Shard(0), Shard(1)
SHAPES = [(7, 5), (6, 12), (3, 4, 5), (9,)]


def measured(layout: Any, **options: Any) -> tuple[dict[str, float], Any]:
    """Return the metrics of the third step, and the optimizer."""
    mesh = mesh_of(layout[0]) if layout else None

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        return spread(tensor, mesh, layout[1]) if layout else tensor.clone()

    params = [nn.Parameter(placed(w)) for w in tensors_like(SHAPES, 0)]
    groups: list[dict[str, Any]] = [
        {"params": params[:2], "lr": 0.1},
        {"params": params[2:3], "lr": 0.2, "adjust_lr_fn": "match_rms_adamw"},
        {"params": params[3:], "algorithm": "adamw", "lr": 0.3},
    ]
    optimizer = Muon(groups, **{"metrics_every": 2, **options})
    for step in range(3):
        for param, grad in zip(params, tensors_like(SHAPES, 1 + step), strict=True):
            param.grad = placed(grad)
        optimizer.step()
    return optimizer.metrics(), optimizer


def expected() -> dict[str, float]:
    """Compute the metrics on one process from torch's optimizers and changes of parameters."""
    weights = tensors_like(SHAPES, 0)
    params = [nn.Parameter(w.clone()) for w in weights]
    parts = [[nn.Parameter(m.clone()) for m in weights[2].unbind()]]
    oracles: list[Any] = [
        torch.optim.Muon(params[:2], lr=0.1),
        torch.optim.Muon(parts[0], lr=0.2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(params[3:], lr=0.3, betas=(0.9, 0.95), weight_decay=0.1),
    ]
    for step in range(3):
        grads = tensors_like(SHAPES, 1 + step)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        for part, grad in zip(parts[0], grads[2].unbind(), strict=True):
            part.grad = grad
        groups = [params[:2], parts[0], params[3:]]
        before = [[p.detach().clone() for p in group] for group in groups]
        for oracle in oracles:
            oracle.step()
    values: dict[str, float] = {}
    keys = ("momentum_buffer", "momentum_buffer", "exp_avg")
    for index, (group, old_params, oracle, key) in enumerate(
        zip(groups, before, oracles, keys, strict=True)
    ):

        def norm(tensors: list[torch.Tensor]) -> float:
            return float(torch.cat([t.detach().double().flatten() for t in tensors]).norm())

        values[f"group{index}/grad_norm"] = norm([p.grad for p in group])
        values[f"group{index}/param_norm"] = norm(group)
        values[f"group{index}/momentum_norm"] = norm([oracle.state[p][key] for p in group])
        update = norm([p - q for p, q in zip(group, old_params, strict=True)])
        values[f"group{index}/update_norm"] = update
        numel = sum(p.numel() for p in group)
        values[f"group{index}/update_rms"] = update / math.sqrt(numel)
        values[f"group{index}/lr"] = 0.1 * (index + 1)
    scale = (35 * math.sqrt(7 / 5) + 72) / (35 + 72)
    values["group0/effective_lr"] = 0.1 * scale
    values["group1/effective_lr"] = 0.2 * 0.2 * math.sqrt(5)
    values["group2/effective_lr"] = 0.3
    values["grad_norm"] = math.sqrt(sum(values[f"group{i}/grad_norm"] ** 2 for i in range(3)))
    return values


def agrees(metrics: dict[str, float], layout: Any) -> bool:
    return all(math.isclose(metrics[key], value, rel_tol=2e-5) for key, value in expected().items())


@pytest.mark.parametrize(
    "layout",
    [
        None,
        ((4,), (S0,)),
        ((4,), (R,)),
        ((2, 2), (R, S0)),
        ((3,), (S0,)),
    ],
    ids=str,
)
def test_numbers_are_those_of_one_process(layout):
    if layout is None:
        assert agrees(measured(None)[0], None)
        return
    num_ranks = math.prod(layout[0])
    for metrics, _ in run_threads(num_ranks, measured, layout):
        assert agrees(metrics, layout)


def plain_and_replicated() -> dict[str, float]:
    """Return the metrics of plain tensors that a config declares as replicated, as under DDP."""
    config = create_devicemesh_config(mesh_of((4,)))
    return measured(None, distributed_config=config)[0]


def test_replicated_plain_tensors_count_once():
    for metrics in run_threads(4, plain_and_replicated):
        assert agrees(metrics, None)


def bytes_and_seconds(layout: Any) -> tuple[dict[str, float], int]:
    metrics, optimizer = measured(layout, strategy="owned")
    cost = optimizer.plan.cost
    return metrics, cost.sent_nbytes[torch.distributed.get_rank()]


def bytes_of_moments(layout: Any) -> tuple[float, int, int]:
    """Return the bytes by the metrics, those planned without row moments, and those of moments."""
    reduced: list[int] = []
    reduce = row_moments.all_reduce_sum

    def counted(values: torch.Tensor, group: Any) -> None:
        size = dist.get_world_size(group)
        reduced.append(2 * (size - 1) * values.numel() * values.element_size() // size)
        reduce(values, group)

    with mock.patch.object(row_moments, "all_reduce_sum", counted):
        metrics, optimizer = measured(layout, strategy="owned", normuon_beta=0.9)
    return (
        metrics["sent_nbytes"],
        optimizer.plan.cost.sent_nbytes[dist.get_rank()],
        sum(reduced) // 3,
    )


def test_bytes_of_row_moments_are_counted():
    """Every rank counts the bytes of the rank with the most moments; see `Reduction`."""
    ranks = run_processes(4, bytes_of_moments, ((2, 2), (R, S0)))
    fullest = max(moments for _, _, moments in ranks)
    assert fullest > 0
    assert [measured_nbytes - planned for measured_nbytes, planned, _ in ranks] == [fullest] * 4


def test_bytes_and_seconds():
    for metrics, planned in run_processes(4, bytes_and_seconds, ((2, 2), (R, S0))):
        assert metrics["sent_nbytes"] == planned > 0
        phases = {"unshard", "wait", "orthogonalize", "reshard", "pass_on", "apply"}
        assert {key for key in metrics if key.startswith("seconds/")} == {
            f"seconds/{phase}" for phase in phases
        }
        assert all(metrics[f"seconds/{phase}"] >= 0 for phase in phases)


def residuals(layout: Any) -> list[float]:
    """Return the residual of each of four steps."""
    mesh = mesh_of(layout[0])
    grads = tensors_like(SHAPES[:2], 1)
    params = [nn.Parameter(spread(torch.zeros_like(g), mesh, layout[1])) for g in grads]
    optimizer = Muon(params, metrics_every=1, strategy="owned", momentum=0.0, nesterov=False)
    values = []
    for _ in range(4):
        for param, grad in zip(params, grads, strict=True):
            param.grad = spread(grad, mesh, layout[1])
        optimizer.step()
        values.append(optimizer.metrics()["orthogonality_residual"])
    return values


@pytest.mark.parametrize("layout", [((4,), (S0,)), ((2, 2), (R, S1)), ((4,), (R,))], ids=str)
def test_every_rank_has_the_residual_of_one_matrix_a_different_one_each_step(layout):
    expected = {
        round(float(orthogonality_residual(newton_schulz(grad))), 6)
        for grad in tensors_like(SHAPES[:2], 1)
    }
    ranks = run_threads(4, residuals, layout)
    assert all(values == ranks[0] for values in ranks)
    assert {round(number, 6) for number in ranks[0]} == expected
    assert ranks[0][:2] == ranks[0][2:]


def test_orthogonality_residual():
    q, _ = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64))
    assert orthogonality_residual(q) < 1e-6
    assert orthogonality_residual(q.T) < 1e-6
    assert orthogonality_residual(2 * q) == pytest.approx(3.0)
    assert orthogonality_residual(torch.zeros(3, 5)) == pytest.approx(1.0)


def test_metrics_without_metrics_every_raise():
    param = nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([param])
    param.grad = torch.ones(2, 2)
    optimizer.step()
    with pytest.raises(RuntimeError, match="construct Muon with metrics_every"):
        optimizer.metrics()
    with pytest.raises(ValueError, match=r"metrics_every must be a number of steps.*got -1"):
        Muon([param], metrics_every=-1)
    config = DistributedConfig(lambda p, s: {0: 0}, lambda t, o, s: t, lambda t, o, s: t, {})
    with pytest.raises(GroupOptionError, match="metrics_every needs a plan"):
        Muon([param], metrics_every=1, distributed_config=config)


def measured_on_some() -> str:
    mesh = mesh_of((4,))
    param = nn.Parameter(spread(torch.ones(8, 4), mesh, (S0,)))
    optimizer = Muon([param], metrics_every=int(torch.distributed.get_rank() == 1))
    param.grad = spread(torch.ones(8, 4), mesh, (S0,))
    try:
        optimizer.step()
    except RuntimeError as error:
        return f"{type(error).__name__} {error}"
    return ""


def test_measuring_on_some_ranks_only_raises_on_all():
    for text in run_processes(4, measured_on_some):
        assert text.startswith("PlanMismatchError")
        assert "measured=True" in text


def test_measuring_changes_nothing():
    _, every = measured(None, metrics_every=1)
    _, never = measured(None, metrics_every=1000)
    for a, b in zip(every.param_groups, never.param_groups, strict=True):
        assert all(map(torch.equal, a["params"], b["params"]))


def test_measured_steps_are_in_the_user_s_trace():
    metrics, optimizer = measured(None, trace=True)
    assert {span.step for span in optimizer.trace.spans} == {0, 1, 2}
    seconds = sum(s.stop - s.start for s in optimizer.trace.spans if s.step == 2)
    assert sum(v for k, v in metrics.items() if k.startswith("seconds/")) == pytest.approx(seconds)


def with_partial_gradients() -> dict[str, float]:
    """Return the metrics of a Partial gradient, as in tensor parallelism."""
    mesh = mesh_of((2,))
    param = nn.Parameter(spread(torch.zeros(4, 6), mesh, (R,)))
    optimizer = Muon([param], metrics_every=1)
    part = torch.ones(4, 6) * (1 + torch.distributed.get_rank())
    param.grad = DTensor.from_local(part, mesh, (Partial(),), run_check=False)
    optimizer.step()
    return optimizer.metrics()


def test_partial_gradients_count_with_their_sum():
    for metrics in run_threads(2, with_partial_gradients):
        assert metrics["grad_norm"] == pytest.approx(3 * math.sqrt(24))
        assert metrics["group0/grad_norm"] == metrics["grad_norm"]


def with_moved_and_missing_gradients() -> float:
    """Return the norm of a gradient with other placements, and of one on one rank only."""
    mesh = mesh_of((2,))
    params = [nn.Parameter(spread(torch.zeros(4, 6), mesh, (S0,))) for _ in range(2)]
    optimizer = Muon(params, metrics_every=1, missing_grad="zero")
    params[0].grad = spread(torch.ones(4, 6), mesh, (R,))
    if torch.distributed.get_rank() == 0:
        params[1].grad = spread(torch.ones(4, 6), mesh, (S0,))
    optimizer.step()
    return optimizer.metrics()["grad_norm"]


def test_gradients_count_as_the_step_uses_them():
    for grad_norm in run_threads(2, with_moved_and_missing_gradients):
        assert grad_norm == pytest.approx(math.sqrt(24 + 12))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_is_measured(dtype):
    param = nn.Parameter(tensors_like([(4, 6)], 0, dtype)[0])
    optimizer = Muon([param], metrics_every=1, lr=0.1, weight_decay=0.0)
    (param.grad,) = tensors_like([(4, 6)], 1, dtype)
    before = param.detach().double().clone()
    optimizer.step()
    metrics = optimizer.metrics()
    assert metrics["grad_norm"] == pytest.approx(float(param.grad.double().norm()))
    change = float((param.detach().double() - before).norm())
    assert metrics["group0/update_norm"] == pytest.approx(change)


def test_metrics_wait_for_copies_of_momenta_to_the_host():
    param = nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([param], metrics_every=1, offload_momentum=True)
    param.grad = torch.ones(4, 6)
    order: list[str] = []

    def wait(_: Settings) -> None:
        order.append("wait")

    def read(*_: Any) -> dict[str, float]:
        order.append("read")
        return {}

    with (
        mock.patch.object(Settings, "wait_for_momentum", wait),
        mock.patch.object(Measurement, "finish", read),
    ):
        optimizer.step()
    assert order == ["wait", "read"]


def wrong_when_measured() -> list[str]:
    """Return the errors of masked steps, where rank 0 has a fault in the step that is measured."""
    mesh = mesh_of((2, 2))
    param = nn.Parameter(spread(torch.ones(16, 8), mesh, (R, S0)))
    optimizer = Muon([("w", param)], lr=0.1, metrics_every=2, deferred_checks=True)
    param.grad = torch.ones_like(param)
    optimizer.step()
    raised = []
    for step in range(7):
        optimizer.param_groups[0]["lr"] = "x" if step == 1 and dist.get_rank() == 0 else 0.1
        try:
            optimizer.step()
            raised.append("")
        except Exception as error:
            raised.append(type(error).__name__)
    return raised


def test_after_a_fault_in_a_measured_step_ranks_measure_the_same_steps():
    for rank, raised in enumerate(run_processes(4, wrong_when_measured)):
        error = "GroupOptionError" if rank == 0 else "RuntimeError"
        assert raised == ["", "", error, "", "", "", ""]
