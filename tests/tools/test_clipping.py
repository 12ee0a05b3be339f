"""clip_grad_norm_ on meshes where torch's own raises, compared with the norm of one process."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from muon_dtensor import Muon, clip_grad_norm_, clipping, group_parameters
from muon_dtensor.distributed_config.full_tensor import cut_like
from muon_dtensor.runtime.torch_private import local_part
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.pool import run_processes
from tests.support.threads import run_threads

R, S0, S1 = Replicate(), Shard(0), Shard(1)
SHAPES = [(7, 5), (6, 4), (9,), (3, 4, 5)]
NORMS = [1.0, 2.0, 3.0, math.inf]


def expected_of(grads: list[torch.Tensor], max_norm: float, p: float) -> tuple[float, list[Any]]:
    """Return the norm and the clipped gradients, in float64 on one process."""
    norm = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in grads]), p)
    factor = min(1.0, float(max_norm / (norm + 1e-6)))
    return float(norm), [g.double() * factor for g in grads]


def agrees(
    params: list[torch.Tensor], full_grads: list[torch.Tensor], p: float, **kwargs: Any
) -> bool:
    """Clip to norm 1.5, and compare norm and gradients with those of one process."""
    norm, clipped = expected_of(full_grads, 1.5, p)
    norm_before = clip_grad_norm_(params, 1.5, p, **kwargs)
    assert not isinstance(norm_before, DTensor)
    good = math.isclose(float(norm_before), norm, rel_tol=1e-6)
    for param, grad in zip(params, clipped, strict=True):
        clipped_shard = local_part(param.grad).double()
        expected_shard = (
            local_part(cut_like(grad, param.grad)) if isinstance(param.grad, DTensor) else grad
        )
        good &= torch.allclose(clipped_shard, expected_shard, rtol=2e-6, atol=1e-7)
    return good


def mixed(p: float) -> bool:
    """A mesh of three dims, its sub-meshes, and plain tensors, all in one call."""
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("rep", "dp", "tp"))
    layouts = [
        (mesh, (R, S0, S1)),
        (mesh["dp", "tp"], (S0, S0)),
        (mesh["dp"], (S0,)),
        (mesh, (R,) * 3),
    ]
    full_grads = tensors_like([*SHAPES, (4, 4)], 1)
    params = []
    for grad, layout in zip(full_grads, [*layouts, None], strict=True):
        param = nn.Parameter(torch.zeros_like(grad) if layout is None else spread(grad, *layout))
        param.grad = grad.clone() if layout is None else spread(grad, *layout)
        params.append(param)
    return agrees(params, full_grads, p)


@pytest.mark.parametrize("p", NORMS)
def test_gradients_on_several_meshes_of_8_ranks(p):
    assert all(run_threads(8, mixed, p))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 14, bias=True)
        self.down = nn.Linear(14, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.norm(x)).relu())


def fsdp_and_tp(p: float) -> tuple[bool, str]:
    """A model for which torch's own clipping raises, with real gradients; and torch's error."""
    torch.manual_seed(0)
    model, plain = Block(), Block()
    plain.load_state_dict(model.state_dict())
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    x = torch.randn(6, 8)
    for net in (model, plain):
        net(x).square().sum().backward()
    refusal = ""
    try:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9, p)
    except Exception as error:
        refusal = f"{type(error).__name__}: {error}"
    good = agrees(list(model.parameters()), [q.grad for q in plain.parameters()], p)
    return good, refusal


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_a_model_for_which_torch_s_clipping_raises(p):
    for good, refusal in run_processes(4, fsdp_and_tp, p):
        assert good
        assert "mesh" in refusal.lower(), "torch clips this now: update the README"


def experts_and_stages(p: float) -> bool:
    """Two pipeline stages of two ranks: experts cut over dim 0, a matrix over dim 1."""
    pp_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "ep"))
    stage = pp_mesh.get_local_rank("pp")
    stage_grads = [tensors_like([(4, 3, 5), (6, 4), (3,)], seed) for seed in range(2)]
    params = []
    for grad, placements in zip(stage_grads[stage], ((S0,), (S1,), None), strict=True):
        shard = grad if placements is None else spread(grad, pp_mesh["ep"], placements)
        params.append(nn.Parameter(shard * 0))
        params[-1].grad = shard.clone()
    norm, _ = expected_of([*stage_grads[0], *stage_grads[1]], 1.0, p)
    norm_before = clip_grad_norm_(params, 1.0, p, pp_group=pp_mesh.get_group("pp"))
    stage_norm, _ = expected_of([local_part(q.grad) for q in params], 1.0, p)
    return math.isclose(float(norm_before), norm, rel_tol=1e-6) and stage_norm <= 1.0 + 1e-6


@pytest.mark.parametrize("p", NORMS)
def test_experts_and_pipeline_stages(p):
    assert all(run_processes(4, experts_and_stages, p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("foreach", [None, False, True])
def test_plain_tensors_as_torch_clips_them(p, foreach, dtype):
    params, torch_params = (
        [nn.Parameter(torch.zeros(s, dtype=dtype)) for s in SHAPES] for _ in range(2)
    )
    for a, b, grad in zip(params, torch_params, tensors_like(SHAPES, 3, dtype), strict=True):
        a.grad, b.grad = grad.clone(), grad.clone()
    params.append(nn.Parameter(torch.ones(3, dtype=dtype)))  # without a gradient
    norm = clip_grad_norm_(iter(params), 0.7, p, foreach=foreach)
    expected = torch.nn.utils.clip_grad_norm_(torch_params, 0.7, p)
    assert norm.dtype == expected.dtype
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for a, b in zip(params, torch_params, strict=False):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8)


def test_narrow_gradients_have_a_wide_norm():
    param = nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    (param.grad,) = tensors_like([(64, 64)], 0, torch.bfloat16)
    norm, _ = expected_of([param.grad], 1.0, 2.0)
    norm_before = clip_grad_norm_(param, 1.0)
    assert norm_before.dtype == torch.float32
    assert math.isclose(float(norm_before), norm, rel_tol=1e-6)
    assert param.grad.dtype == torch.bfloat16


def test_small_gradients_stay_and_none_is_zero():
    param = nn.Parameter(torch.zeros(3))
    assert float(clip_grad_norm_([param], 1.0)) == 0.0
    assert float(clip_grad_norm_([], 1.0)) == 0.0
    param.grad = torch.full((3,), 0.1)
    clip_grad_norm_([param], 1.0)
    assert torch.equal(param.grad, torch.full((3,), 0.1))
    with pytest.raises(ValueError, match="norm_type must be above 0"):
        clip_grad_norm_([param], 1.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_norms(bad):
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.tensor([1.0, bad, 2.0])
    with pytest.raises(RuntimeError, match="nothing was clipped"):
        clip_grad_norm_([param], 1.0, error_if_nonfinite=True)
    assert param.grad[0] == 1.0
    assert not clip_grad_norm_([param], 1.0).isfinite()


def partial_and_missing() -> bool:
    """A Partial gradient enters with its sum; a rank without a gradient takes part."""
    mesh = mesh_of((4,))
    param = nn.Parameter(spread(torch.zeros(4, 4), mesh, (R,)))
    ones = torch.ones(4, 4)
    param.grad = DTensor.from_local(ones, mesh, (Partial(),), run_check=False)
    other = nn.Parameter(spread(torch.zeros(4, 4), mesh, (S0,)))
    if dist.get_rank() != 2:
        other.grad = spread(ones, mesh, (S0,))
    norm = clip_grad_norm_([param, other], 1e9)
    return math.isclose(float(norm), math.sqrt(16 * 16 + 12), rel_tol=1e-6)


def test_partial_and_missing_gradients():
    assert all(run_processes(4, partial_and_missing))


def matrices_and_vectors() -> Muon:
    params = [nn.Parameter(w) for w in tensors_like([(6, 4), (5,), (3, 7)], 0)]
    optimizer = Muon(
        [
            {"params": [params[0]]},
            {"params": [params[1]], "algorithm": "adamw"},
            {"params": [params[2]]},
        ]
    )
    for param, grad in zip(params, tensors_like([(6, 4), (5,), (3, 7)], 1), strict=True):
        param.grad = 10 * grad
    return optimizer


@pytest.mark.parametrize("algorithm", ["adamw", "muon", None])
@pytest.mark.parametrize("as_groups", [False, True])
def test_only_gradients_of_the_named_algorithm_are_clipped(algorithm, as_groups):
    optimizer = matrices_and_vectors()
    groups = optimizer.param_groups
    clipped = [p for g in groups if algorithm in (None, g["algorithm"]) for p in g["params"]]
    unclipped = [p for g in groups if algorithm not in (None, g["algorithm"]) for p in g["params"]]
    before = [p.grad.clone() for p in unclipped]
    norm, expected = expected_of([p.grad for p in clipped], 1.0, 2.0)
    norm_before = clip_grad_norm_(groups if as_groups else optimizer, 1.0, algorithm=algorithm)
    assert math.isclose(float(norm_before), norm, rel_tol=1e-6)
    for param, grad in zip(clipped, expected, strict=True):
        torch.testing.assert_close(param.grad, grad.to(param.grad))
    assert all(map(torch.equal, [p.grad for p in unclipped], before))


def test_an_algorithm_needs_param_groups():
    optimizer = matrices_and_vectors()
    params = [p for g in optimizer.param_groups for p in g["params"]]
    with pytest.raises(ValueError, match="needs an optimizer or its param_groups"):
        clip_grad_norm_(params, 1.0, algorithm="adamw")
    with pytest.raises(ValueError, match="must be 'muon', 'adamw' or None"):
        clip_grad_norm_(optimizer, 1.0, algorithm="sgd")


def adamw_alone_on_ranks() -> bool:
    mesh = mesh_of((4,))
    matrix = nn.Parameter(spread(torch.zeros(8, 4), mesh, (S0,)))
    vector = nn.Parameter(spread(torch.zeros(8), mesh, (S0,)))
    optimizer = Muon([{"params": [matrix]}, {"params": [vector], "algorithm": "adamw"}])
    matrix.grad = spread(torch.full((8, 4), 100.0), mesh, (S0,))
    vector.grad = spread(torch.full((8,), 3.0), mesh, (S0,))
    norm = clip_grad_norm_(optimizer, 1.0, algorithm="adamw")
    same = torch.equal(matrix.grad.to_local(), torch.full((2, 4), 100.0))
    return same and math.isclose(float(norm), math.sqrt(72), rel_tol=1e-6)


def test_adamw_alone_on_four_ranks():
    assert all(run_processes(4, adamw_alone_on_ranks))


def test_clipping_that_brings_muon_s_gradients_near_eps_logs_one_warning(caplog):
    clipping._log_near_eps.cache_clear()
    optimizer = matrices_and_vectors()
    clip_grad_norm_(optimizer, 1.0)
    assert caplog.text == ""
    optimizer.param_groups[1]["params"][0].grad[0] = 1e10  # one embedding row diverges
    clip_grad_norm_(optimizer, 1.0)
    assert "brings all gradients of Muon near eps" in caplog.text
    assert "algorithm='adamw'" in caplog.text
    optimizer = matrices_and_vectors()
    optimizer.param_groups[1]["params"][0].grad[0] = 1e10
    caplog.clear()
    clip_grad_norm_(optimizer, 1.0, algorithm="adamw")
    assert caplog.text == ""


def test_the_algorithm_of_other_optimizers_groups_is_recognized():
    layer = nn.Linear(4, 4)
    for param in layer.parameters():
        param.grad = torch.full_like(param, 10.0)
    norm, _ = expected_of([p.grad for p in layer.parameters()], 1.0, 2.0)
    adamw = torch.optim.AdamW(layer.parameters())
    assert math.isclose(float(clip_grad_norm_(adamw, 1e9, algorithm="adamw")), norm, rel_tol=1e-6)
    muon = torch.optim.Muon([layer.weight])
    assert float(clip_grad_norm_(muon, 1e9, algorithm="adamw")) == 0.0
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="neither Muon nor AdamW"):
        clip_grad_norm_(sgd, 1.0, algorithm="adamw")
    for groups in (sgd, group_parameters(layer)):
        assert math.isclose(float(clip_grad_norm_(groups, 1e9)), norm, rel_tol=1e-6)
