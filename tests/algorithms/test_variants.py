"""NorMuon, cautious weight decay, Dion's learning rates: formulas, and equal steps on any mesh."""

import copy
import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from muon_dtensor import GroupOptionError, Muon
from muon_dtensor.algorithms.newton_schulz import KELLER_JORDAN
from muon_dtensor.algorithms.normuon import normalize_rows
from muon_dtensor.planning.normuon_state import reductions
from muon_dtensor.planning.plan import EXACT_STRATEGIES
from muon_dtensor.runtime import normuon_state
from muon_dtensor.runtime.torch_private import local_part, with_shard
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.layouts import EVEN, EXPERTS, LAYOUTS, ODD
from tests.support.pool import run_processes
from tests.support.threads import run_threads

R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)
NORMUON = {"normuon_beta": 0.9, "adjust_lr_fn": "match_rms_adamw", "lr": 0.1}
VARIANTS = [
    pytest.param(NORMUON, id="normuon"),
    pytest.param({"cautious_weight_decay": True, "weight_decay": 0.5, "lr": 0.3}, id="cautious"),
    pytest.param({"adjust_lr_fn": "spectral_norm", "lr": 0.1}, id="spectral"),
    pytest.param(
        {**NORMUON, "cautious_weight_decay": True, "nesterov": False, "adjust_lr_fn": "rms_norm"},
        id="all",
    ),
]
Shape = tuple[int, ...]


def trained(
    shapes: list[Shape],
    layout: tuple[Shape, tuple[Placement, ...]] | None,
    dtype: torch.dtype = torch.float32,
    group: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[list[Tensor], list[list[Tensor]], Any]:
    """Return parameters and state after each of three steps on a mesh, or on one process."""
    mesh = mesh_of(layout[0]) if layout else None

    def placed(tensor: Tensor) -> Tensor:
        return spread(tensor, mesh, layout[1]) if layout else tensor.clone()

    params = [nn.Parameter(placed(w)) for w in tensors_like(shapes, 0, dtype)]
    optimizer = Muon([{"params": params, **(group or {})}], **options)
    history = []
    for step in range(3):
        for param, grad in zip(params, tensors_like(shapes, 1 + step, dtype), strict=True):
            param.grad = placed(grad)
        optimizer.step()
        state = [optimizer.state[p][key] for p in params for key in sorted(optimizer.state[p])]
        history.append([with_shard(t, local_part(t.detach()).clone()) for t in (*params, *state)])
    return [p.detach() for p in params], history, optimizer


def local_shard(full: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard, cut as another tensor."""
    if not isinstance(like, DTensor):
        return full
    return local_part(spread(full, like.device_mesh, like.placements))


def same_on(shapes: list[Shape], layout: Any, options: dict[str, Any]) -> bool:
    _, history, _ = trained(shapes, layout, **options)
    _, expected, _ = trained(shapes, None, **options)
    return all(
        torch.equal(local_part(a), local_shard(b, a))
        for after in zip(history, expected, strict=True)
        for a, b in zip(*after, strict=True)
    )


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS)
def test_variants_are_bitwise_on_every_layout(mesh_shape, placements, options):
    shapes = [*EVEN, *ODD]
    num_ranks = math.prod(mesh_shape)
    assert all(run_threads(num_ranks, same_on, shapes, (mesh_shape, placements), options))


@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [((4,), (S0,)), ((2, 2), (S0, S1)), ((2, 2), (R, S0)), ((4,), (S2,)), ((3,), (S0,))],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_variants_of_experts(mesh_shape, placements, dtype):
    options = {**NORMUON, "cautious_weight_decay": True, "dtype": dtype}
    num_ranks = math.prod(mesh_shape)
    assert all(run_threads(num_ranks, same_on, [*EXPERTS], (mesh_shape, placements), options))


@pytest.mark.parametrize(
    "more",
    [{"strategy": s} for s in EXACT_STRATEGIES]
    + [{"bucket_mb": 1e-4, "strategy": "owned"}, {"exact": False, "strategy": "auto"}],
    ids=str,
)
def test_normuon_under_every_strategy(more):
    layout = ((2, 2, 2), (R, S0, S1))
    assert all(run_threads(8, same_on, [*EVEN, (9, 4)], layout, {**NORMUON, **more}))


@pytest.mark.P1
@pytest.mark.parametrize("layout", [((2, 2), (S0, S1)), ((4,), (S0,)), ((2, 2), (R, S1))], ids=str)
def test_normuon_over_real_processes(layout):
    assert all(run_processes(4, same_on, [*EVEN, *ODD], layout, NORMUON))


HEADS = {"matrix": "(head dim) model -> head dim model", "matrix_axes": {"head": 4}}


INTERLEAVED = {"matrix": "(i part) h -> part i h", "matrix_axes": {"part": 2}}


def heads_and_blocks(layout: Any) -> list[bool]:
    results = []
    blocks = {"split_sizes": (6, 2, 4)}
    for group in (HEADS, INTERLEAVED, blocks, {"matrix": "i o -> o i"}):
        options: dict[str, Any] = {"group": group, **NORMUON}
        results.append(same_on([(12, 6), (12, 20)], layout, options))
    return results


@pytest.mark.parametrize("placements", [(S0,), (S1,), (R,)], ids=str)
def test_normuon_of_declared_matrices(placements):
    assert run_threads(4, heads_and_blocks, ((4,), placements)) == [[True] * 4] * 4


def reduced_numel(layout: Any, shapes: list[Shape], group: dict[str, Any]) -> tuple[int, int, str]:
    """Return the moments that this rank reduces in a step, the planned number, and the plan."""
    numels: list[int] = []
    reduce = normuon_state.all_reduce_sum

    def counted(values: Tensor, process_group: Any) -> None:
        numels.append(values.numel())
        reduce(values, process_group)

    with mock.patch.object(normuon_state, "all_reduce_sum", counted):
        _, _, optimizer = trained(shapes, layout, group=group, **NORMUON, strategy="owned")
    planned = sum(reduction.numel for reduction in reductions(optimizer.plan))
    return sum(numels) // 3, planned, str(optimizer.plan)


def test_moments_are_reduced_as_planned():
    for numel, planned, text in run_processes(4, reduced_numel, ((2, 2), (R, S0)), [*EVEN], {}):
        assert numel == planned == sum(rows for rows, _ in EVEN)
        assert "row moments  all_reduce over a=2 x b=2, not counted above: 264 B a rank" in text


@pytest.mark.parametrize(
    ("shape", "group"),
    [((8, 6, 5), {}), ((7, 6, 5), {}), ((12, 6), HEADS)],
    ids=["experts", "uneven-experts", "heads"],
)
def test_moments_of_local_matrices_are_not_reduced(shape, group):
    for numel, planned, text in run_processes(4, reduced_numel, ((4,), (S0,)), [shape], group):
        assert numel == planned == 0
        assert "row moments" not in text


def reference_normuon(
    weight: Tensor, grads: list[Tensor], *, lr: float, beta: float, decay: float, eps: float
) -> Tensor:
    """Compute algorithm 1 of arXiv:2510.05491 in float64, with Nesterov's direction as in Muon."""
    weight, momentum = weight.double(), torch.zeros_like(weight.double())
    v = torch.zeros(len(weight), 1, dtype=torch.float64)
    a, b, c = KELLER_JORDAN
    for grad in grads:
        g = grad.double()
        momentum = 0.95 * momentum + 0.05 * g
        o = 0.05 * g + 0.95 * momentum
        tall = o.shape[0] > o.shape[1]
        o = o.T if tall else o
        o = o / o.norm()
        for _ in range(5):
            gram = o @ o.T
            o = a * o + (b * gram + c * gram @ gram) @ o
        o = o.T if tall else o
        v = beta * v + (1 - beta) * (o * o).mean(1, keepdim=True)
        scaled = o / (v.sqrt() + eps)
        rate = 0.2 * lr * math.sqrt(o.numel()) / scaled.norm()
        weight = weight - lr * decay * weight - rate * scaled
    return weight


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7), (1, 5)], ids=str)
def test_normuon_is_the_paper_s(shape):
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-8}
    params, _, _ = trained(
        [shape],
        None,
        normuon_beta=0.95,
        adjust_lr_fn="match_rms_adamw",
        ns_dtype=torch.float32,
        **options,
    )
    (weight,) = tensors_like([shape], 0)
    grads = [tensors_like([shape], 1 + step)[0] for step in range(3)]
    expected = reference_normuon(weight, grads, lr=0.02, beta=0.95, decay=0.1, eps=1e-8)
    torch.testing.assert_close(params[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_rows_become_equally_long():
    torch.manual_seed(0)
    uneven = torch.randn(6, 40) * torch.logspace(-2, 0, 6)[:, None]
    moments = torch.zeros(6)
    result = normalize_rows(uneven, moments, beta=0.0, eps=0.0)
    torch.testing.assert_close(result.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(moments, uneven.square().mean(1))
    zero = normalize_rows(torch.zeros(3, 4), torch.zeros(3), beta=0.9, eps=1e-8)
    assert torch.equal(zero, torch.zeros(3, 4))


def test_eps_is_added_to_the_root_of_the_moments():
    factor = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    result = normalize_rows(factor, torch.zeros(2), beta=0.0, eps=0.5)
    roots = [math.sqrt(25 / 2), math.sqrt(1 / 2)]
    rows = [[3 / (roots[0] + 0.5), 4 / (roots[0] + 0.5)], [0.0, 1 / (roots[1] + 0.5)]]
    expected = torch.tensor(rows)
    torch.testing.assert_close(result, expected * math.sqrt(2) / expected.norm())


def test_a_masked_step_does_not_change_moments():
    moments = torch.full((3,), 0.5)
    normalize_rows(torch.randn(3, 4), moments, beta=0.9, eps=1e-8, keep=torch.tensor(False))
    assert torch.equal(moments, torch.full((3,), 0.5))


def reference_cautious(weight: Tensor, polar: Tensor, lr: float, decay: float) -> Tensor:
    """Compute eq. 2 of arXiv:2510.12402 element by element, in Python's floats."""
    rows = [
        [w - lr * o - (lr * decay * w if o * w >= 0 else 0.0) for w, o in zip(ws, os, strict=True)]
        for ws, os in zip(weight.double().tolist(), polar.double().tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def test_cautious_decay_is_the_paper_s():
    weight, grad = tensors_like([(6, 8), (6, 8)], 3)
    weight[0, 0] = 0.0
    params = [nn.Parameter(weight.clone()) for _ in range(2)]
    polar: Tensor | None = None
    for param, decay in zip(params, (0.0, 0.4), strict=True):
        param.grad = grad.clone()
        Muon([param], lr=0.1, weight_decay=decay, cautious_weight_decay=True).step()
        if decay == 0:
            polar = (weight - param.detach()) / 0.1
    assert polar is not None
    expected = reference_cautious(weight, polar, 0.1, 0.4)
    torch.testing.assert_close(params[1].detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(params[1], params[0] - 0.04 * weight, atol=1e-4), (
        "not all elements decay"
    )


def resumed() -> bool:
    mesh = mesh_of((2, 2))

    def fresh() -> tuple[nn.Parameter, Muon]:
        param = nn.Parameter(spread(tensors_like([(6, 4)], 0)[0], mesh, (R, S0)))
        return param, Muon([param], **NORMUON)

    def train(param: nn.Parameter, optimizer: Muon, steps: range) -> None:
        for step in steps:
            param.grad = spread(tensors_like([(6, 4)], 1 + step)[0], mesh, (R, S0))
            optimizer.step()

    a, first = fresh()
    train(a, first, range(3))
    b, second = fresh()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    local_part(b.detach()).copy_(local_part(a.detach()))
    moments = second.state[b]["row_second_moment"]
    assert moments.dtype == torch.float32
    train(a, first, range(3, 5))
    train(b, second, range(3, 5))
    return torch.equal(local_part(a.detach()), local_part(b.detach()))


def test_normuon_resumes_bitwise():
    assert all(run_threads(4, resumed))


def test_moments_of_bf16_parameters_are_float32():
    param = nn.Parameter(torch.randn(4, 6).bfloat16())
    optimizer = Muon([param], **NORMUON)
    param.grad = torch.randn(4, 6).bfloat16()
    optimizer.step()
    moments = optimizer.state[param]["row_second_moment"].clone()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[param]["row_second_moment"].dtype == torch.float32
    assert torch.equal(optimizer.state[param]["row_second_moment"], moments)


@pytest.mark.parametrize(
    ("group", "text"),
    [
        ({"normuon_beta": 1.0}, r"normuon_beta must be None or in \[0, 1\), got 1.0"),
        ({"normuon_beta": "yes"}, "normuon_beta must be None"),
        ({"cautious_weight_decay": 1}, "cautious_weight_decay must be True or False, got 1"),
        ({"normuon_beta": 0.9, "algorithm": "adamw"}, "for Muon's groups only"),
        ({"adjust_lr_fn": "rms"}, "adjust_lr_fn must be one of None, original"),
    ],
    ids=str,
)
def test_options_out_of_range(group, text):
    with pytest.raises(GroupOptionError, match=text):
        Muon([{"params": [nn.Parameter(torch.ones(2, 2))], **group}])
