"""Regions, meshes, layouts and logical matrices: which rank stores which elements."""

from muon_dtensor.layout.layout import Layout
from muon_dtensor.layout.matrices import Matrix
from muon_dtensor.layout.mesh import MeshSpec
from muon_dtensor.layout.region import Region

__all__ = ["Layout", "Matrix", "MeshSpec", "Region"]
