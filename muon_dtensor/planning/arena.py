"""Where the exchange buffers of a rank lie in one block of memory.

A schedule says how long each buffer lives; those that never live together may share a place.
Counts elements and bytes; knows no tensors.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from muon_dtensor.planning.ir import Action, Phase
from muon_dtensor.planning.routes import Move, RankBucket, RankCollective

ALIGNMENT = 64
"""Bytes: a cache line."""


@dataclass(frozen=True, slots=True)
class ChainHop:
    """One collective between two buffers of a chain.

    `moves`: how the send buffer is filled from the one before; None where it is that one.
    """

    rank_collective: RankCollective
    send: int
    recv: int
    moves: tuple[Move, ...] | None


@dataclass(frozen=True, slots=True)
class Chain:
    """The buffers of one bucket on one rank, in the order in which they are filled, by number.

    Number 0 holds the packed pieces, `wholes` what is orthogonalized in place, and `results` what
    is applied.
    """

    numels: tuple[int, ...]
    there: tuple[ChainHop, ...]
    back: tuple[ChainHop, ...]
    wholes: int

    @property
    def results(self) -> int:
        return len(self.numels) - 1


def chain_of(bucket: RankBucket) -> Chain:
    """The buffers that a rank fills for a bucket."""
    numels = [bucket.pieces.numel]

    def hops(
        collectives: Iterable[RankCollective], all_moves: Iterable[tuple[Move, ...] | None]
    ) -> tuple[ChainHop, ...]:
        found = []
        for collective, moves in zip(collectives, all_moves, strict=True):
            if moves is not None:
                numels.append(collective.send.numel)
            numels.append(collective.recv.numel)
            recv = len(numels) - 1
            found.append(ChainHop(collective, recv - 1, recv, moves))
        return tuple(found)

    there = hops(bucket.unshard, bucket.moves_there)
    wholes = len(numels) - 1
    back = hops(bucket.reshard, bucket.moves_back)
    return Chain(tuple(numels), there, back, wholes)


@dataclass(slots=True)
class Lifetime:
    """The moments of a schedule at which a buffer is first and last needed."""

    first: int
    last: int


def lifetimes(
    schedule: Sequence[Action], chains: Mapping[int, Chain]
) -> dict[tuple[int, int], Lifetime]:
    """Of each buffer, by bucket and number: what the executor does, moment by moment."""
    found: dict[tuple[int, int], Lifetime] = {}
    moment = 0

    def needs(bucket: int, *numbers: int) -> None:
        for number in numbers:
            found.setdefault((bucket, number), Lifetime(moment, moment)).last = moment

    def begin(bucket: int, hop: ChainHop) -> None:
        nonlocal moment
        if hop.moves is not None:
            needs(bucket, hop.send - 1, hop.send)
            moment += 1
        needs(bucket, hop.send, hop.recv)

    def finish(bucket: int, hops: Sequence[ChainHop]) -> None:
        """Wait for the first, which has begun, and run the others."""
        nonlocal moment
        for index, hop in enumerate(hops):
            if index:
                begin(bucket, hop)
            needs(bucket, hop.send, hop.recv)
            moment += 1

    for action in schedule:
        if action.bucket not in chains:
            continue
        bucket, chain = action.bucket, chains[action.bucket]
        moment += 1
        match action.phase:
            case Phase.UNSHARD:
                needs(bucket, 0)
                if chain.there:
                    begin(bucket, chain.there[0])
            case Phase.WAIT:
                finish(bucket, chain.there)
            case Phase.ORTHOGONALIZE:
                needs(bucket, chain.wholes)
            case Phase.RESHARD:
                begin(bucket, chain.back[0])
            case Phase.APPLY:
                finish(bucket, chain.back)
                needs(bucket, chain.results)
    return found


@dataclass(frozen=True, slots=True)
class _Placed:
    start: int
    stop: int
    life: Lifetime


def place(buffers: Sequence[tuple[int, Lifetime]]) -> tuple[list[int], int]:
    """(the offset of each buffer in bytes, the bytes of the block) for (bytes, lifetime) each.

    The best of some tries, the first that needs no more than the fullest moment: the larger or the
    earlier first ("greedy by size" or by time, Pisarchyk & Lee 2020, arXiv:2001.03288), or in one
    of a few shuffled orders; each at the lowest place that is free all its life, or every other one
    at the highest, which suits a chain, in which each buffer meets only its neighbours.
    """
    sizes = [-(-nbytes // ALIGNMENT) * ALIGNMENT for nbytes, _ in buffers]
    lives = [life for _, life in buffers]
    limit = _most_at_once(sizes, lives)
    best: tuple[int, list[int]] | None = None
    for order in _orders(sizes, lives):
        for alternates in (False, True):
            offsets = _placed_in(order, sizes, lives, limit if alternates else None)
            lowest = min(offsets, default=0)
            ends = (offset - lowest + n for offset, n in zip(offsets, sizes, strict=True))
            total = max(ends, default=0)
            if best is None or total < best[0]:
                best = total, [offset - lowest for offset in offsets]
            if total == limit:
                return best[1], total
    assert best is not None, "there are orders"
    return best[1], best[0]


def _orders(sizes: Sequence[int], lives: Sequence[Lifetime]) -> Iterator[list[int]]:
    numbers = list(range(len(sizes)))
    yield sorted(numbers, key=lambda i: (-sizes[i], lives[i].first))
    yield sorted(numbers, key=lambda i: (lives[i].first, lives[i].last))
    shuffled = Random(0)
    for _ in range(2000 // max(len(numbers), 20)):
        yield shuffled.sample(numbers, len(numbers))


def _most_at_once(sizes: Sequence[int], lives: Sequence[Lifetime]) -> int:
    """The bytes alive at the fullest moment: no block is smaller."""
    return max(
        (
            sum(
                size
                for size, life in zip(sizes, lives, strict=True)
                if life.first <= moment.first <= life.last
            )
            for moment in lives
        ),
        default=0,
    )


def _placed_in(
    order: Sequence[int], sizes: Sequence[int], lives: Sequence[Lifetime], limit: int | None
) -> list[int]:
    """Offsets; with a limit every other buffer is hung from there, if need be below 0."""
    offsets = [0] * len(sizes)
    placed: list[_Placed] = []
    for turn, index in enumerate(order):
        size, life = sizes[index], lives[index]
        met = [p for p in placed if p.life.first <= life.last and life.first <= p.life.last]
        if limit is None or turn % 2 == 0:
            offset = 0
            for other in sorted(met, key=lambda p: p.start):
                if other.start < offset + size and offset < other.stop:
                    offset = other.stop
        else:
            offset = limit - size
            for other in sorted(met, key=lambda p: -p.stop):
                if other.start < offset + size and offset < other.stop:
                    offset = other.start - size
        offsets[index] = offset
        placed.append(_Placed(offset, offset + size, life))
    return offsets
