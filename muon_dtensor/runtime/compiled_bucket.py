"""One bucket compiled for one rank: every index and batch that is known before the first step."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muon_dtensor.algorithms.update import MatrixSlice
from muon_dtensor.layout import Matrix, Region
from muon_dtensor.planning.plan import DEVICE_BATCH_NUMEL, Action, Assignment, Phase, Plan
from muon_dtensor.planning.routes import Slot, rank_bucket
from muon_dtensor.runtime.packing import Box, IndexedBox, box_of, from_matrix, view_box

HOST_BATCH_NUMEL = 1 << 17
"""Elements per batch on a host: two float32 tensors and one in bfloat16 fit into 2 MiB of cache,
and the copies take longer than the launch."""


@dataclass(frozen=True, slots=True)
class CompiledSlot:
    """A slot of a buffer with its indexers.

    `in_shard`, `in_momentum`: its box in the local shard of parameter `param`, and in that of its
    momentum if that is cut further. `in_matrix`: where its elements lie in the matrix. `region`:
    the box in the parameter.
    """

    param: int
    numel: int
    in_shard: Box | None
    in_momentum: Box | None
    in_matrix: MatrixSlice
    region: Region


@dataclass(frozen=True, slots=True)
class MomentumBox:
    """A box whose momentum is updated: in the local shard of `param`, and in that of its momentum.

    Both are the same unless the momentum is cut further.
    """

    param: int
    in_shard: Box | None
    in_momentum: Box | None


@dataclass(frozen=True, slots=True)
class PackingBatch:
    """Boxes whose momentum is updated, then slots that are filled, by index.

    The slots of one tuple are filled by one call.
    """

    momenta: tuple[MomentumBox, ...]
    slots: tuple[tuple[int, ...], ...]


class CompiledBucket:
    """What one rank does for one bucket of a plan. Holds no tensor of the step.

    `planned`: the bucket of the plan; `local`: this rank's part of it. `shard_device`: of its
    shards; `device`: of its buffers.
    `pieces`, `results`: the slots of the first and of the last buffer.
    `parts`: per owned matrix, the slots of its parts, by index, and their boxes in it.
    `packing`: batches that fill the first buffer.
    `momentum_only`: boxes whose momentum is updated, with no slot in the first buffer.
    `applying`: batches of results, by index.
    """

    def __init__(
        self,
        plan: Plan,
        index: int,
        rank: int,
        devices: Sequence[torch.device],
        buffer_devices: Sequence[torch.device],
    ) -> None:
        """`devices`, `buffer_devices`: see `Executor`."""
        self.index = index
        bucket = plan.buckets[index]
        self.planned, self.mesh = bucket, bucket.mesh
        self.position = bucket.mesh.position_of(rank)
        self.local = rank_bucket(plan, bucket, self.position)
        self.sequence = self.local.sequence
        self.batches = self.local.batches(plan.options)
        kind = bucket.strategy.kind
        self.profiler_names = {
            phase: f"muon {Action(phase, index)} {phase.name.lower()} {kind}" for phase in Phase
        }
        first = bucket.assignments[0].param
        self.shard_device, self.device = devices[first], buffer_devices[first]
        self.is_offloaded = plan.is_offloaded(bucket)
        self.dtype: torch.dtype = getattr(torch, bucket.wire_dtype)
        self._num_iterations = {a.param: plan.spec(a).num_iterations for a in bucket.assignments}
        self._rounds_by_position = {
            a.param
            for a in bucket.assignments
            if self._updates_on_host and plan.spec(a).dtype in ("bfloat16", "float16")
        }
        self.pieces = [self._compile(slot) for slot in self.local.pieces.slots]
        self.results = [self._compile(slot) for slot in self.local.results.slots]
        self.parts = self._parts()
        self.packing, self.momentum_only = self._packing()
        self.applying = self._applying()

    def _compile(self, slot: Slot) -> CompiledSlot:
        matrix, param = self.local.matrices[slot.assignment], slot.assignment.param
        start = slot.region.relative_to(matrix.region).offset_in(matrix.region.shape)
        is_transposed = matrix.rows > matrix.cols and self._num_iterations[param] > 0
        positions: Tensor | None = None
        if param in self._rounds_by_position and not _is_row_major(matrix, slot):
            all_positions = torch.arange(matrix.numel).view(matrix.rows, matrix.cols)
            positions = view_box(
                from_matrix(all_positions, matrix), box_of(slot.region, matrix.region)
            ).reshape(slot.shape)
        return CompiledSlot(
            param,
            slot.region.numel,
            in_shard=box_of(slot.region, self.local.shards[param]),
            in_momentum=self._in_momentum(param, slot.region),
            in_matrix=MatrixSlice(matrix.rows, matrix.cols, start, is_transposed, positions),
            region=slot.region,
        )

    def _in_momentum(self, param: int, region: Region) -> Box | None:
        """Return a box of the momentum; None for all of it, and for results outside of it."""
        shard = self.local.momentum_shards.get(param)
        return None if shard is None or not shard.covers(region) else box_of(region, shard)

    def _parts(self) -> dict[Assignment, tuple[IndexedBox, ...]]:
        parts: dict[Assignment, list[IndexedBox]] = defaultdict(list)
        for index, slot in enumerate(self.local.wholes.slots):
            box = box_of(slot.region, self.local.boxes[slot.assignment])
            parts[slot.assignment].append((index, box))
        return {assignment: tuple(boxes) for assignment, boxes in parts.items()}

    def _packing(self) -> tuple[list[PackingBatch], list[MomentumBox]]:
        slots_of: dict[int, list[int]] = defaultdict(list)
        for index, piece in enumerate(self.pieces):
            slots_of[piece.param].append(index)
        boxes_of: dict[int, list[MomentumBox]] = defaultdict(list)
        for param, region in self.local.momentum_regions:
            in_shard = box_of(region, self.local.shards[param])
            boxes_of[param].append(MomentumBox(param, in_shard, self._in_momentum(param, region)))
        sizes = [piece.numel for piece in self.pieces]
        params = list(slots_of)
        numels = [sum(sizes[index] for index in slots_of[param]) for param in params]
        batches = []
        for in_batch in _cut(range(len(params)), numels, self._max_batch_numel):
            momenta = [box for i in in_batch for box in boxes_of.pop(params[i], [])]
            slots = [index for i in in_batch for index in slots_of[params[i]]]
            cut_slots = tuple(_cut(slots, sizes, self._max_direction_numel))
            batches.append(PackingBatch(tuple(momenta), cut_slots))
        return batches, [box for boxes in boxes_of.values() for box in boxes]

    @property
    def _updates_on_host(self) -> bool:
        return self.shard_device.type == "cpu"

    @property
    def _max_batch_numel(self) -> int:
        """Most elements of one batch: what stays in the cache of a host."""
        return HOST_BATCH_NUMEL if self._updates_on_host else DEVICE_BATCH_NUMEL

    @property
    def _max_direction_numel(self) -> int:
        """Most elements of a direction that is held before its cast; see `planning.memory`."""
        largest = max((piece.numel for piece in self.pieces), default=0)
        return largest if self._updates_on_host else max(largest, DEVICE_BATCH_NUMEL)

    def _applying(self) -> list[tuple[int, ...]]:
        """Matrices of one size are next to each other: one call applies their results."""
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, result in enumerate(self.results):
            by_size[result.in_matrix.rows, result.in_matrix.cols].append(index)
        order = [index for indices in by_size.values() for index in indices]
        sizes = [result.numel for result in self.results]
        return list(_cut(order, sizes, self._max_batch_numel))


def _cut(indices: Iterable[int], sizes: Sequence[int], max_numel: int) -> Iterator[tuple[int, ...]]:
    """Cut indices into runs whose sizes add up to at most `max_numel`; a larger one is alone."""
    batch: list[int] = []
    total = 0
    for index in indices:
        if batch and total + sizes[index] > max_numel:
            yield tuple(batch)
            batch, total = [], 0
        batch.append(index)
        total += sizes[index]
    if batch:
        yield tuple(batch)


def _is_row_major(matrix: Matrix, slot: Slot) -> bool:
    """Whether a view of a slot is a box or an interval of the matrix."""
    shape = matrix.region.shape
    is_box = len(shape) == 1 or shape[-2:] == (matrix.rows, matrix.cols)
    return not matrix.pattern and is_box and len(slot.shape) == len(shape)
