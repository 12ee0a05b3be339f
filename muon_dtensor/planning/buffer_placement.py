"""Static offsets of a rank's exchange buffers in one block of memory.

Buffers whose lifetimes do not overlap may share memory; see `schedule.lifetimes`.
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
    """Return (offset of each buffer, size of the block), in bytes; `buffers`: (bytes, lifetime).

    Tries several orders: larger buffers first ("greedy by size", Pisarchyk & Lee 2020,
    arXiv:2001.03288), earlier buffers first, and shuffled orders. In each order it places every
    buffer at the lowest offset that is free during its lifetime, or every second one at the
    highest. The latter suits chains, where the lifetime of a buffer overlaps only those of its
    neighbours. Returns the first placement that needs no more than the event with the most live
    bytes, else the smallest.
    """
    sizes = [-(-nbytes // ALIGNMENT) * ALIGNMENT for nbytes, _ in buffers]
    lives = [life for _, life in buffers]
    limit = _max_live_nbytes(sizes, lives)
    best: tuple[int, list[int]] | None = None
    for order in _orders(sizes, lives):
        for alternates in (False, True):
            offsets = _place(order, sizes, lives, limit if alternates else None)
            lowest = min(offsets, default=0)
            ends = (offset - lowest + n for offset, n in zip(offsets, sizes, strict=True))
            total = max(ends, default=0)
            if best is None or total < best[0]:
                best = total, [offset - lowest for offset in offsets]
            if total == limit:
                return best[1], total
    assert best is not None, "at least one order was tried"
    return best[1], best[0]


def _orders(sizes: Sequence[int], lives: Sequence[Lifetime]) -> Iterator[list[int]]:
    """Yield indices of the buffers: by size, by time, then shuffled with a fixed seed."""
    numbers = list(range(len(sizes)))
    yield sorted(numbers, key=lambda i: (-sizes[i], lives[i].first))
    yield sorted(numbers, key=lambda i: (lives[i].first, lives[i].last))
    rng = Random(0)
    for _ in range(2000 // max(len(numbers), 20)):
        yield rng.sample(numbers, len(numbers))


def _max_live_nbytes(sizes: Sequence[int], lives: Sequence[Lifetime]) -> int:
    """Return the most bytes live at one event: a lower bound on the size of the block."""
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


def _place(
    order: Sequence[int], sizes: Sequence[int], lives: Sequence[Lifetime], limit: int | None
) -> list[int]:
    """Return offsets; with a limit every second buffer ends there or below, possibly below 0."""
    offsets = [0] * len(sizes)
    placed: list[_Placed] = []
    for number, index in enumerate(order):
        size, life = sizes[index], lives[index]
        overlapping = [p for p in placed if p.life.first <= life.last and life.first <= p.life.last]
        if limit is None or number % 2 == 0:
            offset = 0
            for other in sorted(overlapping, key=lambda p: p.start):
                if other.start < offset + size and offset < other.stop:
                    offset = other.stop
        else:
            offset = limit - size
            for other in sorted(overlapping, key=lambda p: -p.stop):
                if other.start < offset + size and offset < other.stop:
                    offset = other.start - size
        offsets[index] = offset
        placed.append(_Placed(offset, offset + size, life))
    return offsets
