"""The exceptions of this package, and the texts that several of them share."""

from collections.abc import Sequence
from dataclasses import dataclass


def shortened(names: Sequence[str], max_names: int = 3) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - max_names} more" if len(names) > max_names else ""
    return ", ".join(names[:max_names]) + more


@dataclass(frozen=True, slots=True)
class Problem:
    """One parameter that cannot be planned: what was observed, the reason, and the remedy."""

    fqn: str
    observed: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.fqn}  {self.observed}\n    {self.reason}\n    {self.remedy}"


class RefusalError(ValueError):
    """One parameter cannot be planned. The caller adds its name to make a `Problem`."""

    def __init__(self, reason: str, remedy: str) -> None:
        self.reason, self.remedy = reason, remedy
        super().__init__(reason, remedy)  # pickle calls the class with these args

    def __str__(self) -> str:
        return f"{self.reason} {self.remedy}"


GATHERED = (
    "It is FSDP2's temporary unsharded parameter; the one that trains is the sharded parameter.",
    "Make the optimizer before the first forward, or call module.reshard() on the FSDP module "
    "first (the root stays gathered after a forward).",
)
"""Reason and remedy for a parameter that FSDP2 frees after the forward."""

NUM_SHOWN = 3
"""How many parameters an error lists for each reason."""


class PlanError(ValueError):
    """Some parameters cannot be planned. Raised once for all of them, before any collective."""

    def __init__(self, problems: Sequence[Problem], *, num_params: int) -> None:
        self.problems = tuple(problems)
        lines = [f"{len(self.problems)} of {num_params} parameters cannot be planned."]
        by_cause: dict[tuple[str, str], list[Problem]] = {}
        for problem in self.problems:
            by_cause.setdefault((problem.reason, problem.remedy), []).append(problem)
        for (reason, remedy), same in by_cause.items():
            lines += [f"  {problem.fqn}  {problem.observed}" for problem in same[:NUM_SHOWN]]
            if len(same) > NUM_SHOWN:
                lines.append(f"  and {len(same) - NUM_SHOWN} more, for the same reason:")
            lines += [f"    {reason}", f"    {remedy}"]
        super().__init__("\n".join(lines))


class AssignmentError(ValueError, AssertionError):
    """An assignment names an invalid rank, or does not assign every parameter exactly once."""


class GroupOptionError(ValueError):
    """A param group holds an unknown option, or a value out of range."""


class CheckpointError(ValueError):
    """A state dict is incomplete, comes from another optimizer, or cannot be saved correctly."""


class PlanMismatchError(RuntimeError):
    """Ranks of one mesh hold different plans or hyperparameters. Raised on each of these ranks."""


class StepFailedError(RuntimeError):
    """A step failed halfway: some parameters may be updated and others not. Load a checkpoint."""


class MissingGradientError(RuntimeError):
    """A parameter has a gradient on some ranks of its mesh and none on others."""


class NonFiniteGradientError(RuntimeError):
    """A gradient holds NaN or Inf on some rank. No parameter was updated on any rank."""
