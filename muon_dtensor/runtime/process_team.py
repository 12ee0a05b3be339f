"""A team as torch's process group runs it. Knows no plan and no mathematics."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from muon_dtensor.runtime.collectives import all_gather_parts, all_reduce_max, all_reduce_sum


class ProcessTeam:
    """The ranks of a process group, in its order; see `orthogonalize.gram.Team`."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.num_members = dist.get_world_size(group)
        self.index = dist.get_rank(group)

    def add_up(self, x: Tensor) -> None:
        """The sum over the team, in place."""
        all_reduce_sum(x, self._group)

    def take_largest(self, x: Tensor) -> None:
        """The elementwise maximum over the team, in place."""
        all_reduce_max(x, self._group)

    def gather_rows(self, rows: Tensor, num_rows: int) -> Tensor:
        """All rows; every member's part is as long as the first, whose last rows may be unused."""
        rows_each = -(-num_rows // self.num_members)
        if len(rows) == rows_each:
            part = rows.contiguous()
        else:
            part = rows.new_zeros(rows_each, rows.size(1))
            part[: len(rows)] = rows
        everything = rows.new_empty(self.num_members * rows_each, rows.size(1))
        all_gather_parts(everything, part, self._group)
        return everything[:num_rows]
