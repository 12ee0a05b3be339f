"""Logical matrices: the parts of a parameter that Muon orthogonalizes, each on its own.

They are regions of the global tensor, so every mesh gives the same update.
"""

import re
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from muon_dtensor.errors import RefusalError
from muon_dtensor.layout.region import Region, region_of

TO_ADAMW = (
    "Give it to AdamW: Muon(group_parameters(model)) sorts a whole model, or a param group with "
    "algorithm='adamw'."
)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A region of a parameter that is orthogonalized on its own, as `rows` x `cols`.

    The region has as many elements as the matrix, but its shape may differ: the box of a
    convolution is reshaped, a parameter stored flat holds each matrix as an interval, and the
    region of an interleaved matrix has index sets. Without a `pattern` the elements of region and
    matrix have the same row-major order. Otherwise `einops.rearrange` with `pattern` and the
    lengths `axes` brings a tensor of the shape of the region to [rows, cols].
    """

    region: Region
    rows: int
    cols: int
    pattern: str = ""
    axes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.rows * self.cols != self.region.numel:
            raise ValueError(f"{self.rows} x {self.cols} elements do not fill {self.region}")

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    def moved_by(self, offset: tuple[int, ...]) -> "Matrix":
        """Return the matrix in the coordinates of a larger tensor, in which it begins later."""
        return replace(self, region=self.region.moved_by(offset))


def matrices_of(shape: tuple[int, ...]) -> tuple[Matrix, ...]:
    """Return the matrices of a parameter of this global shape; none if it has no elements.

    `[rows, cols]` is one matrix, `[batch, rows, cols]` is `batch` matrices. Raises RefusalError for
    any other number of tensor dims.
    """
    match shape:
        case (_, _) | (_, _, _) if 0 in shape:
            return ()
        case (rows, cols):
            return (Matrix(Region.of_shape(shape), rows, cols),)
        case (batch, rows, cols):
            return tuple(
                Matrix(Region((i, 0, 0), (i + 1, rows, cols)), rows, cols) for i in range(batch)
            )
        case () | (_,):
            dims = "one tensor dim" if shape else "no tensor dims"
            raise RefusalError(f"Muon needs a matrix; this has {dims}.", TO_ADAMW)
        case _:
            raise RefusalError(
                f"Muon needs matrices to be declared for it; this has {len(shape)} tensor dims.",
                "Declare them, for a convolution matrix='o i kh kw -> o (i kh kw)' in its param "
                f"group. Or: {TO_ADAMW}",
            )


def slabs_of(matrix: Matrix, count: int) -> tuple[Region, ...]:
    """Return `count` boxes that cut the long side of a matrix into blocks of about equal size.

    Returns () if there are no such boxes, or if some of them would be empty.
    """
    for dim in _long_dims(matrix)[:1]:
        region, size = matrix.region, matrix.region.shape[dim]
        ends = [region.start[dim] + size * index // count for index in range(count + 1)]
        if size >= count:
            return tuple(region.with_ends(dim, *block) for block in pairwise(ends))
    return ()


def is_slab(matrix: Matrix, region: Region) -> bool:
    """Whether a box inside a matrix is not empty and contains its short side completely."""
    return region.numel > 0 and any(
        region == matrix.region.with_ends(dim, region.start[dim], region.stop[dim])
        for dim in _long_dims(matrix)
    )


def slab_size(matrix: Matrix, region: Region) -> tuple[int, int]:
    """Return (rows, cols) of the part of a matrix in a box for which `is_slab` holds."""
    for dim in _long_dims(matrix):
        if region.shape[dim] < matrix.region.shape[dim]:
            is_row_block = dim < _first_col_dim(matrix)
            count = region.numel // (matrix.cols if is_row_block else matrix.rows)
            return (count, matrix.cols) if is_row_block else (matrix.rows, count)
    return matrix.rows, matrix.cols


def _first_col_dim(matrix: Matrix) -> int:
    """Return the number of tensor dims whose product is `rows`, or -1 if there is none."""
    shape = matrix.region.shape
    counts = (n for n in range(len(shape) + 1) if prod(shape[:n]) == matrix.rows)
    return -1 if matrix.pattern else next(counts, -1)


def _long_dims(matrix: Matrix) -> tuple[int, ...]:
    """Return the tensor dims that can be cut so that each part contains the short side completely.

    It is the outermost dim of the long side; a square matrix may have one for each side.
    """
    shape, middle = matrix.region.shape, _first_col_dim(matrix)
    if middle < 0:
        return ()
    sides = []
    if matrix.cols >= matrix.rows:
        sides.append(range(middle, len(shape)))
    if matrix.rows >= matrix.cols:
        sides.append(range(middle))
    outermost = (next((dim for dim in side if shape[dim] > 1), None) for side in sides)
    return tuple(dim for dim in outermost if dim is not None)


def flattened(matrix: Matrix, shape: tuple[int, ...]) -> Matrix:
    """Return the matrix as a part of its tensor, of this shape, stored flat."""
    strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    axes = [
        (length, stride * step)
        for dim_axes, stride in zip(matrix.region.axes, strides, strict=True)
        for length, step in dim_axes
    ]
    pattern = matrix.pattern
    if pattern:
        left, right = pattern.split(" -> ")
        pattern = f"({re.sub(r'[()]', '', left)}) -> {right}"
    region = region_of([(matrix.region.offset_in(shape), axes)])
    return replace(matrix, region=region, pattern=pattern)
