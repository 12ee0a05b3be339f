"""Compares ranks before a step: plan, hyperparameters, gradients present, gradients finite.

One small reduction per step and set of ranks. Errors name the ranks that differ. Updates nothing.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from muon_dtensor.errors import MissingGradientError, PlanMismatchError
from muon_dtensor.layout import MeshSpec
from muon_dtensor.runtime.collectives import gather_from_mesh, maximum_of_all
from muon_dtensor.runtime.consistency_codec import (
    Comparison,
    Entry,
    Fault,
    LocalStatus,
    Manifest,
    StatusTensorCache,
    differs,
    encode_status,
    error_of,
    fault_in,
)
from muon_dtensor.runtime.consistency_messages import (
    first_difference,
    missing_gradients,
    other_options,
)
from muon_dtensor.runtime.process_groups import Groups


class Agreement:
    """Compares this rank with others. All ranks of a mesh make the same calls in the same order."""

    def __init__(self, manifests: Sequence[Manifest], groups: Groups, rank: int) -> None:
        shared = [manifest for manifest in manifests if manifest.mesh.num_ranks > 1]
        self._manifests = sorted(shared, key=lambda m: (m.mesh.num_ranks, sorted(m.mesh.ranks)))
        self._groups = groups
        self._rank = rank
        self._second_sweep: list[Manifest] = []
        self._cache = StatusTensorCache()

    @property
    def manifests(self) -> Sequence[Manifest]:
        """The manifests in the order of reductions and of `LocalStatus.presence`."""
        return self._manifests

    def compare_plans(
        self, device: torch.device, needs_second_sweep: dict[frozenset[int], bool]
    ) -> None:
        """Raise PlanMismatchError on every rank unless all hold the same plan.

        Compares sets of ranks that are not in `needs_second_sweep`, and adds them: whether they
        take part in second sweeps. `settle` compares plans that change later. Uses only the process
        groups of the meshes' own dims: no group is made, and no data sent, before plans are equal.
        """
        failed = ""
        new = [m for m in self._manifests if m.mesh.rank_set not in needs_second_sweep]
        last = self._manifests[-1].mesh.rank_set if self._manifests else frozenset()
        crosses = not all(manifest.mesh.rank_set <= last for manifest in self._manifests)
        on_other_mesh = "Ranks of another mesh hold different plans; their errors say which."
        for manifest in new:
            digest = manifest.fingerprint
            high, low, other, twice = self._prove(
                manifest, [digest, -digest, bool(failed), crosses], device
            )
            if high != -low:
                lists = self._gather(manifest, manifest.params)
                failed = first_difference(manifest.mesh, lists)
            elif other:
                failed = failed or on_other_mesh
            needs_second_sweep[manifest.mesh.rank_set] = bool(twice)
        for manifest in reversed(new):
            if needs_second_sweep[manifest.mesh.rank_set]:
                _, _, other, _ = self._prove(manifest, [0, 0, bool(failed), 0], device)
                failed = failed or (on_other_mesh if other else "")
        if failed:
            for manifest in new:
                del needs_second_sweep[manifest.mesh.rank_set]
            raise PlanMismatchError(failed)
        self._second_sweep = [
            m for m in reversed(self._manifests) if needs_second_sweep[m.mesh.rank_set]
        ]

    def _prove(self, manifest: Manifest, values: list[int], device: torch.device) -> list[int]:
        """Return the maxima over a mesh, using the groups of its own dims."""
        reduced = torch.tensor(values, dtype=torch.int64, device=device)
        for group in self._groups.along_each_dim(manifest.mesh):
            with _explain_lost_ranks(manifest.mesh):
                maximum_of_all(reduced, group)
        maxima: list[int] = reduced.tolist()
        return maxima

    def settle(
        self, status: LocalStatus, non_finite: Tensor, *, moved: bool, raise_missing: bool
    ) -> Comparison:
        """Compare ranks and wait for the result: all ranks raise, or all return the same value.

        Args:
            status: the report of this rank.
            non_finite: int64 scalar, 1 if any local gradient holds NaN or Inf.
            moved: whether this rank has gradients to redistribute.
            raise_missing: raise MissingGradientError instead of returning the parameters' names.
        """
        error: Exception | None = None
        bad, fault = int(non_finite), Fault.OTHER_RANK if status.fault else Fault.NONE
        missing: set[str] = set()
        for index, manifest in enumerate(self._manifests):
            carried = (bad, moved, fault)
            reduced = encode_status(
                manifest, (status, index), carried, non_finite.device, self._cache
            )
            self._reduce(reduced, manifest)
            values = reduced.tolist()
            bad, moved = values[Entry.NON_FINITE], bool(values[Entry.MOVED])
            new_fault = Fault(values[Entry.FAULT])
            if differs(values, Entry.PLAN):
                lists = self._gather(manifest, manifest.params)
                error = PlanMismatchError(first_difference(manifest.mesh, lists))
                new_fault = Fault.PLAN
            elif differs(values, Entry.HYPERPARAMETERS):
                options = self._gather(manifest, status.hyperparameters[index])
                error = PlanMismatchError(other_options(manifest.mesh, options))
                new_fault = max(new_fault, Fault.HYPERPARAMETERS)
            elif differs(values, Entry.PRESENCE):
                presence = self._gather(manifest, status.presence[index])
                incomplete, differ_otherwise, text = missing_gradients(
                    manifest.mesh, manifest.fqns, presence
                )
                missing |= incomplete
                if raise_missing or differ_otherwise:
                    error, new_fault = MissingGradientError(text), max(new_fault, Fault.GRADIENTS)
            fault = max(fault, new_fault)
        for manifest in self._second_sweep:
            reduced = encode_status(
                manifest, None, (bad, moved, fault), non_finite.device, self._cache
            )
            self._reduce(reduced, manifest)
            values = reduced.tolist()
            bad, moved = values[Entry.NON_FINITE], bool(values[Entry.MOVED])
            fault = Fault(values[Entry.FAULT])
        if status.fault is not None:
            raise status.fault
        if error is not None:
            raise error
        if fault is not Fault.NONE:
            raise error_of(fault)
        return Comparison(frozenset(missing), bool(bad), moved)

    def settle_on_device(self, status: LocalStatus, non_finite: Tensor) -> Tensor:
        """Compare ranks and leave the results on the device: int64, [reductions, 2].

        Each row is a Fault, and 1 if a gradient holds NaN or Inf. A rank that shares no parameter
        returns one row, for itself.
        """
        outcomes: list[Tensor] = []
        before: Tensor | None = None
        local_fault = Fault.OTHER_RANK if status.fault else Fault.NONE
        if not self._manifests:
            return torch.stack([torch.full_like(non_finite, local_fault), non_finite])[None]
        reports: list[tuple[Manifest, tuple[LocalStatus, int] | None]] = [
            (manifest, (status, index)) for index, manifest in enumerate(self._manifests)
        ]
        reports += [(manifest, None) for manifest in self._second_sweep]
        for manifest, report in reports:
            reduced = encode_status(
                manifest, report, (0, False, local_fault), non_finite.device, self._cache
            )
            reduced[Entry.NON_FINITE] = non_finite
            if before is not None:
                previous = torch.stack(
                    [before[Entry.NON_FINITE], before[Entry.MOVED], outcomes[-1][0]]
                )
                carried = reduced[Entry.NON_FINITE : Entry.PAIRS]
                carried.copy_(torch.maximum(carried, previous))
            self._reduce(reduced, manifest)
            outcomes.append(torch.stack([fault_in(reduced), reduced[Entry.NON_FINITE]]))
            before = reduced
        return torch.stack(outcomes)

    def _reduce(self, encoded: Tensor, manifest: Manifest) -> None:
        with _explain_lost_ranks(manifest.mesh):
            maximum_of_all(encoded, self._groups.over(manifest.mesh, manifest.mesh.dim_names))

    def _gather(self, manifest: Manifest, value: tuple[str, ...]) -> dict[int, tuple[str, ...]]:
        """Return the value of every rank of a manifest's mesh, by global rank."""
        groups = self._groups.along_each_dim(manifest.mesh)
        with _explain_lost_ranks(manifest.mesh):
            return gather_from_mesh(value, groups, self._rank)


UNREACHABLE = re.compile(
    r"timed?[ -]?out|timeout|connection|connect|closed|reset by|broken pipe|socket|peer|store"
    r"|process group|communicator|nccl|gloo",
    re.IGNORECASE,
)
"""Matches errors of torch's backends for an unreachable rank or a destroyed process group."""


@contextmanager
def _explain_lost_ranks(mesh: MeshSpec) -> Iterator[None]:
    """Add the mesh and the likely causes to torch's errors about unreachable ranks.

    Other errors, such as those of memory or of a device, pass unchanged.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not UNREACHABLE.search(str(error)):
            raise
        raise RuntimeError(
            f"Ranks of mesh {mesh} could not agree before the step, which has changed nothing: one "
            f"has died, hangs, or did not call step(), or the process group was destroyed. {error}"
        ) from error
