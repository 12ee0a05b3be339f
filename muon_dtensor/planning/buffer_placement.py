"""Static offsets of a rank's exchange buffers in one block of memory.

Buffers that are never needed at the same time may share a place; see `schedule.lifetimes`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from muon_dtensor.planning.schedule import Lifetime

ALIGNMENT = 64
"""Bytes: a cache line."""


@dataclass(frozen=True, slots=True)
class _Placed:
    start: int
    stop: int
    life: Lifetime


def assign_offsets(buffers: Sequence[tuple[int, Lifetime]]) -> tuple[list[int], int]:
    """(the offset of each buffer in bytes, the bytes of the block) for (bytes, lifetime) each.

    The best of some tries, the first that needs no more than the fullest event: the larger or the
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
    """The bytes alive at the fullest event: no block is smaller."""
    return max(
        (
            sum(
                size
                for size, life in zip(sizes, lives, strict=True)
                if life.first <= other.first <= life.last
            )
            for other in lives
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
