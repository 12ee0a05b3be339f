"""Declarations of logical matrices in a parameter: einops patterns and splits."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from math import prod

from muon_dtensor.errors import RefusalError
from muon_dtensor.layout import Matrix, Region
from muon_dtensor.layout.matrices import matrices_of

Axes = tuple[str, ...]

UNIT = "1"


@dataclass(frozen=True)
class Declaration:
    """What a param group says of the matrices in each of its parameters.

    `pattern`: an einops pattern whose last two result axes are rows and columns, all before them
    batch; with `split_sizes` one pattern for all blocks or one each, None for a whole block.
    `axes`: lengths of axes that the shape does not tell. `split_sizes`: unequal blocks of tensor
    dim `split_dim`, one after the other.
    """

    pattern: str | tuple[str | None, ...] | None = None
    axes: tuple[tuple[str, int], ...] = ()
    split_sizes: tuple[int, ...] | None = None
    split_dim: int = 0

    def matrices(self, shape: tuple[int, ...]) -> tuple[Matrix, ...]:
        """The matrices of a parameter of this global shape; none where it has no elements.

        Raises RefusalError for a declaration that does not fit the shape.
        """
        blocks = [Region.whole(shape)]
        if self.split_sizes is not None:
            blocks = split(shape, self.split_sizes, self.split_dim)
        patterns = self.pattern
        if not isinstance(patterns, tuple):
            patterns = (patterns,) * len(blocks)
        if len(patterns) != len(blocks):
            raise RefusalError(
                f"matrix has {len(patterns)} patterns for {len(blocks)} blocks.",
                "Give one pattern for each of split_sizes, None for a whole block.",
            )
        found: list[Matrix] = []
        for block, pattern in zip(blocks, patterns, strict=True):
            inside = (
                matrices_of(block.shape)
                if pattern is None
                else pattern_matrices(pattern, block.shape, dict(self.axes))
            )
            found += [matrix.moved_by(block.start) for matrix in inside]
        return tuple(found)


def split(shape: tuple[int, ...], sizes: Sequence[int], tensor_dim: int) -> list[Region]:
    """The blocks of these sizes along one tensor dim. Raises RefusalError."""
    if not -len(shape) <= tensor_dim < len(shape):
        raise RefusalError(
            f"split_dim is {tensor_dim}, the parameter has {len(shape)} tensor dims.",
            "Give a tensor dim that it has.",
        )
    tensor_dim %= len(shape)
    if sum(sizes) != shape[tensor_dim]:
        raise RefusalError(
            f"split_sizes {tuple(sizes)} sum to {sum(sizes)}, tensor dim {tensor_dim} of "
            f"{list(shape)} has {shape[tensor_dim]}.",
            "Give sizes that sum to it.",
        )
    blocks = []
    for first, last in pairwise(accumulate(sizes, initial=0)):
        start, stop = [0] * len(shape), list(shape)
        start[tensor_dim], stop[tensor_dim] = first, last
        blocks.append(Region(tuple(start), tuple(stop)))
    return blocks


def pattern_matrices(
    pattern: str, shape: tuple[int, ...], axes: Mapping[str, int]
) -> tuple[Matrix, ...]:
    """The matrices of a pattern on a tensor of this shape, batch axes in row-major order.

    Raises RefusalError for a pattern that einops would not take, or whose matrices are no boxes.
    """
    try:
        return _pattern_matrices(pattern, shape, axes)
    except RefusalError as refusal:
        lengths = ", ".join(f"{name}={size}" for name, size in axes.items()) or "none"
        seen = f"Pattern '{pattern}' on {list(shape)}, axis lengths given: {lengths}."
        raise RefusalError(f"{seen} {refusal.reason}", refusal.remedy) from refusal


def _pattern_matrices(
    pattern: str, shape: tuple[int, ...], axes: Mapping[str, int]
) -> tuple[Matrix, ...]:
    left, right = _parse(pattern)
    if len(right) < 2:
        raise RefusalError(
            "Its result has fewer than two axes.", "End it with rows and columns: '... rows cols'."
        )
    names = [{name for composite in side for name in composite} for side in (left, right)]
    if alone := sorted(name for name in names[0] ^ names[1] if not name.startswith(UNIT)):
        raise RefusalError(
            f"{', '.join(alone)} stands on one side only.", "Name every axis on both sides."
        )
    lengths = _solve(left, shape, axes) | {n: 1 for n in names[1] if n.startswith(UNIT)}
    if 0 in shape:
        return ()
    batch = [name for composite in right[:-2] for name in composite]
    rows, cols = (prod(lengths[name] for name in composite) for composite in right[-2:])
    kept = [tuple(name for name in composite if name not in batch) for composite in left]
    for composite, inner in zip(left, kept, strict=True):
        long = [name for name in composite if lengths[name] > 1]
        if long[len(long) - sum(lengths[n] > 1 for n in inner) :] != [
            name for name in inner if lengths[name] > 1
        ]:
            raise RefusalError(
                f"In ({' '.join(composite)}) the batch axes are not the outer ones, so a matrix "
                "is no box of the tensor.",
                "Store the tensor with batch axes (heads, experts) outermost.",
            )
    own_pattern, own_axes = _own_pattern(kept, right[-2:], lengths)
    matrices = []
    for indices in product(*(range(lengths[name]) for name in batch)):
        at = dict(zip(batch, indices, strict=True))
        start, stop = [], []
        for composite, inner in zip(left, kept, strict=True):
            size, index = prod(lengths[name] for name in inner), 0
            for name in composite:
                if name in at:
                    index = index * lengths[name] + at[name]
            start.append(index * size)
            stop.append((index + 1) * size)
        region = Region(tuple(start), tuple(stop))
        matrices.append(Matrix(region, rows, cols, own_pattern, own_axes))
    return tuple(matrices)


def _own_pattern(
    left: Sequence[Axes], right: Sequence[Axes], lengths: Mapping[str, int]
) -> tuple[str, tuple[tuple[str, int], ...]]:
    """How one box becomes [rows, cols], for einops; empty where that is a plain reshape."""
    long = [
        [tuple(name for name in composite if lengths[name] > 1) for composite in side]
        for side in (left, right)
    ]
    before, after = ([name for composite in side for name in composite] for side in long)
    if before == after:
        return "", ()
    # names of our own: equal matrices are equal values, and einops forbids some that users may take
    short = {name: f"a{number}" for number, name in enumerate(before)}
    sides = (" ".join(f"({' '.join(short[n] for n in c)})" for c in side) for side in long)
    return " -> ".join(sides), tuple((short[name], lengths[name]) for name in before)


def _parse(pattern: str) -> tuple[list[Axes], list[Axes]]:
    """Both sides of a pattern as composites of axis names; each `1` gets a name of its own."""
    sides = pattern.split("->")
    if len(sides) != 2:
        raise RefusalError("It has no '->' or several.", "Write 'stored axes -> batch rows cols'.")
    parsed: list[list[Axes]] = []
    num_units = 0
    for side in sides:
        if not re.fullmatch(r"\s*((\w+|\([\w\s]*\))\s*)*", side, re.ASCII):
            raise RefusalError(
                f"'{side.strip()}' is no list of axes, alone or in parentheses.",
                "Use names, '1' and '(outer inner)'; '...' is not known here.",
            )
        composites: list[Axes] = []
        for group, single in re.findall(r"\(([^)]*)\)|(\w+)", side):
            names: list[str] = []
            for name in [single] if single else group.split():
                if name == UNIT:
                    num_units += 1
                elif not name.isidentifier() or name.startswith("_") or name.endswith("_"):
                    raise RefusalError(f"'{name}' is no axis name.", "Use names and '1'.")
                names.append(f"{UNIT}_{num_units}" if name == UNIT else name)
            composites.append(tuple(names))
        flat = [name for composite in composites for name in composite]
        if len(set(flat)) != len(flat):
            raise RefusalError(f"An axis stands twice in '{side.strip()}'.", "Name each axis once.")
        parsed.append(composites)
    return parsed[0], parsed[1]


def _solve(left: Sequence[Axes], shape: tuple[int, ...], axes: Mapping[str, int]) -> dict[str, int]:
    """The length of every axis, from the shape and the lengths given."""
    if len(left) != len(shape):
        raise RefusalError(
            f"It names {len(left)} stored axes, the tensor has {len(shape)} dims.",
            "Name every tensor dim on the left.",
        )
    lengths = {name: 1 for composite in left for name in composite if name.startswith(UNIT)}
    for composite, size in zip(left, shape, strict=True):
        known = {name: lengths.get(name, axes.get(name)) for name in composite}
        open_axes = [name for name, length in known.items() if length is None]
        product_of_known = prod(length for length in known.values() if length is not None)
        if len(open_axes) > 1:
            raise RefusalError(
                f"The lengths of {', '.join(open_axes)} in ({' '.join(composite)}) are unknown.",
                "Give all but one of them in matrix_axes.",
            )
        if open_axes and product_of_known and size % product_of_known == 0:
            known[open_axes[0]] = size // product_of_known
        elif open_axes or product_of_known != size:
            told = " x ".join(str(length or name) for name, length in known.items())
            raise RefusalError(
                f"({' '.join(composite)}) is {told}, the tensor dim is {size}.",
                "Give lengths in matrix_axes that divide it.",
            )
        lengths.update({name: length for name, length in known.items() if length is not None})
    return lengths
