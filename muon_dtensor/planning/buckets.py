"""Which matrices travel together, under the memory cap, and in which order buckets run.

Sees owners, sizes and flops. Does not choose owners or strategies.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from muon_dtensor.planning.ir import Action, Bucket, Phase

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
class Parcel:
    """One matrix as luggage: who owns it, its work, and its `loads`, (buffer, place, bytes) each.

    Loads at one place add up, and those of another buffer are counted by themselves.
    """

    index: int
    owner: int
    flops: int
    name: tuple[str, int]
    loads: tuple[tuple[str, int, int], ...]


Moment = tuple[tuple[int, str], ...]
"""What is held at one moment: so many copies of the fullest place of each buffer."""


@dataclass(slots=True)
class Footprint:
    """A running upper bound on the buffers of one bucket on any rank; see `BucketCost.buffers`."""

    moments: tuple[Moment, ...]
    places: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))
    fullest: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def empty(self) -> "Footprint":
        return Footprint(self.moments)

    def of(self, parcels: Iterable[Parcel]) -> "Footprint":
        """The footprint of a bucket of these parcels."""
        footprint = self.empty()
        for parcel in parcels:
            footprint.add(parcel)
        return footprint

    def add(self, parcel: Parcel) -> None:
        for buffer, place, nbytes in parcel.loads:
            self.places[buffer, place] += nbytes
            self.fullest[buffer] = max(self.fullest[buffer], self.places[buffer, place])

    @property
    def nbytes(self) -> int:
        return max(
            sum(copies * self.fullest[buffer] for copies, buffer in moment)
            for moment in self.moments
        )


def deal(
    parcels: Sequence[Parcel], empty: Footprint, cap_nbytes: int
) -> tuple[tuple[tuple[Parcel, ...], ...], ...]:
    """Split the matrices of one transport into waves of buckets.

    Round j holds the j-th costliest matrix of every owner, so all owners are busy together.
    A bucket is one or more whole rounds, its own wave. A round over the cap becomes a wave of
    several buckets: their owners differ, so the schedule lets them all compute at once.
    """
    everything = empty.of(parcels)
    target = min(cap_nbytes, max(SMALLEST_NBYTES, everything.nbytes // NUM_OVERLAPPING))
    waves: list[tuple[tuple[Parcel, ...], ...]] = []
    current: list[Parcel] = []
    footprint = empty.empty()
    for level in _rounds(parcels):
        for parcel in level:
            footprint.add(parcel)
        if footprint.nbytes <= target or (not current and footprint.nbytes <= cap_nbytes):
            current += level
            continue
        if current:
            waves.append((tuple(current),))
        parts = _split(level, empty, cap_nbytes)
        current, footprint = [], empty.empty()
        if len(parts) > 1:
            waves.append(parts)
            continue
        current, footprint = list(level), empty.of(level)
    if current:
        waves.append((tuple(current),))
    return tuple(waves)


def _rounds(parcels: Iterable[Parcel]) -> list[list[Parcel]]:
    """The costliest matrix of every owner, then the next costliest, and so on."""
    rounds: list[list[Parcel]] = []
    taken: dict[int, int] = defaultdict(int)
    for parcel in sorted(parcels, key=lambda p: (-p.flops, p.name)):
        turn = taken[parcel.owner]
        taken[parcel.owner] += 1
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(parcel)
    return rounds


def _split(
    level: Sequence[Parcel], empty: Footprint, cap_nbytes: int
) -> tuple[tuple[Parcel, ...], ...]:
    """Consecutive runs under the cap, or near what the largest parcel needs by itself."""
    alone = max(empty.of([parcel]).nbytes for parcel in level)
    limit = cap_nbytes if alone <= cap_nbytes else OVER_CAP * alone
    runs: list[list[Parcel]] = []
    footprint = empty.empty()
    for parcel in level:
        footprint.add(parcel)
        if not runs or footprint.nbytes > limit:
            runs.append([])
            footprint = empty.of([parcel])
        runs[-1].append(parcel)
    return tuple(tuple(run) for run in runs)


def schedule(
    buckets: Sequence[Bucket], waves: Sequence[Sequence[int]], prefetch_count: int
) -> tuple[Action, ...]:
    """The order of phases, the same on every rank, so that collectives meet.

    At most `prefetch_count + 1` unshards are unfinished at a time, and while a wave is
    orthogonalized the next `prefetch_count` buckets and the reshard of the one before are in
    flight. With `prefetch_count` 0 nothing is in flight during compute.
    """
    actions: list[Action] = []
    order = [bucket for wave in waves for bucket in wave]
    issued = 0
    resharding: list[int] = []

    def issue_up_to(count: int) -> None:
        nonlocal issued
        while issued < min(count, len(order)):
            actions.append(Action(Phase.UNSHARD, order[issued]))
            issued += 1

    done = 0
    for wave in waves:
        for bucket in wave:
            issue_up_to(done + 1 + prefetch_count)
            if buckets[bucket].unshard:
                actions.append(Action(Phase.WAIT, bucket))
            done += 1
        actions += [Action(Phase.ORTHOGONALIZE, bucket) for bucket in wave]
        for bucket in wave:
            if buckets[bucket].reshard:
                actions.append(Action(Phase.RESHARD, bucket))
            resharding.append(bucket)
            while len(resharding) > min(prefetch_count, 1):
                actions.append(Action(Phase.APPLY, resharding.pop(0)))
    actions += [Action(Phase.APPLY, bucket) for bucket in resharding]
    return tuple(actions)
