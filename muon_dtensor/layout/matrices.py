"""Logical matrices: the boxes of a parameter that Muon orthogonalizes, each on its own.

They are boxes of the global tensor, so every mesh gives the same update.
"""

from dataclasses import dataclass, replace
from math import prod

from muon_dtensor.errors import RefusalError
from muon_dtensor.layout.region import Region

TO_ADAMW = (
    "Give it to AdamW: Muon(group_parameters(model)) sorts a whole model, or a param group with "
    "algorithm='adamw'."
)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A box of a parameter that is orthogonalized on its own, as `rows` x `cols`.

    The box has as many elements as the matrix, but its shape may differ: the box of a convolution
    is reshaped, a parameter stored flat holds each matrix as an interval. Without a `pattern` box
    and matrix have the same row-major order. Otherwise `einops.rearrange` with `pattern` and the
    lengths `axes` brings the box to [rows, cols].
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
        """Return the matrix in the coordinates of a larger tensor; `offset` is added to its box."""
        start, stop = (
            tuple(a + o for a, o in zip(ends, offset, strict=True))
            for ends in (self.region.start, self.region.stop)
        )
        return replace(self, region=Region(start, stop))


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


def flattened(matrix: Matrix, shape: tuple[int, ...]) -> Matrix:
    """Return the matrix as an interval of the elements of its tensor, of this shape, stored flat.

    Raises RefusalError if the elements of the matrix are not consecutive.
    """
    sizes = matrix.region.shape
    first = matrix.region.offset_in(shape)
    last = first + sum((n - 1) * prod(shape[d + 1 :]) for d, n in enumerate(sizes))
    if last - first + 1 != matrix.numel or matrix.pattern:
        raise RefusalError(
            "It is a slice of a flat parameter of FSDP1, and a declared matrix is not a run of "
            "consecutive elements.",
            "Declare row blocks only (batch axes outermost), or use fully_shard (FSDP2).",
        )
    return Matrix(Region((first,), (first + matrix.numel,)), matrix.rows, matrix.cols)
