"""Boxes in the coordinates of a tensor, also of regularly spaced indices."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from operator import sub


@dataclass(frozen=True, slots=True)
class IndexSet:
    """Regularly spaced indices of one tensor dim: first + i0 s0 + i1 s1 + ..., ascending.

    `axes`: (length, stride) of each level, outermost first. A stride is at least the span of the
    levels inside it. Every second index of 8, from index 1 on, has the axes ((4, 2),); the first 3
    of every 5 indices of 20 have the axes ((4, 5), (3, 1)).
    """

    first: int
    axes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        span = 1
        for length, stride in reversed(self.axes):
            if length < 1 or stride < span:
                raise ValueError(f"axes {self.axes} of an index set overlap or are empty")
            span += (length - 1) * stride

    @property
    def size(self) -> int:
        return prod(length for length, _ in self.axes)

    @property
    def last(self) -> int:
        return self.first + sum((length - 1) * stride for length, stride in self.axes)

    def index_at(self, number: int) -> int:
        """Return the index with this number, counted from 0."""
        index = self.first
        for length, stride in reversed(self.axes):
            number, position = divmod(number, length)
            index += position * stride
        return index

    def count_below(self, index: int) -> int:
        """Return how many indices of the set are smaller than `index`."""
        if index <= self.first:
            return 0
        left, inner, count = index - self.first, self.size, 0
        for length, stride in self.axes:
            inner //= length
            position = left // stride
            if position >= length:
                return count + length * inner
            count += position * inner
            left -= position * stride
        return count + (left > 0)

    def regular_intervals(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Cut an interval of numbers into the fewest that `between` can describe, in order."""
        period = prod(length for length, _ in self.axes[1:])
        low, high = -(-start // period) * period, stop // period * period
        if start >= stop:
            return []
        if (start, stop) == (low, high):
            return [(start, stop)]
        inner = IndexSet(0, self.axes[1:])
        if low > high:  # inside one period
            return [
                (high + a, high + b) for a, b in inner.regular_intervals(start - high, stop - high)
            ]
        return [
            *(
                (low - period + a, low - period + b)
                for a, b in inner.regular_intervals(period - (low - start), period)
                if start < low
            ),
            *([(low, high)] if low < high else []),
            *((high + a, high + b) for a, b in inner.regular_intervals(0, stop - high)),
        ]

    def between(self, start: int, stop: int) -> "IndexSet":
        """Return the indices with the numbers of an interval of `regular_intervals`."""
        axes = self.axes
        while True:
            period = prod(length for length, _ in axes[1:])
            count = (stop - start) // period
            if count > 1 or len(axes) == 1:
                return IndexSet(self.index_at(start), ((count, axes[0][1]), *axes[1:]))
            axes = axes[1:]

    def moved_by(self, offset: int) -> "IndexSet":
        """Return the set with `offset` added to every index."""
        return replace(self, first=self.first + offset)


@dataclass(frozen=True, slots=True)
class Region:
    """A box in the coordinates of a tensor: per tensor dim a half-open interval.

    On a tensor dim with an index set, the interval counts the indices of that set: the box contains
    only these. So the parts of a matrix have the coordinates of the matrix, wherever the tensor
    stores its rows and columns. `index_sets`: one per tensor dim, None for all indices; empty if
    no tensor dim has one.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]
    index_sets: tuple[IndexSet | None, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.start) == len(self.stop), (self.start, self.stop)
        assert all(0 <= a <= b for a, b in zip(self.start, self.stop, strict=True)), self
        assert not self.index_sets or len(self.index_sets) == len(self.start), self
        assert not self.index_sets or any(self.index_sets), self

    @classmethod
    def of_shape(cls, shape: tuple[int, ...]) -> "Region":
        """Return the region that covers a tensor of this shape."""
        return cls((0,) * len(shape), shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(sub, self.stop, self.start))

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def per_dim(self) -> list[tuple[int, int, IndexSet | None]]:
        """(start, stop, index set) of each tensor dim."""
        sets = self.index_sets or (None,) * len(self.start)
        return list(zip(self.start, self.stop, sets, strict=True))

    @property
    def bounding_box(self) -> "Region":
        """The smallest box without index sets that contains a region that is not empty."""
        if not self.index_sets:
            return self
        ends = [
            (first, last)
            if indices is None
            else (indices.index_at(first), indices.index_at(last - 1) + 1)
            for first, last, indices in self.per_dim
        ]
        return Region(tuple(first for first, _ in ends), tuple(last for _, last in ends))

    def intersect(self, other: "Region") -> "Region":
        """Return the common elements; a region of zero elements if the two do not overlap.

        On each tensor dim, both have the same index set, or at most one has one.
        """
        sets = self.index_sets
        if sets != other.index_sets:
            sets = tuple(
                _common_set(own, others)
                for (*_, own), (*_, others) in zip(self.per_dim, other.per_dim, strict=True)
            )
            self, other = self._counted_by(sets), other._counted_by(sets)
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(max, start, map(min, self.stop, other.stop)))
        return Region(start, stop, sets)

    def _counted_by(self, sets: tuple[IndexSet | None, ...]) -> "Region":
        """Return the elements that are in these index sets too, in coordinates that count them."""
        ends = [
            (first, last)
            if indices is None or own is not None
            else (indices.count_below(first), indices.count_below(last))
            for (first, last, own), indices in zip(self.per_dim, sets, strict=True)
        ]
        return Region(tuple(first for first, _ in ends), tuple(last for _, last in ends), sets)

    def shares_elements(self, other: "Region") -> bool:
        """Whether the two have a common element, whatever their index sets."""
        for (a, b, own), (c, d, others) in zip(self.per_dim, other.per_dim, strict=True):
            if own is None or others is None or own == others:
                common = _common_set(own, others)
                if common is not None:
                    a, b = (a, b) if own else (common.count_below(a), common.count_below(b))
                    c, d = (c, d) if others else (common.count_below(c), common.count_below(d))
                if max(a, c) >= min(b, d):
                    return False
            elif {own.index_at(i) for i in range(a, b)}.isdisjoint(
                others.index_at(i) for i in range(c, d)
            ):
                return False
        return True

    def relative_to(self, origin: "Region") -> "Region":
        """Return the region in the coordinates of a tensor that begins where `origin` begins.

        If both have the same index set on a tensor dim, that tensor has only its indices.
        """
        dims = [
            (first, last, indices.moved_by(-begin))
            if indices is not None and base is None
            else (first - begin, last - begin, None)
            for (first, last, indices), (begin, _, base) in zip(
                self.per_dim, origin.per_dim, strict=True
            )
        ]
        sets = tuple(indices for *_, indices in dims)
        return Region(
            tuple(first for first, *_ in dims),
            tuple(last for _, last, _ in dims),
            sets if any(sets) else (),
        )

    def moved_by(self, offset: tuple[int, ...]) -> "Region":
        """Return the region in the coordinates of a larger tensor, in which it begins later."""
        dims = [
            (first + ahead, last + ahead, None)
            if indices is None
            else (first, last, indices.moved_by(ahead))
            for (first, last, indices), ahead in zip(self.per_dim, offset, strict=True)
        ]
        return Region(
            tuple(first for first, *_ in dims),
            tuple(last for _, last, _ in dims),
            self.index_sets and tuple(indices for *_, indices in dims),
        )

    def with_ends(self, tensor_dim: int, first: int, last: int) -> "Region":
        """Return the region with another interval on one tensor dim."""
        start, stop = list(self.start), list(self.stop)
        start[tensor_dim], stop[tensor_dim] = first, last
        return Region(tuple(start), tuple(stop), self.index_sets)

    def offset_in(self, shape: tuple[int, ...]) -> int:
        """Return the row-major index of the region's first element in a tensor of this shape."""
        index = 0
        for (start, _, indices), size in zip(self.per_dim, shape, strict=True):
            index = index * size + (start if indices is None else indices.index_at(start))
        return index

    def covers(self, other: "Region") -> bool:
        """Whether this region contains every element of `other`."""
        return other.numel == 0 or self.intersect(other) == other

    def strided_parts(self) -> tuple["Region", ...]:
        """Cut the region into the fewest parts that are each one strided view of the tensor."""
        parts: tuple[Region, ...] = (self,)
        for tensor_dim, indices in enumerate(self.index_sets):
            if indices is not None:
                first, last = self.start[tensor_dim], self.stop[tensor_dim]
                parts = tuple(
                    part.with_ends(tensor_dim, *ends)
                    for part in parts
                    for ends in indices.regular_intervals(first, last)
                )
        return parts

    @property
    def axes(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Per tensor dim (length, stride) of the axes of a view; only of a `strided_parts`."""
        return tuple(
            ((last - first, 1),) if indices is None else indices.between(first, last).axes
            for first, last, indices in self.per_dim
        )

    @property
    def view_shape(self) -> tuple[int, ...]:
        """The shape of a view of it; it has more dims than the tensor if a dim has more axes."""
        if not self.index_sets:
            return self.shape
        return tuple(length for axes in self.axes for length, _ in axes)


def region_of(dims: Sequence[tuple[int, Sequence[tuple[int, int]]]]) -> Region:
    """Return the region with these (first index, axes) per tensor dim; for axes see `IndexSet`.

    Adjacent axes that are one are merged, and a dim of consecutive indices has no index set.
    """
    ends: list[tuple[int, int]] = []
    sets: list[IndexSet | None] = []
    for first, axes in dims:
        merged: list[tuple[int, int]] = []
        for length, stride in axes:
            if merged and merged[-1][1] == length * stride:
                merged[-1] = merged[-1][0] * length, stride
            elif length > 1:
                merged.append((length, stride))
        match merged:
            case []:
                ends.append((first, first + 1))
                sets.append(None)
            case [(length, 1)]:
                ends.append((first, first + length))
                sets.append(None)
            case _:
                indices = IndexSet(first, tuple(merged))
                ends.append((0, indices.size))
                sets.append(indices)
    start, stop = (tuple(side) for side in zip(*ends, strict=True))
    return Region(start, stop, tuple(sets) if any(sets) else ())


def _common_set(own: IndexSet | None, other: IndexSet | None) -> IndexSet | None:
    if own is not None and other is not None and own != other:
        raise ValueError(f"two index sets on one tensor dim: {own} and {other}")
    return own if own is not None else other
