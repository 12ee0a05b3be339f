"""What ranks agree on before a step: plan, hyperparameters, gradients present, gradients finite.

One small reduction per step. Casts the ballots and says who differs; updates nothing.
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
    DeviceBallots,
    Entry,
    Fault,
    Manifest,
    Verdict,
    Votes,
    ballot_of,
    differs,
    error_of,
    fault_in,
)
from muon_dtensor.runtime.consistency_messages import first_difference, other_options, who_misses
from muon_dtensor.runtime.process_groups import Groups


class Agreement:
    """Ballots of one rank. Every rank of a manifest's mesh makes the same calls in order."""

    def __init__(self, manifests: Sequence[Manifest], groups: Groups, rank: int) -> None:
        shared = [manifest for manifest in manifests if manifest.mesh.num_ranks > 1]
        self._manifests = sorted(shared, key=lambda m: (m.mesh.num_ranks, sorted(m.mesh.ranks)))
        self._groups = groups
        self._rank = rank
        self._second_sweep: list[Manifest] = []
        self._ballots = DeviceBallots()

    @property
    def manifests(self) -> Sequence[Manifest]:
        """In the order of ballots; `Votes.presence` follows it."""
        return self._manifests

    def prove_plan(self, device: torch.device, sweeps_twice: dict[frozenset[int], bool]) -> None:
        """Raise PlanMismatchError on every rank unless all hold the same plan.

        For sets of ranks that are not in `sweeps_twice`, and puts them there, with whether they
        take part in second sweeps; plans that change later are compared by the ballots. Uses only
        the process groups of the meshes' own dims, so that no group is made, and no data sent,
        before plans have been equal once.
        """
        failed = ""
        new = [m for m in self._manifests if m.mesh.rank_set not in sweeps_twice]
        last = self._manifests[-1].mesh.rank_set if self._manifests else frozenset()
        crosses = not all(manifest.mesh.rank_set <= last for manifest in self._manifests)
        elsewhere = "Ranks of another mesh hold different plans; their errors say which."
        for manifest in new:
            mine = manifest.fingerprint
            high, low, other, twice = self._prove(
                manifest, [mine, -mine, bool(failed), crosses], device
            )
            if high != -low:
                lists = self._gather(manifest, manifest.params)
                failed = first_difference(manifest.mesh, lists)
            elif other:
                failed = failed or elsewhere
            sweeps_twice[manifest.mesh.rank_set] = bool(twice)
        for manifest in reversed(new):
            if sweeps_twice[manifest.mesh.rank_set]:
                _, _, other, _ = self._prove(manifest, [0, 0, bool(failed), 0], device)
                failed = failed or (elsewhere if other else "")
        if failed:
            for manifest in new:
                del sweeps_twice[manifest.mesh.rank_set]
            raise PlanMismatchError(failed)
        self._second_sweep = [m for m in reversed(self._manifests) if sweeps_twice[m.mesh.rank_set]]

    def _prove(self, manifest: Manifest, values: list[int], device: torch.device) -> list[int]:
        """The maxima over a mesh, by the groups of its own dims."""
        ballot = torch.tensor(values, dtype=torch.int64, device=device)
        for group in self._groups.along_each_dim(manifest.mesh):
            with _asking(manifest.mesh):
                maximum_of_all(ballot, group)
        maxima: list[int] = ballot.tolist()
        return maxima

    def settle(
        self, votes: Votes, non_finite: Tensor, *, moved: bool, raise_missing: bool
    ) -> Verdict:
        """Reduce the ballot and read it; all ranks raise, or all get the same verdict.

        Args:
            votes: of this rank.
            non_finite: int64 scalar, 1 if any local gradient holds NaN or Inf.
            moved: whether this rank has gradients to redistribute.
            raise_missing: raise MissingGradientError instead of naming parameters in the verdict.
        """
        error: Exception | None = None
        bad, fault = int(non_finite), Fault.OTHER_RANK if votes.fault else Fault.NONE
        missing: set[str] = set()
        for index, manifest in enumerate(self._manifests):
            carried = (bad, moved, fault)
            ballot = ballot_of(manifest, (votes, index), carried, non_finite.device, self._ballots)
            self._reduce(ballot, manifest)
            values = ballot.tolist()
            bad, moved = values[Entry.NON_FINITE], bool(values[Entry.MOVED])
            seen = Fault(values[Entry.FAULT])
            if differs(values, Entry.PLAN):
                lists = self._gather(manifest, manifest.params)
                error = PlanMismatchError(first_difference(manifest.mesh, lists))
                seen = Fault.PLAN
            elif differs(values, Entry.HYPERPARAMETERS):
                options = self._gather(manifest, votes.hyperparameters[index])
                error = PlanMismatchError(other_options(manifest.mesh, options))
                seen = max(seen, Fault.HYPERPARAMETERS)
            elif differs(values, Entry.PRESENCE):
                presence = self._gather(manifest, votes.presence[index])
                incomplete, others, text = who_misses(manifest.mesh, manifest.fqns, presence)
                missing |= incomplete
                if raise_missing or others:
                    error, seen = MissingGradientError(text), max(seen, Fault.GRADIENTS)
            fault = max(fault, seen)
        for manifest in self._second_sweep:
            ballot = ballot_of(
                manifest, None, (bad, moved, fault), non_finite.device, self._ballots
            )
            self._reduce(ballot, manifest)
            values = ballot.tolist()
            bad, moved = values[Entry.NON_FINITE], bool(values[Entry.MOVED])
            fault = Fault(values[Entry.FAULT])
        if votes.fault is not None:
            raise votes.fault
        if error is not None:
            raise error
        if fault is not Fault.NONE:
            raise error_of(fault)
        return Verdict(frozenset(missing), bool(bad), moved)

    def cast(self, votes: Votes, non_finite: Tensor) -> Tensor:
        """Reduce the ballots and leave what they say on the device: int64, [ballots, 2].

        Each row is a Fault, and 1 if a gradient holds NaN or Inf. A rank that shares nothing has
        one row, its own.
        """
        outcomes: list[Tensor] = []
        before: Tensor | None = None
        mine = Fault.OTHER_RANK if votes.fault else Fault.NONE
        if not self._manifests:
            return torch.stack([torch.full_like(non_finite, mine), non_finite])[None]
        said: list[tuple[Manifest, tuple[Votes, int] | None]] = [
            (manifest, (votes, index)) for index, manifest in enumerate(self._manifests)
        ]
        said += [(manifest, None) for manifest in self._second_sweep]
        for manifest, vote in said:
            ballot = ballot_of(manifest, vote, (0, False, mine), non_finite.device, self._ballots)
            ballot[Entry.NON_FINITE] = non_finite
            if before is not None:
                found = torch.stack(
                    [before[Entry.NON_FINITE], before[Entry.MOVED], outcomes[-1][0]]
                )
                carried = ballot[Entry.NON_FINITE : Entry.PAIRS]
                carried.copy_(torch.maximum(carried, found))
            self._reduce(ballot, manifest)
            outcomes.append(torch.stack([fault_in(ballot), ballot[Entry.NON_FINITE]]))
            before = ballot
        return torch.stack(outcomes)

    def _reduce(self, ballot: Tensor, manifest: Manifest) -> None:
        with _asking(manifest.mesh):
            maximum_of_all(ballot, self._groups.over(manifest.mesh, manifest.mesh.dim_names))

    def _gather(self, manifest: Manifest, value: tuple[str, ...]) -> dict[int, tuple[str, ...]]:
        """A value of every rank of a manifest's mesh, by global rank."""
        groups = self._groups.along_each_dim(manifest.mesh)
        with _asking(manifest.mesh):
            return gather_from_mesh(value, groups, self._rank)


UNREACHABLE = re.compile(
    r"timed?[ -]?out|timeout|connection|connect|closed|reset by|broken pipe|socket|peer|store"
    r"|process group|communicator|nccl|gloo",
    re.IGNORECASE,
)
"""What torch's backends say of a rank that cannot be reached, or of a destroyed group."""


@contextmanager
def _asking(mesh: MeshSpec) -> Iterator[None]:
    """Say what was going on where torch says only that a rank cannot be reached.

    Other errors, such as those of memory or of a device, are left as they are.
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
