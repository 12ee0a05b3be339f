"""Sharding-aware Muon: hand it DTensors, their placements say how each matrix comes together."""

from muon_dtensor.errors import (
    GroupOptionError,
    MissingGradientError,
    NonFiniteGradientError,
    PlanError,
    PlanMismatchError,
)
from muon_dtensor.grouping import group_parameters
from muon_dtensor.optim import Muon
from muon_dtensor.planning.ir import Plan

__version__ = "0.1.0"

__all__ = [
    "GroupOptionError",
    "MissingGradientError",
    "Muon",
    "NonFiniteGradientError",
    "Plan",
    "PlanError",
    "PlanMismatchError",
    "group_parameters",
]
