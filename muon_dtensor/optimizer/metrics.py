"""Metrics of a step as plain numbers: norms of gradients, momenta and updates, bytes, seconds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from muon_dtensor.algorithms.residual import orthogonality_residual
from muon_dtensor.algorithms.update import adjusted_lr
from muon_dtensor.layout import Layout
from muon_dtensor.optimizer.params import Entry, ParameterTable
from muon_dtensor.optimizer.state import quantized_momentum
from muon_dtensor.planning.normuon_state import reductions
from muon_dtensor.planning.plan import Assignment, Bucket, ParamSpec
from muon_dtensor.planning.report import PlanReport
from muon_dtensor.runtime.process_groups import Groups
from muon_dtensor.runtime.torch_private import local_part, this_rank
from muon_dtensor.runtime.totals import sharded_sum
from muon_dtensor.runtime.trace import Trace

State = Mapping[Tensor, dict[str, Any]]
"""The state of an optimizer: for each parameter, its values by name."""

SUMMED = ("grad", "momentum", "update", "param", "numel")
"""Sums over the elements of a param group: squares of the first four, and the count."""


class Measurement:
    """The metrics of one step: constructed before the step, `finish` is called after it.

    Holds a copy of this rank's shards of all parameters in between.
    """

    def __init__(
        self,
        plan: PlanReport,
        table: ParameterTable,
        specs: Mapping[Tensor, ParamSpec],
        number: int,
        trace: Trace | None,
    ) -> None:
        """`number`: index of the measurement, selects the sampled matrix. `trace`: the user's."""
        self._plan, self._table, self._param_specs = plan, table, specs
        self._before = {
            entry.name: local_part(entry.param).detach().clone() for entry in table.entries
        }
        self.trace = trace or Trace(this_rank())
        self._first_span = len(self.trace.spans)
        # a team never holds the whole polar factor
        matrices = [
            (bucket, a) for bucket in plan.buckets for a in bucket.assignments if a.slab is None
        ]
        self._sample: tuple[Bucket, Assignment] | None = None
        if matrices:
            self._sample = matrices[number % len(matrices)]
        self._residual: Tensor | None = None

    def observe(self, assignment: Assignment, polar_factor: Tensor) -> None:
        """Record the residual of the sampled matrix from its full polar factor [rows, cols]."""
        if self._sample is None or assignment != self._sample[1]:
            return
        if self._sample[0].mesh.ranks[assignment.owner] == this_rank():
            self._residual = orthogonality_residual(polar_factor)

    def finish(
        self,
        groups: Sequence[Mapping[str, Any]],
        grads: Mapping[str, Tensor],
        state: State,
        process_groups: Groups,
    ) -> dict[str, float]:
        """Return the metrics of the step; see `Muon.metrics`.

        A collective of all parameters' meshes. `grads`: the gradients that the step used, by
        parameter name, placed like the parameters.
        """
        total = self._totals(len(groups), grads, state, process_groups)
        numbers: dict[str, float] = {}
        grad_square = 0.0
        for index, group in enumerate(groups):
            sums = dict(zip(SUMMED, total[index * len(SUMMED) :], strict=False))
            numel = sums.pop("numel")
            group_name = f"group{index}"
            numbers[f"{group_name}/lr"] = float(group["lr"])
            numbers[f"{group_name}/effective_lr"] = self._effective_lr(index, group)
            numbers |= {f"{group_name}/{name}_norm": square**0.5 for name, square in sums.items()}
            numbers[f"{group_name}/update_rms"] = (sums["update"] / numel) ** 0.5 if numel else 0.0
            grad_square += sums["grad"]
        numbers["grad_norm"] = grad_square**0.5
        if self._sample is not None:
            numbers["orthogonality_residual"] = total[-1]
        return {**numbers, **self._rank_metrics()}

    def _totals(
        self,
        num_groups: int,
        grads: Mapping[str, Tensor],
        state: State,
        process_groups: Groups,
    ) -> list[float]:
        """Return the concatenated SUMMED values of all param groups, then the residual."""
        device, size = self._table.shared_device, num_groups * len(SUMMED) + 1
        values: list[tuple[Layout, Tensor]] = []
        for entry in self._table.entries:
            row = torch.zeros(size, dtype=torch.float64, device=device)
            parts = [part.to(device) for part in self._squares(entry, grads.get(entry.name), state)]
            first = entry.group_index * len(SUMMED)
            row[first : first + len(parts)] = torch.stack(parts)
            row[first + len(parts)] = local_part(entry.param).numel()
            spec = self._param_specs.get(entry.param)
            if spec is not None and spec.gathered_dims:  # its momentum has another layout
                of_momentum = torch.zeros_like(row)
                index = first + SUMMED.index("momentum")
                of_momentum[index], row[index] = row[index].clone(), 0
                values.append((spec.momentum_layout, of_momentum))
            values.append((self._table.layout(entry), row))
        if self._sample is not None:
            mesh = self._sample[0].mesh
            row = torch.zeros(size, dtype=torch.float64, device=device)
            if self._residual is not None:
                row[-1] = self._residual
            # The layout is cut over all mesh dims, so that the sum includes every rank's row.
            values.append((Layout(mesh, (mesh.num_ranks,), (mesh.dim_names,)), row))
        if not values:
            return [0.0] * size
        numbers: list[float] = sharded_sum(values, process_groups, this_rank()).tolist()
        return numbers

    def _squares(self, entry: Entry, grad: Tensor | None, state: State) -> Iterator[Tensor]:
        """Yield the sums of squares of this rank's gradient, momentum, update and parameter."""
        param_state = state[entry.param]
        if entry.group["algorithm"] == "adamw":
            momentum = param_state["exp_avg"]
        elif entry.group["momentum_bits"] is not None:
            momentum = quantized_momentum(param_state, entry.param).decoded()
        else:
            momentum = param_state["momentum_buffer"]
        shard = local_part(entry.param).detach()
        yield _square(shard.new_empty(0) if grad is None else local_part(grad))
        yield _square(local_part(momentum))
        wide = torch.promote_types(shard.dtype, torch.float32)
        yield _square(shard.to(wide) - self._before[entry.name].to(wide))
        yield _square(shard)

    def _effective_lr(self, index: int, group: Mapping[str, Any]) -> float:
        """Return lr times the mean scale of a group's matrices, weighted by elements."""
        names = {entry.name for entry in self._table.muon if entry.group_index == index}
        matrices = [m for spec in self._plan.params if spec.fqn in names for m in spec.matrices]
        numel = sum(m.numel for m in matrices)
        scaled = sum(
            m.numel * float(adjusted_lr(group["lr"], group["adjust_lr_fn"], m.rows, m.cols))
            for m in matrices
        )
        return scaled / numel if numel else float(group["lr"])

    def _rank_metrics(self) -> dict[str, float]:
        """Return the metrics of this rank alone: sent bytes and seconds."""
        rank, cost = this_rank(), self._plan.cost
        sent = cost.sent_nbytes[cost.ranks.index(rank)] if rank in cost.ranks else 0
        sent += sum(r.sent_nbytes for r in reductions(self._plan.plan) if r.mesh.holds(rank))
        numbers = {"sent_nbytes": float(sent)}
        for span in self.trace.spans[self._first_span :]:
            name = f"seconds/{span.phase.name.lower()}"
            numbers[name] = numbers.get(name, 0.0) + span.stop - span.start
        return numbers


def _square(part: Tensor) -> Tensor:
    """Return the sum of the squares, in float64."""
    if not part.numel():
        return torch.zeros((), dtype=torch.float64, device=part.device)
    wide = torch.promote_types(part.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(part, dtype=wide)
    return norm.double().square()
