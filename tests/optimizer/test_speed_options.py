"""Options that save time or memory: which results they change, and which not."""

import copy
import dataclasses
import gc
import logging
import pickle
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from muon_dtensor import GroupOptionError, Muon, StepFailedError
from muon_dtensor.algorithms import kernels as bodies
from muon_dtensor.algorithms import newton_schulz
from muon_dtensor.optimizer import planned_step as prepared
from muon_dtensor.planning.plan import EXACT_STRATEGIES
from muon_dtensor.runtime.hyperparameters import MuonOptions
from muon_dtensor.runtime.local_param import LocalParam
from muon_dtensor.runtime.torch_private import on_host
from tests.support.cases import Case, compare_with_oracle, mesh_of, spread, tensors_like
from tests.support.meter import installed
from tests.support.pool import run_processes
from tests.support.threads import run_threads

R, S0, S1 = Replicate(), Shard(0), Shard(1)
SHAPES = [(24, 16), (16, 40), (33, 17), (8, 8), (5, 12)]


def stepped(
    layout: tuple[tuple[int, ...], Any] | None, num_steps: int = 3, **options: Any
) -> tuple[list[Tensor], Muon]:
    """Return full weights after some steps, and the optimizer; without a layout on one rank."""

    def placed(tensor: Tensor) -> Tensor:
        return tensor.clone() if layout is None else spread(tensor, mesh, layout[1])

    mesh = None if layout is None else mesh_of(layout[0])
    params = [nn.Parameter(placed(w)) for w in tensors_like(SHAPES, 0)]
    optimizer = Muon(params, **{"lr": 0.1, **options})
    for step in range(num_steps):
        for param, grad in zip(params, tensors_like(SHAPES, step + 1), strict=True):
            param.grad = placed(grad)
        optimizer.step()
    tensors = [p.detach() for p in params]
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in tensors], optimizer


LAYOUTS = [((4,), (S0,)), ((4,), (R,)), ((2, 2), (R, S0)), ((2, 2), (S1, S0)), ((4,), (S1,))]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_momentum_in_bfloat16_is_the_same_on_every_layout(layout, nesterov):
    options = {"momentum_dtype": torch.bfloat16, "nesterov": nesterov}
    expected, single = stepped(None, **options)
    full, _ = stepped(None, nesterov=nesterov)
    for weights, optimizer in run_threads(4, partial(stepped, layout, **options)):
        assert all(map(torch.equal, weights, expected))
        momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
        assert {m.dtype for m in momenta} == {torch.bfloat16}
    assert not all(map(torch.equal, expected, full)), "bfloat16 must round"
    for a, b, start in zip(expected, full, tensors_like(SHAPES, 0), strict=True):
        assert torch.cosine_similarity((a - start).flatten(), (b - start).flatten(), dim=0) > 0.98
    resumed = Muon(single.param_groups[0]["params"], **options)
    resumed.load_state_dict(single.state_dict())
    for old, new in zip(single.state.values(), resumed.state.values(), strict=True):
        assert torch.equal(old["momentum_buffer"], new["momentum_buffer"])
        assert new["momentum_buffer"].dtype == torch.bfloat16


def saved_and_loaded(path: str) -> bool:
    _, saved = stepped(((4,), (S0,)), momentum_dtype=torch.bfloat16)
    _, loaded = stepped(((4,), (S0,)), 1, momentum_dtype=torch.bfloat16)
    dcp.save({"optimizer": saved.state_dict()}, checkpoint_id=path)
    state = {"optimizer": loaded.state_dict()}
    dcp.load(state, checkpoint_id=path)
    loaded.load_state_dict(state["optimizer"])
    pairs = zip(saved.state.values(), loaded.state.values(), strict=True)
    momenta = [(a["momentum_buffer"], b["momentum_buffer"]) for a, b in pairs]
    return all(a.dtype == b.dtype == torch.bfloat16 and a.equal(b) for a, b in momenta)


def test_a_checkpoint_keeps_momentum_in_bfloat16(tmp_path):
    assert run_processes(4, saved_and_loaded, str(tmp_path)) == [True] * 4


def actions_and_adamw(with_muon: bool) -> list[str]:
    mesh = mesh_of((4,))
    shapes = [*SHAPES, (7, 3)] if with_muon else [(7, 3)]
    params = [nn.Parameter(spread(w, mesh, (S0,))) for w in tensors_like(shapes, 0)]
    for param, grad in zip(params, tensors_like(shapes, 1), strict=True):
        param.grad = spread(grad, mesh, (S0,))
    groups: list[dict[str, Any]] = [{"params": params[-1:], "algorithm": "adamw"}]
    if with_muon:
        groups.append({"params": params[:-1]})
    optimizer = Muon(groups, bucket_mb=0.002, strategy="owned")
    before = params[-1].detach().full_tensor().clone()
    actions: list[str] = []
    act, adamw = optimizer._planned_step.executor._act, prepared.adamw_step

    def record_action(action: Any, *args: Any) -> None:
        actions.append(str(action))
        act(action, *args)

    def stepping(*args: Any) -> None:
        actions.append("adamw")
        adamw(*args)

    optimizer._planned_step.executor._act = record_action
    prepared.adamw_step = stepping
    try:
        optimizer.step()
    finally:
        prepared.adamw_step = adamw
    assert not torch.equal(before, params[-1].detach().full_tensor())
    return actions


@pytest.mark.parametrize("with_muon", [True, False])
def test_adamw_steps_while_the_first_exchanges_are_in_flight(with_muon):
    for actions in run_processes(4, actions_and_adamw, with_muon):
        assert actions.count("adamw") == 1 + with_muon, "once for each group"
        first = actions.index("adamw")
        if with_muon:
            assert first == 2, "after the exchanges of the first bucket and the prefetched one"
            assert all(action.startswith("U") for action in actions[:first])
            assert actions[first + 2].startswith("W")


def failing_once(layout: Any) -> tuple[list[Tensor], list[Tensor], bool]:
    """Return weights after a failed and a successful step, those of a new optimizer, and whether
    the failed step dropped its buffers."""
    fails = [True]

    def orthogonalizer(x: Tensor) -> Tensor:
        if fails and x.shape[-2:] == (33, 17):
            fails.clear()
            raise ArithmeticError("once")
        return newton_schulz(x)

    mesh = mesh_of(layout[0])
    results = []
    held: list[Any] = []
    for _ in range(2):
        params = [nn.Parameter(spread(w, mesh, layout[1])) for w in tensors_like(SHAPES, 0)]
        options = {"strategy": "owned", "bucket_mb": 0.002, "lr": 0.1, "momentum": 0.0}
        fails[:] = []
        optimizer = Muon(params, orthogonalizer=orthogonalizer, **options)
        fails[:] = [True] * (not results)
        for param, grad in zip(params, tensors_like(SHAPES, 1), strict=True):
            param.grad = spread(grad, mesh, layout[1])
        if not results:
            saved = copy.deepcopy(optimizer.state_dict())
            with pytest.raises(StepFailedError, match=r"phase O. \(orthogonalize\): once"):
                optimizer.step()
            executor = optimizer._planned_step.executor
            held = [executor._buffers._block, *executor._buffers._buffers, *executor._in_flight]
            for action in (optimizer.step, optimizer.state_dict, partial(pickle.dumps, optimizer)):
                with pytest.raises(StepFailedError, match="failed halfway: some parameters"):
                    action()
            optimizer.load_state_dict(saved)
            for param, start in zip(params, tensors_like(SHAPES, 0), strict=True):
                param.detach().to_local().copy_(spread(start, mesh, layout[1]).to_local())
        optimizer.step()
        results.append([p.detach().full_tensor() for p in params])
    return results[0], results[1], held == [None]


def test_a_failed_step_drops_its_buffers():
    """On one rank, since other ranks would wait for the failed one."""
    for weights, expected, is_forgotten in run_threads(1, failing_once, ((1,), (S0,))):
        assert all(map(torch.equal, weights, expected))
        assert is_forgotten


def profiled_ranges() -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        stepped(((4,), (S0,)), 1, strategy="owned")
    return {event.key for event in profiler.key_averages() if event.key.startswith("muon ")}


def test_a_profile_shows_the_plan():
    expected = {f"muon {phase} owned" for phase in ("U0 unshard", "W0 wait", "O0 orthogonalize")}
    for ranges in run_processes(4, profiled_ranges):
        assert ranges == expected | {"muon R0 reshard owned", "muon A0 apply owned", "muon wait"}


def grown() -> dict[str, int]:
    """Return the growth over 1,000 steps, after 500 that fill Python's free lists."""
    mesh = mesh_of((2, 2))
    shapes = [(8, 6), (6, 12), (5, 5), (7, 3)]
    params = [nn.Parameter(spread(w, mesh, (R, S0))) for w in tensors_like(shapes, 0)]
    optimizer = Muon([{"params": params[:3]}, {"params": params[3:], "algorithm": "adamw"}])
    grads = [spread(grad, mesh, (R, S0)) for grad in tensors_like(shapes, 1)]

    def steps(num: int) -> None:
        for _ in range(num):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer.step()

    def held() -> dict[str, int]:
        gc.collect()
        objects = gc.get_objects()
        tensors = [o for o in objects if type(o) in (Tensor, nn.Parameter)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return {
            "objects": len(objects),
            "bytes of storages": sum(storages.values()),
            "blocks of Python": sys.getallocatedblocks(),
        }

    def settled() -> dict[str, int]:
        """Return the minima of several readings: gloo's threads free sent data once they run."""
        readings = []
        for _ in range(5):
            dist.barrier()
            time.sleep(0.02)
            readings.append(held())
        return {name: min(reading[name] for reading in readings) for name in readings[0]}

    steps(500)
    before = settled()
    steps(1000)
    after = settled()
    return {name: after[name] - before[name] for name in before}


def test_a_thousand_steps_leak_nothing():
    for growth in run_processes(4, grown):
        assert growth["objects"] < 100, "less than one in ten steps"
        assert growth["bytes of storages"] == 0
        assert growth["blocks of Python"] < 800, "less than one a step: free lists settle slowly"


class Reads(TorchDispatchMode):
    """Counts how often the host reads a value of a tensor."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("adjust_lr_fn", [None, "match_rms_adamw"])
def test_a_capturable_step_does_not_read_a_tensor_lr(adjust_lr_fn):
    options: dict[str, Any] = {"weight_decay": 0.3, "adjust_lr_fn": adjust_lr_fn}
    params = [nn.Parameter(w) for w in tensors_like(SHAPES, 0)]
    for param, grad in zip(params, tensors_like(SHAPES, 1), strict=True):
        param.grad = grad

    def reads(**more: Any) -> int:
        optimizer = Muon(params, **options, **more)
        # as_text reads lr, so that ranks compare it; on a GPU it does not
        with mock.patch.object(prepared, "as_text", return_value=""), Reads() as mode:
            optimizer.step()
        return mode.num

    by_number = reads(lr=0.1)
    assert reads(lr=torch.tensor(0.1), capturable=True) == by_number
    assert reads(lr=torch.tensor(0.1)) > by_number
    expected, _ = stepped(None, **options)
    weights, _ = stepped(None, lr=torch.tensor(0.1), capturable=True, **options)
    for a, b in zip(weights, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_symmetric_kernels_raise_if_requested_and_log_once_with_auto(caplog):
    bodies._symmetric.cache_clear()
    bodies._log_fallback.cache_clear()
    with pytest.raises(GroupOptionError, match="set exact=False"):
        stepped(None, kernels="auto")
    with pytest.raises(GroupOptionError, match="pip install gram-newton-schulz"):
        stepped(None, kernels="symmetric", exact=False)
    with pytest.raises(GroupOptionError, match="one of torch, auto, symmetric"):
        stepped(None, kernels="triton", exact=False)
    with caplog.at_level(logging.INFO, logger="muon_dtensor"):
        weights, _ = stepped(None, kernels="auto", exact=False)
        stepped(None, kernels="auto", exact=False)
    lines = [r.getMessage() for r in caplog.records if "symmetric" in r.getMessage()]
    assert len(lines) == 1
    assert "torch's matrix products" in lines[0]
    assert all(map(torch.equal, weights, stepped(None)[0]))


class _Package:
    """A mock of gram-newton-schulz, which needs a Hopper GPU. It computes in float64."""

    calls: list[tuple[Any, Any]]

    def __init__(self) -> None:
        self.calls = []

    def GramNewtonSchulz(  # noqa: N802
        self,
        ns_coefficients: Any,
        gram_newton_schulz_reset_iterations: Any,
        compile_kwargs: Any = {"mode": "reduce-overhead"},  # noqa: B006  (as in that package)
    ) -> Callable[[Tensor], Tensor]:
        assert compile_kwargs == {"fullgraph": True}, "no CUDA graphs under a step"
        self.calls.append((ns_coefficients, gram_newton_schulz_reset_iterations))

        def run(x: Tensor) -> Tensor:
            assert x.ndim == 3, "the package takes batches"
            wide = x.double()
            for a, b, c in ns_coefficients:
                gram = wide @ wide.mT
                wide = a * wide + (b * gram + c * gram @ gram) @ wide
            return wide.half()

        return run


def test_symmetric_kernels_give_the_result_of_newton_schulz():
    package = _Package()
    bodies._symmetric.cache_clear()
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(bodies.importlib, "import_module", return_value=package),
    ):
        body = bodies.kernel_of("symmetric", compiles=False)
    bodies._symmetric.cache_clear()
    for shape in ((12, 20), (20, 12), (3, 8, 16)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        result = newton_schulz(x, dtype=torch.float32, body=body)
        torch.testing.assert_close(
            result, newton_schulz(x, dtype=torch.float32), atol=2e-3, rtol=2e-3
        )
    assert [restarts for _, restarts in package.calls] == [[2]], "one for each set of coefficients"


def test_speed_options_are_checked():
    with pytest.raises(GroupOptionError, match="momentum_dtype must be one of"):
        stepped(None, momentum_dtype=torch.int8)
    with pytest.raises(GroupOptionError, match="True or False"):
        stepped(None, offload_momentum=1)
    with pytest.raises(GroupOptionError, match="capturable must be True or False"):
        stepped(None, capturable="yes")
    with pytest.raises(GroupOptionError, match="compile that one yourself"):
        stepped(None, compile=True, orthogonalizer=lambda x: x)


def test_offload_momentum_has_no_effect_on_the_host():
    weights, optimizer = stepped(None, offload_momentum=True)
    assert all(map(torch.equal, weights, stepped(None)[0]))
    buffer = optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"]
    assert on_host(buffer) is buffer


@pytest.mark.parametrize("strategy", EXACT_STRATEGIES[1:])
@pytest.mark.parametrize(
    ("mesh_shape", "placements"), [((2, 2), (R, S0)), ((2, 2), (S0, S1)), ((4,), (R,))], ids=str
)
def test_offloaded_momenta_are_copied_back(mesh_shape, placements, strategy):
    """Simulates momenta on the host and parameters on a GPU, with copies instead of moves."""
    case = Case(
        mesh_shape,
        tuple((shape, placements) for shape in ((13, 7), (8, 16), (0, 4))),
        ours={"strategy": strategy, "bucket_mb": 1e-4},
    )

    def copied(local: LocalParam) -> LocalParam:
        return dataclasses.replace(local, momentum_buffer=local.momentum_buffer.clone())

    with (
        installed(),
        mock.patch.object(LocalParam, "is_momentum_elsewhere", True),
        mock.patch.object(LocalParam, "with_momentum", copied),
    ):
        outcomes = run_threads(4, compare_with_oracle, case)
    assert [outcome.differences for outcome in outcomes] == [[]] * 4


@pytest.mark.slow
def test_a_compiled_iteration_is_close():
    expected, _ = stepped(None)
    weights, _ = stepped(None, compile=True)
    for a, b, start in zip(weights, expected, tensors_like(SHAPES, 0), strict=True):
        torch.testing.assert_close(a - start, b - start, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("bucket_mb", [256, 0.004])
def test_batches_are_bounded(bucket_mb):
    """Experts of one size are stacked, up to the size of a bucket."""
    largest: list[int] = []
    original = MuonOptions.polar_factor

    def noting(options: MuonOptions, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        largest.append(len(x))
        return original(options, x, *args, **kwargs)

    with mock.patch.object(MuonOptions, "polar_factor", noting):
        param = nn.Parameter(tensors_like([(12, 16, 24)], 0)[0])
        param.grad = tensors_like([(12, 16, 24)], 1)[0]
        optimizer = Muon([param], batched=True, bucket_mb=bucket_mb)
        optimizer.step()
    num = max(1, int(bucket_mb * 2**20) // (2 * 16 * 24))
    assert max(largest) == min(12, num)
    assert dist.is_initialized() is False


def test_a_batch_holds_matrices_of_one_size():
    shapes = [(8, 4), (8, 6), (8, 4), (6, 8), (8, 8), (4, 8), (8, 6)]
    results = []
    for batched in (True, False):
        params = [nn.Parameter(w) for w in tensors_like(shapes, 0)]
        for param, grad in zip(params, tensors_like(shapes, 1), strict=True):
            param.grad = grad
        Muon(params, lr=1.0, batched=batched, ns_dtype=torch.float32).step()
        results.append([param.detach() for param in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
