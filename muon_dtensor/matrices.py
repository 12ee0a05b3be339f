"""Which boxes of a parameter are matrices that Muon orthogonalizes, each on its own.

Declared on the global tensor, so that every mesh gives the same update. Does not know the mesh.
"""

from muon_dtensor.errors import RefusalError
from muon_dtensor.layout import Region

TO_ADAMW = "Give it to AdamW: a param group with algorithm='adamw'."


def matrix_regions(shape: tuple[int, ...]) -> tuple[Region, ...]:
    """The matrices of a parameter of this global shape; none where it has no elements.

    `[rows, cols]` is one matrix, `[batch, rows, cols]` is `batch` matrices. Raises RefusalError for
    any other number of tensor dims.
    """
    match shape:
        case (_, _) | (_, _, _) if 0 in shape:
            return ()
        case (_, _):
            return (Region.whole(shape),)
        case (batch, rows, cols):
            return tuple(Region((i, 0, 0), (i + 1, rows, cols)) for i in range(batch))
        case () | (_,):
            dims = "one tensor dim" if shape else "no tensor dims"
            raise RefusalError(f"Muon needs a matrix; this has {dims}.", TO_ADAMW)
        case _:
            raise RefusalError(
                f"Muon needs to know its matrices; this has {len(shape)} tensor dims.",
                f"Store it as [rows, cols] or [batch, rows, cols]. Or: {TO_ADAMW}",
            )


def rows_and_cols(matrix: Region) -> tuple[int, int]:
    """The size of one matrix: its last two tensor dims."""
    rows, cols = matrix.shape[-2:]
    return rows, cols
