"""`sync_gradients`: combines the gradients of every step over islands, by hooks of FSDP2 or DDP."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from muon_dtensor.islands.diloco import CAN_SPREAD
from muon_dtensor.islands.exchange import (
    Exchange,
    Header,
    MeshIslands,
    check_plans,
    short_digest,
)
from muon_dtensor.islands.rules import Rule, rule_of
from muon_dtensor.islands.wires import wire_of
from muon_dtensor.layout import Layout
from muon_dtensor.planning.outer import WireCost, best_route
from muon_dtensor.runtime.dtensors import LayoutCache
from muon_dtensor.runtime.process_groups import Groups
from muon_dtensor.runtime.torch_private import this_rank

ROW = 1024
"""Elements of a flat gradient that share one scale on an integer wire."""


class GradientSync:
    """Gradients that are combined over islands; made by `sync_gradients`."""

    def __init__(
        self, islands: MeshIslands, *, wire: str, feedback: bool, reduce: str | Rule
    ) -> None:
        self._islands, self._rule, self._wire = islands, rule_of(reduce), wire_of(wire)
        self._rule.check(islands.size)
        self._uses_feedback = feedback and wire != "float32"
        can_spread = isinstance(self._rule, CAN_SPREAD) and self._wire.is_elementwise
        self._route = best_route(WireCost.of(self._wire.text), islands.size, can_spread=can_spread)
        self._options = f"{self._rule} {self._wire} {feedback}"
        check_plans(islands, self._options)
        self._cache = LayoutCache()
        self._exchanges: dict[tuple[object, Layout], Exchange] = {}
        self._errors: dict[object, Tensor] = {}
        self._counts: dict[object, int] = {}
        self._metrics = dict.fromkeys(("exchanges", "failed", "dropped", "sent_nbytes"), 0.0)

    def metrics(self) -> dict[str, float]:
        """Return counts since construction, on this rank. No collective.

        `exchanges`: one per FSDP2 module or DDP bucket and step. `failed`: of them, those whose
        gradients became NaN because the rule does not tolerate so many that are not finite.
        `dropped`: gradients of islands that were not finite.
        """
        return dict(self._metrics)

    def combine(
        self, key: object, gradient: Tensor, mesh: DeviceMesh | None, dims: tuple[str, ...]
    ) -> None:
        """Combine a flat gradient over the islands, in place. A collective of all islands.

        Args:
            key: of the module or bucket, whose error feedback is kept.
            gradient: this rank's shard, [numel], of any floating-point dtype.
            mesh: of the island; None for one rank.
            dims: mesh dims that cut the gradient, in equal parts; the others replicate it.
        """
        values = gradient.float()
        numel = values.numel()
        rows = torch.nn.functional.pad(values, (0, -numel % ROW)).view(-1, ROW)
        error = self._errors.get(key)
        if error is not None and error.shape == rows.shape:
            rows = rows + error
        spec = self._cache.plain_mesh if mesh is None else self._cache.mesh(mesh)
        layout = Layout(spec, (len(rows) * spec.num_ranks_along(dims), ROW), (dims, ()))
        if (key, layout) not in self._exchanges:
            self._exchanges[key, layout] = Exchange(
                self._islands,
                [layout],
                Groups(self._cache.device_meshes, this_rank()),
                rule=self._rule,
                wire=self._wire,
                route=self._route,
                checks=CHECKS,
                checks_sizes=True,
            )
        exchange = self._exchanges[key, layout]
        count = self._counts[key] = self._counts.get(key, 0) + 1
        what = short_digest(f"{key} {numel}")
        header = Header(short_digest(self._options), what, count, 1.0, finite=True)
        flight = exchange.start([rows], header)
        combined = exchange.finish(flight)
        self._metrics["exchanges"] += 1
        self._metrics["sent_nbytes"] += combined.sent_nbytes
        self._metrics["dropped"] += combined.finite.count(False)
        if combined.update is None:
            self._metrics["failed"] += 1
            gradient.fill_(float("nan"))
            return
        if self._uses_feedback and flight.header.finite:
            self._errors[key] = rows - flight.arrived[0]
        gradient.copy_(combined.update[0].view(-1)[:numel])


CHECKS = {
    "plan": "combine gradients with other options",
    "number": "are in another step",
    "base": "have gradients of other parameters",
}
"""By field of the header, what an island does where its value differs."""


def sync_gradients(
    model: nn.Module,
    islands: DeviceMesh,
    *,
    wire: str = "float32",
    feedback: bool = True,
    reduce: str | Rule = "mean",
) -> GradientSync:
    """Combine the gradients of every backward over islands, by a rule and a wire.

        fully_shard(model, mesh=mesh["dp_shard"])
        sync_gradients(model, mesh["island"], wire="int8", reduce=TrimmedMean(f=1))

    FSDP2's modules are combined one by one, after their reduce-scatter; DDP's buckets after the
    mean over their ranks. Rules see one module or bucket at a time. Gradients that TP replicates
    count once per rank in the rules. What the wire loses is added to the next gradient of the same
    module (`feedback`). Integer wires have one scale for 1,024 elements of each rank's shard.

    Args:
        model: after `fully_shard`, or in DistributedDataParallel over the ranks of one island.
        islands: `mesh["island"]`.
        wire: format of what is sent, see `DiLoCo`.
        feedback: add what the wire lost to the next gradient.
        reduce: a rule or its name, see `DiLoCo`.

    Raises:
        ValueError: the model is neither FSDP2's nor DDP's; an option is out of range, or the rule
            is not defined for this number of islands.
        PlanMismatchError: islands differ in options. The backward raises it if they differ in the
            parameters that have a gradient.
    """
    members = MeshIslands(islands)
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded and not isinstance(model, DistributedDataParallel):
        raise ValueError(
            f"sync_gradients needs a model after fully_shard or in DistributedDataParallel, this "
            f"{type(model).__name__} is neither"
        )
    sync = GradientSync(members, wire=wire, feedback=feedback, reduce=reduce)
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(sync, _ddp_hook(model.process_group))
        return sync
    for index, module in enumerate(sharded):
        module.set_all_reduce_hook(_fsdp_hook(sync, index, module))
    return sync


def _fsdp_hook(sync: GradientSync, index: int, module: Any) -> Callable[[Tensor], None]:
    """Return the hook of one FSDP2 module, which gets the reduced flat gradient of its shards."""
    params = [p for p in module.parameters() if isinstance(p, DTensor)]
    mesh = max((p.device_mesh for p in params), key=lambda mesh: mesh.size())
    names = sync._cache.mesh(mesh).dim_names
    cut = {
        name
        for param in params
        for name, placement in zip(
            sync._cache.mesh(param.device_mesh).dim_names, param.placements, strict=True
        )
        if not placement.is_replicate()
    }
    dims = tuple(name for name in names if name in cut)

    def hook(gradient: Tensor) -> None:
        sync.combine(index, gradient.view(-1), mesh, dims)

    return hook


def _ddp_hook(
    group: dist.ProcessGroup,
) -> Callable[[GradientSync, GradBucket], Future[Tensor]]:
    """Return DDP's hook: the mean over the ranks of the island, then the islands."""

    def hook(sync: GradientSync, bucket: GradBucket) -> Future[Tensor]:
        gradient = bucket.buffer()
        gradient.div_(dist.get_world_size(group))
        dist.all_reduce(gradient, group=group)
        sync.combine(bucket.index(), gradient, None, ())
        future: Future[Tensor] = Future()
        future.set_result(gradient)
        return future

    return hook
