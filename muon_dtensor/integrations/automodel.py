"""Muon in NeMo AutoModel 0.7: an `OptimizerConfig`.

    optimizer:
      _target_: muon_dtensor.integrations.automodel.MuonDTensorConfig
      lr: 0.02
      adamw: {lr: 3.0e-4}

Name this class, not `muon_dtensor.Muon`: AutoModel takes every class of the name Muon for Dion's.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from nemo_automodel.components.optim.optimizer import OptimizerConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from muon_dtensor.distributed_config.config import create_devicemesh_config
from muon_dtensor.integrations.transformers import MuonFactory
from muon_dtensor.optimizer.muon import Muon
from muon_dtensor.optimizer.options import DEFAULTS


@dataclass
class MuonDTensorConfig(OptimizerConfig):  # type: ignore[misc]
    """Keywords of `group_parameters`, and in `options` those of `Muon`."""

    supports_megatron_fsdp_sharding: ClassVar[bool] = False

    lr: float = DEFAULTS["lr"]
    weight_decay: float = DEFAULTS["weight_decay"]
    adamw: dict[str, Any] = field(default_factory=dict)
    rules: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    recognize: bool | str = False
    options: dict[str, Any] = field(default_factory=dict)

    def build(
        self, model: nn.Module, *, device_mesh: DeviceMesh | None = None, is_peft: bool = False
    ) -> list[Muon]:
        """Return one optimizer for each of `model.parts`, or one for the model.

        Plain parameters beside DTensors are replicated on `device_mesh`. Raises ValueError for
        `param_group_overrides`, whose place here is `rules`.
        """
        if self.param_group_overrides:
            raise ValueError(
                "param_group_overrides: use rules=[(regex, options)] of group_parameters"
            )
        optimizers = []
        for part in getattr(model, "parts", [model]):
            params = [p for p in part.parameters() if p.requires_grad]
            options = dict(self.options)
            is_mixed = any(isinstance(p, DTensor) for p in params) and not all(
                isinstance(p, DTensor) for p in params
            )
            if device_mesh is not None and is_mixed:
                options.setdefault("distributed_config", create_devicemesh_config(device_mesh))
            optimizers.append(
                MuonFactory()(
                    part,
                    lr=self.lr,
                    weight_decay=self.weight_decay,
                    adamw=self.adamw,
                    rules=[(pattern, values) for pattern, values in self.rules],
                    recognize=self.recognize,
                    **options,
                )
            )
        return optimizers
