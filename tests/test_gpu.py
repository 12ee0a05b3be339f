"""Tests that need a GPU: `pytest -m gpu`. Skipped without a GPU."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from muon_dtensor import Muon, clip_grad_norm_
from muon_dtensor.algorithms import kernels, newton_schulz
from muon_dtensor.algorithms.distributed_newton_schulz import distributed_newton_schulz
from muon_dtensor.algorithms.newton_schulz import KELLER_JORDAN
from muon_dtensor.runtime.collectives import TeamGroup
from tests.support.cases import tensors_like

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

SHAPES = [(256, 128), (128, 384), (96, 96), (96, 96), (200, 72)]


@pytest.fixture(scope="module", autouse=True)
def _nccl() -> Iterator[None]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def params_and_optimizer(is_sharded: bool, **options: Any) -> tuple[list[nn.Parameter], Muon]:
    """Return parameters with gradients on the GPU, and their optimizer.

    `is_sharded`: DTensors on a mesh of one rank instead of plain tensors.
    """
    mesh = init_device_mesh("cuda", (1, 1), mesh_dim_names=("replica", "shard"))

    def placed(tensor: Tensor) -> Tensor:
        tensor = tensor.cuda()
        return distribute_tensor(tensor, mesh, (Replicate(), Shard(0))) if is_sharded else tensor

    params = [nn.Parameter(placed(w)) for w in tensors_like(SHAPES, 0)]
    for param, grad in zip(params, tensors_like(SHAPES, 1), strict=True):
        param.grad = placed(grad)
    return params, Muon(params, **{"lr": 0.1, **options})


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().to_local() if hasattr(p, "to_local") else p.detach() for p in params]


def changes(is_sharded: bool, num_steps: int = 3, **options: Any) -> list[Tensor]:
    """Return the change of each weight after some steps."""
    params, optimizer = params_and_optimizer(is_sharded, **options)
    before = [value.clone() for value in values(params)]
    for _ in range(num_steps):
        optimizer.step()
    optimizer.state_dict()  # raises deferred errors of masked steps
    return [after - old for after, old in zip(values(params), before, strict=True)]


def assert_close(result: list[Tensor], expected: list[Tensor], min_cosine: float = 0.995) -> None:
    for a, b in zip(result, expected, strict=True):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > min_cosine
        assert a.norm() == pytest.approx(b.norm(), rel=0.03)


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("with_adamw", [False, True])
def test_a_default_step_does_not_synchronize_with_the_gpu(is_sharded, with_adamw):
    params, _ = params_and_optimizer(is_sharded)
    groups: list[dict[str, Any]] = [{"params": params[:-1]}]
    groups.append({"params": params[-1:], "algorithm": "adamw" if with_adamw else "muon"})
    optimizer = Muon(groups)
    for _ in range(2):
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("is_sharded", [False, True])
def test_steps_are_close_to_torch_s(is_sharded):
    params = [nn.Parameter(w.cuda()) for w in tensors_like(SHAPES, 0)]
    before = [param.detach().clone() for param in params]
    oracle = torch.optim.Muon(params, lr=0.1)
    for _ in range(3):
        for param, grad in zip(params, tensors_like(SHAPES, 1), strict=True):
            param.grad = grad.cuda()
        oracle.step()
    expected = [param.detach() - old for param, old in zip(params, before, strict=True)]
    assert_close(changes(is_sharded), expected)
    assert_close(changes(is_sharded, batched=False), expected)


def test_offloaded_momentum_is_pinned_and_changes_no_result():
    expected = changes(True)
    params, optimizer = params_and_optimizer(True, offload_momentum=True)
    for param in params:
        momentum = optimizer.state[param]["momentum_buffer"].to_local()
        assert momentum.device.type == "cpu"
        assert momentum.is_pinned()
    assert all(map(torch.equal, changes(True, offload_momentum=True), expected))
    assert all(map(torch.equal, changes(False, offload_momentum=True), changes(False)))
    optimizer.step()
    torch.cuda.synchronize()
    new_params, loaded = params_and_optimizer(True, offload_momentum=True)
    loaded.load_state_dict(optimizer.state_dict())
    for old, new in zip(params, new_params, strict=True):
        momentum = loaded.state[new]["momentum_buffer"].to_local()
        assert momentum.is_pinned()
        assert torch.equal(momentum, optimizer.state[old]["momentum_buffer"].to_local())


@pytest.mark.parametrize(
    "options",
    [{}, {"bucket_mb": 0.1, "prefetch_count": 2}, {"normuon_beta": 0.95}, {"metrics_every": 1}],
    ids=str,
)
def test_offloaded_weights_are_orthogonalized_on_the_gpu(options):
    """FSDP2's CPUOffloadPolicy over NCCL alone: close to a step of the same model on the GPU."""
    mesh = init_device_mesh("cuda", (1,), mesh_dim_names=("shard",))

    def trained(offload: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(256, 256, bias=False, device="cuda") for _ in range(4)))
        policy = CPUOffloadPolicy() if offload else OffloadPolicy()
        for layer in model:
            fully_shard(layer, mesh=mesh, offload_policy=policy)
        fully_shard(model, mesh=mesh, offload_policy=policy)
        before = [value.clone() for value in values(list(model.parameters()))]
        optimizer = Muon(model.parameters(), lr=0.1, **options)
        assert all(spec.is_offloaded == offload for spec in optimizer.plan.params)
        for step in range(3):
            (batch,) = tensors_like([(64, 256)], 2 + step)
            model(batch.cuda()).square().mean().backward()
            clip_grad_norm_(optimizer, 1e-3)
            optimizer.step()
            optimizer.zero_grad()
        after = values(list(model.parameters()))
        assert {value.device.type for value in after} == {"cpu" if offload else "cuda"}
        return [(new - old).cuda() for new, old in zip(after, before, strict=True)]

    assert_close(trained(True), trained(False))


def test_a_graph_captures_a_step():
    lr = torch.tensor(0.1, device="cuda")
    params, optimizer = params_and_optimizer(True, lr=lr, capturable=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    before = [value.clone() for value in values(params)]
    graph.replay()
    first = [after - old for after, old in zip(values(params), before, strict=True)]
    lr.fill_(0.2)
    before = [value.clone() for value in values(params)]
    graph.replay()
    second = [after - old for after, old in zip(values(params), before, strict=True)]
    for a, b in zip(first, second, strict=True):
        assert b.norm() == pytest.approx(2 * a.norm(), rel=0.2), "replay reads the current lr"


def test_a_graph_requires_capturable():
    _, optimizer = params_and_optimizer(False)
    optimizer.step()
    with (
        pytest.raises(RuntimeError, match="capturable=True"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


def test_a_compiled_iteration_is_close():
    assert_close(changes(False, compile=True), changes(False))


def test_symmetric_kernels_are_close():
    if kernels._symmetric()[0] is None:
        pytest.skip(kernels._symmetric()[1])
    result = changes(False, kernels="symmetric", exact=False)
    assert_close(result, changes(False), min_cosine=0.98)


@pytest.mark.parametrize("shape", [(512, 2048), (2048, 512), (8, 256, 256)])
def test_the_iteration_on_a_gpu_is_close_to_that_on_the_host(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = newton_schulz(x.cuda(), dtype=torch.float32).cpu()
    torch.testing.assert_close(result, newton_schulz(x, dtype=torch.float32), atol=2e-3, rtol=2e-3)


def test_a_team_sums_in_float32_without_waiting():
    """A team of one rank: the products, exchanges and scaling of a slab on the device."""
    (x,) = tensors_like([(128, 512)], 3)
    x = x.cuda().bfloat16()
    world = dist.group.WORLD
    assert world is not None
    team = TeamGroup(world)
    coefficients = [KELLER_JORDAN] * 5
    torch.cuda.set_sync_debug_mode("error")
    try:
        slab = distributed_newton_schulz(
            x.clone(), coefficients, team=team, rows=[range(128)], shares_polynomial=True
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = newton_schulz(x.cpu().float(), dtype=torch.float32)
    alone = newton_schulz(x).cpu().float()
    error, error_alone = ((result - expected).norm() for result in (slab.cpu().float(), alone))
    assert error < 1.1 * error_alone
