"""Matrices in, polar factors out. Knows torch; knows no mesh and no parameter."""

from muon_dtensor.orthogonalize.newton_schulz import newton_schulz

__all__ = ["newton_schulz"]
