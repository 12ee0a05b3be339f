"""Iterations that orthogonalize matrices, and elementwise updates; no torch.distributed."""

from muon_dtensor.algorithms.newton_schulz import newton_schulz
from muon_dtensor.algorithms.polar_express import polar_express

ORTHOGONALIZERS = ("newton_schulz", "polar_express", "custom")
"""Values of a param group's `orthogonalizer`; "custom" is the callable of the constructor."""

__all__ = ["ORTHOGONALIZERS", "newton_schulz", "polar_express"]
