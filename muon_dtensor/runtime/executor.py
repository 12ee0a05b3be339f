"""Executes a plan on one rank: interprets the events of its schedule."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import assert_never

import torch
from torch import Tensor

from muon_dtensor.algorithms.update import (
    MatrixSlice,
    apply_updates,
    update_momentum,
    write_directions,
)
from muon_dtensor.errors import StepFailedError
from muon_dtensor.planning.plan import Action, Assignment, Phase, Plan
from muon_dtensor.planning.schedule import (
    Apply,
    Compute,
    Event,
    Fill,
    Hop,
    Repack,
    Send,
    UpdateMomenta,
    Wait,
    lower,
)
from muon_dtensor.runtime.buffers import ExchangeBuffers, InFlight
from muon_dtensor.runtime.collectives import barrier, issue
from muon_dtensor.runtime.compiled_bucket import CompiledBucket, Run
from muon_dtensor.runtime.hyperparameters import MuonOptions
from muon_dtensor.runtime.local_param import LocalParam
from muon_dtensor.runtime.normuon_state import RowSecondMoments
from muon_dtensor.runtime.packing import (
    assemble,
    disassemble,
    fill,
    from_matrix,
    repack,
    to_matrix,
    view_box,
)
from muon_dtensor.runtime.process_groups import Groups
from muon_dtensor.runtime.torch_private import range_of, timeout_of
from muon_dtensor.runtime.trace import Trace

Observer = Callable[[Assignment, Tensor], None]

_Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


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
        self._runs = {
            index: CompiledBucket(plan, index, rank, devices)
            for index, bucket in enumerate(plan.buckets)
            if bucket.mesh.holds(rank)
        }
        self._program = lower(plan.schedule, {i: run.sequence for i, run in self._runs.items()})
        self._buffers = ExchangeBuffers(
            self._program,
            {index: run.local for index, run in self._runs.items()},
            {index: (run.dtype, run.device) for index, run in self._runs.items()},
        )
        self._flights: dict[int, InFlight] = {}
        self._moments = RowSecondMoments(plan, rank, groups)
        self._look: Observer | None = None
        self._now: Action | None = None
        self._is_overlapped = False

    @contextmanager
    def watched(self, trace: Trace, look: Observer) -> Iterator[None]:
        """Let another trace record the phases inside, and `look` see each whole polar factor."""
        before, self._trace, self._look = self._trace, trace, look
        try:
            yield
        finally:
            self._trace, self._look = before, None

    def connect(self) -> None:
        """Connect every process group the plan needs, in plan order: a collective of its ranks."""
        for run in self._runs.values():
            for collective in (*run.bucket.unshard, *run.bucket.reshard):
                self._groups.connect(run.bucket.mesh, collective.mesh_dims)
        self._moments.connect()

    def run(
        self,
        params: dict[int, LocalParam],
        keep: Tensor | None = None,
        overlapped: Callable[[], None] | None = None,
    ) -> None:
        """One step. `params` maps indices of `plan.params` to those that have a gradient.

        Raises StepFailedError, which names the phase and the bucket, for whatever went wrong.

        Args:
            keep: a bool scalar on the device; where it is False all bytes move and nothing changes.
            overlapped: AdamW's work of this rank, which is done while the first exchanges are in
                flight, and in any case.
        """
        try:
            self._walk(params, keep, overlapped)
        except BaseException as error:
            # exchanges of this step may be in flight yet: the next one must not meet them
            self._flights.clear()
            self._buffers.forget()
            if isinstance(error, Exception):
                raise StepFailedError(f"The step failed in {self._where()}: {error}") from error
            raise
        if self._trace is not None:
            self._trace.step += 1

    def _where(self) -> str:
        if self._is_overlapped:
            return "AdamW's groups"
        if (now := self._now) is None:
            return "the row moments of NorMuon"
        return f"phase {now} ({now.phase.name.lower()})"

    def _walk(
        self,
        params: dict[int, LocalParam],
        keep: Tensor | None,
        overlapped: Callable[[], None] | None,
    ) -> None:
        self._is_overlapped = False
        for action, events in self._program:
            self._now = action
            if overlapped is not None and action.phase is not Phase.UNSHARD:
                self._do(overlapped)
                overlapped = None
            run = self._runs[action.bucket]
            if action.phase is Phase.ORTHOGONALIZE and self.plan.options.sequential:
                self._act_in_turn(action, events, run, params, keep)
            else:
                self._act(action, events, run, params, keep)
        if overlapped is not None:
            self._do(overlapped)
        self._now = None
        kept = {index: p.moments for index, p in params.items() if p.moments is not None}
        self._moments.broadcast(kept)

    def _do(self, overlapped: Callable[[], None]) -> None:
        self._is_overlapped = True
        overlapped()
        self._is_overlapped = False

    def _act(
        self,
        action: Action,
        events: Sequence[Event],
        run: CompiledBucket,
        params: dict[int, LocalParam],
        keep: Tensor | None,
    ) -> None:
        trace = self._trace
        with (
            range_of(run.names[action.phase]),
            nullcontext() if trace is None else trace.span(action.bucket, action.phase),
        ):
            if action.phase is Phase.UNSHARD:
                with self._momenta_here(run, params) as params_here:
                    self._interpret(events, run, params_here, keep)
            else:
                self._interpret(events, run, params, keep)

    def _interpret(
        self,
        events: Sequence[Event],
        run: CompiledBucket,
        params: dict[int, LocalParam],
        keep: Tensor | None,
    ) -> None:
        for event in events:
            match event:
                case Fill(buffer=number):
                    buffer = self._buffers.take(run.index, number)
                    self._flights[run.index] = InFlight(buffer)
                    self._fill(run, buffer, params, keep)
                case UpdateMomenta():
                    self._update_momenta(run.unpacked, params, keep)
                case Repack(hop=hop):
                    self._repack(run, self._flights[run.index], hop)
                case Send(hop=hop):
                    self._send(run, self._flights[run.index], hop)
                case Wait():
                    self._flights[run.index].wait()
                case Compute():
                    self._orthogonalize(run, self._flights[run.index], params, keep)
                case Apply():
                    self._apply(run, self._flights.pop(run.index).buffer, params, keep)
                case _:
                    assert_never(event)

    @contextmanager
    def _momenta_here(
        self, run: CompiledBucket, params: dict[int, LocalParam]
    ) -> Iterator[dict[int, LocalParam]]:
        """Bring offloaded momenta of a bucket to the device, and copy them back afterwards."""
        away = {
            index: params[index]
            for index in run.local.shards
            if index in params and params[index].is_momentum_away
        }
        if not away:
            yield params
            return
        here = {**params, **{index: local.with_momentum() for index, local in away.items()}}
        yield here
        for index, local in away.items():
            local.momentum_buffer.copy_(here[index].momentum_buffer, non_blocking=True)

    def _fill(
        self,
        run: CompiledBucket,
        buffer: Tensor,
        params: dict[int, LocalParam],
        keep: Tensor | None,
    ) -> None:
        """Update momenta, and write directions into the first buffer, batch by batch."""
        views = self._buffers.views(run.index, 0, buffer, run.local.pieces)
        for batch in run.packing:
            self._update_momenta(batch.runs, params, keep)
            for indices in batch.pieces:
                self._write_directions(run, indices, views, params)

    def _write_directions(
        self,
        run: CompiledBucket,
        indices: Sequence[int],
        views: list[Tensor],
        params: dict[int, LocalParam],
    ) -> None:
        groups: dict[tuple[float, bool], _Lists] = {}
        for index in indices:
            piece = run.pieces[index]
            if local := params.get(piece.param):
                key = local.options.momentum, local.options.nesterov
                targets, momenta, grads = groups.setdefault(key, ([], [], []))
                targets.append(views[index])
                momenta.append(view_box(local.momentum_buffer, piece.box))
                grads.append(view_box(local.grad, piece.box))
        for (momentum, nesterov), lists in groups.items():
            write_directions(*lists, momentum, nesterov)

    def _update_momenta(
        self, runs: Sequence[Run], params: dict[int, LocalParam], keep: Tensor | None
    ) -> None:
        groups: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for param, box in runs:
            if local := params.get(param):
                momenta, grads = groups.setdefault(local.options.momentum, ([], []))
                momenta.append(view_box(local.momentum_buffer, box))
                grads.append(view_box(local.grad, box))
        for momentum, (momenta, grads) in groups.items():
            update_momentum(momenta, grads, momentum, keep)

    def _repack(self, run: CompiledBucket, flight: InFlight, hop: Hop) -> None:
        """Fill the send buffer of a collective."""
        send = self._buffers.take(run.index, hop.send)
        repack(flight.buffer, send, run.local.collective(hop).moves)
        flight.buffer = send

    def _send(self, run: CompiledBucket, flight: InFlight, hop: Hop) -> None:
        """Issue a collective; what it receives becomes the flight's buffer."""
        flight.sending = flight.buffer
        flight.buffer = self._buffers.take(run.index, hop.recv)
        collective = run.local.collective(hop)
        group = self._groups.over(run.bucket.mesh, collective.collective.mesh_dims)
        flight.work = issue(collective, flight.sending, flight.buffer, group)
        flight.timeout = timeout_of(group)

    def _orthogonalize(
        self,
        run: CompiledBucket,
        flight: InFlight,
        params: dict[int, LocalParam],
        keep: Tensor | None,
    ) -> None:
        views = self._wholes(run, flight.buffer)
        batches: list[tuple[MuonOptions, list[Assignment]]] = []
        for batch in run.batches:
            by_options: dict[MuonOptions, list[Assignment]] = defaultdict(list)
            for assignment in batch:
                if local := params.get(assignment.param):
                    by_options[local.options].append(assignment)
            batches += by_options.items()
        gives_up = len(batches) == 1 and not self._buffers.are_kept(run.index)
        for options, assignments in batches:
            params_of_batch = [(a, params[a.param]) for a in assignments]
            self._orthogonalize_batch(run, flight, views, options, params_of_batch, gives_up, keep)

    def _orthogonalize_batch(
        self,
        run: CompiledBucket,
        flight: InFlight,
        views: list[Tensor],
        options: MuonOptions,
        batch: Sequence[tuple[Assignment, LocalParam]],
        gives_up: bool,
        keep: Tensor | None,
    ) -> None:
        """Matrices of one size, each to its polar factor in place.

        `gives_up`: the buffer holds nothing else, and its memory may serve the iteration; see
        `memory.workspaces`.
        """
        x, is_own = self._assemble(run, flight.buffer, views, [a for a, _ in batch])
        if gives_up and is_own:
            views.clear()
            flight.buffer = x.new_empty(0)
        result = options.polar_factor(x, run.dtype, overwrite=is_own)
        del x
        if gives_up and is_own:
            flight.buffer = self._buffers.take(run.index, run.sequence.wholes)
            views += self._wholes(run, flight.buffer)
        polar_factors = [result] if len(batch) == 1 else result.unbind()
        for (assignment, local), polar_factor in zip(batch, polar_factors, strict=True):
            self._put(run, views, assignment, polar_factor, local, keep)

    def _wholes(self, run: CompiledBucket, buffer: Tensor) -> list[Tensor]:
        """The slots of a buffer of whole matrices."""
        return self._buffers.views(run.index, run.sequence.wholes, buffer, run.local.wholes)

    def _assemble(
        self,
        run: CompiledBucket,
        buffer: Tensor,
        views: list[Tensor],
        assignments: Sequence[Assignment],
    ) -> tuple[Tensor, bool]:
        """[[batch,] rows, cols] of matrices of one size, and whether they left the buffer."""
        places = [(run.parts[a], run.local.matrices[a]) for a in assignments]
        if len(places) == 1:
            ((parts, matrix),) = places
            x = to_matrix(assemble(views, parts, matrix.region.shape, buffer), matrix)
            return x, x.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr()
        _, first = places[0]
        batch = buffer.new_empty((len(places), first.rows, first.cols))
        for target, (parts, matrix) in zip(batch, places, strict=True):
            if matrix.pattern:
                whole = assemble(views, parts, matrix.region.shape, buffer)
                target.copy_(to_matrix(whole, matrix))
            else:
                fill(target.view(matrix.region.shape), views, parts)
        return batch, True

    def _put(
        self,
        run: CompiledBucket,
        views: list[Tensor],
        assignment: Assignment,
        polar_factor: Tensor,
        local: LocalParam,
        keep: Tensor | None,
    ) -> None:
        """Lay out a polar factor as its bucket is sent back."""
        if self._look is not None:
            self._look(assignment, polar_factor)
        if local.moments is not None:
            moments = self._moments.of_matrix(local.moments, assignment)
            polar_factor = local.options.normalized(polar_factor, moments, keep)
        result = from_matrix(polar_factor, run.local.matrices[assignment])
        disassemble(result, views, run.parts[assignment])

    def _act_in_turn(
        self,
        action: Action,
        events: Sequence[Event],
        run: CompiledBucket,
        params: dict[int, LocalParam],
        keep: Tensor | None,
    ) -> None:
        mesh = run.bucket.mesh
        for position in sorted(range(mesh.num_ranks), key=mesh.ranks.__getitem__):
            if position == run.position:
                self._act(action, events, run, params, keep)
            if mesh.dim_names:
                barrier(self._groups.over(mesh, mesh.dim_names))

    def _apply(
        self,
        run: CompiledBucket,
        buffer: Tensor,
        params: dict[int, LocalParam],
        keep: Tensor | None,
    ) -> None:
        """Decay and update the local shards."""
        views = self._buffers.views(run.index, run.sequence.results, buffer, run.local.results)
        for batch in run.applying:
            groups: dict[
                tuple[MuonOptions, int, int], tuple[list[Tensor], list[Tensor], list[MatrixSlice]]
            ] = {}
            for index in batch:
                piece = run.results[index]
                if local := params.get(piece.param):
                    key = local.options, piece.place.rows, piece.place.cols
                    targets, polar_factors, places = groups.setdefault(key, ([], [], []))
                    targets.append(view_box(local.param, piece.box))
                    polar_factors.append(views[index])
                    places.append(piece.place)
            for (options, rows, cols), lists in groups.items():
                matrix_lr = options.matrix_lr(rows, cols)
                apply_updates(
                    *lists,
                    decay=options.decay,
                    matrix_lr=matrix_lr,
                    cautious=options.cautious,
                    keep=keep,
                )
