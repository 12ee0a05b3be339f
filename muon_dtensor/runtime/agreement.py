"""What ranks agree on before a step: plan, hyperparameters, gradients present, gradients finite.

One small reduction per step. Knows the ballots and how to name who differs; updates nothing.

Note [Ballot]
    Nine int64, reduced by MAX over every set of ranks that a mesh holds, smaller sets first.
    A value and its negative reveal any difference: the maxima agree only if all values do. What
    a smaller set found travels on in the last three entries, so ranks of a larger set that see
    nothing wrong themselves stop with the others. Where a rank's last set does not hold its
    others (one mesh of rows, one of columns), a second sweep over all sets of such a rank carries
    what was found late back again; who sweeps twice is settled when plans are proven equal.
    On a device the ballots stay there; the step is masked by them, and they are read when that
    no longer costs a wait.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from muon_dtensor.errors import MissingGradientError, NonFiniteGradientError, PlanMismatchError
from muon_dtensor.layout import MeshSpec
from muon_dtensor.runtime.collectives import all_gather_values, all_reduce_max
from muon_dtensor.runtime.groups import Groups


class Entry(IntEnum):
    """Places of a ballot; each of the first three is followed by its negative."""

    PLAN = 0
    HYPERPARAMETERS = 2
    PRESENCE = 4
    NON_FINITE = 6
    MOVED = 7
    FAULT = 8


MISSING, PRESENT = "", "yes"


class Fault(IntEnum):
    """Why a rank cannot take this step; the greatest wins."""

    NONE = 0
    GRADIENTS = 1
    HYPERPARAMETERS = 2
    PLAN = 3
    OTHER_RANK = 4


def fingerprint(text: str) -> int:
    """62 bits of SHA-256: a nonnegative int64 whose negative is one too."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


@dataclass(frozen=True)
class Manifest:
    """What one set of ranks must have in common, as lines that an error can show.

    `groups`: indices of the param groups that hold any of its parameters.
    """

    mesh: MeshSpec
    digest: str
    params: tuple[str, ...]
    fqns: tuple[str, ...]
    groups: tuple[int, ...]

    @cached_property
    def fingerprint(self) -> int:
        """What ranks compare: 62 bits of the digest and the lines."""
        return fingerprint("\n".join((self.digest, *self.params)))


@dataclass(frozen=True, slots=True)
class Votes:
    """What this rank has to say, per manifest: its hyperparameters, its gradients' state.

    `presence` holds one text per parameter of the manifest: MISSING, PRESENT, or what else is
    particular about its gradient. `fault` says why this rank cannot step; empty if it can.
    """

    hyperparameters: tuple[tuple[str, ...], ...]
    presence: tuple[tuple[str, ...], ...]
    fault: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all ranks now know.

    `incomplete`: parameters with a gradient on some ranks only. `moved`: some rank has gradients
    to redistribute, after which all ranks vote again.
    """

    incomplete: frozenset[str]
    non_finite: bool
    moved: bool


class Agreement:
    """Ballots of one rank. Every rank of a manifest's mesh makes the same calls in order."""

    def __init__(self, manifests: Sequence[Manifest], groups: Groups, rank: int) -> None:
        shared = [manifest for manifest in manifests if manifest.mesh.num_ranks > 1]
        self._manifests = sorted(shared, key=lambda m: (m.mesh.num_ranks, sorted(m.mesh.ranks)))
        self._groups = groups
        self._rank = rank
        self._second_sweep: list[Manifest] = []

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
                failed = self._first_difference(manifest)
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
            all_reduce_max(ballot, group)
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
            ballot = self._ballot(manifest, (votes, index), carried, non_finite.device)
            self._reduce(ballot, manifest)
            values = ballot.tolist()
            bad, moved = values[Entry.NON_FINITE], bool(values[Entry.MOVED])
            seen = Fault(values[Entry.FAULT])
            if _differ(values, Entry.PLAN):
                error, seen = PlanMismatchError(self._first_difference(manifest)), Fault.PLAN
            elif _differ(values, Entry.HYPERPARAMETERS):
                error = PlanMismatchError(
                    self._other_options(manifest, votes.hyperparameters[index])
                )
                seen = max(seen, Fault.HYPERPARAMETERS)
            elif _differ(values, Entry.PRESENCE):
                incomplete, others, text = self._who_misses(manifest, votes.presence[index])
                missing |= incomplete
                if raise_missing or others:
                    error, seen = MissingGradientError(text), max(seen, Fault.GRADIENTS)
            fault = max(fault, seen)
        for manifest in self._second_sweep:
            ballot = self._ballot(manifest, None, (bad, moved, fault), non_finite.device)
            self._reduce(ballot, manifest)
            values = ballot.tolist()
            bad, moved = values[Entry.NON_FINITE], bool(values[Entry.MOVED])
            fault = Fault(values[Entry.FAULT])
        if votes.fault:
            raise RuntimeError(votes.fault)
        if error is not None:
            raise error
        if fault is not Fault.NONE:
            raise _error_of(fault)
        return Verdict(frozenset(missing), bool(bad), moved)

    def cast(self, votes: Votes, non_finite: Tensor) -> Tensor:
        """Reduce the ballot and leave it on the device: int64, [ballots, entries]."""
        ballots: list[Tensor] = []
        mine = Fault.OTHER_RANK if votes.fault else Fault.NONE
        said: list[tuple[Manifest, tuple[Votes, int] | None]] = [
            (manifest, (votes, index)) for index, manifest in enumerate(self._manifests)
        ]
        said += [(manifest, None) for manifest in self._second_sweep]
        for manifest, vote in said:
            ballot = self._ballot(manifest, vote, (0, False, mine), non_finite.device)
            ballot[Entry.NON_FINITE] = non_finite
            if ballots:
                before = ballots[-1]
                found = torch.stack(
                    [before[Entry.NON_FINITE], before[Entry.MOVED], _fault_in(before)]
                )
                torch.maximum(ballot[Entry.NON_FINITE :], found, out=ballot[Entry.NON_FINITE :])
            self._reduce(ballot, manifest)
            ballots.append(ballot)
        return torch.stack(ballots)

    def _reduce(self, ballot: Tensor, manifest: Manifest) -> None:
        all_reduce_max(ballot, self._groups.over(manifest.mesh, manifest.mesh.dim_names))

    def _ballot(
        self,
        manifest: Manifest,
        vote: tuple[Votes, int] | None,
        carried: tuple[int, bool, Fault],
        device: torch.device,
    ) -> Tensor:
        """See Note [Ballot]. `vote`: votes and the index of the manifest; None in second sweeps.

        `carried`: the last three entries.
        """
        values = [0] * Entry.NON_FINITE
        if vote is not None:
            votes, index = vote
            plan = manifest.fingerprint
            options = fingerprint("\n".join(votes.hyperparameters[index]))
            present = fingerprint("\n".join(votes.presence[index]))
            values = [plan, -plan, options, -options, present, -present]
        return torch.tensor([*values, *carried], dtype=torch.int64, device=device)

    def _gather(self, mesh: MeshSpec, value: object) -> dict[int, object]:
        """A value of every rank of a mesh, by global rank."""
        gathered: dict[int, object] = {self._rank: value}
        for group in self._groups.along_each_dim(mesh):
            merged: dict[int, object] = {}
            for part in all_gather_values(gathered, group):
                assert isinstance(part, dict)
                merged.update(part)
            gathered = merged
        return dict(sorted(gathered.items()))

    def _first_difference(self, manifest: Manifest) -> str:
        by_rank = self._gather(manifest.mesh, (manifest.digest, manifest.params))
        lists = {rank: value[1] for rank, value in by_rank.items() if isinstance(value, tuple)}
        longest = max(map(len, lists.values()))
        for index in range(longest):
            seen: dict[str, list[int]] = {}
            for rank, params in lists.items():
                line = params[index] if index < len(params) else "no further parameter"
                seen.setdefault(line, []).append(rank)
            if len(seen) > 1:
                told = "".join(f"\n  {_ranks(ranks)}: {line}" for line, ranks in seen.items())
                return (
                    f"Ranks of mesh {manifest.mesh} hold different plans, "
                    f"from parameter {index} on:{told}\n"
                    "Build the same model with the same parallelism on all of them, and hand its "
                    "parameters to the optimizer in one order."
                )
        return (
            f"Ranks of mesh {manifest.mesh} hold the same parameters and different plans: they "
            "run different versions of muon_dtensor, or were given different plan options "
            "(bucket_mb, prefetch_count, batched, ns_dtype, ns_steps)."
        )

    def _other_options(self, manifest: Manifest, mine: tuple[str, ...]) -> str:
        by_rank = self._gather(manifest.mesh, mine)
        lines = []
        values = [v for v in by_rank.values() if isinstance(v, tuple)]
        for index in range(max(map(len, values))):
            seen: dict[str, list[int]] = {}
            for rank, options in by_rank.items():
                assert isinstance(options, tuple)
                line = options[index] if index < len(options) else "nothing further"
                seen.setdefault(line, []).append(rank)
            if len(seen) > 1:
                lines += [f"\n  {_ranks(r)}: {line}" for line, r in seen.items()]
        return (
            f"Ranks of mesh {manifest.mesh} hold different hyperparameters:{''.join(lines)}\n"
            "Set the same values on all of them; a scheduler must step on all of them too."
        )

    def _who_misses(
        self, manifest: Manifest, presence: tuple[str, ...]
    ) -> tuple[frozenset[str], bool, str]:
        """Parameters missing on some ranks, whether gradients differ otherwise, and the text."""
        by_rank = self._gather(manifest.mesh, presence)
        missing, others, lines = set(), False, []
        for index, fqn in enumerate(manifest.fqns):
            states: dict[str, list[int]] = {}
            for rank, present in by_rank.items():
                assert isinstance(present, tuple)
                states.setdefault(present[index], []).append(rank)
            if len(states) == 1:
                continue
            if states.keys() == {MISSING, PRESENT}:
                missing.add(fqn)
                lines.append(f"\n  {fqn}: no gradient on {_ranks(states[MISSING])}")
                continue
            others = True
            words = {MISSING: "no gradient", PRESENT: "placed as the parameter"}
            told = "; ".join(f"{words.get(s, s)} on {_ranks(r)}" for s, r in states.items())
            lines.append(f"\n  {fqn}: {told}")
        advice = "Run the same forward and backward on all of them"
        if not others:
            advice += ', or construct Muon with missing_grad="zero" to count a missing one as zero'
        text = f"Gradients differ between ranks of mesh {manifest.mesh}:{''.join(lines)}\n{advice}."
        return frozenset(missing), others, text


def read(ballots: Tensor, *, with_non_finite: bool) -> None:
    """Raise what the ballots of an earlier step say. Waits for the device; no communication."""
    faults = torch.stack([_fault_in(ballot) for ballot in ballots])
    if fault := Fault(int(faults.max())):
        raise _error_of(fault)
    if with_non_finite and ballots[:, Entry.NON_FINITE].any():
        raise NonFiniteGradientError(
            "A gradient of an earlier step holds NaN or Inf on some rank. That step changed "
            'nothing. Lower the learning rate or clip gradients; nonfinite="skip" leaves such '
            "steps out silently."
        )


def all_agree(ballots: Tensor) -> Tensor:
    """A bool scalar on the device: no ballot shows a fault. Non-finite is not looked at."""
    return torch.stack([_fault_in(ballot) for ballot in ballots]).amax() == 0


def _fault_in(ballot: Tensor) -> Tensor:
    """int64 scalar: the worst Fault that a reduced ballot shows."""
    differs = ballot[: Entry.NON_FINITE : 2] != -ballot[1 : Entry.NON_FINITE : 2]
    codes = [Fault.PLAN, Fault.HYPERPARAMETERS, Fault.GRADIENTS]
    found = differs * torch.tensor(codes, dtype=torch.int64, device=ballot.device)
    return torch.maximum(found.amax(), ballot[Entry.FAULT])


def _differ(values: Sequence[int], entry: Entry) -> bool:
    return values[entry] != -values[entry + 1]


def _error_of(fault: Fault) -> Exception:
    match fault:
        case Fault.PLAN:
            return PlanMismatchError("Ranks hold different plans; the step changed nothing.")
        case Fault.HYPERPARAMETERS:
            return PlanMismatchError(
                "Ranks hold different hyperparameters; the step changed nothing. Set the same "
                "values on all of them."
            )
        case Fault.GRADIENTS:
            return MissingGradientError(
                "A parameter has a gradient on some ranks only; the step changed nothing. Run "
                "the same forward and backward on all ranks."
            )
        case _:
            return RuntimeError("Another rank could not take this step; its error says why.")


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"{len(ranks)} ranks ({shown})"


def non_finite_flag(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """int64 scalar on `device`: 1 if any of the tensors holds NaN or Inf."""
    nonempty = [grad for grad in grads if grad.numel()]
    if not nonempty:
        return torch.zeros((), dtype=torch.int64, device=device)
    # NaN and Inf survive in these extremes: one kernel per tensor on the host, one for all on a GPU
    extremes: list[Tensor] = []
    if device.type == "cpu":
        for grad in nonempty:
            extremes += torch.aminmax(grad)
    else:
        extremes += torch._foreach_norm(nonempty, float("inf"))
    gathered = torch.stack([extreme.to(device=device, dtype=torch.float64) for extreme in extremes])
    return (~gathered.isfinite()).any().to(torch.int64)
