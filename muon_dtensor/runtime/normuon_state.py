"""Synchronization of NorMuon's row second moments on one rank: owners send them to all holders.

See `planning.normuon_state`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate

from muon_dtensor.layout import Layout
from muon_dtensor.planning.normuon_state import Reduction, moment_slice, reductions
from muon_dtensor.planning.plan import Assignment, Plan
from muon_dtensor.runtime.collectives import all_reduce_sum
from muon_dtensor.runtime.dtensors import describe_mesh, from_shard
from muon_dtensor.runtime.process_groups import Groups
from muon_dtensor.runtime.torch_private import local_part

Moments = Mapping[int, Tensor]
"""The moments that this rank stores, by index of parameter: float32, contiguous."""


def zeros_with_layout(
    param: Tensor, layout: Layout, rank: int, device: torch.device | None = None
) -> Tensor:
    """Return float32 zeros with this layout, on a device; None: that of the parameter.

    For a DTensor a DTensor: it has the placements of tensor dim 0 on mesh dims that cut `layout`.
    """
    shape = layout.region(layout.mesh.position_of(rank)).shape
    zeros = torch.zeros(shape, dtype=torch.float32, device=device or local_part(param).device)
    if not isinstance(param, DTensor):
        return zeros
    names = describe_mesh(param.device_mesh).dim_names
    placements = [
        placement if name in layout.cuts[0] else Replicate()
        for name, placement in zip(names, param.placements, strict=True)
    ]
    return from_shard(zeros, param.device_mesh, placements, layout.shape)


class RowSecondMoments:
    """The row second moments of all parameters that NorMuon steps, on one rank."""

    def __init__(self, plan: Plan, rank: int, groups: Groups) -> None:
        self._plan, self._rank, self._groups = plan, rank, groups
        self._reductions = [r for r in reductions(plan) if r.mesh.holds(rank)]
        self._slices: dict[Assignment, slice] = {}
        self._owned: dict[int, list[Assignment]] = {}
        for bucket in plan.buckets if self._reductions else ():
            for a in bucket.assignments:
                if bucket.mesh.holds(rank) and bucket.mesh.ranks[a.owner] == rank:
                    self._owned.setdefault(a.param, []).append(a)

    def connect(self) -> None:
        """Connect every process group that `broadcast` needs: a collective of its ranks."""
        for reduction in self._reductions:
            self._groups.connect(reduction.mesh, reduction.mesh_dims)

    def _group(self, reduction: Reduction) -> ProcessGroup:
        return self._groups.over(reduction.mesh, reduction.mesh_dims)

    def of_matrix(self, moments: Tensor, assignment: Assignment) -> Tensor:
        """Return the moments [rows] of a matrix, a view of its parameter's on this rank."""
        rows = self._slices.get(assignment)
        if rows is None:
            spec = self._plan.spec(assignment)
            position = spec.layout.mesh.position_of(self._rank)
            rows = self._slices[assignment] = moment_slice(spec, assignment.matrix, position)
        return moments.view(-1)[rows]

    def broadcast(self, moments: Moments) -> None:
        """Broadcast the row second moments from each matrix's owner to all ranks that store them.

        Each number is summed with zeros only, so that all ranks hold the same bits.
        """
        for reduction in self._reductions:
            params = [index for index in reduction.params if index in moments]
            if not params:
                continue
            owned = [torch.zeros_like(moments[index]) for index in params]
            for index, zeros in zip(params, owned, strict=True):
                for a in self._owned.get(index, ()):
                    self.of_matrix(zeros, a).copy_(self.of_matrix(moments[index], a))
            summed = torch.cat([zeros.view(-1) for zeros in owned])
            all_reduce_sum(summed, self._group(reduction))
            parts = torch.split(summed, [zeros.numel() for zeros in owned])
            for index, part in zip(params, parts, strict=True):
                moments[index].copy_(part.view_as(moments[index]))
