"""Iterations that orthogonalize matrices, and elementwise updates; no torch.distributed."""

from muon_dtensor.algorithms.newton_schulz import newton_schulz
from muon_dtensor.algorithms.presets import PRESETS

ORTHOGONALIZERS = ("newton_schulz", *PRESETS, "custom")
"""Values of a param group's `orthogonalizer`; "custom" is the callable of the constructor."""

WHOLE_MATRICES = ("custom", *(name for name in PRESETS if PRESETS[name].is_preconditioned))
"""Those that need all rows of a matrix on one rank."""

__all__ = ["ORTHOGONALIZERS", "PRESETS", "WHOLE_MATRICES", "newton_schulz"]
