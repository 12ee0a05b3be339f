"""Walks a Plan on one rank; decides nothing.

Takes local tensors and numbers, moves and updates them in the plan's order. Does not know param
groups, and never reads a value from a device.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor
from torch.distributed import Work

from muon_dtensor.layout import Region
from muon_dtensor.matrices import rows_and_cols
from muon_dtensor.orthogonalize import newton_schulz
from muon_dtensor.planning.ir import Action, Assignment, Phase, Plan
from muon_dtensor.planning.routes import RankBucket, Slot, Transfer, rank_bucket
from muon_dtensor.runtime.collectives import issue
from muon_dtensor.runtime.groups import Groups
from muon_dtensor.runtime.packing import (
    Move,
    assemble,
    moves,
    repack,
    scatter,
    view_region,
    view_slot,
)
from muon_dtensor.update import (
    Place,
    adjusted_lr,
    apply_update,
    direction_of,
    update_momentum,
)


@dataclass(frozen=True, slots=True)
class MuonOptions:
    """What a param group says about the step of its parameters, with the meaning torch gives."""

    lr: float
    weight_decay: float
    momentum: float
    nesterov: bool
    ns_coefficients: tuple[float, float, float]
    eps: float
    ns_steps: int
    adjust_lr_fn: str | None


@dataclass(frozen=True, slots=True)
class LocalParam:
    """This rank's shards of one parameter that has a gradient: plain tensors of one shape."""

    param: Tensor
    grad: Tensor
    momentum_buffer: Tensor
    options: MuonOptions


@dataclass(slots=True)
class _Flight:
    """What is live of one bucket between its phases; see Note [Three buffers].

    `buffer` is what the next phase reads: `wholes`, later what a hop back has brought. `sending`
    is what unfinished works still read.
    """

    buffer: Tensor
    sending: Tensor | None
    works: list[Work]

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works.clear()
        self.sending = None


class _RankBucketRun:
    """One bucket on one rank, with all that can be worked out before the first step."""

    def __init__(self, plan: Plan, index: int, rank: int, devices: Sequence[torch.device]) -> None:
        bucket = plan.buckets[index]
        self.device = devices[bucket.assignments[0].param]
        self.bucket = bucket
        position = bucket.mesh.position_of(rank)
        self.local: RankBucket = rank_bucket(plan, bucket, position)
        self.dtype: torch.dtype = getattr(torch, bucket.wire_dtype)
        self.origins = {
            a.param: plan.spec(a).layout.region(position) for a, _ in self.local.touched
        }
        self.momentum_runs = _merge_runs(self.local.touched, self.origins)
        self.slots_of: dict[Assignment, list[Slot]] = defaultdict(list)
        for slot in self.local.wholes.slots:
            self.slots_of[slot.assignment].append(slot)
        self.matrix_of = {a: plan.matrix(a) for a, _ in self.local.touched}
        self.hop_moves = self._hop_moves()

    def _hop_moves(self) -> list[tuple[Move, ...] | None]:
        """Per hop back, how its send buffer is filled; None where it is the buffer before it."""
        found: list[tuple[Move, ...] | None] = []
        before = self.local.wholes
        for transfer in self.local.reshard:
            mirror = transfer.send.by_peer == before.by_peer
            found.append(None if mirror else moves(before, transfer.send))
            before = transfer.recv
        return found


def _merge_runs(
    touched: Sequence[tuple[Assignment, Region]], origins: dict[int, Region]
) -> tuple[tuple[int, Region], ...]:
    """Pieces by parameter; where they are all of the shard, the shard itself."""
    by_param: dict[int, list[Region]] = defaultdict(list)
    for assignment, region in touched:
        by_param[assignment.param].append(region)
    runs: list[tuple[int, Region]] = []
    for param, regions in by_param.items():
        whole = sum(region.numel for region in regions) == origins[param].numel
        runs += [(param, origins[param])] if whole else [(param, region) for region in regions]
    return tuple(runs)


class Executor:
    """Runs the steps of one plan on one rank.

    Contract: all ranks of the plan's meshes call `run` the same number of times, in the same
    order, with the same set of parameters that have gradients. Nothing here can tell.
    """

    def __init__(
        self, plan: Plan, rank: int, groups: Groups, devices: Sequence[torch.device]
    ) -> None:
        """`devices`: where the local shard of each of `plan.params` lives."""
        self.plan = plan
        self._groups = groups
        self._buckets = {
            index: _RankBucketRun(plan, index, rank, devices)
            for index, bucket in enumerate(plan.buckets)
            if bucket.mesh.holds(rank)
        }
        self._flights: dict[int, _Flight] = {}

    def connect(self) -> None:
        """Make every process group the plan needs, in plan order: a collective of its ranks."""
        for run in self._buckets.values():
            for collective in (*run.bucket.unshard, *run.bucket.reshard):
                self._groups.over(run.bucket.mesh, collective.mesh_dims)

    def run(self, params: dict[int, LocalParam], keep: Tensor | None = None) -> None:
        """One step. `params` maps indices of `plan.params` to those that have a gradient.

        `keep`: a bool scalar on the device; where it is False all bytes move and nothing changes.
        """
        for action in self.plan.schedule:
            if action.bucket in self._buckets:
                self._act(action, self._buckets[action.bucket], params, keep)

    def _act(
        self,
        action: Action,
        run: _RankBucketRun,
        params: dict[int, LocalParam],
        keep: Tensor | None,
    ) -> None:
        match action.phase:
            case Phase.UNSHARD:
                self._flights[action.bucket] = self._unshard(run, params, keep)
            case Phase.WAIT:
                self._flights[action.bucket].wait()
            case Phase.ORTHOGONALIZE:
                self._orthogonalize(run, self._flights[action.bucket], params)
            case Phase.RESHARD:
                self._hop_back(run, self._flights[action.bucket], hop=0)
            case Phase.APPLY:
                self._apply(run, self._flights.pop(action.bucket), params, keep)
            case _:
                assert_never(action.phase)

    def _unshard(
        self, run: _RankBucketRun, params: dict[int, LocalParam], keep: Tensor | None
    ) -> _Flight:
        local = run.local
        by_momentum: dict[float, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for param, region in run.momentum_runs:
            if leaf := params.get(param):
                views = (
                    view_region(leaf.momentum_buffer, region, run.origins[param]),
                    view_region(leaf.grad, region, run.origins[param]),
                )
                by_momentum[leaf.options.momentum].append(views)
        for momentum, pairs in by_momentum.items():
            update_momentum([b for b, _ in pairs], [g for _, g in pairs], momentum, keep)
        pieces = torch.empty(local.pieces.numel, dtype=run.dtype, device=run.device)
        for slot in local.pieces.slots:
            if leaf := params.get(slot.assignment.param):
                origin = run.origins[slot.assignment.param]
                direction = direction_of(
                    view_region(leaf.momentum_buffer, slot.region, origin),
                    view_region(leaf.grad, slot.region, origin),
                    leaf.options.momentum,
                    leaf.options.nesterov,
                )
                view_slot(pieces, slot).copy_(direction)
        flight = _Flight(pieces, None, [])
        for transfer in local.unshard:
            self._send(run, flight, transfer, pieces)
        return flight

    def _send(self, run: _RankBucketRun, flight: _Flight, transfer: Transfer, send: Tensor) -> None:
        """Start a transfer; what it brings becomes the flight's buffer."""
        group = self._groups.over(run.bucket.mesh, transfer.collective.mesh_dims)
        recv = torch.empty(transfer.recv.numel, dtype=run.dtype, device=run.device)
        flight.works.append(issue(transfer, send, recv, group))
        flight.buffer, flight.sending = recv, send

    def _orthogonalize(
        self, run: _RankBucketRun, flight: _Flight, params: dict[int, LocalParam]
    ) -> None:
        batches: dict[object, list[Assignment]] = defaultdict(list)
        for assignment in run.local.owned:
            if leaf := params.get(assignment.param):
                shape = rows_and_cols(run.matrix_of[assignment])
                alone = None if self.plan.options.batched else assignment
                batches[shape, leaf.options, alone].append(assignment)
        for assignments in batches.values():
            options = params[assignments[0].param].options
            matrices = [
                assemble(flight.buffer, run.slots_of[a], run.matrix_of[a]).view(
                    rows_and_cols(run.matrix_of[a])
                )
                for a in assignments
            ]
            stacked = matrices[0] if len(matrices) == 1 else torch.stack(matrices)
            result = newton_schulz(
                stacked,
                coefficients=options.ns_coefficients,
                num_iterations=options.ns_steps,
                eps=options.eps,
                dtype=run.dtype,
            )
            results = [result] if len(matrices) == 1 else list(result.unbind())
            for assignment, polar_factor in zip(assignments, results, strict=True):
                slots, matrix = run.slots_of[assignment], run.matrix_of[assignment]
                scatter(polar_factor, flight.buffer, slots, matrix)

    def _hop_back(self, run: _RankBucketRun, flight: _Flight, hop: int) -> None:
        """Start one transfer of the way back."""
        transfer, runs = run.local.reshard[hop], run.hop_moves[hop]
        send = flight.buffer
        if runs is not None:
            send = torch.empty(transfer.send.numel, dtype=run.dtype, device=run.device)
            repack(flight.buffer, send, runs)
        self._send(run, flight, transfer, send)

    def _apply(
        self,
        run: _RankBucketRun,
        flight: _Flight,
        params: dict[int, LocalParam],
        keep: Tensor | None,
    ) -> None:
        flight.wait()
        for hop in range(1, len(run.local.reshard)):
            self._hop_back(run, flight, hop)
            flight.wait()
        for slot in run.local.results.slots:
            leaf = params.get(slot.assignment.param)
            if leaf is None:
                continue
            options, origin = leaf.options, run.origins[slot.assignment.param]
            matrix = run.matrix_of[slot.assignment]
            rows, cols = rows_and_cols(matrix)
            row, col = slot.region.relative_to(matrix).start[-2:]
            apply_update(
                view_region(leaf.param, slot.region, origin),
                view_slot(flight.buffer, slot),
                Place(rows, cols, row, col),
                lr=options.lr,
                matrix_lr=adjusted_lr(options.lr, options.adjust_lr_fn, rows, cols),
                weight_decay=options.weight_decay,
                keep=keep,
            )
