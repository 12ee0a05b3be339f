"""Which boxes of a parameter are matrices that Muon orthogonalizes, each on its own.

Declared on the global tensor, so that every mesh gives the same update. Does not know the mesh.
"""

from math import prod

from muon_dtensor.errors import RefusalError
from muon_dtensor.layout import Matrix, Region

TO_ADAMW = (
    "Give it to AdamW: Muon(group_parameters(model)) sorts a whole model, or a param group with "
    "algorithm='adamw'."
)


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
                "Declare them, for a convolution matrix='o i kh kw -> o (i kh kw)' in its param "
                f"group. Or: {TO_ADAMW}",
            )


def flattened(matrix: Matrix, shape: tuple[int, ...]) -> Matrix:
    """A matrix of a tensor of this shape where that is stored flat: an interval of its elements.

    Raises RefusalError if the elements of the matrix do not lie one after the other.
    """
    sizes = matrix.region.shape
    first = matrix.region.offset_in(shape)
    last = first + sum((n - 1) * prod(shape[d + 1 :]) for d, n in enumerate(sizes))
    if last - first + 1 != matrix.numel or matrix.pattern:
        raise RefusalError(
            "It is a slice of a flat parameter of FSDP1, and the declared matrices are no runs of "
            "its elements.",
            "Declare row blocks only (batch axes outermost), or use fully_shard (FSDP2).",
        )
    return Matrix(Region((first,), (first + matrix.numel,)), matrix.rows, matrix.cols)
