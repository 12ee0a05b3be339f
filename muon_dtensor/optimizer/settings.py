"""`Settings`: the checked options of `Muon` that are not options of param groups."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from muon_dtensor.algorithms.kernels import kernel_of
from muon_dtensor.algorithms.newton_schulz import IterationKernel
from muon_dtensor.errors import GroupOptionError
from muon_dtensor.optimizer.options import OPTIONS
from muon_dtensor.planning.plan import PlanOptions
from muon_dtensor.planning.presets import PRESETS, topology_of
from muon_dtensor.planning.topology import Topology
from muon_dtensor.runtime.hyperparameters import Orthogonalizer


@dataclass(frozen=True)
class Settings:
    """Keywords of `Muon` with the same names. `custom` is the user's own orthogonalizer.

    Raises:
        GroupOptionError: a value is out of range.
        ValueError: an unknown `topology`.
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
    deferred_checks: bool | None
    shard_momentum: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name in OPTIONS:
                OPTIONS[field.name].check(field.name, getattr(self, field.name))
        if self.exact and self.kernels != "torch":
            raise GroupOptionError(
                f"kernels={self.kernels!r} round differently from torch.optim.Muon: set "
                "exact=False as well"
            )
        if self.custom is not None and (self.compile or self.kernels != "torch"):
            raise GroupOptionError(
                "compile and kernels apply to the iterations of this package, not to an "
                "orthogonalizer of your own; compile that one yourself"
            )
        self.kernel()
        if self.topology is not None:
            object.__setattr__(self, "topology", topology_of(self.topology))

    @classmethod
    def of(cls, options: Mapping[str, Any], custom: Orthogonalizer | None) -> "Settings":
        """Select the settings among the constructor's options."""
        names = [field.name for field in fields(cls) if field.name in options]
        return cls(custom=custom, **{name: options[name] for name in names})

    def kernel(self) -> IterationKernel:
        """Return the kernel that multiplies the matrices of an iteration."""
        return kernel_of(self.kernels, compiles=self.compile)

    def wait_for_momentum(self) -> None:
        """Wait for copies of an offloaded momentum to the host. A step does not wait for them."""
        if self.offload_momentum and torch.cuda.is_available():
            torch.cuda.synchronize()

    def plan_options(self, *, on_gpu: bool, prefetch_count: int, sequential: bool) -> PlanOptions:
        """Return the options of the planner."""
        topology = self.topology or PRESETS["h100-ib-400" if on_gpu else "gloo-local"]
        assert isinstance(topology, Topology), "__post_init__ converts names and paths"
        return PlanOptions(
            bucket_nbytes=max(1, int(self.bucket_mb * 2**20)),
            prefetch_count=prefetch_count,
            batched=on_gpu if self.batched is None else self.batched,
            sequential=sequential,
            strategy=self.strategy,
            exact=self.exact,
            topology=topology,
        )
