"""Rounds of islands: equivalences, every layout, wires, delay, faults, checkpoints.

Ranks are threads here, and processes in `test_over_gloo` and for checkpoints.
"""

import math
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from muon_dtensor import CheckpointError, Muon, PlanMismatchError
from muon_dtensor.islands import (
    Bulyan,
    DiLoCo,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NearestNeighbourMixing,
    TrimmedMean,
)
from muon_dtensor.planning.outer import OuterRoute
from muon_dtensor.runtime.dtensors import describe_layout, describe_mesh
from tests.support.cases import spread, tensors_like
from tests.support.pool import run_processes
from tests.support.threads import run_threads

R, S0, S1 = Replicate(), Shard(0), Shard(1)
SHAPES = ((12, 20), (20, 12), (7, 9), (13,), (3, 5, 6))


@dataclass(frozen=True)
class Run:
    """Islands of one layout that train on gradients of their own.

    `num_islands`: along the mesh dim island; `inner`: sizes of the mesh dims of an island.
    """

    num_islands: int
    inner: tuple[int, ...] = (1,)
    placements: tuple = (R,)
    num_steps: int = 6
    outer: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    bad: dict[int, float] = field(default_factory=dict)
    """Islands whose gradients are multiplied by a number."""

    @property
    def num_ranks(self) -> int:
        return self.num_islands * torch.Size(self.inner).numel()


def gradients(step: int, island: int, dtype: torch.dtype) -> list[Tensor]:
    return tensors_like(SHAPES, 1000 * island + step + 1, dtype)


def placed(placements: tuple, ndim: int) -> tuple:
    """The placements for a tensor of fewer dims."""
    return tuple(R if isinstance(p, Shard) and p.dim >= ndim else p for p in placements)


def built(run: Run) -> tuple[list[nn.Parameter], Muon, DiLoCo, int]:
    names = ("island", *"abc"[: len(run.inner)])
    mesh = init_device_mesh("cpu", (run.num_islands, *run.inner), mesh_dim_names=names)
    inner = mesh[names[1:]]
    params = [
        nn.Parameter(spread(w, inner, placed(run.placements, w.ndim)))
        for w in tensors_like(SHAPES, 0, run.dtype)
    ]
    groups = [
        {"params": [(f"layers.{i}.w", p) for i, p in enumerate(params) if p.ndim > 1]},
        {
            "params": [(f"layers.{i}.w", p) for i, p in enumerate(params) if p.ndim == 1],
            "algorithm": "adamw",
        },
    ]
    optimizer = Muon(groups, lr=0.05)
    outer = DiLoCo(optimizer, mesh["island"], **{"sync_every": 3, **run.outer})
    return params, optimizer, outer, mesh["island"].get_local_rank()


def train(run: Run, params: list, optimizer: Muon, island: int, steps: range) -> None:
    for step in steps:
        for param, grad in zip(params, gradients(step, island, run.dtype), strict=True):
            scaled = grad * run.bad.get(island, 1.0)
            param.grad = spread(scaled, param.device_mesh, param.placements)
        optimizer.step()


def gathered(run: Run, params: list) -> list[Tensor]:
    """Full tensors; shards are cut by torch.chunk, so they are concatenated in order."""
    return [p.detach().full_tensor() for p in params]


def result(run: Run) -> tuple[list[Tensor], dict[str, float], str, int]:
    """Train; return full weights, metrics, the plan's text, and planned minus sent bytes."""
    params, optimizer, outer, island = built(run)
    train(run, params, optimizer, island, range(run.num_steps))
    outer.finish()
    rounds = [r for r in range(run.num_steps + 1) if r and outer.plan.sync_every]
    position = dist.get_rank() % (run.num_ranks // run.num_islands)
    planned = sum(
        outer.plan.sent_nbytes(f, position) for r in rounds if (f := outer.plan.at(r)) is not None
    )
    metrics = outer.metrics()
    return gathered(run, params), metrics, str(outer.plan), planned - int(metrics["sent_nbytes"])


def reference(
    run: Run, combine: Any = None, lr: float = 0.9, momentum: float = 0.8
) -> list[Tensor]:
    """The same on one rank in plain torch: mean, float32, no delay, one fragment."""
    islands = []
    for _ in range(run.num_islands):
        params = [nn.Parameter(w) for w in tensors_like(SHAPES, 0, run.dtype)]
        groups = [
            {"params": [p for p in params if p.ndim > 1]},
            {"params": [p for p in params if p.ndim == 1], "algorithm": "adamw"},
        ]
        islands.append((params, Muon(groups, lr=0.05)))
    base = [nn.Parameter(w.float()) for w in tensors_like(SHAPES, 0, run.dtype)]
    outer = torch.optim.SGD(base, lr=lr, momentum=momentum, nesterov=momentum > 0)
    every = run.outer.get("sync_every", 3)
    for step in range(run.num_steps):
        for island, (params, optimizer) in enumerate(islands):
            for param, grad in zip(params, gradients(step, island, run.dtype), strict=True):
                param.grad = grad * run.bad.get(island, 1.0)
            optimizer.step()
        if (step + 1) % every == 0:
            for index, weight in enumerate(base):
                updates = [
                    weight.data.to(run.dtype).float() - params[index].data.float()
                    for params, _ in islands
                ]
                stacked = torch.stack(updates)
                weight.grad = stacked.mean(0) if combine is None else combine(stacked)
            outer.step()
            for params, _ in islands:
                for param, weight in zip(params, base, strict=True):
                    param.data.copy_(weight.data)
    return [weight.data.to(run.dtype) for weight in base]


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-6) -> bool:
    return all(
        torch.allclose(x, y, atol=tolerance, rtol=tolerance) for x, y in zip(a, b, strict=True)
    )


INNER = [
    pytest.param((1,), (R,), id="one"),
    pytest.param((2,), (S0,), id="rows"),
    pytest.param((2,), (S1,), id="cols"),
    pytest.param((3,), (S0,), id="rows-over-3"),
    pytest.param((2, 2), (R, S0), id="hsdp"),
    pytest.param((2, 2), (S0, S1), id="fsdp-tp"),
]


@pytest.mark.parametrize(("inner", "placements"), INNER)
def test_rounds_are_those_of_plain_torch(inner, placements):
    run = Run(3, inner, placements)
    expected = reference(run)
    for weights, metrics, _, difference in run_threads(run.num_ranks, result, run):
        assert close(weights, expected)
        assert difference == 0, "bytes as planned"
        assert (metrics["rounds"], metrics["failed"], metrics["accepted"]) == (2, 0, 6)


@pytest.mark.parametrize("route", ["spread", "everyone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routes(route, dtype):
    run = Run(3, (2,), (S0,), outer={"route": route}, dtype=dtype)
    expected = reference(run)
    for weights, _, plan, difference in run_threads(6, result, run):
        assert close(weights, expected, 1e-6 if dtype == torch.float32 else 2e-2)
        assert difference == 0
        assert ("all_to_all" in plan) == (route == "spread")


def test_one_island_without_momentum_is_the_inner_optimizer():
    run = Run(1, (2,), (S0,), outer={"sync_every": 1, "lr": 1.0, "momentum": 0.0})
    params = [nn.Parameter(w) for w in tensors_like(SHAPES, 0)]
    groups = [
        {"params": [p for p in params if p.ndim > 1]},
        {"params": [p for p in params if p.ndim == 1], "algorithm": "adamw"},
    ]
    optimizer = Muon(groups, lr=0.05)
    for step in range(run.num_steps):
        for param, grad in zip(params, gradients(step, 0, torch.float32), strict=True):
            param.grad = grad
        optimizer.step()
    for weights, *_ in run_threads(2, result, run):
        assert all(map(torch.equal, weights, [p.detach() for p in params]))


def same_gradients(run: Run) -> list[Tensor]:
    """SGD on islands, with an outer step after every inner one: data parallelism."""
    mesh = init_device_mesh("cpu", (run.num_islands,), mesh_dim_names=("island",))
    params = [nn.Parameter(w) for w in tensors_like(SHAPES, 0)]
    optimizer = torch.optim.SGD(params, lr=0.1)
    DiLoCo(optimizer, mesh["island"], sync_every=1, lr=1.0, momentum=0.0)
    for step in range(4):
        for param, grad in zip(
            params, gradients(step, mesh.get_local_rank(), torch.float32), strict=True
        ):
            param.grad = grad
        optimizer.step()
    return [p.detach() for p in params]


def test_the_mean_of_every_step_is_data_parallelism():
    expected = tensors_like(SHAPES, 0)
    for step in range(4):
        grads = [gradients(step, island, torch.float32) for island in range(3)]
        for weight, *parts in zip(expected, *grads, strict=True):
            weight -= 0.1 * sum(parts) / 3
    for weights in run_threads(3, same_gradients, Run(3)):
        assert close(weights, expected)


RULES = [
    "mean",
    "median",
    Median(),
    TrimmedMean(1),
    Krum(1),
    MultiKrum(1),
    Bulyan(1),
    GeometricMedian(),
    NearestNeighbourMixing(1),
]


@pytest.mark.parametrize(
    ("rule", "wire"),
    [
        *((rule, wire) for rule in RULES for wire in ("float32", "int8", "int2")),
        *((rule, wire) for rule in ("mean", Bulyan(1)) for wire in ("float16", "int4")),
    ],
    ids=str,
)
def test_bitwise_the_same_on_every_inner_layout(rule, wire):
    outer = {"reduce": rule, "wire": wire, "clip": 1.0}
    (expected, *_), *_ = run_threads(5, result, Run(5, outer=outer))
    for inner, placements in (((2,), (S0,)), ((2,), (S1,)), ((2, 2), (R, S1))):
        run = Run(5, inner, placements, outer=outer)
        for weights, _, _, difference in run_threads(run.num_ranks, result, run):
            assert all(map(torch.equal, weights, expected))
            assert difference == 0


ODD = ((1, 9), (0, 4), (3, 2), (5,), (2, 3, 4), (1,))


def odd_shards(sizes: tuple, names: tuple, placements: tuple, outer: dict) -> list:
    """Train tensors with uneven and empty shards; return this rank's shards and their boxes."""
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    inner = mesh[tuple(name for name in names if name != "island")]
    params = [
        nn.Parameter(spread(w, inner, placed(placements, w.ndim))) for w in tensors_like(ODD, 0)
    ]
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = torch.optim.SGD([*params, frozen], lr=0.1)
    DiLoCo(optimizer, mesh["island"], sync_every=2, **outer)
    for step in range(4):
        grads = tensors_like(ODD, 10 * mesh["island"].get_local_rank() + step)
        for param, grad in zip(params, grads, strict=True):
            param.grad = spread(grad, param.device_mesh, param.placements)
        optimizer.step()
    results = []
    for param in params:
        layout = describe_layout(param.detach(), describe_mesh(param.device_mesh))
        region = layout.region(layout.mesh.position_of(dist.get_rank()))
        box = tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))
        results.append((param.detach().to_local(), box))
    return results


@pytest.mark.parametrize(
    ("sizes", "names", "placements"),
    [
        ((3, 4), ("island", "dp"), (S0,)),
        ((4, 3), ("dp", "island"), (S1,)),
        ((2, 3, 2), ("dp", "island", "tp"), (S0, S1)),
        ((3, 2, 2, 2), ("island", "r", "dp", "tp"), (R, S0, S0)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "outer",
    [{}, {"wire": "int4"}, {"reduce": "geometric_median", "wire": "int8"}, {"clip": 0.1}],
    ids=str,
)
def test_uneven_and_empty_shards_on_any_mesh(outer, sizes, names, placements):
    whole, *_ = run_threads(3, odd_shards, (3, 1), ("island", "dp"), (R,), outer)
    num_ranks = torch.Size(sizes).numel()
    for shards in run_threads(num_ranks, odd_shards, sizes, names, placements, outer):
        for (shard, box), (full, _) in zip(shards, whole, strict=True):
            assert torch.equal(shard, full[box])


def nothing_to_exchange() -> list[float]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("island",))
    rounds = []
    for param in (nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(2))):
        param.requires_grad = param.numel() == 0
        optimizer = torch.optim.SGD([param], lr=0.1)
        outer = DiLoCo(optimizer, mesh["island"], sync_every=1)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        rounds.append(outer.metrics()["rounds"])
    return rounds


def test_islands_without_elements_or_trainable_parameters():
    assert run_threads(2, nothing_to_exchange) == [[1.0, 1.0]] * 2


@pytest.mark.parametrize(
    ("wire", "tolerance"),
    [("bfloat16", 3e-3), ("float16", 1e-3), ("int8", 1e-2), ("int4", 0.1), ("int2", 0.4)],
)
@pytest.mark.parametrize("route", ["spread", "everyone"])
def test_wires_are_near_float32(wire, tolerance, route):
    run = Run(3, (2,), (S0,), outer={"wire": wire, "route": route}, num_steps=12)
    expected = reference(run)
    start = tensors_like(SHAPES, 0)
    for weights, *_ in run_threads(6, result, run):
        for found, weight, first in zip(weights, expected, start, strict=True):
            assert (found - weight).norm() <= tolerance * (weight - first).norm()


@pytest.mark.parametrize("wire", ["int8", "topk:0.1"])
def test_feedback_keeps_what_a_wire_loses(wire):
    """With the same update in every round the sum of what arrives approaches the sum of updates."""
    distances = {}
    for feedback in (True, False):
        run = Run(2, outer={"wire": wire, "feedback": feedback, "momentum": 0.0}, num_steps=30)
        (weights, *_), *_ = run_threads(2, result, run)
        expected = reference(run, momentum=0.0)
        distances[feedback] = sum(
            float((a - b).norm()) for a, b in zip(weights, expected, strict=True)
        )
    assert distances[True] < distances[False]


def bases(run: Run) -> tuple[list[Tensor], dict[str, float]]:
    """Train; return this rank's shards of the base values."""
    params, optimizer, outer, island = built(run)
    train(run, params, optimizer, island, range(run.num_steps))
    outer.finish()
    return [shard.base for shard in outer._shards], outer.metrics()


@pytest.mark.parametrize("fragments", [1, 2, 3])
@pytest.mark.parametrize("delay", [0, 1, 2])
def test_fragments_and_delay(fragments, delay):
    run = Run(2, (2,), (S0,), num_steps=12, outer={"fragments": fragments, "delay": delay})
    firsts = [3 * (k + 1) // fragments for k in range(fragments)]
    num_rounds = sum(step >= f and (step - f) % 3 == 0 for step in range(1, 13) for f in firsts)
    results = run_threads(4, bases, run)
    for rank, (values, metrics) in enumerate(results):
        assert all(map(torch.equal, values, results[rank % 2][0])), "equal on both islands"
        assert metrics["rounds"] == num_rounds
    for weights, _, _, difference in run_threads(4, result, run):
        assert difference == 0, "bytes as planned"
        if fragments == 1 and delay == 0:
            assert close(weights, reference(run))


def test_a_delayed_result_keeps_what_was_learned_meanwhile():
    """Islands with equal gradients: an outer step of lr 1 without momentum changes nothing."""
    run = Run(2, num_steps=7, outer={"delay": 2, "lr": 1.0, "momentum": 0.0})
    for weights, *_ in run_threads(2, equal_islands, run):
        params = [nn.Parameter(w) for w in tensors_like(SHAPES, 0)]
        optimizer = torch.optim.SGD(params, lr=0.1)
        for step in range(7):
            for param, grad in zip(params, gradients(step, 0, torch.float32), strict=True):
                param.grad = grad
            optimizer.step()
        assert close(weights, [p.detach() for p in params])


def equal_islands(run: Run) -> tuple[list[Tensor]]:
    mesh = init_device_mesh("cpu", (run.num_islands,), mesh_dim_names=("island",))
    params = [nn.Parameter(w) for w in tensors_like(SHAPES, 0)]
    optimizer = torch.optim.SGD(params, lr=0.1)
    outer = DiLoCo(optimizer, mesh["island"], sync_every=3, **run.outer)
    for step in range(run.num_steps):
        for param, grad in zip(params, gradients(step, 0, torch.float32), strict=True):
            param.grad = grad
        optimizer.step()
    outer.finish()
    return ([p.detach() for p in params],)


@pytest.mark.parametrize("rule", ["mean", TrimmedMean(1), Krum(1), Median()], ids=str)
@pytest.mark.parametrize(("inner", "placements"), [((1,), (R,)), ((2,), (S0,))])
def test_an_island_that_is_not_finite_is_dropped_and_takes_over(rule, inner, placements, caplog):
    run = Run(5, inner, placements, bad={2: math.nan}, outer={"reduce": rule})
    # our Muon refuses such gradients: let it propagate them, as a broken island would
    results = run_threads(run.num_ranks, with_propagation, run)
    for weights, metrics, *_ in results:
        assert all(w.isfinite().all() for w in weights)
        assert all(map(torch.equal, weights, results[0][0]))
        assert metrics["dropped"] == 1
    assert "takes over the result" in caplog.text


def with_propagation(run: Run):
    params, optimizer, outer, island = built(run)
    for step in range(3):
        for param, grad in zip(params, gradients(step, island, run.dtype), strict=True):
            param.grad = spread(grad, param.device_mesh, param.placements)
        optimizer.step() if step < 2 else None
    if island in run.bad:
        with torch.no_grad():
            params[0].to_local().mul_(run.bad[island])
    optimizer.step()
    return gathered(run, params), outer.metrics()


def overflowing(run: Run) -> tuple[list[Tensor], dict[str, float]]:
    """The first island changes an element by more than float16 holds."""
    params, optimizer, outer, island = built(run)
    if island == 0:
        params[0].data.to_local()[0, 0] += 1e6
    train(run, params, optimizer, island, range(3))
    return gathered(run, params), outer.metrics()


@pytest.mark.parametrize("route", ["spread", "everyone"])
def test_an_update_that_overflows_the_wire_is_not_finite(route):
    run = Run(3, (2,), (S0,), outer={"wire": "float16", "route": route})
    for weights, metrics in run_threads(6, overflowing, run):
        assert all(w.isfinite().all() for w in weights)
        assert float(weights[0].abs().max()) < 10
        assert metrics["dropped"] == 1


def test_a_round_without_a_result_changes_nothing(caplog):
    run = Run(5, bad={0: math.nan, 1: math.nan, 3: math.nan}, outer={"reduce": TrimmedMean(1)})
    results = run_threads(5, with_propagation, run)
    for index, (weights, metrics) in enumerate(results):
        assert metrics["failed"] == 1
        assert all(w.isfinite().all() for w in weights) == (index not in run.bad)
    assert "a round of islands failed and changed nothing" in caplog.text


def test_noise_has_the_planned_variance_and_differs_between_islands():
    run = Run(
        4,
        num_steps=1,
        outer={"sync_every": 1, "clip": 0.5, "noise_multiplier": 3.0, "lr": 1.0, "momentum": 0.0},
    )
    quiet = Run(4, num_steps=1, outer={**run.outer, "noise_multiplier": 0.0})
    ((noisy, *_), *_), ((calm, *_), *_) = run_threads(4, result, run), run_threads(4, result, quiet)
    noise = torch.cat([(a - b).flatten() for a, b in zip(noisy, calm, strict=True)])
    # each island adds variance (3.0 * 0.5)^2 / 4, the mean of four divides by 4
    assert float(noise.std()) == pytest.approx(3.0 * 0.5 / 4, rel=0.1)
    start = tensors_like(SHAPES, 0)
    moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(calm, start, strict=True)))
    assert moved <= 0.5 + 1e-5


def test_the_noise_of_an_island_is_secret_and_equal_on_its_replicas():
    options = {"sync_every": 1, "clip": 0.5, "noise_multiplier": 3.0, "lr": 1.0, "momentum": 0.0}
    run = Run(2, (2,), (R,), num_steps=1, outer=options)
    first, second = run_threads(4, result, run), run_threads(4, result, run)
    for weights, *_ in first:
        assert all(map(torch.equal, weights, first[0][0])), "replicas and islands stay equal"
    assert not torch.equal(first[0][0][0], second[0][0][0]), "another secret in another run"
    known = Run(2, (2,), (R,), num_steps=1, outer={**options, "seed": 3})
    (a, *_), (b, *_) = run_threads(4, result, known)[0], run_threads(4, result, known)[0]
    assert all(map(torch.equal, a, b))


def test_epsilon_is_that_of_opacus():
    accountants = pytest.importorskip("opacus.accountants")

    def body(run: Run) -> float:
        params, optimizer, outer, island = built(run)
        assert outer.epsilon() == 0
        train(run, params, optimizer, island, range(9))
        return outer.epsilon(1e-5)

    expected = accountants.RDPAccountant()
    for _ in range(3):
        expected.step(noise_multiplier=2.0, sample_rate=1.0)
    options = {"clip": 1.0, "noise_multiplier": 2.0}
    for epsilon in run_threads(2, body, Run(2, outer=options)):
        assert epsilon == pytest.approx(expected.get_epsilon(1e-5))
    assert run_threads(1, body, Run(1, outer={"clip": 1.0})) == [math.inf]

    def without_clip(run: Run) -> None:
        with pytest.raises(ValueError, match="epsilon needs clip"):
            built(run)[2].epsilon()

    run_threads(1, without_clip, Run(1))


def test_clipping_keeps_the_direction():
    clipped = Run(2, num_steps=3, outer={"clip": 0.01})
    (found, *_), *_ = run_threads(2, result, clipped)
    (whole, *_), *_ = run_threads(2, result, Run(2, num_steps=3))
    start = tensors_like(SHAPES, 0)
    a = torch.cat([(x - y).flatten() for x, y in zip(found, start, strict=True)])
    b = torch.cat([(x - y).flatten() for x, y in zip(whole, start, strict=True)])
    assert torch.cosine_similarity(a, b, dim=0) > 0.99
    assert a.norm() < b.norm()


def uneven(run: Run) -> tuple[list[Tensor], dict[str, float]]:
    """Islands that are not equally fast, on a clock."""
    params, optimizer, outer, island = built(run)
    step = 0
    while outer.metrics()["rounds"] < 3:
        train(run, params, optimizer, island, range(step, step + 1))
        step += 1
        torch.ops.aten.sum(torch.ones(10))  # some work
        if island:
            __import__("time").sleep(0.03)
    return gathered(run, params), {**outer.metrics(), "steps": float(step)}


def test_on_a_clock_slow_islands_do_fewer_steps():
    run = Run(2, (2,), (S0,), outer={"sync_every": timedelta(seconds=0.25)})
    results = run_processes(4, uneven, run)
    for weights, metrics in results:
        assert all(map(torch.equal, weights, results[0][0]))
        assert metrics["rounds"] == 3
    assert results[0][1]["steps"] > results[2][1]["steps"]


def weighted(run: Run) -> list[Tensor]:
    params, optimizer, outer, island = built(run)
    for step in range(3):
        outer.add_tokens(1.0 + 3 * island)
        train(run, params, optimizer, island, range(step, step + 1))
    return gathered(run, params)


def test_tokens_weigh_updates():
    expected = reference(Run(2, num_steps=3), combine=lambda x: (x[0] + 4 * x[1]) / 5)
    for weights in run_threads(2, weighted, Run(2)):
        assert close(weights, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_every": 0}, "sync_every must be 1 step or more"),
        ({"sync_every": timedelta(0)}, "sync_every must be above 0"),
        ({"lr": 0}, "lr must be above 0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"fragments": 4}, "fragments must be 1 to 3"),
        ({"delay": 3}, "delay must be 0 to 2 steps"),
        ({"wire": "int3"}, "wire must be one of float32"),
        ({"reduce": "max"}, "reduce must be a rule"),
        ({"reduce": Krum(1)}, "Krum .f=1. needs at least 5 islands for f=1, and there are 2"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"noise_multiplier": 1.0}, "clip must be set if there is noise_multiplier"),
        ({"route": "spread", "wire": "topk:0.1"}, "needs route='everyone'"),
        ({"route": "x"}, "route must be None, 'spread' or 'everyone', got 'x'"),
    ],
    ids=str,
)
def test_wrong_options_raise_before_any_exchange(options, message):
    def body(run: Run) -> str:
        with pytest.raises(ValueError, match=message) as error:
            built(run)
        return str(error.value)

    assert len(set(run_threads(2, body, Run(2, outer=options)))) == 1


def test_more_fragments_than_layers_raise():
    def body(run: Run) -> None:
        with pytest.raises(ValueError, match="fragments=6, but the parameters have 5 blocks"):
            built(run)

    run_threads(2, body, Run(2, outer={"fragments": 6, "sync_every": 9}))


def test_islands_with_other_options_raise():
    def body(run: Run) -> str:
        options = {"momentum": 0.5} if dist.get_rank() else {}
        with pytest.raises(PlanMismatchError) as error:
            built(Run(3, outer=options))
        return str(error.value)

    for message in run_threads(3, body, Run(3)):
        assert "Islands [1, 2] of 3 have another outer plan than island 0" in message


def test_an_island_with_another_base_is_named():
    def body(run: Run) -> str:
        params, optimizer, outer, island = built(run)
        if island == 2:
            outer._shards[1].base[0, 0] += 1e-7
            outer._shards[1].base[0, 0] += 1
        with pytest.raises(PlanMismatchError) as error:
            train(run, params, optimizer, island, range(3))
        return str(error.value)

    for message in run_threads(4, body, Run(4)):
        assert "Islands [2] of 4 hold other base values" in message


def test_an_island_that_sends_different_values_is_found_in_the_next_round():
    """Island 2 sends island 0 other values than the others: from then on island 0 differs."""

    def body(run: Run) -> str:
        params, optimizer, outer, island = built(run)
        exchange = outer._exchanges[0]
        finish = exchange.finish

        def changed(flight):
            exchange._wait(flight)
            if island == 0 and outer._rounds[0] == 0:
                flight.payloads[2].view(torch.float32)[0] += 1
            return finish(flight)

        exchange.finish = changed
        with pytest.raises(PlanMismatchError) as error:
            train(run, params, optimizer, island, range(6))
        assert outer.metrics()["rounds"] == 1
        return str(error.value)

    run = Run(4, outer={"route": "everyone"})
    for message in run_threads(4, body, run):
        assert "Islands [0] of 4 hold other base values, or were sent other values" in message


def test_an_island_in_another_round_is_named():
    def body(run: Run) -> str:
        params, optimizer, outer, island = built(run)
        outer._rounds[0] = int(island == 1)
        with pytest.raises(PlanMismatchError) as error:
            train(run, params, optimizer, island, range(3))
        return str(error.value)

    for message in run_threads(3, body, Run(3)):
        assert "Islands [1] of 3 are in another round" in message


@pytest.mark.parametrize("wire", ["float32", "int8", "topk:0.1"])
@pytest.mark.parametrize("reduce", ["mean", Krum(1)], ids=str)
def test_over_gloo(wire, reduce):
    run = Run(5, outer={"wire": wire, "reduce": reduce})
    expected = run_threads(5, result, run)
    for found, other in zip(run_processes(5, result, run), expected, strict=True):
        assert all(map(torch.equal, found[0], other[0]))
        assert found[3] == 0


def saved(path: str, run: Run, num_steps: int) -> None:
    params, optimizer, outer, island = built(run)
    train(run, params, optimizer, island, range(num_steps))
    dcp.save(checkpoint(params, optimizer, outer, island), checkpoint_id=path)


def checkpoint(params: list, optimizer: Muon, outer: DiLoCo, island: int) -> dict[str, Any]:
    names = [f"p{i}" for i in range(len(params))]
    inner = {name: dict(optimizer.state[p]) for name, p in zip(names, params, strict=True)}
    return {
        "model" + str(island): {n: p.detach() for n, p in zip(names, params, strict=True)},
        "inner" + str(island): inner,
        "outer": outer.state_dict(),
    }


def resumed(path: str, run: Run, steps: range) -> list[Tensor]:
    params, optimizer, outer, island = built(run)
    if outer._delay:  # a checkpoint in flight has values of its own: start one to make a place
        train(run, params, optimizer, island, range(3))
    state = checkpoint(params, optimizer, outer, island)
    dcp.load(state, checkpoint_id=path)
    outer.load_state_dict(state["outer"])
    train(run, params, optimizer, island, steps)
    outer.finish()
    return gathered(run, params)


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("wire", ["float32", "int4"])
def test_checkpoints(tmp_path, wire, delay):
    run = Run(2, (2,), (S0,), num_steps=9, outer={"wire": wire, "delay": delay})
    expected = [weights for weights, *_ in run_processes(4, result, run)]
    path = str(tmp_path / "checkpoint")
    run_processes(4, saved, path, run, 4)
    found = run_processes(4, resumed, path, run, range(4, 9))
    for weights, others in zip(found, expected, strict=True):
        assert all(map(torch.equal, weights, others))


def outer_loaded(path: str, run: Run) -> tuple[list[Tensor], list[Tensor]]:
    _, _, outer, _ = built(run)
    state = {"outer": outer.state_dict()}
    dcp.load(state, checkpoint_id=path, planner=DefaultLoadPlanner(allow_partial_load=True))
    outer.load_state_dict(state["outer"])
    dtensors = state["outer"]["base"].values()
    return [v.full_tensor() for v in dtensors], [s.error for s in outer._shards]


def test_checkpoints_load_on_other_numbers_of_islands_and_layouts(tmp_path):
    path = str(tmp_path / "checkpoint")
    run_processes(4, saved, path, Run(2, (2,), (S0,), outer={"wire": "int8"}), 3)
    expected = None
    for run in (Run(4, outer={"wire": "int8"}), Run(1, (4,), (S1,), outer={"wire": "int8"})):
        for base, errors in run_processes(4, outer_loaded, path, run):
            expected = expected or base
            assert all(map(torch.equal, base, expected))
            assert all(e is not None for e in errors)


def test_state_of_other_parameters_raises():
    def body(run: Run) -> None:
        _, _, outer, _ = built(run)
        state = outer.state_dict()
        wrong = {**state, "base": {**state["base"], "other": torch.ones(1)}}
        with pytest.raises(CheckpointError, match=r"differ in parameters: \['other'\]"):
            outer.load_state_dict(wrong)
        cut = dict(state["base"])
        cut["layers.0.w"] = torch.ones(2, 2)
        with pytest.raises(CheckpointError, match=r"'base' of layers\.0\.w has shards of"):
            outer.load_state_dict({**state, "base": cut})

    run_threads(1, body, Run(1))


def test_the_plan_says_what_is_sent():
    def body(run: Run) -> str:
        return str(built(run)[2].plan)

    for text in run_threads(9, body, Run(9, outer={"reduce": Bulyan(2), "wire": "int8"})):
        assert "9 islands of 1 rank: every 3 steps, 5 parameters in 1 fragment" in text
        assert "warning: Bulyan (f=2) has a guarantee from 11 islands on, and there are 9" in text
        assert "all_gather, everyone combines" in text
    (text, *_) = run_threads(2, body, Run(2, outer={"wire": "topk:0.1"}))
    assert "depends on how the tensors are cut" in text


def test_the_route_with_fewer_bytes_is_chosen():
    def body(run: Run) -> OuterRoute:
        return built(run)[2].plan.route

    for islands, wire, route in ((2, "float32", "everyone"), (4, "float32", "spread")):
        run = Run(islands, outer={"wire": wire})
        assert set(run_threads(islands, body, run)) == {OuterRoute(route)}
    run = Run(4, outer={"reduce": TrimmedMean(1)})
    assert set(run_threads(4, body, run)) == {OuterRoute.EVERYONE}
