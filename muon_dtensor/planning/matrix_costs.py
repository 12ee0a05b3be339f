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
    return num_iterations * (4 * short * short * long + 2 * short**3)


def matrix_flops(matrix: Matrix, num_iterations: int) -> int:
    """Return `newton_schulz_flops` of one matrix of a parameter."""
    return newton_schulz_flops(matrix.rows, matrix.cols, num_iterations)
