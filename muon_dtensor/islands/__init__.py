"""Training across slow links: islands train alone, and combine their updates now and then."""

from muon_dtensor.islands.diloco import DiLoCo
from muon_dtensor.islands.exchange import MeshIslands
from muon_dtensor.islands.gradients import GradientSync, sync_gradients
from muon_dtensor.islands.rules import (
    Bulyan,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    NearestNeighbourMixing,
    Rule,
    TrimmedMean,
)
from muon_dtensor.islands.torchft import TorchFT

__all__ = [
    "Bulyan",
    "DiLoCo",
    "GeometricMedian",
    "GradientSync",
    "Krum",
    "Mean",
    "Median",
    "MeshIslands",
    "MultiKrum",
    "NearestNeighbourMixing",
    "Rule",
    "TorchFT",
    "TrimmedMean",
    "sync_gradients",
]
