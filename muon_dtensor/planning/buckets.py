"""Which matrices travel together, under the memory cap."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from muon_dtensor.layout import Layout
from muon_dtensor.planning.owners import Candidate
from muon_dtensor.planning.schedule import BufferSequence
from muon_dtensor.planning.strategies import Strategy

NUM_OVERLAPPING = 4
"""Buckets to aim for where the cap would allow fewer: the exchange of the first and the last
hide behind nothing, so four buckets hide about three quarters of the traffic."""

SMALLEST_NBYTES = 16 * 2**20
"""Below this a bucket's time is mostly latency (16 MiB take 0.4 ms at 40 GB/s, an all-to-all
over 64 ranks starts in about 0.1 ms), so no bucket is split for overlap alone."""


OVER_CAP = 1.25
"""Where one matrix alone needs more than the cap, what its bucket may hold is this times as much:
matrices of other owners add little, and alone each would leave the links of all others idle."""


@dataclass(frozen=True, slots=True)
class OwnedMatrix:
    """A candidate with its owner, and the bytes that it adds to numbered buffers.

    `loads`: (buffer, place, bytes) each. Bytes at one place add up.
    """

    candidate: Candidate
    owner: int
    loads: tuple[tuple[int, int, int], ...]


class BufferBound:
    """An upper bound on the buffers of one bucket on any rank, kept up to date as it grows.

    `memory.bucket_peak_nbytes` is exact and visits every rank; this one adds up matrix by matrix.
    """

    def __init__(self, sets: Sequence[tuple[int, ...]]) -> None:
        """`sets`: of buffers that hold something at the same time; see `schedule.live_sets`."""
        self._sets = sets
        self._places: dict[tuple[int, int], int] = defaultdict(int)
        self._fullest: dict[int, int] = defaultdict(int)

    def of(self, matrices: Iterable[OwnedMatrix]) -> "BufferBound":
        """The bound of a bucket of these matrices."""
        bound = BufferBound(self._sets)
        for matrix in matrices:
            bound.add(matrix)
        return bound

    def add(self, matrix: OwnedMatrix) -> None:
        """Put one more matrix into the bucket."""
        for buffer, place, nbytes in matrix.loads:
            self._places[buffer, place] += nbytes
            self._fullest[buffer] = max(self._fullest[buffer], self._places[buffer, place])

    @property
    def nbytes(self) -> int:
        return max(sum(self._fullest[buffer] for buffer in live) for live in self._sets)


def owned_matrix(
    candidate: Candidate,
    owner: int,
    layout: Layout,
    *,
    strategy: Strategy,
    sequence: BufferSequence,
    itemsize: int,
) -> OwnedMatrix:
    """A matrix with the bytes it adds to each buffer of its bucket; `itemsize` on the wire."""
    mesh, matrix = layout.mesh, candidate.matrix
    holders = layout.holders(matrix.region)
    piece, whole = layout.largest_part(matrix.region), matrix.numel
    # the pieces of a matrix that lies apart are at many homes, and count as one place
    home = 0 if len(holders) > 1 else layout.home(owner)
    replica = layout.replica_offset(owner)
    loads = []
    for buffer, content in enumerate(sequence.contents):
        if content.done is None:
            place, numel = home, piece
        elif set(content.done) >= set(strategy.unshard_dims):
            place, numel = owner, whole
        else:
            place = replica + mesh.offset_of(mesh.index_along(owner, content.done), content.done)
            numel = min(whole, mesh.num_ranks_along(content.done) * piece)
        loads.append((buffer, place, content.copies * itemsize * numel))
    return OwnedMatrix(candidate, owner, tuple(loads))


def deal(
    matrices: Sequence[OwnedMatrix], empty: BufferBound, cap_nbytes: int
) -> tuple[tuple[tuple[OwnedMatrix, ...], ...], ...]:
    """Split the matrices of one group into waves of buckets.

    Round j holds the j-th costliest matrix of every owner, so all owners are busy together.
    A bucket is one or more whole rounds, its own wave. A round over the cap becomes a wave of
    several buckets: their owners differ, so the schedule lets them all compute together.
    """
    everything = empty.of(matrices)
    target = min(cap_nbytes, max(SMALLEST_NBYTES, everything.nbytes // NUM_OVERLAPPING))
    waves: list[tuple[tuple[OwnedMatrix, ...], ...]] = []
    current: list[OwnedMatrix] = []
    bound = empty.of([])
    for level in _rounds(matrices):
        for matrix in level:
            bound.add(matrix)
        if bound.nbytes <= target or (not current and bound.nbytes <= cap_nbytes):
            current += level
            continue
        if current:
            waves.append((tuple(current),))
        parts = _split(level, empty, cap_nbytes)
        current, bound = [], empty.of([])
        if len(parts) > 1:
            waves.append(parts)
            continue
        current, bound = list(level), empty.of(level)
    if current:
        waves.append((tuple(current),))
    return tuple(waves)


def _rounds(matrices: Iterable[OwnedMatrix]) -> list[list[OwnedMatrix]]:
    """The costliest matrix of every owner, then the next costliest, and so on."""
    rounds: list[list[OwnedMatrix]] = []
    num_dealt: dict[int, int] = defaultdict(int)
    for matrix in sorted(matrices, key=lambda m: (-m.candidate.flops, m.candidate.name)):
        turn = num_dealt[matrix.owner]
        num_dealt[matrix.owner] += 1
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(matrix)
    return rounds


def _split(
    level: Sequence[OwnedMatrix], empty: BufferBound, cap_nbytes: int
) -> tuple[tuple[OwnedMatrix, ...], ...]:
    """Consecutive runs under the cap, or near what the largest matrix needs alone."""
    largest = max(empty.of([matrix]).nbytes for matrix in level)
    limit = cap_nbytes if largest <= cap_nbytes else OVER_CAP * largest
    runs: list[list[OwnedMatrix]] = []
    bound = empty.of([])
    for matrix in level:
        bound.add(matrix)
        if not runs or bound.nbytes > limit:
            runs.append([])
            bound = empty.of([matrix])
        runs[-1].append(matrix)
    return tuple(tuple(run) for run in runs)
