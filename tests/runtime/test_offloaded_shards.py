"""Shards on the host of the devices that orthogonalize: bitwise results, and what may overlap.

Without a GPU both sides are the host, and the buckets are copied between two buffers there. Ranks
are threads, and processes in `test_over_gloo`. `fake_device` has a device of its own,
and tests/test_gpu.py a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from muon_dtensor import Muon
from muon_dtensor.optimizer.params import ParameterTable
from muon_dtensor.planning.plan import Phase
from muon_dtensor.planning.report import PlanReport
from muon_dtensor.runtime.host_link import HostLink
from tests.support.cases import Case, compare_in_process, mesh_of, spread, tensors_like
from tests.support.layouts import EVEN, EXPERTS, LAYOUTS, ODD, case, hold_to_plan, run
from tests.support.pool import run_processes
from tests.support.threads import run_threads

R, S0, S1 = Replicate(), Shard(0), Shard(1)


@contextmanager
def offloaded() -> Iterator[None]:
    """Treat the host of a mesh on the host as that of other devices."""

    def is_offloaded(table: ParameterTable, param: Tensor) -> bool:
        return param.ndim > 0

    with mock.patch.object(ParameterTable, "is_offloaded", is_offloaded):
        yield


@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS)
@pytest.mark.parametrize("shapes", [EVEN, ODD], ids=["even", "odd"])
def test_matrices(mesh_shape, placements, shapes):
    with offloaded():
        hold_to_plan(run(case(mesh_shape, shapes, placements)))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"ours": {"bucket_mb": 1e-4, "prefetch_count": 2, "strategy": "owned_staged"}},
        {"ours": {"bucket_mb": 1e-4, "prefetch_count": 0}},
        {"ours": {"async_gpu_parallelism": False}},
        {"ours": {"shard_momentum": True}},
    ],
    ids=["bf16", "staged", "no-prefetch", "sequential", "shard-momentum"],
)
@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS[2::3])
def test_options(mesh_shape, placements, options):
    with offloaded():
        hold_to_plan(run(case(mesh_shape, (*ODD, *EXPERTS), placements, **options)))


def weights_after(placements: Any, options: dict[str, Any]) -> list[Tensor]:
    """Return the shards of this rank after two steps."""
    mesh = mesh_of((2, 2))
    params = [nn.Parameter(spread(w, mesh, placements)) for w in tensors_like(EVEN, 0)]
    optimizer = Muon(params, **options)
    for step in range(2):
        for param, grad in zip(params, tensors_like(EVEN, step + 1), strict=True):
            param.grad = spread(grad, mesh, placements)
        optimizer.step()
    return [param.detach().to_local() for param in params]


@pytest.mark.parametrize(
    "options",
    [
        {"normuon_beta": 0.95},
        {"momentum_bits": 8},
        {"cautious_weight_decay": True},
        {"strategy": "distributed", "exact": False},
        {"orthogonalizer": "polar_express", "metrics_every": 1},
        {"momentum_dtype": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.parametrize("placements", [(R, S0), (S0, S0)], ids=str)
def test_other_options_change_no_bit(options, placements):
    expected = run_threads(4, weights_after, placements, options)
    with offloaded():
        results = run_threads(4, weights_after, placements, options)
    for result, shards in zip(results, expected, strict=True):
        assert all(map(torch.equal, result, shards))


def compare_offloaded(offloaded_case: Case) -> Any:
    with offloaded():
        return compare_in_process(offloaded_case)


@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [
        pytest.param((2, 2), (R, S0)),
        pytest.param((4,), (S1,), marks=pytest.mark.P1),
        pytest.param((3, 2), (S0, S0), marks=pytest.mark.P1),
    ],
    ids=str,
)
def test_over_gloo(mesh_shape, placements):
    ours = {"bucket_mb": 1e-4, "prefetch_count": 2}
    one = case(mesh_shape, (*EVEN, *ODD), placements, ours=ours)
    hold_to_plan(run_processes(one.num_ranks, compare_offloaded, one))


class Streams:
    """A device module whose streams note what must happen before what.

    A stream or event is the set of operations that have finished where it has.
    """

    class Stream:
        def __init__(self) -> None:
            self.finished: set[str] = set()

        def wait_event(self, event: set[str]) -> None:
            self.finished |= event

        def record_event(self) -> set[str]:
            return set(self.finished)

        def synchronize(self) -> None:
            """The host waits, which is no order between streams."""

    def __init__(self) -> None:
        self._main = self._current = Streams.Stream()
        self.before: dict[str, set[str]] = {}

    def current_stream(self) -> "Streams.Stream":
        return self._current

    @contextmanager
    def stream(self, stream: "Streams.Stream") -> Iterator[None]:
        previous, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = previous

    def queue(self, operation: str) -> None:
        """Queue an operation in the current stream."""
        self.before[operation] = set(self._current.finished)
        self._current.finished.add(operation)


def test_copies_overlap_with_other_buckets_and_wait_for_their_own():
    """By the streams in which a step of three buckets on one rank queues its work."""
    streams = Streams()

    class Link(HostLink):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self._device_module = streams
            self._stream = Streams.Stream()

        @contextmanager
        def phase(self, bucket: int, phase: Phase) -> Iterator[None]:
            with super().phase(bucket, phase):
                if phase is Phase.APPLY:
                    streams.queue(f"download {bucket}")
                yield
                if phase is Phase.UNSHARD:
                    streams.queue(f"upload {bucket}")
                if phase is Phase.ORTHOGONALIZE:
                    streams.queue(f"compute {bucket}")

        def share(self, buffer: Tensor) -> None: ...

        def host_buffer(self, buffer: Tensor) -> Tensor:
            return torch.empty_like(buffer)

    params = [nn.Parameter(w) for w in tensors_like([(8, 16)] * 3, 0)]
    for param in params:
        param.grad = torch.ones_like(param)
    with offloaded(), mock.patch("muon_dtensor.runtime.executor.HostLink", Link):
        optimizer = Muon(params, bucket_mb=1e-4)
        assert len(optimizer.plan.buckets) == 3
        optimizer.step()
    before = streams.before
    assert len(before) == 9
    for bucket in range(3):
        assert f"upload {bucket}" in before[f"compute {bucket}"]
        assert f"compute {bucket}" in before[f"download {bucket}"]
    for bucket in range(2):
        assert f"compute {bucket}" not in before[f"upload {bucket + 1}"]
        assert f"compute {bucket + 1}" not in before[f"download {bucket}"]


def test_the_plan_says_what_is_offloaded():
    params = [("w", nn.Parameter(torch.zeros(8, 16)))]
    with offloaded():
        report = Muon(params).plan
    assert report.params[0].is_offloaded
    again = PlanReport.from_json(report.to_json())
    assert again.plan == report.plan
    assert report.digest != Muon(params).plan.digest
    assert "host" not in str(Muon(params).plan)
    assert "offloaded weights: up to 256 B a rank copied to the device, 256 B back" in str(report)
