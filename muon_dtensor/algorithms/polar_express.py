"""Polar Express: the coefficients with the fastest worst-case convergence, a row per iteration."""

from muon_dtensor.algorithms.newton_schulz import Coefficients

# Amsel, Persson, Musco & Gower 2025, "The Polar Express", arXiv:2505.16932, algorithm 1: for
# singular values in [1e-3, 1], each row is the odd quintic nearest to 1 (minimax) on the interval
# to which the previous rows map. Cushion 0.02407327424182761 (section 4.4): the interval of a row
# begins no lower than this times its end, and the row is then centered on the real interval.
# Rederived in float64 by tests/algorithms/test_polar_express.py.
_MINIMAX = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)

SAFETY = 1.01
"""Each row but the last is applied to X / 1.01 (ibid., section 4.4: 1.01). Rounding in bfloat16 may
lift a singular value over 1; with this factor the polynomial is still near 1 there."""

POLAR_EXPRESS: tuple[Coefficients, ...] = (
    *((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in _MINIMAX[:-1]),
    _MINIMAX[-1],
)


def polar_express_rows(num_iterations: int) -> tuple[Coefficients, ...]:
    """Return the (a, b, c) of each iteration.

    Beyond eight iterations the last row, a Newton-Schulz step of fifth order, repeats.
    """
    rows = POLAR_EXPRESS[:num_iterations]
    return rows + POLAR_EXPRESS[-1:] * (num_iterations - len(rows))
