"""Assignments of parameters to ranks by the user's `assign_fn`, in its two forms.

The planner's own choice of owners is in `planning.owners`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from muon_dtensor.errors import AssignmentError

Assignments = Mapping[int, int] | Mapping[int, Sequence[int]]
"""`{index of parameter: global rank}`, or `{global rank: [index of parameter, ...]}`."""

AssignFn = Callable[[Sequence[Tensor], dict[str, Any]], Assignments]
"""(parameters, state) -> Assignments. It must return the same on every rank."""


def ranks_of(state: Mapping[str, Any]) -> Sequence[int]:
    """Return the ranks to assign to: those of the mesh, or all ranks of the world."""
    ranks: Sequence[int] = state.get("ranks") or range(state["world_size"])
    return ranks


def default_assign_fn(params: Sequence[Tensor], state: Mapping[str, Any]) -> dict[int, int]:
    """Assign round robin, as `{index: rank}`: counts differ by at most one."""
    ranks = ranks_of(state)
    return {index: ranks[index % len(ranks)] for index in range(len(params))}


def load_balanced_assign_fn(params: Sequence[Tensor], state: Mapping[str, Any]) -> dict[int, int]:
    """Assign largest first, to the rank with the fewest elements so far, as `{index: rank}`."""
    loads = dict.fromkeys(ranks_of(state), 0)
    assignments = {}
    for index in sorted(range(len(params)), key=lambda i: (-params[i].numel(), i)):
        rank = min(loads, key=lambda r: (loads[r], r))
        assignments[index] = rank
        loads[rank] += params[index].numel()
    return dict(sorted(assignments.items()))


def by_rank(assignments: Mapping[int, int], ranks: Iterable[int]) -> dict[int, list[int]]:
    """Convert `{index: rank}` to `{rank: [index, ...]}`, with a list for each of `ranks`."""
    lists: dict[int, list[int]] = {rank: [] for rank in ranks}
    for index, rank in assignments.items():
        lists[rank].append(index)
    return lists


def validate_assignments(
    assignments: Assignments, params: Sequence[object], world_size: int
) -> dict[int, int]:
    """Check the assignments, and return them as `{index: rank}`.

    Raises:
        AssignmentError: a rank is outside 0..world_size - 1, an index is outside the parameters, a
            parameter is assigned twice or not at all, or the value is not an assignment.
    """
    if not isinstance(assignments, Mapping):
        raise AssignmentError(
            f"assign_fn returned {assignments!r}, not {{index: rank}} or {{rank: [index, ...]}}"
        )
    pairs: list[tuple[Any, Any]] = []
    for key, value in assignments.items():
        if isinstance(value, (list, tuple, range, set)):
            pairs += [(index, key) for index in value]
        else:
            pairs.append((key, value))
    owners: dict[int, int] = {}
    for index, rank in pairs:
        if type(index) is not int or not 0 <= index < len(params):
            raise AssignmentError(
                f"assign_fn assigns parameter {index!r}, but there are {len(params)}, numbered "
                "from 0"
            )
        if type(rank) is not int or not 0 <= rank < world_size:
            raise AssignmentError(
                f"parameter {index} is assigned to rank {rank!r}; ranks are 0 to {world_size - 1}"
            )
        if index in owners:
            raise AssignmentError(
                f"parameter {index} is assigned twice, to ranks {owners[index]} and {rank}"
            )
        owners[index] = rank
    if missing := [index for index in range(len(params)) if index not in owners]:
        raise AssignmentError(f"parameters {missing} are assigned to no rank")
    return dict(sorted(owners.items()))
