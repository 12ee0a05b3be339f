"""The tensors and options of one parameter on one rank, for a step. Updates nothing."""

from dataclasses import dataclass, replace

from torch import Tensor

from muon_dtensor.runtime.hyperparameters import MuonOptions


@dataclass(slots=True, eq=False)
class LocalParam:
    """This rank's shards of one parameter that has a gradient: tensors of one shape.

    The shard of the momentum may be a part of that, see `ParamSpec.shards_momentum`.
    `moments`: the row second moments of NorMuon, if the options have its beta. `compensation`: what
    was rounded away from the weight, if the options keep it.
    """

    param: Tensor
    grad: Tensor
    momentum_buffer: Tensor
    options: MuonOptions
    moments: Tensor | None = None
    compensation: Tensor | None = None

    @property
    def is_momentum_offloaded(self) -> bool:
        """Whether the momentum is offloaded to the host."""
        return self.momentum_buffer.device != self.param.device

    def with_momentum(self) -> "LocalParam":
        """Return this with a copy of the momentum on the device of the parameter."""
        copied = self.momentum_buffer.to(self.param.device, non_blocking=True)
        return replace(self, momentum_buffer=copied)
