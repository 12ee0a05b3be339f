"""The orthogonalizers by name: coefficients of each iteration, with source and safety.

Values of the polynomials that the rows of a name compose, and their errors on matrices, are in
docs/options.md; tests/algorithms/test_presets.py derives both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

from muon_dtensor.algorithms.newton_schulz import KELLER_JORDAN, NUM_ITERATIONS, Coefficients
from muon_dtensor.algorithms.polar_express import POLAR_EXPRESS, SAFETY, polar_express_rows

Rows = tuple[Coefficients, ...]

# DeepSeek-V4, technical report, section 2.4, "hybrid Newton-Schulz": the last two of ten iterations
# converge to 1 at a double root.
DEEPSEEK_V4_LAST = (2.0, -1.5, 0.5)
DEEPSEEK_V4_NUM_LAST = 2

# Grishina, Smirnov & Rakhuba 2025, "Accelerating Newton-Schulz Iteration for Orthogonalization via
# Chebyshev-type Polynomials", arXiv:2506.10935: each row is the minimax quintic on the interval to
# which the rows before it map [1e-3, 1]. Rounded to four digits, as published with
# NVIDIA-NeMo/Emerging-Optimizers.
CANS: Rows = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)

# Boissin, Massena, Mamalet & Serrurier 2025, "Turbo-Muon", arXiv:2512.04632; coefficients of
# thib-s/flash-newton-schulz, newton_schulz_triton.py.
TURBO_MUON: Rows = (
    (4.0098, -7.0585, 2.4635),
    (3.4585, -5.5479, 2.5959),
    (2.7573, -3.2939, 1.4254),
    (2.7215, -3.0494, 1.3169),
)

LIMIT = POLAR_EXPRESS[-1]
"""The limit of minimax quintics: the Newton-Schulz step of fifth order."""

LOWEST = 1e-3
"""The smallest singular value, relative to the norm, for which `cubic` is the fastest."""


@dataclass(frozen=True)
class Preset:
    """An orthogonalizer by name.

    `rows` returns the (a, b, c) of each of a number of iterations. `num_iterations`: as published.
    `source`: the paper. `warning`: why it is not safe for every matrix; "" if it is. With
    `is_preconditioned`, rows of the matrix are scaled instead of the whole matrix; see
    `newton_schulz.almost_orthogonal_scales`.
    """

    rows: Callable[[int], Rows]
    num_iterations: int
    source: str
    warning: str = ""
    is_preconditioned: bool = False


def _repeated(rows: Rows, last: Coefficients) -> Callable[[int], Rows]:
    """Return a function from a number of iterations to rows, the last of which repeats."""
    return lambda count: rows[:count] + (last,) * (count - len(rows))


def deepseek_v4_rows(num_iterations: int) -> Rows:
    """Return Jordan's coefficients, with DeepSeek-V4's in the last two iterations."""
    num_last = min(num_iterations, DEEPSEEK_V4_NUM_LAST)
    first = (KELLER_JORDAN,) * (num_iterations - num_last)
    return first + (DEEPSEEK_V4_LAST,) * num_last


def cubic_rows(num_iterations: int) -> Rows:
    """Return minimax cubics, (a, b, 0), on the intervals to which [1e-3, 1] is mapped.

    With the interval [l, 1] and s = sqrt(3 / (1 + l + l^2)) the cubic is s x (3 - s^2 x^2) / 2, and
    the next l is its value at l (Chen & Chow 2014, "A Stable Scaling of Newton-Schulz for Improving
    the Sign Function Computation of a Hermitian Matrix", ANL/MCS-P5059-0114, section 3). They are
    applied to X / 1.01, as those of Polar Express, because the first maps 1.004 below 0.
    """
    rows, low = [], LOWEST
    for _ in range(num_iterations):
        scale = sqrt(3 / (1 + low + low * low))
        rows.append((1.5 * scale / SAFETY, -0.5 * scale**3 / SAFETY**3, 0.0))
        low = 0.5 * scale * low * (3 - (scale * low) ** 2)
    return tuple(rows)


PRESETS: dict[str, Preset] = {
    "polar_express": Preset(polar_express_rows, NUM_ITERATIONS, "arXiv:2505.16932"),
    "deepseek_v4": Preset(
        deepseek_v4_rows, 8 + DEEPSEEK_V4_NUM_LAST, "DeepSeek-V4, technical report, section 2.4"
    ),
    "cubic": Preset(cubic_rows, 2 * NUM_ITERATIONS, "Chen & Chow 2014, ANL/MCS-P5059-0114"),
    "cans": Preset(
        _repeated(CANS, LIMIT),
        len(CANS),
        "arXiv:2506.10935",
        "it maps a singular value of 1.001 times the norm to 2e23, and bfloat16 rounds norms by up "
        "to 0.4 %: a matrix of rank one may overflow. polar_express is the same with a margin of "
        "1 %",
    ),
    "turbo_muon": Preset(
        _repeated(TURBO_MUON, TURBO_MUON[-1]),
        len(TURBO_MUON),
        "arXiv:2512.04632",
        "it maps singular values of 0.9 to 1 to about -1, and matrices of rank one and orthogonal "
        "matrices have these after its scaling: their update goes uphill",
        is_preconditioned=True,
    ),
}
"""By name, beside "newton_schulz", whose coefficients are options, and "custom"."""
