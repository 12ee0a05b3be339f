"""The layout of a tensor from the shapes of all ranks' shards.

For plain tensors under process groups and slices of flat parameters, whose shards do not describe
themselves.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod

from muon_dtensor.errors import RefusalError
from muon_dtensor.layout import Layout, MeshSpec


def layout_from_shards(
    mesh: MeshSpec, cuts: Sequence[tuple[str, ...]], shapes: Mapping[int, tuple[int, ...]]
) -> Layout:
    """The layout of a tensor whose shards have these shapes; sizes may be uneven or zero.

    Args:
        mesh: where the shards lie.
        cuts: per tensor dim the mesh dims that cut it, outermost first.
        shapes: of the shard at each position of the mesh.

    Raises:
        RefusalError: the shards do not make one tensor when they are put together so.
    """
    if any(len(shape) != len(cuts) for shape in shapes.values()):
        seen = sorted({len(shape) for shape in shapes.values()})
        raise RefusalError(
            f"Ranks hold shards of {' and '.join(map(str, seen))} tensor dims.",
            "Hand over the same parameter on every rank.",
        )
    bounds = tuple(
        tuple(accumulate(_sizes_along(mesh, tensor_dim, dims, shapes), initial=0))
        for tensor_dim, dims in enumerate(cuts)
    )
    return Layout(mesh, tuple(ends[-1] for ends in bounds), tuple(cuts), bounds)


def _sizes_along(
    mesh: MeshSpec, tensor_dim: int, dims: tuple[str, ...], shapes: Mapping[int, tuple[int, ...]]
) -> list[int]:
    """Sizes of the pieces of one tensor dim, in order."""
    first: dict[int, int] = {}
    for position in sorted(shapes):
        other = first.setdefault(mesh.index_along(position, dims), position)
        if shapes[other][tensor_dim] != shapes[position][tensor_dim]:
            where = f"is cut over {' and '.join(dims)} alone" if dims else "is not cut"
            raise RefusalError(
                f"Rank {mesh.ranks[other]} holds a shard {list(shapes[other])} and rank "
                f"{mesh.ranks[position]} one of {list(shapes[position])}, though tensor dim "
                f"{tensor_dim} {where}.",
                "Say which tensor dim each process group cuts: fsdp_shard_dim, tp_shard_dim.",
            )
    return [shapes[first[index]][tensor_dim] for index in range(len(first))]


def flat_layout_from_shards(
    mesh: MeshSpec,
    mesh_dim: str,
    shape: tuple[int, ...],
    slices: Mapping[int, tuple[int | None, int]],
) -> Layout:
    """The layout of a tensor of `shape` stored flat, cut in slices along `mesh_dim`.

    Args:
        mesh: where the slices lie.
        mesh_dim: the mesh dim that cuts; all others replicate.
        shape: of the whole tensor.
        slices: where the slice at each position begins (None for an empty one), and its numel.

    Raises:
        RefusalError: the slices are not one after the other all of the tensor.
    """
    shapes = {position: (numel,) for position, (_, numel) in slices.items()}
    layout = layout_from_shards(mesh, [(mesh_dim,)], shapes)
    for position, (start, numel) in slices.items():
        (expected,) = layout.region(position).start
        if numel and start != expected:
            raise RefusalError(
                f"Rank {mesh.ranks[position]} holds its elements from {start} on; sliced over "
                f"{mesh_dim} they would begin at {expected}.",
                "Give the process groups that the model was wrapped with, each in its own place.",
            )
    if layout.shape != (prod(shape),):
        raise RefusalError(
            f"The slices over {mesh_dim} have {layout.shape[0]} elements, its shape {list(shape)} "
            f"has {prod(shape)}.",
            "Give the process groups that the model was wrapped with.",
        )
    return layout
