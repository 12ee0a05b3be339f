"""Every error that this package raises on purpose, and their texts."""

from collections.abc import Sequence
from dataclasses import dataclass


def shortened(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@dataclass(frozen=True, slots=True)
class Problem:
    """One parameter that cannot be planned: what was seen, why not, what to do instead."""

    fqn: str
    seen: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.fqn}  {self.seen}\n    {self.reason}\n    {self.remedy}"


class RefusalError(ValueError):
    """Why one parameter cannot be planned, from whoever found out; a Problem without its name."""

    def __init__(self, reason: str, remedy: str) -> None:
        self.reason, self.remedy = reason, remedy
        super().__init__(reason, remedy)  # so that it pickles

    def __str__(self) -> str:
        return f"{self.reason} {self.remedy}"


GATHERED = (
    "It is FSDP2's temporary unsharded parameter; the one that trains is the sharded parameter.",
    "Make the optimizer before the first forward, or call module.reshard() on the FSDP module "
    "first (the root stays gathered after a forward).",
)
"""Why a parameter that FSDP2 frees again cannot be stepped, and what to do."""

NUM_SHOWN = 3
"""How many parameters of one problem an error lists."""


class PlanError(ValueError):
    """Some parameters cannot be planned. Raised once for all of them, before any collective."""

    def __init__(self, problems: Sequence[Problem], *, num_params: int) -> None:
        self.problems = tuple(problems)
        lines = [f"{len(self.problems)} of {num_params} parameters cannot be planned."]
        by_cause: dict[tuple[str, str], list[Problem]] = {}
        for problem in self.problems:
            by_cause.setdefault((problem.reason, problem.remedy), []).append(problem)
        for (reason, remedy), same in by_cause.items():
            lines += [f"  {problem.fqn}  {problem.seen}" for problem in same[:NUM_SHOWN]]
            if len(same) > NUM_SHOWN:
                lines.append(f"  and {len(same) - NUM_SHOWN} more, for the same reason:")
            lines += [f"    {reason}", f"    {remedy}"]
        super().__init__("\n".join(lines))


class AssignmentError(ValueError, AssertionError):
    """An assignment of parameters to ranks names a rank that is none, or a parameter not once."""


class GroupOptionError(ValueError):
    """A param group holds an option that is unknown or has a value out of its range."""


class CheckpointError(ValueError):
    """A state dict that is not whole, not ours, or that torch would not save as it is."""


class PlanMismatchError(RuntimeError):
    """Ranks of one mesh hold different plans or hyperparameters. Raised on each of them."""


class StepFailedError(RuntimeError):
    """A step ended halfway: some parameters may be updated and others not. Load a checkpoint."""


class MissingGradientError(RuntimeError):
    """A parameter has a gradient on some ranks of its mesh and none on others."""


class NonFiniteGradientError(RuntimeError):
    """A gradient holds NaN or Inf on some rank. Nothing was updated on any rank."""
