"""Which boxes of a parameter are matrices that Muon orthogonalizes, each on its own.

Declared on the global tensor, so that every mesh gives the same update. Does not know the mesh.
"""

from math import prod

from muon_dtensor.errors import RefusalError
from muon_dtensor.layout import Matrix, Region

TO_ADAMW = "Give it to AdamW: a param group with algorithm='adamw'."


def matrices_of(shape: tuple[int, ...]) -> tuple[Matrix, ...]:
    """The matrices of a parameter of this global shape; none where it has no elements.

    `[rows, cols]` is one matrix, `[batch, rows, cols]` is `batch` matrices. Raises RefusalError for
    any other number of tensor dims.
    """
    match shape:
        case (_, _) | (_, _, _) if 0 in shape:
            return ()
        case (rows, cols):
            return (Matrix(Region.whole(shape), rows, cols),)
        case (batch, rows, cols):
            return tuple(
                Matrix(Region((i, 0, 0), (i + 1, rows, cols)), rows, cols) for i in range(batch)
            )
        case () | (_,):
            dims = "one tensor dim" if shape else "no tensor dims"
            raise RefusalError(f"Muon needs a matrix; this has {dims}.", TO_ADAMW)
        case _:
            raise RefusalError(
                f"Muon needs to know its matrices; this has {len(shape)} tensor dims.",
                f"Store it as [rows, cols] or [batch, rows, cols]. Or: {TO_ADAMW}",
            )


def flat_matrices_of(shape: tuple[int, ...]) -> tuple[Matrix, ...]:
    """The same matrices where a parameter of this shape is stored flat: as intervals."""
    numel = prod(shape[-2:])
    return tuple(
        Matrix(Region((index * numel,), ((index + 1) * numel,)), matrix.rows, matrix.cols)
        for index, matrix in enumerate(matrices_of(shape))
    )
