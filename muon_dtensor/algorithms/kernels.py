"""The implementations of an iteration: torch, torch.compile, or symmetric GPU kernels.

Only the first is exact.
"""

import importlib
import logging
import math
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from muon_dtensor.algorithms.newton_schulz import (
    Coefficients,
    IterationKernel,
    quintic,
    quintic_in_place,
)
from muon_dtensor.errors import GroupOptionError

logger = logging.getLogger("muon_dtensor")

KERNELS = ("torch", "auto", "symmetric")
PACKAGE = "gram_newton_schulz"


def kernel_of(kernels: str, *, compiles: bool) -> IterationKernel:
    """The body of an iteration, which may overwrite its input.

    Args:
        kernels: "torch"; "symmetric", those of the package gram-newton-schulz (Zhang, Amsel, Chen &
            Dao 2026, https://dao-ailab.github.io/blog/2026/gram-newton-schulz/), which compute half
            of each symmetric product, in float16, on Hopper and newer; "auto": those if they are
            installed, else torch's, and a line in the log.
        compiles: through torch.compile, once for each shape. Symmetric kernels compile themselves.

    Raises GroupOptionError for another name, or if "symmetric" is not installed.
    """
    if kernels not in KERNELS:
        raise GroupOptionError(f"kernels must be one of {', '.join(KERNELS)}, got {kernels!r}")
    if kernels != "torch":
        symmetric, why_not = _symmetric()
        if symmetric is not None:
            return symmetric
        if kernels == "symmetric":
            raise GroupOptionError(
                f"kernels='symmetric' needs the package gram-newton-schulz and a GPU of the Hopper "
                f"generation or newer ({why_not}). pip install gram-newton-schulz "
                "--no-build-isolation, or say kernels='auto'."
            )
        _tell(why_not)
    return _compiled() if compiles else quintic_in_place


SLOW = 2.0
"""From this ratio on a host's products in bfloat16 are called slow."""

_SIDE, _ROUNDS = 192, 3
"""A product of 14 MFLOP, which takes 1.5 ms where it is slow."""


@cache
def bfloat16_slowdown() -> float:
    """How many times as long this host takes for a bfloat16 product as for a float32 one.

    Below 1 on processors with AVX512-BF16 or AMX, about 7 on those that have AVX2 alone. Measured
    once in a process, in 10 ms: the best of a few rounds, taken in turns.
    """
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    matrices = {dtype: torch.ones(_SIDE, _SIDE, dtype=dtype, device="cpu") for dtype in seconds}
    for _ in range(_ROUNDS + 1):  # the first, which sets up kernels, is never the best
        for dtype, matrix in matrices.items():
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.bfloat16] / seconds[torch.float32]


@cache
def log_slow_bfloat16(level: int) -> None:
    """Log once, at this level, if this host's bfloat16 products are slow."""
    if (ratio := bfloat16_slowdown()) >= SLOW:
        logger.log(
            level,
            "bfloat16 products take %.1f times as long as float32 ones on this processor: "
            "Muon(..., ns_dtype=torch.float32) is faster here, and differs from "
            "torch.optim.Muon by the rounding of bfloat16",
            ratio,
        )


@cache
def _compiled() -> IterationKernel:
    body: IterationKernel = torch.compile(quintic)
    return body


@cache
def _tell(why_not: str) -> None:
    logger.info("no symmetric kernels (%s): iterating with torch's matrix products", why_not)


@cache
def _symmetric() -> tuple[IterationKernel | None, str]:
    """The package's iteration as a body, or why there is none."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9:
        return None, "no GPU of the Hopper generation or newer"
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError as error:
        return None, str(error)
    made: dict[tuple[Coefficients, ...], Any] = {}

    def body(x: Tensor, coefficients: Sequence[Coefficients]) -> Tensor:
        key = tuple(coefficients)
        if not key:
            return x
        if key not in made:
            # the package's advice: one restart, after the second of five iterations
            restarts = list(range(2, len(key), 3))
            made[key] = package.GramNewtonSchulz(
                ns_coefficients=[list(row) for row in key],
                gram_newton_schulz_reset_iterations=restarts,
                # its default is "reduce-overhead": CUDA graphs, which a captured step cannot hold
                compile_kwargs={"fullgraph": True},
            )
        result: Tensor = made[key](x if x.ndim == 3 else x[None])
        return result.to(x.dtype).view(x.shape)

    return body, ""
