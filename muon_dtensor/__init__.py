"""Sharding-aware Muon for PyTorch: DTensor placements determine how each matrix is exchanged."""

import importlib
from typing import TYPE_CHECKING, Any

from muon_dtensor.errors import (
    AssignmentError,
    CheckpointError,
    GroupOptionError,
    MissingGradientError,
    NonFiniteGradientError,
    PlanError,
    PlanMismatchError,
    StepFailedError,
)
from muon_dtensor.planning.report import PlanReport
from muon_dtensor.version import __version__

Plan = PlanReport
"""The name of `PlanReport` in 0.1.0."""

if TYPE_CHECKING:
    from muon_dtensor.clipping import clip_grad_norm_
    from muon_dtensor.config_file import MuonConfig
    from muon_dtensor.distributed_config.config import (
        DistributedConfig,
        create_devicemesh_config,
        create_dtensor_config,
    )
    from muon_dtensor.distributed_config.from_groups import (
        create_auto_config,
        create_processgroup_config,
    )
    from muon_dtensor.grouping import group_parameters
    from muon_dtensor.optimizer.full_state import (
        checkpointable,
        clone_state,
        load_full_state_dict,
    )
    from muon_dtensor.optimizer.muon import Muon

__all__ = [
    "AssignmentError",
    "CheckpointError",
    "DistributedConfig",
    "GroupOptionError",
    "MissingGradientError",
    "Muon",
    "MuonConfig",
    "NonFiniteGradientError",
    "Plan",
    "PlanError",
    "PlanMismatchError",
    "PlanReport",
    "StepFailedError",
    "__version__",
    "checkpointable",
    "clip_grad_norm_",
    "clone_state",
    "create_auto_config",
    "create_devicemesh_config",
    "create_dtensor_config",
    "create_processgroup_config",
    "group_parameters",
    "load_full_state_dict",
]


# Names that need torch are imported on first access, so that planning works without torch.
_LAZY = {
    "DistributedConfig": ("distributed_config.config", "DistributedConfig"),
    "Muon": ("optimizer.muon", "Muon"),
    "MuonConfig": ("config_file", "MuonConfig"),
    "checkpointable": ("optimizer.full_state", "checkpointable"),
    "clip_grad_norm_": ("clipping", "clip_grad_norm_"),
    "clone_state": ("optimizer.full_state", "clone_state"),
    "create_auto_config": ("distributed_config.from_groups", "create_auto_config"),
    "create_devicemesh_config": ("distributed_config.config", "create_devicemesh_config"),
    "create_dtensor_config": ("distributed_config.config", "create_dtensor_config"),
    "create_processgroup_config": ("distributed_config.from_groups", "create_processgroup_config"),
    "group_parameters": ("grouping", "group_parameters"),
    "load_full_state_dict": ("optimizer.full_state", "load_full_state_dict"),
    # The requirement documents import these private names.
    "_default_assign_fn": ("distributed_config.assignment", "default_assign_fn"),
    "_gather_fn_async": ("distributed_config.manual_transport", "gather_fn_async"),
    "_load_balanced_assign_fn": ("distributed_config.assignment", "load_balanced_assign_fn"),
    "_validate_assignments": ("distributed_config.assignment", "validate_assignments"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(f"muon_dtensor.{module}"), attribute)


def __dir__() -> list[str]:
    return __all__
