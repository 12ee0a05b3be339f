"""Copies between offloaded shards on the host and the exchange buffers of their device.

Note [Offloaded shards]
    FSDP2's CPUOffloadPolicy keeps weights, gradients and momenta on the host of a GPU's mesh. The
    host packs a bucket's directions into pinned memory. They are copied to the device, exchanged
    and orthogonalized there like all others, and the host applies the results. Copies and the
    exchanges next to them are queued in a stream of their own, so that those of one bucket overlap
    with the orthogonalization of another. The phases of one bucket wait for each other by events.
    Both streams use the buffers of these buckets, which `share` records for torch's allocator.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from muon_dtensor.planning.plan import Phase
from muon_dtensor.runtime.torch_private import is_accelerator

IN_LINK_STREAM = (Phase.UNSHARD, Phase.PASS_ON, Phase.APPLY)
"""Phases that copy, or exchange results while other buckets are orthogonalized."""


class HostLink:
    """Copies between the host and one device; see Note [Offloaded shards].

    On a device without streams, and on the host, where only tests use it, copies are synchronous.
    """

    def __init__(self, device: torch.device) -> None:
        self._device_module: Any = None  # torch.cuda, or the module of another accelerator
        if is_accelerator(device):
            module = torch.get_device_module(device)
            self._device_module = module if hasattr(module, "Stream") else None
        if self._device_module is not None:
            self._stream = self._device_module.Stream()
            self._main = self._device_module.current_stream()
        self._done: dict[int, Any] = {}  # per bucket, the event at the end of its last phase

    @contextmanager
    def phase(self, bucket: int, phase: Phase) -> Iterator[None]:
        """Queue a phase in its stream, after the phase before it of the same bucket."""
        if self._device_module is None:
            yield
            return
        self._main = self._device_module.current_stream()
        is_here = phase in IN_LINK_STREAM
        with self._device_module.stream(self._stream) if is_here else nullcontext():
            stream = self._stream if is_here else self._main
            done = self._done.pop(bucket, None)
            if done is not None and phase is not Phase.UNSHARD:
                stream.wait_event(done)
            yield
            if phase is not Phase.APPLY:
                self._done[bucket] = stream.record_event()

    def share(self, buffer: Tensor) -> None:
        """Keep the memory of a new buffer until both streams have used it."""
        if self._device_module is not None:
            buffer.record_stream(self._stream)
            buffer.record_stream(self._main)

    def host_buffer(self, buffer: Tensor) -> Tensor:
        """Return pinned host memory of the size and dtype of a buffer."""
        return torch.empty_like(buffer, device="cpu", pin_memory=self._device_module is not None)

    def upload(self, host_buffer: Tensor, buffer: Tensor) -> None:
        """Copy to the device, in the link's stream. The host does not wait."""
        buffer.copy_(host_buffer, non_blocking=self._device_module is not None)

    def download(self, buffer: Tensor) -> Tensor:
        """Return a copy on the host, in the link's stream, and wait for it."""
        host_buffer = self.host_buffer(buffer)
        host_buffer.copy_(buffer, non_blocking=self._device_module is not None)
        if self._device_module is not None:
            self._stream.synchronize()
        return host_buffer
