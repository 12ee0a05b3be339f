"""Bytes per element by dtype, and flops by size of a matrix."""

from muon_dtensor.layout import Matrix

ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
"""Bytes per element of each dtype."""

WIRE_DTYPES = ("bfloat16", "float32", "float64")
"""Dtypes in which matrices can be orthogonalized and sent."""


def newton_schulz_flops(rows: int, cols: int, num_iterations: int) -> int:
    """Return the floating-point operations of Newton-Schulz on one matrix.

    With short side r and long side c, an iteration computes X X^T (2 r^2 c), its square (2 r^3),
    and the product of their polynomial with X (2 r^2 c).
    """
    short, long = sorted((rows, cols))
    return slab_flops(short, long, short, num_iterations)


def slab_flops(short: int, slab: int, num_rows: int, num_iterations: int) -> int:
    """Return the operations of one member of a team, see `algorithms.distributed_newton_schulz`.

    It has a slab of size `short` x `slab`, and computes `num_rows` rows of the square.
    """
    return num_iterations * (4 * short * short * slab + 2 * short * short * num_rows)


def gram_itemsize(wire_dtype: str) -> int:
    """Return the bytes per element of a Gram matrix that a team sums: at least float32."""
    return max(4, ITEMSIZES[wire_dtype])


def rows_of_member(num_rows: int, index: int, team_size: int) -> range:
    """Return the rows of the Gram matrix that a member of a team sums, by its index in the team."""
    return range(num_rows * index // team_size, num_rows * (index + 1) // team_size)


def matrix_flops(matrix: Matrix, num_iterations: int) -> int:
    """Return `newton_schulz_flops` of one matrix of a parameter."""
    return newton_schulz_flops(matrix.rows, matrix.cols, num_iterations)
