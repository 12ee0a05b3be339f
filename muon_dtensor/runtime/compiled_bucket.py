"""One bucket compiled for one rank: everything that is known before the first step."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muon_dtensor.algorithms.update import MatrixSlice
from muon_dtensor.layout import Matrix
from muon_dtensor.planning.plan import DEVICE_BATCH_NUMEL, Action, Assignment, Phase, Plan
from muon_dtensor.planning.routes import Slot, rank_bucket
from muon_dtensor.runtime.packing import Box, Part, box_of, from_matrix, view_box

HOST_BATCH_NUMEL = 1 << 17
"""Elements of two float32 tensors and of one in bfloat16 that fit into 2 MiB of cache, and more
than the time of a launch counts for."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A slot of a buffer and where it lies: in the local shard, and in its matrix."""

    param: int
    slot: Slot
    box: Box | None
    place: MatrixSlice


Run = tuple[int, Box | None]
"""A part of the local shard of a parameter."""


@dataclass(frozen=True, slots=True)
class PackingBatch:
    """Runs whose momentum is due, and then pieces by index: those of a tuple are packed at once."""

    runs: tuple[Run, ...]
    pieces: tuple[tuple[int, ...], ...]


class CompiledBucket:
    """What one rank does for one bucket of a plan, and where. Holds no tensor of the step."""

    def __init__(self, plan: Plan, index: int, rank: int, devices: Sequence[torch.device]) -> None:
        """`devices`: where the local shard of each of `plan.params` lives."""
        self.index = index
        self.bucket = bucket = plan.buckets[index]
        self.position = bucket.mesh.position_of(rank)
        self.local = rank_bucket(plan, bucket, self.position)
        self.sequence = self.local.sequence
        self.batches = self.local.batches(plan.options)
        kind = bucket.strategy.kind
        self.names = {
            phase: f"muon {Action(phase, index)} {phase.name.lower()} {kind}" for phase in Phase
        }
        self.device = devices[bucket.assignments[0].param]
        self.dtype: torch.dtype = getattr(torch, bucket.wire_dtype)
        self._num_iterations = {a.param: plan.spec(a).num_iterations for a in bucket.assignments}
        self._rounding = {
            a.param
            for a in bucket.assignments
            if self.device.type == "cpu" and plan.spec(a).dtype in ("bfloat16", "float16")
        }
        self.pieces = [self._piece(slot) for slot in self.local.pieces.slots]
        self.results = [self._piece(slot) for slot in self.local.results.slots]
        self.parts = self._parts()
        self.packing, self.unpacked = self._packing()
        self.applying = self._applying()

    def _piece(self, slot: Slot) -> Piece:
        matrix, param = self.local.matrices[slot.assignment], slot.assignment.param
        start = slot.region.relative_to(matrix.region).offset_in(matrix.region.shape)
        box = box_of(slot.region, self.local.shards[param])
        is_transposed = matrix.rows > matrix.cols and self._num_iterations[param] > 0
        positions: Tensor | None = None
        if param in self._rounding and not _is_row_major(matrix):
            everything = torch.arange(matrix.numel).view(matrix.rows, matrix.cols)
            positions = view_box(
                from_matrix(everything, matrix), box_of(slot.region, matrix.region)
            ).contiguous()
        place = MatrixSlice(matrix.rows, matrix.cols, start, is_transposed, positions)
        return Piece(param, slot, box, place)

    def _parts(self) -> dict[Assignment, tuple[Part, ...]]:
        """Of what this rank orthogonalizes, the slots by index and where each belongs."""
        parts: dict[Assignment, list[Part]] = defaultdict(list)
        for number, slot in enumerate(self.local.wholes.slots):
            matrix = self.local.matrices[slot.assignment]
            parts[slot.assignment].append((number, box_of(slot.region, matrix.region)))
        return {assignment: tuple(found) for assignment, found in parts.items()}

    def _packing(self) -> tuple[list[PackingBatch], list[Run]]:
        """What is packed, in batches, and the runs of parameters of which nothing is."""
        by_param: dict[int, list[int]] = defaultdict(list)
        for number, piece in enumerate(self.pieces):
            by_param[piece.param].append(number)
        runs: dict[int, list[Run]] = defaultdict(list)
        for param, region in self.local.runs:
            runs[param].append((param, box_of(region, self.local.shards[param])))
        sizes = [piece.slot.region.numel for piece in self.pieces]
        params = list(by_param)
        numels = [sum(sizes[number] for number in by_param[param]) for param in params]
        batches = []
        for taken in _cut(range(len(params)), numels, self._most_at_once):
            due = [run for index in taken for run in runs.pop(params[index], [])]
            numbers = [number for index in taken for number in by_param[params[index]]]
            batches.append(PackingBatch(tuple(due), tuple(_cut(numbers, sizes, self._most_cast))))
        return batches, [run for found in runs.values() for run in found]

    @property
    def _most_at_once(self) -> int:
        """Elements that are worked on in one go: all that stays in the cache of a host."""
        return HOST_BATCH_NUMEL if self.device.type == "cpu" else DEVICE_BATCH_NUMEL

    @property
    def _most_cast(self) -> int:
        """Elements of which the direction is held before it is cast; see `planning.memory`."""
        largest = max((piece.slot.region.numel for piece in self.pieces), default=0)
        return largest if self.device.type == "cpu" else max(largest, DEVICE_BATCH_NUMEL)

    def _applying(self) -> list[tuple[int, ...]]:
        """Results that are applied together, by index: of one size of matrix where they can be."""
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, piece in enumerate(self.results):
            by_size[piece.place.rows, piece.place.cols].append(number)
        numbers = [number for found in by_size.values() for number in found]
        sizes = [piece.slot.region.numel for piece in self.results]
        return list(_cut(numbers, sizes, self._most_at_once))


def _cut(numbers: Iterable[int], sizes: Sequence[int], most: int) -> Iterator[tuple[int, ...]]:
    """Runs of these numbers whose sizes add up to no more than `most`, or that are alone."""
    batch: list[int] = []
    total = 0
    for number in numbers:
        if batch and total + sizes[number] > most:
            yield tuple(batch)
            batch, total = [], 0
        batch.append(number)
        total += sizes[number]
    if batch:
        yield tuple(batch)


def _is_row_major(matrix: Matrix) -> bool:
    """Whether boxes and intervals of a matrix's region are boxes and intervals of the matrix."""
    shape = matrix.region.shape
    return not matrix.pattern and (len(shape) == 1 or shape[-2:] == (matrix.rows, matrix.cols))
