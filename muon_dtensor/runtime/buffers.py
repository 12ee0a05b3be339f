"""The exchange buffers of one rank.

Note [Kept buffers]
    On the host all buffers lie in one block. The block and the views of its slots are kept from
    step to step: pages that the kernel maps again cost as much as packing (12 layers of d = 384 on
    4 ranks: 4,300 page faults and a sixth of a step). On a device buffers are allocated in each
    step: torch's allocator caches the memory, and forward and backward can use it in between.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import Work

from muon_dtensor.planning.buffer_placement import assign_offsets
from muon_dtensor.planning.routes import Packing, RankBucket
from muon_dtensor.planning.schedule import BufferKey, Program, lifetimes
from muon_dtensor.runtime.collectives import finish
from muon_dtensor.runtime.host_link import HostLink
from muon_dtensor.runtime.packing import view_slots
from muon_dtensor.runtime.torch_private import profiler_range

KEPT_ON = ("cpu",)
"""Device types on which buffers are kept."""


class ExchangeBuffers:
    """Provides flat buffers by bucket and number; see Note [Kept buffers]."""

    def __init__(
        self,
        program: Program,
        buckets: Mapping[int, RankBucket],
        kinds: Mapping[int, tuple[torch.dtype, torch.device]],
        links: Mapping[int, HostLink],
    ) -> None:
        """`kinds`: dtype and device of each bucket's buffers. `links`: of offloaded buckets."""
        self._buckets, self._kinds, self._links = buckets, kinds, links
        lives = {key: life for key, life in lifetimes(program).items() if self.are_kept(key[0])}
        sizes = [
            (buckets[bucket].numels[number] * kinds[bucket][0].itemsize, life)
            for (bucket, number), life in lives.items()
        ]
        offsets, self.block_nbytes = assign_offsets(sizes)
        self._offsets = dict(zip(lives, offsets, strict=True))
        self._block: Tensor | None = None
        self._buffers: dict[BufferKey, Tensor] = {}
        self._views: dict[BufferKey, list[Tensor]] = {}

    def are_kept(self, bucket: int) -> bool:
        """Whether the buffers of a bucket use the same memory in every step."""
        return self._kinds[bucket][1].type in KEPT_ON

    def acquire(self, bucket: int, number: int) -> Tensor:
        """Return a buffer at the start of its lifetime, uninitialized."""
        key = bucket, number
        if key in self._buffers:
            return self._buffers[key]
        numel, (dtype, device) = self._buckets[bucket].numels[number], self._kinds[bucket]
        if key not in self._offsets:
            buffer = torch.empty(numel, dtype=dtype, device=device)
            if bucket in self._links:
                self._links[bucket].share(buffer)
            return buffer
        if self._block is None:
            self._block = torch.empty(self.block_nbytes, dtype=torch.uint8)
        start = self._offsets[key]
        buffer = self._block[start : start + numel * dtype.itemsize].view(dtype)
        self._buffers[key] = buffer
        return buffer

    def drop_all(self) -> None:
        """Use new memory from now on. Tensors in use keep the old memory alive."""
        self._block = None
        self._buffers.clear()
        self._views.clear()

    def views(self, bucket: int, number: int, buffer: Tensor, packing: Packing) -> list[Tensor]:
        """Return views of the slots of the buffer of this number; cached for kept buffers."""
        key = bucket, number
        if key not in self._offsets:
            return view_slots(buffer, packing.slots)
        if key not in self._views:
            self._views[key] = view_slots(buffer, packing.slots)
        return self._views[key]


@dataclass(slots=True)
class InFlight:
    """The live tensors of one bucket between its phases; see Note [Three buffers].

    `buffer`: the input of the next phase: `wholes`, later the output of a hop back. `sending`: the
    input of an unfinished collective.
    """

    buffer: Tensor
    sending: Tensor | None = None
    work: Work | None = None
    timeout: timedelta | None = None

    def wait(self) -> None:
        if self.work is not None:
            with profiler_range("muon wait"):
                finish(self.work, self.timeout)
        self.work = self.sending = None
