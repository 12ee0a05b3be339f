"""Error messages that say which ranks differ, and in what."""

from collections.abc import Iterator, Mapping, Sequence

from muon_dtensor.layout import MeshSpec
from muon_dtensor.runtime.consistency_codec import MISSING, NOTHING_HERE, OF_DTYPE, PRESENT


def first_difference(mesh: MeshSpec, params: Mapping[int, tuple[str, ...]]) -> str:
    """Where the lists of versions and then parameters, by rank, first differ; or that plans do."""
    for index, told in _differing_lines(params, filler="no further parameter"):
        if index == 0:
            return (
                f"Ranks of mesh {mesh} run different versions:{told}\nInstall one on all of them."
            )
        return (
            f"Ranks of mesh {mesh} hold different plans, from parameter {index - 1} on:{told}\n"
            "Build the same model with the same parallelism on all of them, and hand its "
            "parameters to the optimizer in one order."
        )
    return (
        f"Ranks of mesh {mesh} hold the same parameters and different plans: they were given "
        "different plan options (bucket_mb, "
        "prefetch_count, batched, strategy, exact, topology, ns_dtype, ns_steps, assign_fn)."
    )


def other_options(mesh: MeshSpec, options: Mapping[int, tuple[str, ...]]) -> str:
    """Which hyperparameters, as text by rank, differ."""
    told = "".join(told for _, told in _differing_lines(options, filler="nothing further"))
    return (
        f"Ranks of mesh {mesh} hold different hyperparameters:{told}\n"
        "Set the same values on all of them; a scheduler must step on all of them too."
    )


def _differing_lines(
    lists: Mapping[int, tuple[str, ...]], *, filler: str
) -> Iterator[tuple[int, str]]:
    """Index and text of the lines that differ between ranks; `filler` where a list has ended."""
    for index in range(max(map(len, lists.values()))):
        seen: dict[str, list[int]] = {}
        for rank, lines in lists.items():
            seen.setdefault(lines[index] if index < len(lines) else filler, []).append(rank)
        if len(seen) > 1:
            yield index, "".join(f"\n  {_ranks(ranks)}: {line}" for line, ranks in seen.items())


def who_misses(
    mesh: MeshSpec, fqns: Sequence[str], presence: Mapping[int, tuple[str, ...]]
) -> tuple[frozenset[str], bool, str]:
    """Parameters missing on some ranks, whether gradients differ otherwise, and the text."""
    missing, others, lines = set(), False, []
    for index, fqn in enumerate(fqns):
        states: dict[str, list[int]] = {}
        for rank, present in presence.items():
            if present[index] != NOTHING_HERE:
                states.setdefault(present[index], []).append(rank)
        if len(states) <= 1:
            continue
        present_states = [s for s in states if s == PRESENT or s.endswith(OF_DTYPE)]
        if MISSING in states and len(states) == 2 and present_states:
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
    text = f"Gradients differ between ranks of mesh {mesh}:{''.join(lines)}\n{advice}."
    return frozenset(missing), others, text


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"{len(ranks)} ranks ({shown})"
