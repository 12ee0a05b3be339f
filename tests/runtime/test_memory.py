"""Memory of a step beside parameters, gradients and state, measured by live storages."""

from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from muon_dtensor import Muon
from muon_dtensor.planning.memory import bucket_peak_nbytes
from muon_dtensor.runtime import buffers
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.meter import peak_nbytes_of, workspace_nbytes
from tests.support.pool import run_processes

pytestmark = pytest.mark.P1

R, S0, S1 = Replicate(), Shard(0), Shard(1)
F32, BF16 = torch.float32, torch.bfloat16


def peak_of_a_step(
    mesh_shape: tuple[int, ...], placements: Any, bucket_mb: float, prefetch_count: int
) -> tuple[int, int, int, int, int]:
    mesh = mesh_of(mesh_shape)
    shapes = [(96, 64), (64, 96), (64, 64), (128, 64)] * 4
    params = [nn.Parameter(spread(w, mesh, placements)) for w in tensors_like(shapes, 0)]
    optimizer = Muon(params, bucket_mb=bucket_mb, prefetch_count=prefetch_count)
    for param, grad in zip(params, tensors_like(shapes, 1), strict=True):
        param.grad = spread(grad, mesh, placements)
    optimizer.step()
    cost, workspace = optimizer.plan.cost, workspace_nbytes(128, 64)
    planned = cost.buffer_nbytes[dist.get_rank()]
    return (
        peak_nbytes_of(optimizer, enough=planned + workspace),
        planned,
        len(optimizer.plan.buckets),
        max(map(bucket_peak_nbytes, cost.buckets)),
        workspace,
    )


@pytest.mark.parametrize("prefetch_count", [0, 1, 2])
@pytest.mark.parametrize("bucket_mb", [0.08, 0.12, 256])
@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [((4,), (S0,)), ((2, 2), (R, S0)), ((2, 2), (S0, S1)), ((4,), (R,))],
    ids=["fsdp", "hsdp", "fsdp-tp", "ddp"],
)
def test_buffers_stay_under_the_cap(mesh_shape, placements, bucket_mb, prefetch_count):
    outcomes = run_processes(4, peak_of_a_step, mesh_shape, placements, bucket_mb, prefetch_count)
    for peak, planned, num_buckets, largest_bucket, workspace in outcomes:
        cap = bucket_mb * 2**20
        assert largest_bucket <= cap
        assert peak <= (prefetch_count + 2) * cap + workspace
        assert peak <= planned + workspace, "the plan says what a step holds"
        assert peak >= 0.9 * planned, "and does not exaggerate"
        if bucket_mb == 0.08:
            assert num_buckets > 1, "the cap binds"


SHAPES = {
    "small": [(96, 64), (64, 96), (64, 64), (128, 64)] * 4,
    "uneven": [(97, 61)] * 5,
    "one": [(256, 1024)],
    "wide": [(192, 576), (192, 192), (768, 192), (192, 768)] * 2,
    "experts": [(6, 48, 32), (6, 32, 48)],
}

ALL_CELLS = list(product(SHAPES, [None], [F32, BF16]))
SOME_CELLS = [
    ("small", 6, F32),
    ("uneven", None, BF16),
    ("one", None, F32),
    ("wide", 4, BF16),
    ("experts", None, F32),
]
"""Name, maximal number of its shapes, and dtype."""


def peaks_of_steps(
    mesh_shape: tuple[int, ...], placements: Any, options: Any, cells: Any
) -> dict[str, tuple[int, int]]:
    """Return (measured, planned) by shapes and dtype."""
    mesh = mesh_of(mesh_shape)
    peaks = {}
    for name, max_count, dtype in cells:
        shapes = SHAPES[name][:max_count]
        weights, grads = ([t.to(dtype) for t in tensors_like(shapes, seed)] for seed in (0, 1))
        params = [nn.Parameter(spread(weight, mesh, placements)) for weight in weights]
        optimizer = Muon(params, **options)
        for param, grad in zip(params, grads, strict=True):
            param.grad = spread(grad, mesh, placements)
        optimizer.step()
        planned = optimizer.plan.cost.peak_nbytes
        measured = peak_nbytes_of(optimizer, enough=1.05 * max(planned))
        peaks[f"{name} {dtype}"] = (measured, planned[dist.get_rank()])
    return peaks


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": "owned", "bucket_mb": 0.1, "prefetch_count": 2},
        {"strategy": "owned", "ns_dtype": torch.float32, "batched": True},
        {"strategy": "owned_staged"},
    ],
    ids=["auto", "prefetch", "batched", "staged"],
)
@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [((4,), (S0,)), ((2, 2), (R, S0)), ((2, 2), (S0, S1)), ((4,), (R,))],
    ids=["fsdp", "hsdp", "fsdp-tp", "ddp"],
)
@pytest.mark.parametrize(
    "cells",
    [
        pytest.param(SOME_CELLS, id="some"),
        pytest.param(ALL_CELLS, id="all", marks=pytest.mark.slow),
    ],
)
def test_peak_memory_is_predicted(mesh_shape, placements, options, cells):
    """Within 5% on the fullest rank, for all shapes and dtypes."""
    ranks = run_processes(4, peaks_of_steps, mesh_shape, placements, options, cells)
    for cell in ranks[0]:
        measured, planned = (max(values) for values in zip(*(r[cell] for r in ranks), strict=True))
        assert measured == pytest.approx(planned, rel=0.05), cell


def peaks_without_kept_buffers(shapes: Any, options: Any) -> tuple[int, int, list[bool]]:
    """Return (measured, planned, whether parameters equal torch's) if buffers are not kept."""
    mesh = mesh_of((4,))
    with mock.patch.object(buffers, "KEPT_ON", ()):
        params = [nn.Parameter(spread(w, mesh, (S0,))) for w in tensors_like(shapes, 0)]
        optimizer = Muon(params, topology="h100-ib-400", **options)
        unsharded = [nn.Parameter(w) for w in tensors_like(shapes, 0)]
        for param, single, grad in zip(params, unsharded, tensors_like(shapes, 1), strict=True):
            param.grad, single.grad = spread(grad, mesh, (S0,)), grad
        optimizer.step()
        torch.optim.Muon(unsharded).step()
        equal = [
            torch.equal(param.full_tensor(), single)
            for param, single in zip(params, unsharded, strict=True)
        ]
        planned = optimizer.plan.cost.peak_nbytes
        measured = peak_nbytes_of(optimizer, enough=1.05 * max(planned))
    return measured, planned[dist.get_rank()], equal


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(256, 1024)], {}),
        ([(1024, 256)] * 4, {}),
        ([(320, 320)] * 4, {"bucket_mb": 0.05, "prefetch_count": 0}),
    ],
    ids=["one", "tall", "under-a-cap"],
)
def test_the_iteration_uses_the_memory_of_buffers_that_are_not_kept(shapes, options):
    """As on a GPU: the peak is two copies of the matrix, two of its Gram matrix, and the buffers
    of the exchanges."""
    ranks = run_processes(4, peaks_without_kept_buffers, shapes, options)
    measured, planned = (max(values) for values in zip(*((m, p) for m, p, _ in ranks), strict=True))
    assert measured == pytest.approx(planned, rel=0.05)
    assert all(all(equal) for _, _, equal in ranks)
