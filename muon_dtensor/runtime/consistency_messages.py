"""Error messages about differences between ranks."""

from collections.abc import Iterator, Mapping, Sequence

from muon_dtensor.layout import MeshSpec
from muon_dtensor.runtime.consistency_codec import MISSING, NO_ELEMENTS, OF_DTYPE, PRESENT


def first_difference(mesh: MeshSpec, params: Mapping[int, tuple[str, ...]]) -> str:
    """Return the message for different plans: the first line that differs, if any does."""
    for index, text in _differing_lines(params, filler="no further parameter"):
        if index == 0:
            return (
                f"Ranks of mesh {mesh} run different versions:{text}\nInstall one on all of them."
            )
        return (
            f"Ranks of mesh {mesh} hold different plans, from parameter {index - 1} on:{text}\n"
            "Build the same model with the same parallelism on all of them, and pass its "
            "parameters to the optimizer in the same order."
        )
    return (
        f"Ranks of mesh {mesh} hold the same parameters and different plans: their plan options "
        "differ (bucket_mb, "
        "prefetch_count, batched, strategy, exact, topology, ns_dtype, ns_steps, assign_fn)."
    )


def other_options(mesh: MeshSpec, options: Mapping[int, tuple[str, ...]]) -> str:
    """Return the message for different hyperparameters, which are texts by rank."""
    lines = "".join(text for _, text in _differing_lines(options, filler="nothing further"))
    return (
        f"Ranks of mesh {mesh} hold different hyperparameters:{lines}\n"
        "Set the same values on all of them. A scheduler must step on all of them, too."
    )


def _differing_lines(
    lists: Mapping[int, tuple[str, ...]], *, filler: str
) -> Iterator[tuple[int, str]]:
    """Yield index and text of lines that differ between ranks; `filler` stands for absent lines."""
    for index in range(max(map(len, lists.values()))):
        ranks_by_line: dict[str, list[int]] = {}
        for rank, lines in lists.items():
            line = lines[index] if index < len(lines) else filler
            ranks_by_line.setdefault(line, []).append(rank)
        if len(ranks_by_line) > 1:
            yield index, "".join(f"\n  {_ranks(r)}: {line}" for line, r in ranks_by_line.items())


def missing_gradients(
    mesh: MeshSpec, fqns: Sequence[str], presence: Mapping[int, tuple[str, ...]]
) -> tuple[frozenset[str], bool, str]:
    """Return parameters without gradient on some ranks, whether others differ, and the message."""
    missing, differ_otherwise, lines = set(), False, []
    for index, fqn in enumerate(fqns):
        states: dict[str, list[int]] = {}
        for rank, present in presence.items():
            if present[index] != NO_ELEMENTS:
                states.setdefault(present[index], []).append(rank)
        if len(states) <= 1:
            continue
        present_states = [s for s in states if s == PRESENT or s.endswith(OF_DTYPE)]
        if MISSING in states and len(states) == 2 and present_states:
            missing.add(fqn)
            lines.append(f"\n  {fqn}: no gradient on {_ranks(states[MISSING])}")
            continue
        differ_otherwise = True
        words = {MISSING: "no gradient", PRESENT: "placed as the parameter"}
        text = "; ".join(f"{words.get(s, s)} on {_ranks(r)}" for s, r in states.items())
        lines.append(f"\n  {fqn}: {text}")
    advice = "Run the same forward and backward on all of them"
    if not differ_otherwise:
        advice += ', or construct Muon with missing_grad="zero" to count a missing one as zero'
    message = f"Gradients differ between ranks of mesh {mesh}:{''.join(lines)}\n{advice}."
    return frozenset(missing), differ_otherwise, message


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"{len(ranks)} ranks ({shown})"
