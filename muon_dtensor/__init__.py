"""Sharding-aware Muon: hand it DTensors, their placements say how each matrix comes together."""

from typing import TYPE_CHECKING, Any

from muon_dtensor.errors import (
    GroupOptionError,
    MissingGradientError,
    NonFiniteGradientError,
    PlanError,
    PlanMismatchError,
)
from muon_dtensor.planning.ir import Plan

if TYPE_CHECKING:
    from muon_dtensor.grouping import group_parameters
    from muon_dtensor.optim import Muon

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


def __getattr__(name: str) -> Any:
    # What needs torch is imported when it is asked for, so that plans can be made without torch.
    if name == "Muon":
        from muon_dtensor.optim import Muon

        return Muon
    if name == "group_parameters":
        from muon_dtensor.grouping import group_parameters

        return group_parameters
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
