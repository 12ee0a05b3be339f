"""Implementations of the iteration: torch, torch.compile, or symmetric GPU kernels.

Only the first is bitwise torch.optim.Muon's.
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
    """Return the body of an iteration, which may overwrite its input.

    Args:
        kernels: "torch"; "symmetric", those of the package gram-newton-schulz (Zhang, Amsel, Chen &
            Dao 2026, https://dao-ailab.github.io/blog/2026/gram-newton-schulz/), which compute half
            of each symmetric product, in float16, on Hopper and newer; "auto": symmetric kernels if
            they are installed, else torch's, with a line in the log.
        compiles: use torch.compile, once for each shape. Symmetric kernels compile themselves.

    Raises GroupOptionError for any other name, or if "symmetric" is not available.
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
                "--no-build-isolation, or use kernels='auto'."
            )
        _log_fallback(why_not)
    return _compiled() if compiles else quintic_in_place


SLOW = 2.0
"""`bfloat16_slowdown` from which bfloat16 products count as slow."""

_SIDE, _ROUNDS = 192, 3
"""A product of 14 MFLOP takes 1.5 ms on a host with slow bfloat16."""


@cache
def bfloat16_slowdown() -> float:
    """Return the time of a bfloat16 product on this host, divided by that of a float32 product.

    Below 1 on processors with AVX512-BF16 or AMX, about 7 with only AVX2. Measured once per
    process, in 10 ms: the best of a few rounds, which alternate between the dtypes.
    """
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    matrices = {dtype: torch.ones(_SIDE, _SIDE, dtype=dtype, device="cpu") for dtype in seconds}
    for _ in range(_ROUNDS + 1):  # the first sets up kernels, so it is never the best
        for dtype, matrix in matrices.items():
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.bfloat16] / seconds[torch.float32]


@cache
def log_slow_bfloat16(level: int) -> None:
    """Log once at this level if this host's bfloat16 products are slow."""
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
def _log_fallback(why_not: str) -> None:
    logger.info("no symmetric kernels (%s): iterating with torch's matrix products", why_not)


@cache
def _symmetric() -> tuple[IterationKernel | None, str]:
    """Return the package's iteration as a body, or None and the reason."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9:
        return None, "no GPU of the Hopper generation or newer"
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError as error:
        return None, str(error)
    iterations: dict[tuple[Coefficients, ...], Any] = {}

    def body(x: Tensor, coefficients: Sequence[Coefficients]) -> Tensor:
        key = tuple(coefficients)
        if not key:
            return x
        if key not in iterations:
            # the package's advice: one restart, after the second of five iterations
            restarts = list(range(2, len(key), 3))
            iterations[key] = package.GramNewtonSchulz(
                ns_coefficients=[list(row) for row in key],
                gram_newton_schulz_reset_iterations=restarts,
                # its default "reduce-overhead" uses CUDA graphs, which a captured step cannot nest
                compile_kwargs={"fullgraph": True},
            )
        result: Tensor = iterations[key](x if x.ndim == 3 else x[None])
        return result.to(x.dtype).view(x.shape)

    return body, ""
