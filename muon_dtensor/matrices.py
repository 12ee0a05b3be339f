"""Which boxes of a parameter are matrices that Muon orthogonalizes, each on its own.

Declared on the global tensor, so that every mesh gives the same update. Does not know the mesh.
"""

from muon_dtensor.layout import Region


def matrix_regions(shape: tuple[int, ...]) -> tuple[Region, ...]:
    """The matrices of a parameter of this global shape.

    `[rows, cols]` is one matrix, `[batch, rows, cols]` is `batch` matrices. Raises ValueError,
    with what to do instead as its text, for any other number of tensor dims.
    """
    match shape:
        case (_, _):
            return (Region.whole(shape),)
        case (batch, rows, cols):
            return tuple(Region((i, 0, 0), (i + 1, rows, cols)) for i in range(batch))
        case () | (_,):
            raise ValueError("Give it to AdamW: a param group with algorithm='adamw'.")
        case _:
            raise ValueError(
                "Store it as [rows, cols] or [batch, rows, cols], or give it to AdamW: "
                "a param group with algorithm='adamw'."
            )


def rows_and_cols(matrix: Region) -> tuple[int, int]:
    """The size of one matrix: its last two tensor dims."""
    rows, cols = matrix.shape[-2:]
    return rows, cols
