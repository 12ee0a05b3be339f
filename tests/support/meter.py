"""Meters of a step: bytes passed to collectives, orthogonalized matrices, flops, live storages."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from muon_dtensor.algorithms import newton_schulz
from muon_dtensor.runtime import collectives
from muon_dtensor.runtime import hyperparameters as muon_options
from muon_dtensor.runtime.torch_private import local_part

_local = threading.local()
_all_to_all_single = dist.all_to_all_single
_all_to_all = dist.all_to_all
_all_gather = dist.all_gather
_isend = dist.isend
_SINGLE = collectives.all_gather_single().__name__
_all_gather_single = getattr(dist, _SINGLE)
_iterate = muon_options.iterate


@dataclass
class Count:
    """Counts of one rank. Bytes that a rank sends to itself are not counted."""

    sent_nbytes: int = 0
    num_matrices: int = 0
    flops: int = 0


def _counted_all_to_all(
    output: Tensor,
    input: Tensor,
    output_splits: list[int] | None = None,
    input_splits: list[int] | None = None,
    **kwargs: Any,
) -> Any:
    count: Count | None = getattr(_local, "count", None)
    # the consistency check exchanges without splits
    if count is not None and input_splits is not None and output_splits is not None:
        to_self = input_splits[dist.get_rank(kwargs["group"])]
        count.sent_nbytes += (sum(input_splits) - to_self) * input.element_size()
        assert len(input) == sum(input_splits), "the splits cover the send buffer"
        assert len(output) == sum(output_splits), "the splits cover the receive buffer"
    return _all_to_all_single(output, input, output_splits, input_splits, **kwargs)


def _counted_list_all_to_all(
    outputs: list[Tensor], inputs: list[Tensor], *, group: Any, **kwargs: Any
) -> Any:
    count: Count | None = getattr(_local, "count", None)
    if count is not None:
        others = [t for rank, t in enumerate(inputs) if rank != dist.get_rank(group)]
        count.sent_nbytes += sum(t.numel() * t.element_size() for t in others)
    return _all_to_all(outputs, inputs, group=group, **kwargs)


def _counted_isend(tensor: Tensor, **kwargs: Any) -> Any:
    count: Count | None = getattr(_local, "count", None)
    if count is not None:
        count.sent_nbytes += tensor.numel() * tensor.element_size()
    return _isend(tensor, **kwargs)


def _counted_all_gather(outputs: list[Tensor], input: Tensor, *, group: Any, **kwargs: Any) -> Any:
    count: Count | None = getattr(_local, "count", None)
    if count is not None:
        count.sent_nbytes += (len(outputs) - 1) * input.numel() * input.element_size()
    return _all_gather(outputs, input, group=group, **kwargs)


def _counted_all_gather_single(output: Tensor, input: Tensor, *, group: Any, **kwargs: Any) -> Any:
    count: Count | None = getattr(_local, "count", None)
    if count is not None:
        count.sent_nbytes += (dist.get_world_size(group) - 1) * input.numel() * input.element_size()
    return _all_gather_single(output, input, group=group, **kwargs)


def _counted_iterate(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    count: Count | None = getattr(_local, "count", None)
    if count is not None:
        count.num_matrices += 1 if x.ndim == 2 else len(x)
    return _iterate(x, *args, **kwargs)


@contextmanager
def counting_flops() -> Iterator[None]:
    """Add torch's flop count of this thread's matrix products to the count."""
    with FlopCounterMode(display=False) as counter:
        yield
    _local.count.flops += counter.get_total_flops()


@contextmanager
def counting() -> Iterator[Count]:
    """Count on this thread. Requires the wrappers of `installed`."""
    _local.count = Count()
    try:
        yield _local.count
    finally:
        del _local.count


@contextmanager
def installed() -> Iterator[None]:
    """Wrap torch's all-to-all and our Newton-Schulz for all threads of this process."""
    with (
        mock.patch.object(dist, "all_to_all_single", _counted_all_to_all),
        mock.patch.object(dist, "all_to_all", _counted_list_all_to_all),
        mock.patch.object(dist, "all_gather", _counted_all_gather),
        mock.patch.object(dist, _SINGLE, _counted_all_gather_single),
        mock.patch.object(dist, "isend", _counted_isend),
        mock.patch.object(muon_options, "iterate", _counted_iterate),
    ):
        yield


class LiveStorages(TorchDispatchMode):
    """Peak bytes of live storages that were allocated or used under this mode.

    Used storages may be older than the mode, as the exchange buffers in host memory are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._ignored: set[int] = set()
        self.peak_nbytes = 0

    def ignore(self, *tensors: Tensor) -> None:
        self._ignored |= {StorageWeakRef(t.untyped_storage()).cdata for t in tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self._ignored:
                    self._storages[reference.cdata] = (reference, storage.nbytes())
        self._storages = {k: v for k, v in self._storages.items() if not v[0].expired()}
        self.peak_nbytes = max(self.peak_nbytes, sum(n for _, n in self._storages.values()))
        return result


MIN_STEPS, MAX_STEPS = 4, 40


def peak_nbytes_of(optimizer: Optimizer, enough: float = math.inf) -> int:
    """Return the peak bytes of a step on this rank without parameters, gradients and momentum.

    A collective. Returns the minimum over several steps, since gloo's threads release sent buffers
    only when they get a core. Takes more steps while the minimum exceeds `enough` on some rank.
    """
    peaks: list[int] = []
    params = [param for group in optimizer.param_groups for param in group["params"]]
    is_over = torch.ones(())
    while len(peaks) < MIN_STEPS or (is_over and len(peaks) < MAX_STEPS):
        meter = LiveStorages()
        for param in params:
            momentum = optimizer.state[param]["momentum_buffer"]
            meter.ignore(*(local_part(t.detach()) for t in (param, param.grad, momentum)))
        with meter:
            optimizer.step()
        peaks.append(meter.peak_nbytes)
        is_over = torch.tensor(float(min(peaks) > enough))
        dist.all_reduce(is_over, op=dist.ReduceOp.MAX)
    return min(peaks)


def workspace_nbytes(rows: int, cols: int) -> int:
    """Return the peak bytes of one matrix in Newton-Schulz, including the matrix."""
    with LiveStorages() as meter:
        newton_schulz(torch.ones(rows, cols, dtype=torch.bfloat16))
    return meter.peak_nbytes
