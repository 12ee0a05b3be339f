"""Form buckets: matrices moved by one set of collectives, under the memory cap."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from muon_dtensor.layout import Region
from muon_dtensor.planning.owners import Candidate
from muon_dtensor.planning.plan import ParamSpec
from muon_dtensor.planning.schedule import BufferSequence
from muon_dtensor.planning.strategies import Strategy

NUM_OVERLAPPING = 4
"""Number of buckets to form where the cap would allow fewer. The first unshard and the last reshard
overlap with no compute, so four buckets overlap about three quarters of the traffic."""

SMALLEST_NBYTES = 16 * 2**20
"""Buckets are not split below this size for overlap only: the time of a smaller one is mostly
latency (16 MiB take 0.4 ms at 40 GB/s, an all-to-all over 64 ranks starts in about 0.1 ms)."""


OVER_CAP = 1.25
"""If one matrix needs more than the cap, its bucket may need this many times the bytes of that
matrix. Matrices of other owners add little, and in buckets of their own each would leave the links
of the other owners idle."""


@dataclass(frozen=True, slots=True)
class OwnedMatrix:
    """A candidate with its owners and the bytes that it adds to numbered buffers.

    `boxes`: {position: the box that it orthogonalizes}, one or those of a team. `loads`: (buffer,
    place, bytes); bytes of matrices at the same place of a buffer add up. `nbytes`: of the matrix.
    """

    candidate: Candidate
    boxes: Mapping[int, Region]
    loads: tuple[tuple[int, int, int], ...]
    nbytes: int


class BufferBound:
    """An upper bound on the buffer bytes of one bucket on any rank, updated as matrices are added.

    `memory.bucket_peak_nbytes` is exact but visits every rank.
    """

    def __init__(self, sets: Sequence[tuple[int, ...]]) -> None:
        """`sets`: sets of buffers that are live at the same time; see `schedule.live_sets`."""
        self._sets = sets
        self._place_nbytes: dict[tuple[int, int], int] = defaultdict(int)
        self._buffer_nbytes: dict[int, int] = defaultdict(int)

    def of(self, matrices: Iterable[OwnedMatrix]) -> "BufferBound":
        """Return the bound of a bucket of these matrices."""
        bound = BufferBound(self._sets)
        for matrix in matrices:
            bound.add(matrix)
        return bound

    def add(self, matrix: OwnedMatrix) -> None:
        """Add a matrix to the bucket."""
        for buffer, place, nbytes in matrix.loads:
            self._place_nbytes[buffer, place] += nbytes
            self._buffer_nbytes[buffer] = max(
                self._buffer_nbytes[buffer], self._place_nbytes[buffer, place]
            )

    @property
    def nbytes(self) -> int:
        return max(sum(self._buffer_nbytes[buffer] for buffer in live) for live in self._sets)


def owned_matrix(
    candidate: Candidate,
    boxes: Mapping[int, Region],
    spec: ParamSpec,
    *,
    strategy: Strategy,
    sequence: BufferSequence,
    itemsize: int,
) -> OwnedMatrix:
    """Return a matrix with the bytes it adds to each buffer; `itemsize`: of the wire dtype."""
    layout, matrix = spec.momentum_layout, candidate.matrix
    mesh, holders = layout.mesh, layout.holders(matrix.region)
    piece_numel = layout.largest_part(matrix.region)
    # A matrix with several holders counts its largest piece at one place that stands for all homes.
    home = 0 if len(holders) > 1 else mesh.moved(next(iter(holders)), spec.gathered_dims, to=0)
    num_gathered = mesh.num_ranks_along(spec.gathered_dims)
    loads = []
    for buffer, content in enumerate(sequence.contents):
        numels: dict[int, int] = {}
        if content.done is None:
            numels[home] = min(matrix.numel, num_gathered * piece_numel)
        elif set(content.done) >= set(strategy.unshard_dims):
            numels = {position: box.numel for position, box in boxes.items()}
        else:
            numel = min(matrix.numel, mesh.num_ranks_along(content.done) * piece_numel)
            for owner in boxes:
                along = mesh.offset_of(mesh.index_along(owner, content.done), content.done)
                numels[layout.replica_offset(owner) + along] = numel
        for place, numel in numels.items():
            loads.append((buffer, place, itemsize * numel))
    return OwnedMatrix(candidate, boxes, tuple(loads), itemsize * matrix.numel)


def form_buckets(
    matrices: Sequence[OwnedMatrix], empty: BufferBound, cap_nbytes: int
) -> tuple[tuple[tuple[OwnedMatrix, ...], ...], ...]:
    """Return the matrices of one group as waves of buckets.

    Round j holds the j-th costliest matrix of every owner, so that all owners compute at the same
    time. A bucket of one or more complete rounds is a wave. A round over the cap is split into
    several buckets that form one wave: their owners differ, so they compute at the same time.
    """
    total_nbytes = empty.of(matrices).nbytes
    target = min(cap_nbytes, max(SMALLEST_NBYTES, total_nbytes // NUM_OVERLAPPING))
    waves: list[tuple[tuple[OwnedMatrix, ...], ...]] = []
    current: list[OwnedMatrix] = []
    bound = empty.of([])
    for one_round in _rounds(matrices):
        for matrix in one_round:
            bound.add(matrix)
        if bound.nbytes <= target or (not current and bound.nbytes <= cap_nbytes):
            current += one_round
            continue
        if current:
            waves.append((tuple(current),))
        parts = _split_round(one_round, empty, cap_nbytes)
        current, bound = [], empty.of([])
        if len(parts) > 1:
            waves.append(parts)
            continue
        current, bound = list(one_round), empty.of(one_round)
    if current:
        waves.append((tuple(current),))
    return tuple(waves)


def _rounds(matrices: Iterable[OwnedMatrix]) -> list[list[OwnedMatrix]]:
    """Return the costliest matrix of every owner, then the second costliest, and so on."""
    rounds: list[list[OwnedMatrix]] = []
    num_placed: dict[int, int] = defaultdict(int)
    for matrix in sorted(matrices, key=lambda m: (-m.candidate.flops, m.candidate.name)):
        index = max(num_placed[owner] for owner in matrix.boxes)
        for owner in matrix.boxes:
            num_placed[owner] = index + 1
        if index == len(rounds):
            rounds.append([])
        rounds[index].append(matrix)
    return rounds


def _split_round(
    matrices: Sequence[OwnedMatrix], empty: BufferBound, cap_nbytes: int
) -> tuple[tuple[OwnedMatrix, ...], ...]:
    """Return consecutive runs under the cap, or OVER_CAP times what the largest matrix needs."""
    largest = max(max(empty.of([matrix]).nbytes, matrix.nbytes) for matrix in matrices)
    limit = cap_nbytes if largest <= cap_nbytes else OVER_CAP * largest
    runs: list[list[OwnedMatrix]] = []
    bound = empty.of([])
    for matrix in matrices:
        bound.add(matrix)
        if not runs or bound.nbytes > limit:
            runs.append([])
            bound = empty.of([matrix])
        runs[-1].append(matrix)
    return tuple(tuple(run) for run in runs)
