"""Executes a plan on one rank by interpreting the events of its schedule."""

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import assert_never

import torch
from torch import Tensor

from muon_dtensor.algorithms.rounding import RandomKey, apply_rounded, random_bits
from muon_dtensor.algorithms.update import (
    MatrixSlice,
    apply_updates,
    update_momentum,
    write_directions,
)
from muon_dtensor.errors import StepFailedError
from muon_dtensor.layout.matrices import slab_size
from muon_dtensor.planning.matrix_costs import rows_of_member
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
from muon_dtensor.planning.strategies import Distributed
from muon_dtensor.runtime.buffers import ExchangeBuffers, InFlight
from muon_dtensor.runtime.collectives import TeamGroup, barrier, issue
from muon_dtensor.runtime.compiled_bucket import CompiledBucket, CompiledSlot, MomentumBox
from muon_dtensor.runtime.host_link import HostLink
from muon_dtensor.runtime.hyperparameters import MuonOptions
from muon_dtensor.runtime.local_param import LocalParam
from muon_dtensor.runtime.normuon_state import RowSecondMoments
from muon_dtensor.runtime.packing import (
    Copies,
    assemble,
    element_numbers,
    from_matrix,
    repack,
    to_matrix,
    view_box,
    view_slots,
)
from muon_dtensor.runtime.process_groups import Groups
from muon_dtensor.runtime.torch_private import profiler_range, shares_storage, timeout_of
from muon_dtensor.runtime.trace import Trace

Observer = Callable[[Assignment, Tensor], None]

_Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


class Executor:
    """Runs the steps of one plan on one rank.

    Contract: all ranks of the plan's meshes call `run` the same number of times, in the same
    order, with the same set of parameters that have gradients. This class does not check it.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        groups: Groups,
        devices: Sequence[torch.device],
        buffer_devices: Sequence[torch.device],
        trace: Trace | None = None,
    ) -> None:
        """Compile the plan for one rank.

        `devices`: of the local shard of each of `plan.params`; `buffer_devices`: of the buffers in
        which it is exchanged, another device for offloaded parameters.
        """
        self.plan = plan
        self._trace = trace
        self._groups = groups
        self._buckets = {
            index: CompiledBucket(plan, index, rank, devices, buffer_devices)
            for index, bucket in enumerate(plan.buckets)
            if bucket.mesh.holds(rank)
        }
        self._program = lower(
            plan.schedule, {i: bucket.sequence for i, bucket in self._buckets.items()}
        )
        links = {
            device: HostLink(device)
            for device in {b.device for b in self._buckets.values() if b.is_offloaded}
        }
        self._links = {i: links[b.device] for i, b in self._buckets.items() if b.is_offloaded}
        self._buffers = ExchangeBuffers(
            self._program,
            {index: bucket.local for index, bucket in self._buckets.items()},
            {index: (bucket.dtype, bucket.device) for index, bucket in self._buckets.items()},
            self._links,
        )
        self._in_flight: dict[int, InFlight] = {}
        self._dense: dict[int, LocalParam] = {}
        self._last_bucket = {
            index: action.bucket
            for action, _ in self._program
            if action.phase is Phase.UNSHARD
            for index in self._buckets[action.bucket].local.momentum_shards
        }
        self._moments = RowSecondMoments(plan, rank, groups)
        self._observer: Observer | None = None
        self._action: Action | None = None
        self._is_overlapped = False

    @contextmanager
    def observed(self, trace: Trace, observer: Observer) -> Iterator[None]:
        """Record phases in `trace`, and call `observer` with each polar factor, in this context."""
        previous, self._trace, self._observer = self._trace, trace, observer
        try:
            yield
        finally:
            self._trace, self._observer = previous, None

    def connect(self) -> None:
        """Connect every process group of the plan, in plan order. A collective of its ranks."""
        for bucket in self._buckets.values():
            for collective in (*bucket.planned.unshard, *bucket.planned.reshard):
                self._groups.connect(bucket.mesh, collective.mesh_dims)
            strategy = bucket.planned.strategy
            if isinstance(strategy, Distributed):
                self._groups.connect(bucket.mesh, strategy.team_dims, strategy.team_size)
        self._moments.connect()

    def run(
        self,
        params: dict[int, LocalParam],
        keep: Tensor | None = None,
        overlapped: Callable[[], None] | None = None,
    ) -> None:
        """Run one step.

        Args:
            params: the parameters that have a gradient, by their index in `plan.params`.
            keep: a bool scalar on the device; where it is False all bytes move and nothing changes.
            overlapped: AdamW's work of this rank. Runs once, while the first exchanges are in
                flight if there are any.

        Raises:
            StepFailedError: any error inside; names the phase and the bucket.
        """
        try:
            self._walk(params, keep, overlapped)
        except BaseException as error:
            # exchanges of this step may still be in flight: the next step must not wait for them
            self._in_flight.clear()
            self._dense.clear()
            self._buffers.drop_all()
            if isinstance(error, Exception):
                raise StepFailedError(
                    f"The step failed in {self._failed_phase()}: {error}"
                ) from error
            raise
        if self._trace is not None:
            self._trace.step += 1

    def _failed_phase(self) -> str:
        if self._is_overlapped:
            return "AdamW's groups"
        if self._action is None:
            return "the row moments of NorMuon"
        return f"phase {self._action} ({self._action.phase.name.lower()})"

    def _walk(
        self,
        params: dict[int, LocalParam],
        keep: Tensor | None,
        overlapped: Callable[[], None] | None,
    ) -> None:
        self._is_overlapped = False
        for action, events in self._program:
            self._action = action
            if overlapped is not None and action.phase is not Phase.UNSHARD:
                self._run_overlapped(overlapped)
                overlapped = None
            bucket = self._buckets[action.bucket]
            if action.phase is Phase.ORTHOGONALIZE and self.plan.options.sequential:
                self._run_in_turn(action, events, bucket, params, keep)
            else:
                self._act(action, events, bucket, params, keep)
        if overlapped is not None:
            self._run_overlapped(overlapped)
        self._action = None
        moments = {index: p.moments for index, p in params.items() if p.moments is not None}
        self._moments.broadcast(moments)

    def _run_overlapped(self, overlapped: Callable[[], None]) -> None:
        self._is_overlapped = True
        overlapped()
        self._is_overlapped = False

    def _act(
        self,
        action: Action,
        events: Sequence[Event],
        bucket: CompiledBucket,
        params: dict[int, LocalParam],
        keep: Tensor | None,
    ) -> None:
        trace, link = self._trace, self._links.get(bucket.index)
        with (
            profiler_range(bucket.profiler_names[action.phase]),
            nullcontext() if trace is None else trace.span(action.bucket, action.phase),
            nullcontext() if link is None else link.phase(action.bucket, action.phase),
        ):
            if action.phase is Phase.UNSHARD:
                with self._momenta_on_device(bucket, params) as params_on_device:
                    self._interpret(events, bucket, params_on_device, keep)
            else:
                self._interpret(events, bucket, params, keep)

    def _interpret(
        self,
        events: Sequence[Event],
        bucket: CompiledBucket,
        params: dict[int, LocalParam],
        keep: Tensor | None,
    ) -> None:
        for event in events:
            match event:
                case Fill(buffer=number):
                    buffer = self._buffers.acquire(bucket.index, number)
                    self._in_flight[bucket.index] = InFlight(buffer)
                    self._fill(bucket, buffer, params, keep)
                case UpdateMomenta():
                    self._update_momenta(bucket.momentum_only, params, keep)
                case Repack(hop=hop):
                    self._repack(bucket, self._in_flight[bucket.index], hop)
                case Send(hop=hop):
                    self._send(bucket, self._in_flight[bucket.index], hop)
                case Wait():
                    self._in_flight[bucket.index].wait()
                case Compute():
                    self._orthogonalize(bucket, self._in_flight[bucket.index], params, keep)
                case Apply():
                    self._apply(bucket, self._in_flight.pop(bucket.index).buffer, params, keep)
                case _:
                    assert_never(event)

    @contextmanager
    def _momenta_on_device(
        self, bucket: CompiledBucket, params: dict[int, LocalParam]
    ) -> Iterator[dict[int, LocalParam]]:
        """Copy or decode momenta of a bucket that are stored elsewhere, and store them afterwards.

        The momentum of a parameter with matrices in several buckets is stored after the last.
        """
        elsewhere = {
            index: params[index]
            for index in bucket.local.momentum_shards
            if index in params and params[index].is_momentum_elsewhere
        }
        if not elsewhere:
            yield params
            return
        for index, local in elsewhere.items():
            if index not in self._dense:
                self._dense[index] = local.with_momentum()
        yield {**params, **{index: self._dense[index] for index in elsewhere}}
        for index, local in elsewhere.items():
            if self._last_bucket[index] == bucket.index:
                local.store_momentum(self._dense.pop(index))

    def _fill(
        self,
        bucket: CompiledBucket,
        buffer: Tensor,
        params: dict[int, LocalParam],
        keep: Tensor | None,
    ) -> None:
        """Update momenta, and write directions into the first buffer, batch by batch."""
        link = self._links.get(bucket.index)
        if link is None:
            views = self._buffers.views(bucket.index, 0, buffer, bucket.local.pieces)
        else:
            host_buffer = link.host_buffer(buffer)
            views = view_slots(host_buffer, bucket.local.pieces.slots)
        for batch in bucket.packing:
            self._update_momenta(batch.momenta, params, keep)
            for indices in batch.slots:
                self._write_directions(bucket, indices, views, params)
        if link is not None:
            link.upload(host_buffer, buffer)

    def _write_directions(
        self,
        bucket: CompiledBucket,
        indices: Sequence[int],
        views: list[Tensor],
        params: dict[int, LocalParam],
    ) -> None:
        groups: dict[tuple[float, bool], _Lists] = {}
        for index in indices:
            slot = bucket.pieces[index]
            if local := params.get(slot.param):
                key = local.options.momentum, local.options.nesterov
                targets, momenta, grads = groups.setdefault(key, ([], [], []))
                targets.append(views[index])
                momenta.append(view_box(local.dense_momentum, slot.in_momentum))
                grads.append(view_box(local.grad, slot.in_shard))
        for (momentum, nesterov), lists in groups.items():
            write_directions(*lists, momentum, nesterov)

    def _update_momenta(
        self, boxes: Sequence[MomentumBox], params: dict[int, LocalParam], keep: Tensor | None
    ) -> None:
        groups: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for box in boxes:
            if local := params.get(box.param):
                momenta, grads = groups.setdefault(local.options.momentum, ([], []))
                momenta.append(view_box(local.dense_momentum, box.in_momentum))
                grads.append(view_box(local.grad, box.in_shard))
        for momentum, (momenta, grads) in groups.items():
            update_momentum(momenta, grads, momentum, keep)

    def _repack(self, bucket: CompiledBucket, flight: InFlight, hop: Hop) -> None:
        """Fill the send buffer of a collective."""
        send = self._buffers.acquire(bucket.index, hop.send)
        repack(flight.buffer, send, bucket.local.collective(hop).moves)
        flight.buffer = send

    def _send(self, bucket: CompiledBucket, flight: InFlight, hop: Hop) -> None:
        """Issue a collective; its receive buffer becomes the buffer in flight."""
        flight.sending = flight.buffer
        flight.buffer = self._buffers.acquire(bucket.index, hop.recv)
        collective = bucket.local.collective(hop)
        group = self._groups.over(bucket.mesh, collective.collective.mesh_dims)
        flight.work = issue(collective, flight.sending, flight.buffer, group)
        flight.timeout = timeout_of(group)

    def _orthogonalize(
        self,
        bucket: CompiledBucket,
        flight: InFlight,
        params: dict[int, LocalParam],
        keep: Tensor | None,
    ) -> None:
        views = self._wholes(bucket, flight.buffer)
        if isinstance(bucket.planned.strategy, Distributed):
            self._orthogonalize_slabs(bucket, bucket.planned.strategy, flight, views, params)
            return
        batches: list[tuple[MuonOptions, list[Assignment]]] = []
        for batch in bucket.batches:
            by_options: dict[MuonOptions, list[Assignment]] = defaultdict(list)
            for assignment in batch:
                if local := params.get(assignment.param):
                    by_options[local.options].append(assignment)
            batches += by_options.items()
        frees_buffer = len(batches) == 1 and not self._buffers.are_kept(bucket.index)
        for options, assignments in batches:
            params_of_batch = [(a, params[a.param]) for a in assignments]
            self._orthogonalize_batch(
                bucket, flight, views, options, params_of_batch, frees_buffer, keep
            )

    def _orthogonalize_slabs(
        self,
        bucket: CompiledBucket,
        strategy: Distributed,
        flight: InFlight,
        views: list[Tensor],
        params: dict[int, LocalParam],
    ) -> None:
        """Replace slabs by those of the polar factors, in the buffer, together with the teams.

        All members of a team take the matrices in the order of the plan.
        """
        if not bucket.local.owned:
            return
        team = TeamGroup(self._groups.over(bucket.mesh, strategy.team_dims, strategy.team_size))
        for assignment in bucket.local.owned:
            if not (local := params.get(assignment.param)):
                continue
            matrix, box = bucket.local.matrices[assignment], bucket.local.boxes[assignment]
            parts = bucket.parts[assignment]
            slab = assemble(views, parts, box.shape, flight.buffer).view(slab_size(matrix, box))
            is_row_block = slab.size(0) < matrix.rows
            short = min(matrix.rows, matrix.cols)
            result = local.options.polar_slab(
                slab.mT if is_row_block else slab,
                team,
                [rows_of_member(short, index, team.size) for index in range(team.size)],
                strategy.shares_polynomial,
            )
            copies = Copies()
            update = result.mT if is_row_block else result
            copies.disassemble(update.reshape(box.shape), views, parts)
            copies.run()

    def _orthogonalize_batch(
        self,
        bucket: CompiledBucket,
        flight: InFlight,
        views: list[Tensor],
        options: MuonOptions,
        batch: Sequence[tuple[Assignment, LocalParam]],
        frees_buffer: bool,
        keep: Tensor | None,
    ) -> None:
        """Replace matrices of one size by their polar factors, in the buffer.

        `frees_buffer`: free the buffer during the iteration; the batch is all it holds. See
        `memory.workspaces`.
        """
        x, is_copy = self._assemble(bucket, flight.buffer, views, [a for a, _ in batch])
        if frees_buffer and is_copy:
            views.clear()
            flight.buffer = x.new_empty(0)
        result = options.polar_factor(x, bucket.dtype, overwrite=is_copy)
        del x
        if frees_buffer and is_copy:
            flight.buffer = self._buffers.acquire(bucket.index, bucket.sequence.wholes)
            views += self._wholes(bucket, flight.buffer)
        polar_factors = [result] if len(batch) == 1 else result.unbind()
        copies = Copies()
        for (assignment, local), polar_factor in zip(batch, polar_factors, strict=True):
            update = self._update_of(bucket, assignment, polar_factor, local, keep)
            parts, matrix = bucket.parts[assignment], bucket.local.matrices[assignment]
            copies.disassemble(update, views, parts)
            if local.moments is not None or len(parts) > 1 or matrix.pattern:
                copies.run()  # the update may be a copy: hold one at a time
        copies.run()

    def _wholes(self, bucket: CompiledBucket, buffer: Tensor) -> list[Tensor]:
        """Views of the slots of the buffer `wholes`."""
        return self._buffers.views(
            bucket.index, bucket.sequence.wholes, buffer, bucket.local.wholes
        )

    def _assemble(
        self,
        bucket: CompiledBucket,
        buffer: Tensor,
        views: list[Tensor],
        assignments: Sequence[Assignment],
    ) -> tuple[Tensor, bool]:
        """Matrices of one size as [[batch,] rows, cols], and whether that is a copy."""
        sources = [(bucket.parts[a], bucket.local.matrices[a]) for a in assignments]
        if len(sources) == 1:
            ((parts, matrix),) = sources
            x = to_matrix(assemble(views, parts, matrix.region.shape, buffer), matrix)
            return x, not shares_storage(x, buffer)
        _, first = sources[0]
        batch = buffer.new_empty((len(sources), first.rows, first.cols))
        copies = Copies()
        for target, (parts, matrix) in zip(batch, sources, strict=True):
            if matrix.pattern:
                box = assemble(views, parts, matrix.region.shape, buffer)
                target.copy_(to_matrix(box, matrix))  # of a copy: hold one at a time
            else:
                copies.fill(target.view(matrix.region.shape), views, parts)
        copies.run()
        return batch, True

    def _update_of(
        self,
        bucket: CompiledBucket,
        assignment: Assignment,
        polar_factor: Tensor,
        local: LocalParam,
        keep: Tensor | None,
    ) -> Tensor:
        """Return a polar factor, normalized by NorMuon if required, as a box of the parameter."""
        if self._observer is not None:
            self._observer(assignment, polar_factor)
        if local.moments is not None:
            moments = self._moments.of_matrix(local.moments, assignment)
            polar_factor = local.options.normalized(polar_factor, moments, keep)
        return from_matrix(polar_factor, bucket.local.matrices[assignment])

    def _run_in_turn(
        self,
        action: Action,
        events: Sequence[Event],
        bucket: CompiledBucket,
        params: dict[int, LocalParam],
        keep: Tensor | None,
    ) -> None:
        mesh = bucket.mesh
        for position in sorted(range(mesh.num_ranks), key=mesh.ranks.__getitem__):
            if position == bucket.position:
                self._act(action, events, bucket, params, keep)
            if mesh.dim_names:
                barrier(self._groups.over(mesh, mesh.dim_names))

    def _apply(
        self,
        bucket: CompiledBucket,
        buffer: Tensor,
        params: dict[int, LocalParam],
        keep: Tensor | None,
    ) -> None:
        """Apply decay and updates to the local shards."""
        if keep is not None:
            buffer.masked_fill_(~keep, 0)
        link = self._links.get(bucket.index)
        if link is None:
            views = self._buffers.views(
                bucket.index, bucket.sequence.results, buffer, bucket.local.results
            )
        else:
            views = view_slots(link.download(buffer), bucket.local.results.slots)
        for batch in bucket.applying:
            groups: dict[
                tuple[MuonOptions, int, int], tuple[list[Tensor], list[Tensor], list[MatrixSlice]]
            ] = {}
            for index in batch:
                slot = bucket.results[index]
                local = params.get(slot.param)
                if local and local.options.weight_rounding != "nearest":
                    self._apply_rounded(slot, local, views[index], keep)
                elif local:
                    key = local.options, slot.in_matrix.rows, slot.in_matrix.cols
                    targets, polar_factors, slices = groups.setdefault(key, ([], [], []))
                    targets.append(view_box(local.param, slot.in_shard))
                    polar_factors.append(views[index])
                    slices.append(slot.in_matrix)
            for (options, rows, cols), lists in groups.items():
                matrix_lr = options.matrix_lr(rows, cols)
                apply_updates(
                    *lists,
                    decay=options.decay,
                    matrix_lr=matrix_lr,
                    cautious=options.cautious,
                    keep=keep,
                )

    def _apply_rounded(
        self, slot: CompiledSlot, local: LocalParam, polar_factor: Tensor, keep: Tensor | None
    ) -> None:
        """Apply decay and update to a piece of a weight in bfloat16; see `rounding`."""
        options, place, spec = local.options, slot.in_matrix, self.plan.params[slot.param]
        compensation, bits = local.compensation, None
        if compensation is None:
            stream = zlib.crc32(spec.fqn.encode())
            elements = element_numbers(slot.region, spec.shape, local.param.device)
            bits = random_bits(elements, RandomKey(options.seed, options.step, stream))
        else:
            compensation = view_box(compensation, slot.in_shard)
        apply_rounded(
            view_box(local.param, slot.in_shard),
            polar_factor,
            place,
            decay=options.decay,
            matrix_lr=options.matrix_lr(place.rows, place.cols),
            cautious=options.cautious,
            keep=keep,
            compensation=compensation,
            bits=bits,
        )
