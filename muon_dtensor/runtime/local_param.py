"""The tensors and options of one parameter on one rank, for a step. Updates nothing."""

from dataclasses import dataclass, replace

from torch import Tensor

from muon_dtensor.algorithms.quantized import QuantizedMomentum
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
    momentum_buffer: Tensor | QuantizedMomentum
    options: MuonOptions
    moments: Tensor | None = None
    compensation: Tensor | None = None

    @property
    def is_momentum_elsewhere(self) -> bool:
        """Whether the momentum is quantized, or offloaded to the host."""
        momentum = self.momentum_buffer
        return isinstance(momentum, QuantizedMomentum) or momentum.device != self.param.device

    def with_momentum(self) -> "LocalParam":
        """Return this with a dense copy of the momentum on the device of the parameter."""
        momentum = self.momentum_buffer
        if isinstance(momentum, QuantizedMomentum):
            return replace(self, momentum_buffer=momentum.decoded())
        copied = momentum.to(self.param.device, non_blocking=True)
        return replace(self, momentum_buffer=copied)

    def store_momentum(self, updated: "LocalParam") -> None:
        """Store the momentum of the result of `with_momentum`."""
        momentum, dense = self.momentum_buffer, updated.dense_momentum
        if isinstance(momentum, QuantizedMomentum):
            momentum.store(dense)
        else:
            momentum.copy_(dense, non_blocking=True)

    @property
    def dense_momentum(self) -> Tensor:
        """The momentum, which is not quantized."""
        assert isinstance(self.momentum_buffer, Tensor), "use with_momentum"
        return self.momentum_buffer
