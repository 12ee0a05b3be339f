"""Boxes in the coordinates of a tensor."""

from dataclasses import dataclass
from math import prod
from operator import sub


@dataclass(frozen=True, slots=True)
class Region:
    """A box in the coordinates of a tensor: per tensor dim a half-open interval."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.start) == len(self.stop), (self.start, self.stop)
        assert all(0 <= a <= b for a, b in zip(self.start, self.stop, strict=True)), self

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

    def intersect(self, other: "Region") -> "Region":
        """Return the common box; a box of zero elements if the two do not overlap."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(max, start, map(min, self.stop, other.stop)))
        return Region(start, stop)

    def relative_to(self, origin: "Region") -> "Region":
        """Return the box in the coordinates of a tensor that begins where `origin` begins."""
        return Region(
            tuple(a - o for a, o in zip(self.start, origin.start, strict=True)),
            tuple(b - o for b, o in zip(self.stop, origin.start, strict=True)),
        )

    def offset_in(self, shape: tuple[int, ...]) -> int:
        """Return the row-major index of the box's first element in a tensor of this shape."""
        index = 0
        for start, size in zip(self.start, shape, strict=True):
            index = index * size + start
        return index

    def covers(self, other: "Region") -> bool:
        """Whether this box contains every element of `other`."""
        return other.numel == 0 or self.intersect(other) == other
