"""What the constructor says about the optimizer as a whole, beside its param groups.

Checks every value, and hands it to those who use it. Holds no tensor.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from muon_dtensor.algorithms.kernels import body_of
from muon_dtensor.algorithms.newton_schulz import Body
from muon_dtensor.errors import GroupOptionError
from muon_dtensor.optimizer.options import one_of
from muon_dtensor.planning.plan import PlanOptions
from muon_dtensor.planning.presets import PRESETS, topology_of
from muon_dtensor.planning.topology import Topology
from muon_dtensor.runtime.hyperparameters import Orthogonalizer

WIRE_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Settings:
    """Keywords of `Muon` by their names there; `custom` is an orthogonalizer of the user's.

    Raises:
        GroupOptionError: a value out of its range.
        ValueError: `bucket_mb`, or a `topology` that is none.
    """

    ns_dtype: torch.dtype
    bucket_mb: float
    batched: bool | None
    missing_grad: Literal["raise", "zero"]
    nonfinite: Literal["raise", "skip", "propagate"]
    strategy: str
    exact: bool
    topology: str | Path | Topology | None
    momentum_dtype: torch.dtype | None
    offload_momentum: bool
    compile: bool
    kernels: str
    custom: Orthogonalizer | None
    metrics_every: int
    check_replicas: bool

    def __post_init__(self) -> None:
        one_of("ns_dtype", self.ns_dtype, WIRE_DTYPES)
        one_of("missing_grad", self.missing_grad, ("raise", "zero"))
        one_of("nonfinite", self.nonfinite, ("raise", "skip", "propagate"))
        one_of("momentum_dtype", self.momentum_dtype, (None, torch.bfloat16, torch.float32))
        if not (isinstance(self.bucket_mb, (int, float)) and 0 < self.bucket_mb < math.inf):
            raise ValueError(f"bucket_mb must be a number above 0, got {self.bucket_mb!r}")
        for name in ("offload_momentum", "compile", "check_replicas"):
            if type(getattr(self, name)) is not bool:
                raise GroupOptionError(f"{name} is True or False, got {getattr(self, name)!r}")
        if type(self.metrics_every) is not int or self.metrics_every < 0:
            raise ValueError(f"metrics_every is a number of steps, got {self.metrics_every!r}")
        if self.exact and self.kernels != "torch":
            raise GroupOptionError(
                f"kernels={self.kernels!r} round otherwise than torch.optim.Muon: say exact=False "
                "as well"
            )
        if self.custom is not None and (self.compile or self.kernels != "torch"):
            raise GroupOptionError(
                "compile and kernels are about the iterations of this package, not about an "
                "orthogonalizer of your own; compile that one yourself"
            )
        self.body()
        if self.topology is not None:
            object.__setattr__(self, "topology", topology_of(self.topology))

    def body(self) -> Body:
        """What multiplies the matrices of an iteration."""
        return body_of(self.kernels, compiles=self.compile)

    def wait_for_momentum(self) -> None:
        """Until copies of it to the host, which nothing else waits for, have arrived."""
        if self.offload_momentum and torch.cuda.is_available():
            torch.cuda.synchronize()

    def plan_options(self, *, on_gpu: bool, prefetch_count: int, sequential: bool) -> PlanOptions:
        """What the planner is told."""
        topology = self.topology or PRESETS["h100-ib-400" if on_gpu else "gloo-local"]
        assert isinstance(topology, Topology), "made one above"
        return PlanOptions(
            bucket_nbytes=max(1, int(self.bucket_mb * 2**20)),
            prefetch_count=prefetch_count,
            batched=on_gpu if self.batched is None else self.batched,
            sequential=sequential,
            strategy=self.strategy,
            exact=self.exact,
            topology=topology,
        )
