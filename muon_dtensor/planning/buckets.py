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


@dataclass(frozen=True, slots=True)
class Parcel:
    """One owned matrix as luggage. `nbytes` and `piece_nbytes` (the largest piece) on the wire.

    `replica` and `home` tell where its owner sits. A matrix that lies apart has pieces at many
    homes, and they count as one place: `home` is 0.
    """

    index: int
    owner: int
    replica: int
    home: int
    nbytes: int
    piece_nbytes: int
    flops: int
    name: tuple[str, int]


@dataclass(slots=True)
class Footprint:
    """A running upper bound on the buffers of one bucket on any rank; see `BucketCost.buffers`."""

    num_replicas: int
    num_hops: int
    gathers: bool
    pieces: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    wholes: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    spread: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def empty(self) -> "Footprint":
        return Footprint(self.num_replicas, self.num_hops, self.gathers)

    def of(self, parcels: Iterable[Parcel]) -> "Footprint":
        """The footprint of a bucket of these parcels."""
        footprint = self.empty()
        for parcel in parcels:
            footprint.add(parcel)
        return footprint

    def add(self, parcel: Parcel) -> None:
        self.pieces[parcel.replica] += parcel.piece_nbytes
        self.wholes[parcel.owner] += parcel.nbytes
        self.spread[parcel.home] += parcel.piece_nbytes

    @property
    def nbytes(self) -> int:
        pieces, wholes, spread = (
            max(places.values(), default=0) for places in (self.pieces, self.wholes, self.spread)
        )
        exchange = pieces + wholes if self.gathers else wholes
        match self.num_hops, self.num_replicas:
            case (1, copies) if copies > 1:
                return max(exchange, copies * wholes + max(wholes, spread))
            case (2, copies):
                return max(exchange, copies * pieces + max(pieces, spread))
            case _:
                return exchange


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
    """Consecutive runs under the cap, or under what the largest parcel needs by itself."""
    limit = max(cap_nbytes, *(empty.of([parcel]).nbytes for parcel in level))
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
