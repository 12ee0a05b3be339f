"""NorMuon's second moments of rows on one rank: owners bring them up to date and tell the others.

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
from muon_dtensor.runtime.dtensors import describe_mesh
from muon_dtensor.runtime.process_groups import Groups
from muon_dtensor.runtime.torch_private import local_part

Kept = Mapping[int, Tensor]
"""By index of parameter all the moments that this rank keeps: float32, contiguous."""


def zeros_beside(param: Tensor, layout: Layout, rank: int) -> Tensor:
    """Float32 zeros on the device of a parameter, laid out so on its mesh.

    Of a DTensor a DTensor: it keeps the placements of tensor dim 0 on mesh dims that cut `layout`.
    """
    shape = layout.region(layout.mesh.position_of(rank)).shape
    zeros = torch.zeros(shape, dtype=torch.float32, device=local_part(param).device)
    if not isinstance(param, DTensor):
        return zeros
    names = describe_mesh(param.device_mesh).dim_names
    placements = [
        placement if name in layout.cuts[0] else Replicate()
        for name, placement in zip(names, param.placements, strict=True)
    ]
    strides = torch.empty(layout.shape, device="meta").stride()
    whole: DTensor = DTensor.from_local(
        zeros,
        param.device_mesh,
        placements,
        run_check=False,
        shape=torch.Size(layout.shape),
        stride=strides,
    )
    return whole


class RowSecondMoments:
    """Of all parameters of a plan that NorMuon steps, seen from one rank."""

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
        """Connect every process group that `tell` needs: a collective of its ranks."""
        for reduction in self._reductions:
            self._groups.connect(reduction.mesh, reduction.mesh_dims)

    def _group(self, reduction: Reduction) -> ProcessGroup:
        return self._groups.over(reduction.mesh, reduction.mesh_dims)

    def of_matrix(self, kept: Tensor, assignment: Assignment) -> Tensor:
        """The moments [rows] of a matrix among all that this rank keeps of its parameter."""
        where = self._slices.get(assignment)
        if where is None:
            spec = self._plan.spec(assignment)
            position = spec.layout.mesh.position_of(self._rank)
            where = self._slices[assignment] = moment_slice(spec, assignment.matrix, position)
        return kept.view(-1)[where]

    def tell(self, kept: Kept) -> None:
        """Bring the moments of all who keep them to what the owners of the matrices say.

        Each number is summed with zeros alone, so that all ranks hold the same bits.
        """
        for reduction in self._reductions:
            params = [index for index in reduction.params if index in kept]
            if not params:
                continue
            said = [torch.zeros_like(kept[index]) for index in params]
            for index, zeros in zip(params, said, strict=True):
                for a in self._owned.get(index, ()):
                    self.of_matrix(zeros, a).copy_(self.of_matrix(kept[index], a))
            everything = torch.cat([zeros.view(-1) for zeros in said])
            all_reduce_sum(everything, self._group(reduction))
            parts = torch.split(everything, [zeros.numel() for zeros in said])
            for index, part in zip(params, parts, strict=True):
                kept[index].copy_(part.view_as(kept[index]))
