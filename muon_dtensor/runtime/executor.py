"""Walks a Plan on one rank; decides nothing.

Takes local tensors and numbers, moves and updates them in the plan's order. Does not know param
groups, and reads no value from a device but a tensor lr.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor
from torch.distributed import Work
from torch.profiler import record_function

from muon_dtensor.layout import Matrix
from muon_dtensor.orthogonalize.gram import gram_polar_factor
from muon_dtensor.planning.ir import Action, Assignment, Gram, Phase, Plan, gram_segments
from muon_dtensor.planning.routes import Move, RankCollective, Slot, rank_bucket
from muon_dtensor.runtime.collectives import barrier, issue
from muon_dtensor.runtime.describe import local_part
from muon_dtensor.runtime.groups import Groups
from muon_dtensor.runtime.muon_options import MuonOptions
from muon_dtensor.runtime.packing import (
    Box,
    assemble,
    box_of,
    disassemble,
    from_matrix,
    repack,
    to_matrix,
    view_box,
    view_slot,
)
from muon_dtensor.runtime.process_team import ProcessTeam
from muon_dtensor.runtime.trace import Trace
from muon_dtensor.update import (
    Place,
    adjusted_lr,
    apply_update,
    direction_of,
    update_momentum,
)


@dataclass(frozen=True, slots=True)
class LocalParam:
    """This rank's shards of one parameter that has a gradient: tensors of one shape."""

    param: Tensor
    grad: Tensor
    momentum_buffer: Tensor
    options: MuonOptions

    def on_this_rank(self) -> "LocalParam":
        """The same as plain tensors."""
        return LocalParam(
            local_part(self.param),
            local_part(self.grad),
            local_part(self.momentum_buffer),
            self.options,
        )


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


@dataclass(frozen=True, slots=True)
class _Piece:
    """A slot of a buffer and where it lies: in the local shard, and in its matrix."""

    param: int
    slot: Slot
    box: Box | None
    place: Place


class _RankBucketRun:
    """One bucket on one rank, with all that can be worked out before the first step."""

    def __init__(self, plan: Plan, index: int, rank: int, devices: Sequence[torch.device]) -> None:
        self.bucket = bucket = plan.buckets[index]
        self.position = bucket.mesh.position_of(rank)
        self.local = rank_bucket(plan, bucket, self.position)
        self.batches = self.local.batches(plan.options.batched)
        kind = type(bucket.strategy).__name__.lower()
        self.names = {
            phase: f"muon {Action(phase, index)} {phase.name.lower()} {kind}" for phase in Phase
        }
        self.device = devices[bucket.assignments[0].param]
        self.dtype: torch.dtype = getattr(torch, bucket.wire_dtype)
        self.num_iterations = {a.param: plan.spec(a).num_iterations for a in bucket.assignments}
        self.rounding = {
            a.param
            for a in bucket.assignments
            if self.device.type == "cpu" and plan.spec(a).dtype in ("bfloat16", "float16")
        }
        shards = self.local.shards
        self.runs = [(param, box_of(region, shards[param])) for param, region in self.local.runs]
        self.pieces = [self._piece(slot) for slot in self.local.pieces.slots]
        self.results = [self._piece(slot) for slot in self.local.results.slots]

    def _piece(self, slot: Slot) -> _Piece:
        matrix, param = self.local.matrices[slot.assignment], slot.assignment.param
        start = slot.region.relative_to(matrix.region).offset_in(matrix.region.shape)
        box = box_of(slot.region, self.local.shards[param])
        is_transposed = matrix.rows > matrix.cols and self.num_iterations[param] > 0
        positions = None
        if param in self.rounding and not _is_row_major(matrix):
            everything = torch.arange(matrix.numel).view(matrix.rows, matrix.cols)
            positions = view_box(
                from_matrix(everything, matrix), box_of(slot.region, matrix.region)
            ).contiguous()
        place = Place(matrix.rows, matrix.cols, start, is_transposed, positions)
        return _Piece(param, slot, box, place)


def _is_row_major(matrix: Matrix) -> bool:
    """Whether boxes and intervals of a matrix's region are boxes and intervals of the matrix."""
    shape = matrix.region.shape
    return not matrix.pattern and (len(shape) == 1 or shape[-2:] == (matrix.rows, matrix.cols))


class Executor:
    """Runs the steps of one plan on one rank.

    Contract: all ranks of the plan's meshes call `run` the same number of times, in the same
    order, with the same set of parameters that have gradients. Nothing here can tell.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        groups: Groups,
        devices: Sequence[torch.device],
        trace: Trace | None = None,
    ) -> None:
        """`devices`: where the local shard of each of `plan.params` lives."""
        self.plan = plan
        self._trace = trace
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
            if isinstance(run.bucket.strategy, Gram):
                self._groups.over(run.bucket.mesh, run.bucket.strategy.team_dims)

    def run(self, params: dict[int, LocalParam], keep: Tensor | None = None) -> None:
        """One step. `params` maps indices of `plan.params` to those that have a gradient.

        `keep`: a bool scalar on the device; where it is False all bytes move and nothing changes.
        """
        for action in self.plan.schedule:
            if action.bucket in self._buckets:
                run = self._buckets[action.bucket]
                if action.phase is Phase.ORTHOGONALIZE and self.plan.options.sequential:
                    self._orthogonalize_in_turn(action, run, params)
                else:
                    self._act(action, run, params, keep)
        if self._trace is not None:
            self._trace.step += 1

    def _act(
        self,
        action: Action,
        run: _RankBucketRun,
        params: dict[int, LocalParam],
        keep: Tensor | None,
    ) -> None:
        trace = self._trace
        with (
            record_function(run.names[action.phase]),
            nullcontext() if trace is None else trace.span(action.bucket, action.phase),
        ):
            match action.phase:
                case Phase.UNSHARD:
                    self._flights[action.bucket] = self._unshard(run, params, keep)
                case Phase.WAIT:
                    self._arrive(run, self._flights[action.bucket])
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
        by_momentum: dict[float, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for param, box in run.runs:
            if local := params.get(param):
                views = view_box(local.momentum_buffer, box), view_box(local.grad, box)
                by_momentum[local.options.momentum].append(views)
        for momentum, pairs in by_momentum.items():
            update_momentum([b for b, _ in pairs], [g for _, g in pairs], momentum, keep)
        buffer = torch.empty(run.local.pieces.numel, dtype=run.dtype, device=run.device)
        flight = _Flight(buffer, None, [])
        for piece in run.pieces:
            if local := params.get(piece.param):
                view_slot(buffer, piece.slot).copy_(
                    direction_of(
                        view_box(local.momentum_buffer, piece.box),
                        view_box(local.grad, piece.box),
                        local.options.momentum,
                        local.options.nesterov,
                    )
                )
        del buffer
        if run.local.unshard:
            self._hop(run, flight, run.local.unshard[0], run.local.moves_there[0])
        return flight

    def _arrive(self, run: _RankBucketRun, flight: _Flight) -> None:
        """Wait for what brings the pieces, hop after hop."""
        flight.wait()
        for hop in range(1, len(run.local.unshard)):
            self._hop(run, flight, run.local.unshard[hop], run.local.moves_there[hop])
            flight.wait()

    def _orthogonalize(
        self, run: _RankBucketRun, flight: _Flight, params: dict[int, LocalParam]
    ) -> None:
        if isinstance(run.bucket.strategy, Gram):
            self._orthogonalize_in_teams(run, flight.buffer, params, run.bucket.strategy)
            return
        for batch in run.batches:
            by_options: dict[MuonOptions, list[Assignment]] = defaultdict(list)
            for assignment in batch:
                if local := params.get(assignment.param):
                    by_options[local.options].append(assignment)
            for options, assignments in by_options.items():
                self._orthogonalize_batch(run, flight.buffer, options, assignments)

    def _orthogonalize_in_teams(
        self,
        run: _RankBucketRun,
        buffer: Tensor,
        params: dict[int, LocalParam],
        strategy: Gram,
    ) -> None:
        """This rank's slab of each matrix of its teams, in place; all members go in one order."""
        team = ProcessTeam(self._groups.over(run.bucket.mesh, strategy.team_dims))
        for assignment in run.local.boxes:
            if local := params.get(assignment.param):
                self._orthogonalize_slab(run, buffer, local.options, assignment, team)

    def _orthogonalize_slab(
        self,
        run: _RankBucketRun,
        buffer: Tensor,
        options: MuonOptions,
        assignment: Assignment,
        team: ProcessTeam,
    ) -> None:
        box, slots = run.local.boxes[assignment], run.local.slots_of.get(assignment, ())
        slab = assemble(buffer, slots, box) if slots else buffer.new_empty(box.shape)
        slab = slab.view(box.shape[-2:])
        matrix = run.local.matrices[assignment]
        is_tall = matrix.rows >= matrix.cols
        result = gram_polar_factor(
            slab.mT if is_tall else slab,
            options.coefficients,
            gram_segments(options.ns_steps),
            team,
            eps=options.eps,
        )
        result = (result.mT if is_tall else result).reshape(box.shape)
        disassemble(result, buffer, slots, box)

    def _orthogonalize_in_turn(
        self, action: Action, run: _RankBucketRun, params: dict[int, LocalParam]
    ) -> None:
        mesh = run.bucket.mesh
        for position in sorted(range(mesh.num_ranks), key=mesh.ranks.__getitem__):
            if position == run.position:
                self._act(action, run, params, None)
            if mesh.dim_names:
                barrier(self._groups.over(mesh, mesh.dim_names))

    def _orthogonalize_batch(
        self,
        run: _RankBucketRun,
        buffer: Tensor,
        options: MuonOptions,
        assignments: Sequence[Assignment],
    ) -> None:
        """Matrices of one size, each to its polar factor in place."""
        places = [(run.local.slots_of[a], run.local.matrices[a]) for a in assignments]
        matrices = [
            to_matrix(assemble(buffer, slots, matrix.region), matrix) for slots, matrix in places
        ]
        together = matrices[0] if len(matrices) == 1 else torch.stack(matrices)
        result = options.polar_factor(together, run.dtype)
        polar_factors = [result] if len(matrices) == 1 else result.unbind()
        for polar_factor, (slots, matrix) in zip(polar_factors, places, strict=True):
            disassemble(from_matrix(polar_factor, matrix), buffer, slots, matrix.region)

    def _hop_back(self, run: _RankBucketRun, flight: _Flight, hop: int) -> None:
        """Issue one collective of the way back."""
        self._hop(run, flight, run.local.reshard[hop], run.local.moves_back[hop])

    def _hop(
        self,
        run: _RankBucketRun,
        flight: _Flight,
        rank_collective: RankCollective,
        moves: Sequence[Move] | None,
    ) -> None:
        """Issue a collective; what it brings becomes the flight's buffer."""
        if moves is not None:
            send = torch.empty(rank_collective.send.numel, dtype=run.dtype, device=run.device)
            repack(flight.buffer, send, moves)
            flight.buffer = send
        flight.sending = flight.buffer
        flight.buffer = torch.empty(rank_collective.recv.numel, dtype=run.dtype, device=run.device)
        group = self._groups.over(run.bucket.mesh, rank_collective.collective.mesh_dims)
        flight.works.append(issue(rank_collective, flight.sending, flight.buffer, group))

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
        for piece in run.results:
            local = params.get(piece.param)
            if local is None:
                continue
            options, place = local.options, piece.place
            apply_update(
                view_box(local.param, piece.box),
                view_slot(flight.buffer, piece.slot),
                place,
                decay=options.decay,
                matrix_lr=adjusted_lr(options.lr, options.adjust_lr_fn, place.rows, place.cols),
                keep=keep,
            )
