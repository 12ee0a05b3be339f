"""Declarations of logical matrices in a parameter: einops patterns and splits."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from math import prod

from muon_dtensor.errors import RefusalError
from muon_dtensor.layout import Matrix, Region
from muon_dtensor.layout.matrices import matrices_of
from muon_dtensor.layout.region import region_of

Axes = tuple[str, ...]

UNIT = "1"


@dataclass(frozen=True)
class Declaration:
    """How each parameter of a param group is divided into matrices.

    `pattern`: an einops pattern. The last two axes of its result are rows and columns, those
    before them are batch axes, which may be anywhere in the tensor. With `split_sizes` it is one
    pattern for all blocks, or a tuple with one for each block (None: divide the block as
    `matrices_of` does). `axes`: lengths of axes that the shape does not determine. `split_sizes`:
    sizes of consecutive blocks along `split_dim`: a tensor dim, or the name of an axis of the
    patterns, whose length is their sum; each pattern describes the whole tensor then.
    """

    pattern: str | tuple[str | None, ...] | None = None
    axes: tuple[tuple[str, int], ...] = ()
    split_sizes: tuple[int, ...] | None = None
    split_dim: int | str = 0

    def matrices(self, shape: tuple[int, ...]) -> tuple[Matrix, ...]:
        """Return the matrices of a parameter of this global shape; none if it has no elements.

        Raises RefusalError if the declaration does not fit the shape.
        """
        num_blocks = 1 if self.split_sizes is None else len(self.split_sizes)
        patterns = self.pattern
        if not isinstance(patterns, tuple):
            patterns = (patterns,) * num_blocks
        if len(patterns) != num_blocks:
            raise RefusalError(
                f"matrix has {len(patterns)} patterns for {num_blocks} blocks.",
                "Give one pattern for each of split_sizes, None for a whole block.",
            )
        axes = dict(self.axes)
        matrices: list[Matrix] = []
        if isinstance(self.split_dim, str):
            sizes = self.split_sizes or ()
            axes.setdefault(self.split_dim, sum(sizes))
            for index, pattern in enumerate(patterns):
                block_of_axis = AxisBlock(self.split_dim, sizes, index)
                matrices += pattern_matrices(pattern or "", shape, axes, block_of_axis)
            return tuple(matrices)
        blocks = [Region.of_shape(shape)]
        if self.split_sizes is not None:
            blocks = split(shape, self.split_sizes, self.split_dim)
        for block, pattern in zip(blocks, patterns, strict=True):
            block_matrices = (
                matrices_of(block.shape)
                if pattern is None
                else pattern_matrices(pattern, block.shape, axes)
            )
            matrices += [matrix.moved_by(block.start) for matrix in block_matrices]
        return tuple(matrices)


def split(shape: tuple[int, ...], sizes: Sequence[int], tensor_dim: int) -> list[Region]:
    """Return the blocks of these sizes along one tensor dim.

    Raises RefusalError if there is no such tensor dim or the sizes do not sum to its size.
    """
    if not -len(shape) <= tensor_dim < len(shape):
        raise RefusalError(
            f"split_dim is {tensor_dim}, the parameter has {len(shape)} tensor dims.",
            "Give the index of one of its tensor dims.",
        )
    tensor_dim %= len(shape)
    if sum(sizes) != shape[tensor_dim]:
        raise RefusalError(
            f"split_sizes {tuple(sizes)} sum to {sum(sizes)}, tensor dim {tensor_dim} of "
            f"{list(shape)} has {shape[tensor_dim]}.",
            "Give sizes that sum to the tensor dim.",
        )
    blocks = []
    for first, last in pairwise(accumulate(sizes, initial=0)):
        start, stop = [0] * len(shape), list(shape)
        start[tensor_dim], stop[tensor_dim] = first, last
        blocks.append(Region(tuple(start), tuple(stop)))
    return blocks


@dataclass(frozen=True, slots=True)
class AxisBlock:
    """One of the blocks of these sizes along an axis of a pattern, by index."""

    axis: str
    sizes: tuple[int, ...]
    index: int

    def interval(self, lengths: Mapping[str, int]) -> tuple[int, int]:
        """Return the block's first number on the axis and its size.

        Raises RefusalError if there is no such axis or the sizes do not sum to its length.
        """
        if self.axis not in lengths:
            raise RefusalError(
                f"split_dim is '{self.axis}', which is none of its axes.",
                f"Name one of them: {', '.join(n for n in lengths if not n.startswith(UNIT))}.",
            )
        if sum(self.sizes) != lengths[self.axis]:
            raise RefusalError(
                f"split_sizes {self.sizes} sum to {sum(self.sizes)}, axis {self.axis} has length "
                f"{lengths[self.axis]}.",
                "Give sizes that sum to the length of the axis.",
            )
        return sum(self.sizes[: self.index]), self.sizes[self.index]


def pattern_matrices(
    pattern: str,
    shape: tuple[int, ...],
    axes: Mapping[str, int],
    block: AxisBlock | None = None,
) -> tuple[Matrix, ...]:
    """Return the matrices of a pattern on a tensor of this shape, batch in row-major order.

    `block`: of an axis, to which the matrices are limited. Raises RefusalError if einops rejects
    the pattern.
    """
    try:
        return _pattern_matrices(pattern, shape, axes, block)
    except RefusalError as refusal:
        lengths = ", ".join(f"{name}={size}" for name, size in axes.items()) or "none"
        context = f"Pattern '{pattern}' on {list(shape)}, axis lengths given: {lengths}."
        raise RefusalError(f"{context} {refusal.reason}", refusal.remedy) from refusal


def _pattern_matrices(
    pattern: str, shape: tuple[int, ...], axes: Mapping[str, int], block: AxisBlock | None
) -> tuple[Matrix, ...]:
    left, right = _parse(pattern)
    if len(right) < 2:
        raise RefusalError(
            "Its result has fewer than two axes.", "End it with rows and columns: '... rows cols'."
        )
    names = [{name for composite in side for name in composite} for side in (left, right)]
    if unmatched := sorted(name for name in names[0] ^ names[1] if not name.startswith(UNIT)):
        raise RefusalError(
            f"Axes on one side only: {', '.join(unmatched)}.", "Name every axis on both sides."
        )
    lengths = _solve(left, shape, axes) | {n: 1 for n in names[1] if n.startswith(UNIT)}
    first_of = dict.fromkeys(lengths, 0)
    strides = {
        name: prod(lengths[inner] for inner in composite[position + 1 :])
        for composite in left
        for position, name in enumerate(composite)
    }
    if block is not None:
        first_of[block.axis], lengths[block.axis] = block.interval(lengths)
    if 0 in shape or 0 in lengths.values():
        return ()
    batch = [name for composite in right[:-2] for name in composite]
    rows, cols = (prod(lengths[name] for name in composite) for composite in right[-2:])
    box_axes = [tuple(name for name in composite if name not in batch) for composite in left]
    pattern_of_box, lengths_of_box = _box_pattern(box_axes, right[-2:], lengths)
    matrices = []
    for indices in product(*(range(first_of[n], first_of[n] + lengths[n]) for n in batch)):
        index_of = {**first_of, **dict(zip(batch, indices, strict=True))}
        region = region_of(
            [
                (
                    sum(index_of[name] * strides[name] for name in composite),
                    [(lengths[name], strides[name]) for name in inner],
                )
                for composite, inner in zip(left, box_axes, strict=True)
            ]
        )
        matrices.append(Matrix(region, rows, cols, pattern_of_box, lengths_of_box))
    return tuple(matrices)


def _box_pattern(
    left: Sequence[Axes], right: Sequence[Axes], lengths: Mapping[str, int]
) -> tuple[str, tuple[tuple[str, int], ...]]:
    """Return (einops pattern, axis lengths) that bring a box to [rows, cols].

    Both are empty if a reshape is enough.
    """
    long_axes = [
        [tuple(name for name in composite if lengths[name] > 1) for composite in side]
        for side in (left, right)
    ]
    before, after = ([name for composite in side for name in composite] for side in long_axes)
    if before == after:
        return "", ()
    # Rename the axes: equal matrices must be equal values, and einops rejects some of the names
    # that users may choose.
    renamed = {name: f"a{number}" for number, name in enumerate(before)}
    sides = (" ".join(f"({' '.join(renamed[n] for n in c)})" for c in side) for side in long_axes)
    return " -> ".join(sides), tuple((renamed[name], lengths[name]) for name in before)


def _parse(pattern: str) -> tuple[list[Axes], list[Axes]]:
    """Return both sides of a pattern as composites of axis names; each `1` gets a unique name."""
    sides = pattern.split("->")
    if len(sides) != 2:
        raise RefusalError(
            "It does not have exactly one '->'.", "Write 'stored axes -> batch rows cols'."
        )
    parsed: list[list[Axes]] = []
    num_units = 0
    for side in sides:
        if not re.fullmatch(r"\s*((\w+|\([\w\s]*\))\s*)*", side, re.ASCII):
            raise RefusalError(
                f"'{side.strip()}' is not a list of axes and parenthesized groups of axes.",
                "Use names, '1' and '(outer inner)'; '...' is not supported.",
            )
        composites: list[Axes] = []
        for group, single in re.findall(r"\(([^)]*)\)|(\w+)", side):
            names: list[str] = []
            for name in [single] if single else group.split():
                if name == UNIT:
                    num_units += 1
                elif not name.isidentifier() or name.startswith("_") or name.endswith("_"):
                    raise RefusalError(f"'{name}' is not an axis name.", "Use names and '1'.")
                names.append(f"{UNIT}_{num_units}" if name == UNIT else name)
            composites.append(tuple(names))
        flat = [name for composite in composites for name in composite]
        if len(set(flat)) != len(flat):
            raise RefusalError(f"An axis occurs twice in '{side.strip()}'.", "Name each axis once.")
        parsed.append(composites)
    return parsed[0], parsed[1]


def _solve(left: Sequence[Axes], shape: tuple[int, ...], axes: Mapping[str, int]) -> dict[str, int]:
    """Return the length of every axis, from the shape and the declared lengths `axes`.

    Raises RefusalError if they contradict each other or do not determine a length.
    """
    if len(left) != len(shape):
        raise RefusalError(
            f"It names {len(left)} stored axes, the tensor has {len(shape)} dims.",
            "Name every tensor dim on the left.",
        )
    lengths = {name: 1 for composite in left for name in composite if name.startswith(UNIT)}
    for composite, size in zip(left, shape, strict=True):
        factors = {name: lengths.get(name, axes.get(name)) for name in composite}
        unknown = [name for name, length in factors.items() if length is None]
        product_of_known = prod(length for length in factors.values() if length is not None)
        if len(unknown) > 1:
            raise RefusalError(
                f"The lengths of {', '.join(unknown)} in ({' '.join(composite)}) are unknown.",
                "Give all but one of them in matrix_axes.",
            )
        if unknown and product_of_known and size % product_of_known == 0:
            factors[unknown[0]] = size // product_of_known
        elif unknown or product_of_known != size:
            product_text = " x ".join(str(length or name) for name, length in factors.items())
            raise RefusalError(
                f"({' '.join(composite)}) is {product_text}, the tensor dim is {size}.",
                "Give lengths in matrix_axes that divide the tensor dim.",
            )
        lengths.update({name: length for name, length in factors.items() if length is not None})
    return lengths
