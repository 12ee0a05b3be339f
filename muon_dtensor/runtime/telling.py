"""Who differs from whom, in words: what every rank raises once a ballot shows a difference.

Takes what was gathered from all ranks. Sends nothing.
"""

from collections.abc import Mapping, Sequence

from muon_dtensor.layout import MeshSpec
from muon_dtensor.runtime.ballots import MISSING, NOTHING_HERE, PRESENT


def first_difference(mesh: MeshSpec, params: Mapping[int, tuple[str, ...]]) -> str:
    """Where the lists of parameters, by rank, first differ; or that the plans do."""
    for index in range(max(map(len, params.values()))):
        seen: dict[str, list[int]] = {}
        for rank, lines in params.items():
            line = lines[index] if index < len(lines) else "no further parameter"
            seen.setdefault(line, []).append(rank)
        if len(seen) > 1:
            told = "".join(f"\n  {_ranks(ranks)}: {line}" for line, ranks in seen.items())
            return (
                f"Ranks of mesh {mesh} hold different plans, from parameter {index} on:{told}\n"
                "Build the same model with the same parallelism on all of them, and hand its "
                "parameters to the optimizer in one order."
            )
    return (
        f"Ranks of mesh {mesh} hold the same parameters and different plans: they run different "
        "versions of muon_dtensor, or were given different plan options (bucket_mb, "
        "prefetch_count, batched, ns_dtype, ns_steps, assign_fn)."
    )


def other_options(mesh: MeshSpec, options: Mapping[int, tuple[str, ...]]) -> str:
    """Which hyperparameters, as text by rank, differ."""
    told = []
    for index in range(max(map(len, options.values()))):
        seen: dict[str, list[int]] = {}
        for rank, lines in options.items():
            line = lines[index] if index < len(lines) else "nothing further"
            seen.setdefault(line, []).append(rank)
        if len(seen) > 1:
            told += [f"\n  {_ranks(r)}: {line}" for line, r in seen.items()]
    return (
        f"Ranks of mesh {mesh} hold different hyperparameters:{''.join(told)}\n"
        "Set the same values on all of them; a scheduler must step on all of them too."
    )


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
    text = f"Gradients differ between ranks of mesh {mesh}:{''.join(lines)}\n{advice}."
    return frozenset(missing), others, text


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"{len(ranks)} ranks ({shown})"
