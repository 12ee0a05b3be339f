"""Sharding-aware Muon: hand it DTensors, their placements say how each matrix comes together."""

import importlib
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
    from muon_dtensor.config import (
        DistributedConfig,
        create_devicemesh_config,
        create_dtensor_config,
    )
    from muon_dtensor.grouping import group_parameters
    from muon_dtensor.optim import Muon

__version__ = "0.1.0"

__all__ = [
    "DistributedConfig",
    "GroupOptionError",
    "MissingGradientError",
    "Muon",
    "NonFiniteGradientError",
    "Plan",
    "PlanError",
    "PlanMismatchError",
    "create_devicemesh_config",
    "create_dtensor_config",
    "group_parameters",
]


# What needs torch is imported when it is asked for, so that plans can be made without torch.
_HOMES = {
    "DistributedConfig": "config",
    "Muon": "optim",
    "create_devicemesh_config": "config",
    "create_dtensor_config": "config",
    "group_parameters": "grouping",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"muon_dtensor.{_HOMES[name]}"), name)
