"""Mutation test: plants faults, one at a time, and reports those that no test catches.

    python -m tests.mutate                  # all, two at a time: about half an hour on two cores
    python -m tests.mutate --only moments   # faults with this word in their name
    python -m tests.mutate --marker P0      # run only the tests of one tier
    python -m tests.mutate --json out.json

Each fault is planted in a copy of the package. The tests that should catch it run there until the
first failure. Pytest does not collect this file.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from time import monotonic

ROOT = Path(__file__).parents[1]
SECONDS = 420
"""A fault counts as caught if its tests run longer than this: they have deadlines."""

PASSED, FAILED = 0, 1
"""Exit statuses of pytest; every other status is an error of this script."""


@dataclass(frozen=True)
class Fault:
    """Replaces text `old` of a file by `new`.

    `tests`: tests that should catch it, as file or file::test, without `test_`.
    `why_it_lives`: reason why no test can catch it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    why_it_lives: str = ""


def in_files(file: str, tests: str, *faults: tuple[str, str, str]) -> list[Fault]:
    """Return faults (name, old text, new text) of one file that the same tests should catch."""
    return [Fault(name, file, old, new, tests) for name, old, new in faults]


FAULTS = [
    *in_files(
        "runtime/executor.py",
        "consistency::a_masked_step_changes_nothing_and_raises_later",
        (
            "results of a masked step are not zeroed",
            "            buffer.masked_fill_(~keep, 0)",
            "            buffer = buffer",
        ),
    ),
    *in_files(
        "runtime/executor.py",
        "layouts_bitwise::matrices gloo config misuse speed_options",
        (
            "momenta of matrices owned elsewhere are not updated",
            "        self._update_momenta(bucket.momentum_only, params, keep)\n",
            "",
        ),
        (
            "reused buffers are not dropped after a failed step",
            "            self._buffers.drop_all()\n",
            "",
        ),
        (
            "buckets in flight of a failed step are not dropped",
            "            self._in_flight.clear()\n",
            "",
        ),
        (
            "the sequential mode runs in mesh order",
            "sorted(range(mesh.num_ranks), key=mesh.ranks.__getitem__)",
            "range(mesh.num_ranks)",
        ),
        (
            "the sequential mode has no barrier",
            "            if mesh.dim_names:\n                barrier(",
            "            if not mesh.dim_names:\n                barrier(",
        ),
        (
            "AdamW's failure is reported as a phase",
            "        self._is_overlapped = True\n",
            "",
        ),
    ),
    *in_files(
        "runtime/executor.py",
        "variants::normuon_over_real_processes",
        (
            "NorMuon's moments are not broadcast",
            "        self._moments.broadcast(moments)\n",
            "",
        ),
    ),
    *in_files(
        "runtime/executor.py",
        "variants consistency",
        (
            "the mask does not reach NorMuon",
            "local.options.normalized(polar_factor, moments, keep)",
            "local.options.normalized(polar_factor, moments, None)",
        ),
    ),
    *in_files(
        "runtime/executor.py",
        "consistency",
        (
            "the mask does not reach the momenta",
            "            update_momentum(momenta, grads, momentum, keep)",
            "            update_momentum(momenta, grads, momentum, None)",
        ),
    ),
    *in_files(
        "runtime/executor.py",
        "consistency",
        (
            "the mask does not reach the parameters",
            "                    cautious=options.cautious,\n                    keep=keep,",
            "                    cautious=options.cautious,\n                    keep=None,",
        ),
    ),
    *in_files(
        "runtime/executor.py",
        "variants",
        (
            "cautious decay is not applied",
            "                    cautious=options.cautious,",
            "                    cautious=False,",
        ),
    ),
    *in_files(
        "runtime/executor.py",
        "deaths gloo",
        (
            "the timeout of the default group is not applied",
            "flight.timeout = timeout_of(group)",
            "flight.timeout = None",
        ),
    ),
    *in_files(
        "runtime/executor.py",
        "async_checkpoint gloo",
        (
            "groups of the plan are not connected",
            "                self._groups.connect(bucket.mesh, collective.mesh_dims)\n",
            "                pass\n",
        ),
    ),
    *in_files(
        "runtime/executor.py",
        "memory::the_iteration_uses_the_memory_of_buffers_that_are_not_kept",
        (
            "a buffer is not freed after matrices are assembled from it",
            "            flight.buffer = x.new_empty(0)\n",
            "",
        ),
        (
            "assembled matrices are not freed during the iteration",
            "overwrite=is_copy)",
            "overwrite=False)",
        ),
    ),
    *in_files(
        "runtime/buffers.py",
        "buffer_placement speed_options::a_failed_step_drops_its_buffers",
        (
            "a block is reused after a failed step",
            "        self._block = None\n        self._buffers.clear()\n",
            "        self._buffers.clear()\n",
        ),
        (
            "a block is allocated for every buffer",
            "        if self._block is None:\n",
            "        if True:\n",
        ),
    ),
    *in_files(
        "runtime/gradients.py",
        "consistency::where_checks_are_deferred gradients",
        (
            "a device waits in every step",
            'is_deferred = device.type != "cpu" if deferred_checks is None',
            "is_deferred = False if deferred_checks is None",
        ),
        (
            "the first step with deferred checks does not wait",
            "if not (self.is_deferred and self._has_settled):",
            "if not self.is_deferred:",
        ),
        (
            "zeros for missing gradients do not wait",
            ' and not is_mixed and missing_grad != "zero"',
            " and not is_mixed",
        ),
    ),
    *in_files(
        "cli/plan_plot.py",
        "plan::the_plot_is_written",
        (
            "the plot is empty",
            "    _timeline(report, top.subplots())\n    load, sent = bottom.subplots(1, 2)\n"
            "    _load(report, load)\n    _sent(report, sent)\n",
            "",
        ),
    ),
    *in_files(
        "optimizer/params.py",
        "gradient_dtypes",
        (
            "momenta do not follow the dtype of their gradients",
            "            if casts_momenta and momentum.dtype != grad.dtype:",
            "            if False:",
        ),
    ),
    *in_files(
        "runtime/gradients.py",
        "gradients gradient_dtypes consistency",
        (
            "a gradient of another dtype is ordinary",
            "            and grad.dtype is param.dtype\n",
            "",
        ),
        (
            "a moved gradient is ordinary",
            "isinstance(grad, DTensor) and has_same_spec(param, grad)",
            "isinstance(grad, DTensor)",
        ),
    ),
    *in_files(
        "layout/declarations.py",
        "docs::the_rules_of_parameters_declare_matrices",
        (
            "only the first block is declared",
            "for block, pattern in zip(blocks, patterns, strict=True):",
            "for block, pattern in list(zip(blocks, patterns, strict=True))[:1]:",
        ),
    ),
    *in_files(
        "algorithms/newton_schulz.py",
        "newton_schulz",
        (
            "an in-place iteration overwrites its input",
            "x if is_like_result else x.mT.reshape(x.shape)",
            "x",
        ),
    ),
    *in_files(
        "runtime/normuon_state.py",
        "variants",
        (
            "owners send none of their moments",
            "                    self.of_matrix(zeros, a).copy_(self.of_matrix(moments[index], a))\n",
            "                    pass\n",
        ),
        (
            "moments are summed, not replaced",
            "                moments[index].copy_(part.view_as(moments[index]))",
            "                moments[index].add_(part.view_as(moments[index]))",
        ),
    ),
    *in_files(
        "algorithms/normuon.py",
        "variants",
        (
            "moments ignore the mask",
            "averages if keep is None else torch.where(keep, averages, second_moments)",
            "averages",
        ),
        ("moments of sums, not means", ".square().mean(-1)", ".square().sum(-1)"),
        ("no eps under the root", "(averages.sqrt() + eps)", "(averages.sqrt() + 1e-30)"),
        ("scaled by the longer side", "min(polar_factor.shape)", "max(polar_factor.shape)"),
    ),
    *in_files(
        "planning/schedule.py",
        "schedule buffer_placement gloo memory::buffers_stay_under_the_cap planner",
        (
            "the second hop is awaited before the next compute",
            "        if passed_on == before:",
            "        if True:",
        ),
        (
            "a buffer's life ends an event early",
            "            life.last = index\n",
            "            life.last = max(life.first, index - 1)\n",
        ),
        (
            "hops after the first are not waited for",
            "            yield Wait(hop)\n",
            "            if not index:\n                yield Wait(hop)\n",
        ),
        (
            "nothing is prefetched",
            "            issue_up_to(done + 1 + prefetch_count)",
            "            issue_up_to(done + 1)",
        ),
        (
            "results are applied immediately",
            "        while len(resharding) > num_pending:",
            "        while len(resharding) > 0:",
        ),
    ),
    *in_files(
        "planning/buffer_placement.py",
        "buffer_placement gloo memory::buffers_stay_under_the_cap",
        (
            "buffers with touching lifetimes may overlap",
            "p.life.first <= life.last and life.first <= p.life.last",
            "p.life.first < life.last and life.first < p.life.last",
        ),
        ("buffers are not aligned", "-(-nbytes // ALIGNMENT) * ALIGNMENT", "nbytes"),
    ),
    *in_files(
        "planning/routes.py",
        "gloo planner strategies::bitwise strategies::strategies_over_gloo",
        (
            "results of replicas are received in the order of matrices",
            "            pieces.sort(key=lambda piece: mesh.ranks[mesh.moved(peer, dims, to=piece[0].owner)])",
            "            pieces.sort(key=lambda piece: 0)",
        ),
        (
            "runs are merged though their sources do not touch",
            "if last and last.source + last.numel == offset:",
            "if last:",
        ),
        (
            "pieces of other replicas are sent too",
            "if layout.replica_offset(assignment.owner) != layout.replica_offset(position):",
            "if False:",
        ),
    ),
    *in_files(
        "islands/rules.py",
        "rules diloco",
        (
            "trimmed mean drops only the largest",
            "ascending[self.f : len(rows) - self.f]",
            "ascending[: len(rows) - self.f]",
        ),
        (
            "Krum counts an island as its own neighbour",
            "others = sorted(distances[i][j] for j in candidates if j != i)",
            "others = sorted(distances[i][j] for j in candidates)",
        ),
        (
            "an update that is not finite is near",
            "            else INFINITY\n",
            "            else 0.0\n",
        ),
    ),
    *in_files(
        "islands/gram.py",
        "rules",
        (
            "the low limbs are not multiplied",
            "torch.stack([high @ high.T, crossed + crossed.T, low @ low.T])",
            "torch.stack([high @ high.T, 0 * crossed, 0 * crossed])",
        ),
    ),
    *in_files(
        "islands/wires.py",
        "wires",
        (
            "small integers are packed over each other",
            "            result |= column << (index * self.bits)",
            "            result |= column",
        ),
        (
            "a top-k wire sends the first elements",
            "indices = chunks.abs().nan_to_num(math.inf).topk(self.per_chunk, dim=1).indices",
            "indices = torch.arange(self.per_chunk).expand(len(chunks), -1)",
        ),
    ),
    *in_files(
        "islands/exchange.py",
        "diloco",
        (
            "scales of rows that are cut stay local",
            "            if dims and wire.needs_scales:",
            "            if False:",
        ),
        (
            "an overflow of the wire is not noticed",
            "float(not own.isfinite().all())",
            "float(not vector.isfinite().all())",
        ),
        (
            "base values are not compared",
            '    "base": "hold other base values, or were sent other values in an earlier round",\n',
            "",
        ),
    ),
    *in_files(
        "islands/diloco.py",
        "diloco",
        (
            "what a wire loses is forgotten",
            "                update += shard.error\n",
            "                update += 0\n",
        ),
        (
            "a delayed result erases what was learned meanwhile",
            "            if is_own_finite and pending.age:",
            "            if False:",
        ),
        (
            "outer momentum is not Nesterov's",
            "            step = update + shard.velocity * self._momentum",
            "            step = shard.velocity",
        ),
        (
            "noise is not divided among the islands",
            "        scale = self._noise * self._clip / self._islands.size**0.5",
            "        scale = self._noise * self._clip",
        ),
    ),
    *in_files(
        "runtime/host_link.py",
        "offloaded_shards",
        (
            "a phase of an offloaded bucket does not wait for the one before",
            "stream.wait_event(done)",
            "stream.record_event()",
        ),
        (
            "offloaded buckets have no stream of their own",
            "is_here = phase in IN_LINK_STREAM",
            "is_here = False",
        ),
    ),
    *in_files(
        "planning/routes.py",
        "shard_momentum",
        (
            "parts of a momentum are expected from the owner's side",
            "sender = home if spec.gathered_dims else owner_side",
            "sender = owner_side",
        ),
    ),
    *in_files(
        "planning/strategies.py",
        "shard_momentum",
        (
            "results are not gathered where the momentum is cut",
            "    replica_dims = gathered_dims or layout.replica_dims\n",
            "    replica_dims = layout.replica_dims\n",
        ),
    ),
    *in_files(
        "optimizer/state.py",
        "shard_momentum",
        (
            "momenta are not cut over replicas",
            "        if spec is not None and spec.gathered_dims and mesh is not None:",
            "        if False:",
        ),
        (
            "a loaded momentum is cut at its start",
            "    shard = view_box(local_part(momentum), box_of(part, spec.layout.region(position)))",
            "    shard = local_part(momentum)[tuple(map(slice, part.shape))]",
        ),
        (
            "a momentum cut over replicas loads where it is whole",
            "                    and _has_layout(saved_state[key], specs[param].momentum_layout)",
            "                    and isinstance(saved_state[key], DTensor)",
        ),
    ),
    *in_files(
        "optimizer/metrics.py",
        "shard_momentum::metrics",
        (
            "parts of a momentum count as replicas",
            "            if spec is not None and spec.gathered_dims:",
            "            if False:",
        ),
    ),
    *in_files(
        "planning/routes.py",
        "speed_options",
        (
            "batches hold matrices of different sizes",
            "by_size[matrix.rows, matrix.cols].append(assignment)",
            "by_size[matrix.rows, matrix.rows].append(assignment)",
        ),
    ),
    *in_files(
        "planning/check.py",
        "check planner",
        (
            "overlapping matrices pass",
            "    if numel != param_region.numel or _overlap(regions):",
            "    if numel != param_region.numel:",
        ),
        (
            "owners that may not own a matrix pass",
            "        elif not can_own(spec.momentum_layout, matrix.region, assignment.owner):",
            "        elif False:",
        ),
        (
            "owners outside of the mesh pass",
            "        elif not 0 <= assignment.owner < bucket.mesh.num_ranks:",
            "        elif False:",
        ),
        (
            "any schedule passes",
            "        if phases[index] != expected:",
            "        if False:",
        ),
    ),
    *in_files(
        "algorithms/distributed_newton_schulz.py",
        "distributed",
        (
            "Gram matrices are summed in the wire dtype",
            "    received = team.exchange(_gram(x, wide),",
            "    received = team.exchange(_gram(x, wide).to(x.dtype),",
        ),
        (
            "a zero slab counts with its own scale",
            "scale / power_of_two(largest_of_each).to(wide)).clamp(max=1)",
            "scale / power_of_two(largest_of_each).to(wide))",
        ),
        (
            "each member scales its slab by its own largest element",
            "    scale = power_of_two(largest_of_each.amax()).to(wide)",
            "    scale = own_scale",
        ),
        (
            "every member computes the first rows of the polynomial",
            "    own = slice(rows[team.index].start, rows[team.index].stop)",
            "    own = slice(0, len(rows[team.index]))",
        ),
    ),
    *in_files(
        "planning/teams.py",
        "distributed teams",
        (
            "slabs are taken in the order of the team",
            "        member = max(free, key=lambda position: stored[position].intersect(slab).numel)",
            "        member = free[0]",
        ),
        (
            "shards that are slabs are exchanged all the same",
            "            if team_dims == unshard_dims and size == count and holds_slabs(layout, matrix, size):",
            "            if False:",
        ),
        (
            "teams are as large as possible",
            "        if (seconds := _makespan(tasks, num_ranks)) < best_seconds:",
            "        if (seconds := _makespan(tasks, num_ranks)) < math.inf:",
        ),
    ),
    *in_files(
        "planning/owners.py",
        "planner layouts_bitwise::matrices",
        (
            "the smallest matrix goes first",
            "key=lambda i: (-work[i].cost, work[i].candidate.name)",
            "key=lambda i: (work[i].cost, work[i].candidate.name)",
        ),
        (
            "loads are not counted",
            "            loads[rank] += work[index].cost",
            "            loads[rank] += 0",
        ),
        (
            "an owner holds none of the matrix",
            "key=lambda item: (-item[1].numel, spread(item[0], layout.cut_dims)),",
            "key=lambda item: (item[1].numel, spread(item[0], layout.cut_dims)),",
        ),
    ),
    *in_files(
        "planning/buckets.py",
        "planner memory::buffers_stay_under_the_cap",
        (
            "the size limit of a bucket is ignored",
            "        if not runs or bound.nbytes > limit:",
            "        if not runs:",
        ),
    ),
    *in_files(
        "planning/strategies.py",
        "planner layouts_bitwise::matrices strategies::bitwise",
        (
            "replicas share nothing",
            "    replica_dims = gathered_dims or layout.replica_dims\n",
            "    replica_dims = gathered_dims\n",
        ),
        (
            "unshard stages run in mesh order",
            "for name in reversed(self.unshard_dims))",
            "for name in self.unshard_dims)",
        ),
    ),
    *in_files(
        "planning/normuon_state.py",
        "planner variants",
        (
            "moments are cut where rows of others are stored",
            "        if rows != set(range(first, last)):\n            return ()",
            "        if rows != set(range(first, last)):\n            return dims",
        ),
        (
            "moments of replicas are not reduced",
            "n for n in mesh.dim_names if n not in spec.moment_cuts and mesh.sizes[n] > 1",
            "n for n in mesh.dim_names if n in spec.layout.cut_dims and mesh.sizes[n] > 1 "
            "and n not in spec.moment_cuts",
        ),
        (
            "bytes of moments count one rank too few",
            "2 * (num_ranks - 1) * MOMENT_ITEMSIZE",
            "2 * (num_ranks - 2) * MOMENT_ITEMSIZE",
        ),
    ),
    *in_files(
        "runtime/consistency_codec.py",
        "consistency misuse from_groups",
        (
            "a finite overflow in the sums is not rechecked",
            "        for grad in nonempty:\n            extremes += torch.aminmax(grad)\n",
            "        return torch.ones((), dtype=torch.int64)\n",
        ),
        (
            "plans are not compared in a step",
            "values = [plan, -plan, options",
            "values = [0, 0, options",
        ),
        (
            "hyperparameters are not compared",
            "options, -options, present",
            "0, 0, present",
        ),
        (
            "presence is not compared",
            "present, -present]",
            "0, 0]",
        ),
        (
            "a missing gradient of a slice is not detected",
            "PAIR_OF = {PRESENT: (1, -1), MISSING: (0, 0)",
            "PAIR_OF = {PRESENT: (1, -1), MISSING: (1, -1)",
        ),
        (
            "on a device, faults of slices are not detected",
            "    if len(pairs):\n        differ",
            "    if False:\n        differ",
        ),
        (
            "on a device, missing gradients are not detected",
            "        (Entry.PRESENCE, Fault.GRADIENTS),\n    ):",
            "    ):",
        ),
        (
            "an earlier non-finite gradient is forgotten",
            "    if with_non_finite and any(",
            "    if False and any(",
        ),
    ),
    *in_files(
        "runtime/consistency.py",
        "consistency misuse frozen_parameters",
        (
            "settle_on_device carries nothing over",
            "                carried.copy_(torch.maximum(carried, previous))\n",
            "",
        ),
        (
            "the second pass is skipped",
            "        self._second_sweep = [\n            m for m in reversed(self._manifests)",
            "        self._second_sweep = [\n            m for m in ()",
        ),
        (
            "plans that differ count as verified",
            "            for manifest in new:\n                del needs_second_sweep[manifest.mesh.rank_set]\n",
            "",
        ),
        (
            "a fault of a smaller mesh is not carried on",
            "            carried = (bad, moved, fault)\n",
            "            carried = (bad, moved, Fault.NONE)\n",
        ),
        (
            "a non-finite gradient of a smaller mesh is not carried on",
            "            carried = (bad, moved, fault)\n",
            "            carried = (0, moved, fault)\n",
        ),
        (
            "plans are not verified equal",
            "            if high != -low:",
            "            if False:",
        ),
        (
            "larger sets are compared before smaller ones",
            "key=lambda m: (m.mesh.num_ranks, sorted(m.mesh.ranks))",
            "key=lambda m: (-m.mesh.num_ranks, sorted(m.mesh.ranks))",
        ),
    ),
    *in_files(
        "runtime/gradients.py",
        "consistency gradient_dtypes misuse gloo",
        (
            "a gradient of another dtype on one rank passes",
            "            if grad.dtype != self._params[name].dtype:\n"
            "                return of_dtype(dtype_name(grad.dtype))\n",
            "",
        ),
        (
            "AdamW accepts gradients of another dtype",
            "        if grad.dtype != param.dtype and name in self._same_dtype_params:",
            "        if False:",
        ),
        (
            "an overflow of summed Partial gradients is not detected",
            "            bad |= second.non_finite\n",
            "",
        ),
        (
            "a gradient whose shard has another shape passes",
            "    if shard_shape != grad_shape and not _has_moved(param, grad):",
            "    if False:",
        ),
        (
            "a gradient of another mesh passes",
            "        and grad.device_mesh != param.device_mesh\n    ):",
            "        and False\n    ):",
        ),
        (
            "a masked fault is forgotten by the next gradient check",
            "        self._past, self._past_fault = before._past, before._past_fault\n",
            "",
        ),
        (
            "missing gradients are zeros of the parameter's dtype",
            "return zeros_like(param, self._dtypes.get(name))",
            "return zeros_like(param)",
        ),
        (
            "a sparse gradient passes",
            "    if grad.layout != torch.strided:",
            "    if False:",
        ),
        (
            "nonfinite is not compared between ranks",
            'f"optimizer: missing_grad={self._missing_grad}, nonfinite={self._nonfinite}, "',
            'f"optimizer: missing_grad={self._missing_grad}, "',
        ),
    ),
    *in_files(
        "optimizer/options.py",
        "consistency::every_option_that_a_step_reads_is_compared "
        "checkpoints::options_are_restored_from_a_checkpoint "
        "checkpoints::checkpoints_of_torch_do_not_change_options_that_they_lack "
        "param_groups torch_optimizers declared_matrices checkpoints frozen_parameters",
        (
            "a differing eps is not compared between ranks",
            'if name not in (*DECLARED, "betas", "format_version")',
            'if name not in (*DECLARED, "betas", "format_version", "eps")',
        ),
        (
            "AdamW's betas are not compared between ranks",
            'READ_BY_ADAMW = ("algorithm", "lr", "betas",',
            'READ_BY_ADAMW = ("algorithm", "lr",',
        ),
        (
            "AdamW's weight decay is not compared between ranks",
            '"eps", "weight_decay", "capturable")',
            '"eps", "capturable")',
        ),
        (
            "NorMuon's option is lost in a checkpoint",
            '    *("adjust_lr_fn", "betas"),\n',
            '    *("adjust_lr_fn", "betas", "normuon_beta"),\n',
        ),
        (
            "the orthogonalizer is lost in a checkpoint",
            '    *("adjust_lr_fn", "betas"),\n',
            '    *("adjust_lr_fn", "betas", "orthogonalizer"),\n',
        ),
        (
            "a checkpoint's declaration replaces the live one",
            'of_live = (*DECLARED, RECOGNIZED, "param_names")',
            'of_live = ("param_names",)',
        ),
        (
            "amsgrad is dropped without an error",
            "    if unsupported := [name for name in UNSUPPORTED_FLAGS if group.get(name)]:",
            "    if unsupported := []:",
        ),
        (
            "AdamW's momentum does not follow cyclic schedulers",
            "    if beta1 == last_beta1 and momentum != last_beta1:",
            "    if False:",
        ),
        (
            "a change of NorMuon needs no plan",
            'state = (group["normuon_beta"] is None, ',
            "state = (True, ",
        ),
        (
            "checkpoints of another format load",
            "    if value != FORMAT_VERSION:",
            "    if False:",
        ),
    ),
    *in_files(
        "optimizer/state.py",
        "checkpoints::damaged_and_foreign_state_raises_and_changes_nothing gradient_dtypes "
        "variants::moments_of_bf16_parameters_are_float32 torch_optimizers frozen_parameters "
        "layout_faults speed_options::a_checkpoint_keeps_momentum_in_bfloat16 torch_tools",
        (
            "state that is missing passes",
            '            if "format_version" in saved and missing:',
            "            if False:",
        ),
        (
            "state of another optimizer passes",
            "            if unknown := saved_state.keys() - needed:",
            "            if unknown := set():",
        ),
        (
            "state with other placements passes",
            "                if not is_cut_momentum and not _is_placed_as(saved_state[key], param):\n"
            "                    raise CheckpointError(\n                        f\"'{key}'",
            "                if False:\n                    raise "
            "CheckpointError(\n                        f\"'{key}'",
        ),
        (
            "wide momenta are rounded by loading",
            '                ("momentum_buffer", wide),\n',
            "",
        ),
        (
            "NorMuon's moments are rounded by loading",
            "                (MOMENTS, torch.float32),\n",
            "",
        ),
        (
            "AdamW's step count stays a number",
            '            if "step" in loaded and not _is_step_tensor(loaded["step"], param):',
            "            if False:",
        ),
        (
            "other numbers of parameters pass",
            "    if sizes != saved_sizes:",
            "    if False:",
        ),
        (
            "momenta of replaced parameters are dropped without an error",
            "    if any(local_part(v).any() for param in replaced for v in state[param].values() if v.ndim):",
            "    if False:",
        ),
        (
            "stale state is kept",
            "        state.pop(key, None)\n",
            "        pass\n",
        ),
    ),
    *in_files(
        "optimizer/full_state.py",
        "checkpoints::full_state_that_does_not_fit_raises "
        "checkpoints::checkpointable_sets_offsets_and_restores_dtensors",
        (
            "full state of another shape loads",
            "    if full_value.shape != live.shape:",
            "    if False:",
        ),
        (
            "full state of other names loads",
            "    if live.keys() != model_state.keys():",
            "    if False:",
        ),
        (
            "the original DTensors are not restored after a checkpoint",
            "            container[key] = tensor\n",
            "            pass\n",
        ),
    ),
    *in_files(
        "algorithms/update.py",
        "update layouts_bitwise::bf16_parameters variants::cautious_decay_is_the_paper_s "
        "variants::normuon_is_the_paper_s layouts_bitwise::options "
        "consistency::a_masked_step_leaves_all_state_as_a_skipped_one_does",
        ("cautious decay skips zeros", "polar_factor.sign() >= 0", "polar_factor.sign() > 0"),
        (
            "narrow dtypes round alpha late",
            "    alpha = float(torch.tensor(alpha, dtype=param.dtype))\n    numel",
            "    numel",
        ),
        ("no decay", "            param.mul_(factor)", "            pass"),
        (
            "the learning rate of tall matrices is clamped",
            "return lr * math.sqrt(rows / cols)",
            "return lr * math.sqrt(max(1, rows / cols))",
        ),
        (
            "rms_norm is another rule",
            'if adjust_lr_fn in ("match_rms_adamw", "rms_norm"):',
            'if adjust_lr_fn == "match_rms_adamw":',
        ),
        (
            "the mask does not reach updates of narrow dtypes",
            "        param.copy_(torch.where(keep, updated, param))",
            "        param.copy_(updated)",
        ),
        (
            "the mask does not reach the decay of wide dtypes",
            "factor = torch.where(keep, decay, torch.ones_like(keep, dtype=dtype))",
            "factor = torch.where(keep, decay, keep.to(dtype))",
        ),
        (
            "the mask does not reach lists of tensors",
            "        torch.where(keep, value, target, out=target)",
            "        target.copy_(value)",
        ),
        (
            "a masked update does not decay",
            "        updated = [p * decay for p in params] if is_host",
            "        updated = [p * 1 for p in params] if is_host",
        ),
    ),
    *in_files(
        "runtime/packing.py",
        "layouts_bitwise::matrices gloo",
        (
            "only the first copy of a list runs",
            "            torch._foreach_copy_(self._targets, self._sources)",
            "            torch._foreach_copy_(self._targets[:1], self._sources[:1])",
        ),
    ),
    *in_files(
        "clipping.py",
        "clipping",
        (
            "the p = inf norm is summed over pp",
            "(all_reduce_max if math.isinf(p) else all_reduce_sum)(total, pp_group)",
            "all_reduce_sum(total, pp_group)",
        ),
        ("the root of a norm is missing", "total ** (1 / p)", "total"),
        ("factors above one scale up", ".clamp(max=1.0)", ""),
        (
            "algorithm clips all groups",
            "        if algorithm in (None, kind):",
            "        if True:",
        ),
    ),
    *in_files(
        "runtime/totals.py",
        "clipping metrics",
        (
            "replicas count several times",
            "value if is_first else torch.zeros_like(value)",
            "value",
        ),
        (
            "the largest of meshes is summed",
            "return totals.amax(0) if take_largest else totals.sum(0)",
            "return totals.sum(0)",
        ),
    ),
    *in_files(
        "optimizer/metrics.py",
        "metrics",
        (
            "metrics miss the bytes of NorMuon's moments",
            "sum(r.sent_nbytes for r in ",
            "0 * sum(r.sent_nbytes for r in ",
        ),
        (
            "an update is measured without its initial value",
            "shard.to(wide) - self._before[entry.name].to(wide)",
            "shard.to(wide)",
        ),
    ),
    *in_files(
        "distributed_config/config.py",
        "config config_faults public_api config_file",
        (
            "ep counts as replicated",
            'if n not in ("pp", "ep"))',
            'if n not in ("pp",))',
        ),
        (
            "any sizes make a mesh",
            "    if world_size % fixed or (not open_dims and fixed != world_size):",
            "    if False:",
        ),
    ),
    *in_files(
        "distributed_config/mesh_from_groups.py",
        "config_faults from_groups",
        (
            "groups that are not orthogonal pass",
            "            if shared != [rank]:",
            "            if False:",
        ),
    ),
    *in_files(
        "runtime/torch_private.py",
        "torch_versions dtensors checkpoints::state_dict_warns_once_of_misplaced_shards gloo",
        (
            "all ranks warn",
            "    return logging.WARNING if this_rank() == first else logging.INFO",
            "    return logging.WARNING",
        ),
        (
            "a cast of a DTensor keeps the old dtype in its spec",
            "    if meta.dtype != shard.dtype:",
            "    if False:",
        ),
    ),
    *in_files(
        "runtime/dtensors.py",
        "torch_versions dtensors checkpoints::state_dict_warns_once_of_misplaced_shards gloo",
        (
            "strided shards are cut in mesh order",
            "            factor = placement.split_factor\n",
            "            factor = 1\n",
        ),
        (
            "annotated parts of matrices pass",
            "    if differing:\n        raise RefusalError(",
            "    if False:\n        raise RefusalError(",
        ),
    ),
    *in_files(
        "config_file.py",
        "config_file",
        (
            "MuonConfig drops an option",
            'for name in ("name", "adamw", "rules", "recognize", "class_weight_decay"):',
            'options.pop("normuon_beta")\n'
            '        for name in ("name", "adamw", "rules", "recognize", "class_weight_decay"):',
        ),
        (
            "MuonConfig drops the weight decay",
            'weight_decay={"matrix": section.weight_decay, **section.class_weight_decay},',
            "weight_decay={**section.class_weight_decay},",
        ),
        (
            "MuonConfig drops the rules",
            "rules=[(rule.pattern, _with_tuples(rule.options)) for rule in section.rules],",
            "rules=[],",
        ),
        (
            "the expert mesh forgets pp",
            'for name in ("pp", "dp_replicate") if name in sizes}',
            'for name in ("dp_replicate",) if name in sizes}',
        ),
        (
            "AdamW's section is dropped",
            "            adamw=dataclasses.asdict(section.adamw),\n",
            "",
        ),
    ),
    *in_files(
        "cli/validate.py",
        "validate",
        (
            "validate is 100 times too tolerant",
            "rtol=tolerance, atol=tolerance",
            "rtol=100 * tolerance, atol=100 * tolerance",
        ),
    ),
    *in_files(
        "algorithms/adamw.py",
        "param_groups::adamw_reads_each_of_its_options "
        "consistency::a_masked_step_leaves_all_state_as_a_skipped_one_does",
        ("AdamW ignores lr", '        lr=group["lr"],', "        lr=3e-4,"),
        ("AdamW ignores eps", '        eps=group["eps"],', "        eps=1e-8,"),
        (
            "AdamW ignores its betas",
            '        beta2=group["betas"][1],',
            "        beta2=0.95,",
        ),
        (
            "AdamW ignores its weight decay",
            '        weight_decay=group["weight_decay"],',
            "        weight_decay=0.1,",
        ),
        ("AdamW ignores the mask", "        found_inf=found_inf,", "        found_inf=None,"),
    ),
    *in_files(
        "optimizer/planned_step.py",
        "misuse layout_faults frozen_parameters param_groups",
        (
            "a failed step is forgotten",
            "        self.is_unfinished: bool = before is not None and before.is_unfinished",
            "        self.is_unfinished: bool = False",
        ),
        (
            "a step that fails is not unfinished",
            "        self.is_unfinished = not self._config.uses_custom_transport",
            "        self.is_unfinished = False and not self._config.uses_custom_transport",
        ),
        (
            "replicas are not compared",
            "            mismatch = self._replica_mismatch()\n",
            "            mismatch = None\n",
        ),
        (
            "cleared state is not initialized again",
            "            and all(state.get(entry.param) for entry in self.table.entries)",
            "            and True",
        ),
        (
            "unfrozen parameters are not planned",
            "            and not any(can_train(param, {}) for param in self._frozen)\n",
            "",
        ),
        (
            "invalid options are not rejected",
            "        fault = fault or self._wrong_options(texts)\n",
            "",
        ),
    ),
    *in_files(
        "grouping.py",
        "grouping",
        (
            "tied heads go to Muon",
            'entry = next((use for use in uses if use.kind != "matrix"), uses[0])',
            "entry = uses[0]",
        ),
        (
            "depthwise convolutions go to Muon",
            "    if shape[1] == 1:",
            "    if False:",
        ),
        (
            "norms decay",
            'WITHOUT_DECAY = ("norm",',
            "WITHOUT_DECAY = (",
        ),
    ),
    *in_files(
        "algorithms/newton_schulz.py",
        "newton_schulz",
        ("no scaling by powers of two", "_is_harmless(norm, eps)", "True"),
        ("tall matrices are not transposed", "    if tall:\n        x = x.mT\n", ""),
    ),
    *in_files(
        "layout/region.py",
        "declared_matrices",
        (
            "interleaved: a clipped period counts one index too many",
            "        return count + (left > 0)",
            "        return count + 1",
        ),
        (
            "interleaved: parts of a period are one view",
            "        if low > high:  # inside one period",
            "        if True:",
        ),
        (
            "interleaved: a shard keeps the first index of the set",
            "(first, last, indices.moved_by(-begin))",
            "(first, last, indices)",
        ),
        (
            "interleaved: overlapping index sets are accepted",
            "            elif {own.index_at(i) for i in range(a, b)}.isdisjoint(",
            "            elif False and {own.index_at(i) for i in range(a, b)}.isdisjoint(",
        ),
    ),
    *in_files(
        "planning/routes.py",
        "declared_matrices",
        (
            "interleaved: a piece has one slot",
            "            for region in piece.strided_parts():",
            "            for region in (piece,):",
        ),
    ),
    *in_files(
        "algorithms/presets.py",
        "presets",
        (
            "the cubics have no margin",
            "rows.append((1.5 * scale / SAFETY,",
            "rows.append((1.5 * scale,",
        ),
        (
            "deepseek_v4 ends with one last iteration",
            "DEEPSEEK_V4_NUM_LAST = 2",
            "DEEPSEEK_V4_NUM_LAST = 1",
        ),
        ("turbo_muon scales by the norm", "        is_preconditioned=True,\n", ""),
    ),
    *in_files(
        "algorithms/rounding.py",
        "rounding",
        ("random bits do not depend on the step", "key.step & _WORD", "0"),
        (
            "random bits depend on the low half of an element's number",
            " ^ (elements >> 32)",
            "",
        ),
        (
            "a skipped step changes the compensation",
            "lost if keep is None else torch.where(keep, lost, compensation)",
            "lost",
        ),
        (
            "the compensation is forgotten",
            "param.float() if compensation is None else param.float().add_(compensation)",
            "param.float()",
        ),
    ),
    *in_files(
        "runtime/local_param.py",
        "speed_options",
        (
            "an offloaded momentum is not written back",
            "            momentum.copy_(dense, non_blocking=True)\n",
            "            pass\n",
        ),
    ),
    *in_files(
        "algorithms/quantized.py",
        "quantized",
        ("zero has two codes", "(relative < 0) & (codes > 0)", "(relative < 0)"),
        ("codes of a block are relative to its mean", ".abs().amax(dim=-1)", ".abs().mean(dim=-1)"),
    ),
    *in_files(
        "runtime/executor.py",
        "quantized::steps_are_the_same_on_every_layout",
        (
            "a momentum in several buckets is stored after the first",
            "            if self._last_bucket[index] == bucket.index:",
            "            if index in self._dense:",
        ),
    ),
    *in_files(
        "optimizer/muon.py",
        "rounding::a_resumed_run_goes_on_bitwise",
        (
            "stochastic rounding does not count steps",
            'group["rounding_step"] += 1',
            'group["rounding_step"] += 0',
        ),
    ),
    *in_files(
        "distributed_config/full_tensor.py",
        "checkpoints::the_state_of_misplaced_shards_is_saved_by_plain_dcp",
        (
            "state passes the offset 0",
            "ChunkStorageMetadata(torch.Size(r.start), torch.Size(r.shape))",
            "ChunkStorageMetadata(torch.Size([0] * len(r.start)), torch.Size(r.shape))",
        ),
    ),
    *in_files(
        "planning/traffic.py",
        "fuzz::plans_are_valid_and_changed_plans_are_not",
        (
            "results are not counted by link",
            "itemsize * numel * (1 + returns)",
            "itemsize * numel",
        ),
    ),
    *in_files(
        "cli/models.py",
        "plan::ep_is_a_part_of_the_other_mesh_dims",
        (
            "experts fewer than ranks are cut on dim 0",
            "        cuts[is_many] = (*cuts[is_many], EXPERT_FSDP_DIM)",
            "        cuts[0] = (*cuts[0], EXPERT_FSDP_DIM)",
        ),
    ),
    *in_files(
        "algorithms/polar_express.py",
        "polar_express",
        ("no safety factor", "SAFETY = 1.01", "SAFETY = 1.0"),
        (
            "the last row has the safety factor too",
            "for a, b, c in _MINIMAX[:-1]),\n    _MINIMAX[-1],",
            "for a, b, c in _MINIMAX),",
        ),
        (
            "steps beyond the table are left out",
            "    return rows + POLAR_EXPRESS[-1:] * (num_iterations - len(rows))",
            "    return rows",
        ),
    ),
    *in_files(
        "qk_clip.py",
        "qk_clip",
        ("maxima are not exchanged", "maximum_of_all(self._max_logits.view(-1), group)", "pass"),
        ("logits are not reset", "        self._max_logits.zero_()\n", ""),
        (
            "shards are scaled by the first rows' factors",
            "            factors = factors[region.start[0] : region.stop[0]]",
            "            factors = factors[: region.stop[0] - region.start[0]]",
        ),
    ),
    *in_files(
        "runtime/replicas.py",
        "layout_faults",
        (
            "replicas that differ pass",
            "names += [name for (name, _), differ in zip(replicated, differs, strict=True) if differ]",
            "names += []",
        ),
    ),
    *in_files(
        "distributed_config/custom_transport.py",
        "custom_transport",
        (
            "NaN from the functions passes",
            "        if check_finite and not shard.isfinite().all():",
            "        if False:",
        ),
        (
            "the scale of the learning rate is left out",
            "from_matrix(polar_factor * scale, matrix)",
            "from_matrix(polar_factor, matrix)",
        ),
    ),
    *in_files(
        "runtime/process_groups.py",
        "async_checkpoint",
        (
            "steps use the default group over several dims",
            "        groups = _own.setdefault(world, {})\n",
            "        if len(ranks) == dist.get_world_size():\n            return world\n"
            "        groups = _own.setdefault(world, {})\n",
        ),
    ),
    *in_files(
        "layout/from_shards.py",
        "from_groups",
        (
            "slices that begin elsewhere pass",
            "        if numel and start != expected:",
            "        if False:",
        ),
        (
            "slices that are not all of the tensor pass",
            "    if layout.shape != (prod(shape),):",
            "    if False:",
        ),
    ),
    *in_files(
        "optimizer/full_state.py",
        "run_checkpoints::shards_that_do_not_begin_their_storage_are_saved",
        (
            "a copy of a state shares memory with it",
            "        return with_shard(value, shard.to(device or shard.device, copy=True))",
            "        return with_shard(value, shard)",
        ),
    ),
    *in_files(
        "train/checkpoints.py",
        "run_checkpoints",
        (
            "a rank whose notes cannot be written lets the others wait",
            "        problem = self._problem(problem)\n",
            "",
        ),
        (
            "notes of a rank of another run are taken over",
            '        if manifest["world_size"] != (1 if self._is_alone else dist.get_world_size()):',
            "        if False:",
        ),
    ),
    *in_files(
        "train/job.py",
        "train_config",
        (
            "overrides replace whole sections",
            "            section = section.setdefault(part, {})\n",
            "            section[part] = section = {}\n",
        ),
        (
            "an error of rank 0 is not raised on the other ranks",
            "    if problem:\n        raise ValueError(problem)\n",
            "    if problem and dist.get_rank() == 0:\n        raise ValueError(problem)\n",
        ),
        (
            "meshes that do not fit the ranks are accepted",
            "        if len(free) > 1 or prod(sizes.values()) != world_size:",
            "        if len(free) > 1:",
        ),
    ),
]


def outcome_of(fault: Fault, tree: Path, marker: str) -> str:
    """Return "caught ...", "lives", or an error. `tree`: a copy that only this thread uses."""
    path = tree / "muon_dtensor" / fault.file
    original = path.read_text()
    if fault.old not in original:
        return "stale: its text is not in the file"
    path.write_text(original.replace(fault.old, fault.new, 1))
    tests = []
    for name in fault.tests.split():
        file, _, test = name.partition("::")
        (test_file,) = (tree / "tests").rglob(f"test_{file}.py")
        tests.append(f"{test_file.relative_to(tree)}{f'::test_{test}' if test else ''}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider"]
    command += ["-m", marker] if marker else []
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [*command, *tests],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return "caught: it hangs"
    finally:
        path.write_text(original)
    failed = next((ln for ln in output.splitlines() if ln.startswith("FAILED ")), "")
    return {
        PASSED: "lives",
        FAILED: f"caught by {failed.removeprefix('FAILED ').split(' - ')[0]}",
    }.get(process.returncode, f"pytest ended with {process.returncode}: {output[-600:]}")


def main() -> int:
    """Plant the faults. Returns 1 if a fault lives without a reason or cannot be planted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="a word in the names or files of faults")
    parser.add_argument("--marker", default="", help="pytest's -m: the tests of one tier")
    parser.add_argument("--jobs", type=int, default=2, help="number of faults at a time")
    parser.add_argument("--json", type=Path, help="file for all outcomes")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if options.only in f"{fault.file} {fault.name}"]
    outcomes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        trees: Queue[Path] = Queue()
        for number in range(options.jobs):
            tree = Path(folder) / str(number)
            ignored = shutil.ignore_patterns(".git", "*_cache", "__pycache__", ".hypothesis")
            shutil.copytree(ROOT, tree, ignore=ignored)
            trees.put(tree)

        def run(fault: Fault) -> None:
            tree, start = trees.get(), monotonic()
            outcome = outcomes[fault.name] = outcome_of(fault, tree, options.marker)
            trees.put(tree)
            print(
                f"{monotonic() - start:5.0f} s  {fault.file}: {fault.name}: {outcome}", flush=True
            )

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(run, faults))
    caught = [f for f in faults if outcomes[f.name].startswith("caught")]
    print(f"{len(caught)} of {len(faults)} faults caught, {len(caught) / len(faults):.1%}")
    not_caught = [fault for fault in faults if fault not in caught]
    for fault in not_caught:
        print(f"{fault.file}: {fault.name}: {outcomes[fault.name]} ({fault.why_it_lives or '?'})")
    if options.json:
        options.json.write_text(json.dumps(outcomes, indent=1))
    return int(any(not fault.why_it_lives for fault in not_caught))


if __name__ == "__main__":
    raise SystemExit(main())
