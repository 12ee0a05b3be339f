"""The layout of a tensor from the shapes of all ranks' shards.

For plain tensors under process groups and slices of flat parameters, which carry no placements.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod

from muon_dtensor.errors import RefusalError
from muon_dtensor.layout import Layout, MeshSpec


def layout_from_shards(
    mesh: MeshSpec, cuts: Sequence[tuple[str, ...]], shapes: Mapping[int, tuple[int, ...]]
) -> Layout:
    """Return the layout of a tensor whose shards have these shapes; sizes may be uneven or zero.

    Args:
        mesh: the mesh of the shards.
        cuts: per tensor dim the mesh dims that cut it, outermost first.
        shapes: the shape of the shard at each position of the mesh.

    Raises:
        RefusalError: no tensor cut in this way has shards of these shapes.
    """
    if any(len(shape) != len(cuts) for shape in shapes.values()):
        counts = sorted({len(shape) for shape in shapes.values()})
        raise RefusalError(
            f"Ranks hold shards of {' and '.join(map(str, counts))} tensor dims.",
            "Pass the same parameter on every rank.",
        )
    bounds = tuple(
        tuple(accumulate(_sizes_along(mesh, tensor_dim, dims, shapes), initial=0))
        for tensor_dim, dims in enumerate(cuts)
    )
    return Layout(mesh, tuple(ends[-1] for ends in bounds), tuple(cuts), bounds)


def _sizes_along(
    mesh: MeshSpec, tensor_dim: int, dims: tuple[str, ...], shapes: Mapping[int, tuple[int, ...]]
) -> list[int]:
    """Return the sizes of the pieces of one tensor dim, in order."""
    first_position: dict[int, int] = {}
    for position in sorted(shapes):
        other = first_position.setdefault(mesh.index_along(position, dims), position)
        if shapes[other][tensor_dim] != shapes[position][tensor_dim]:
            expected = f"is cut over {' and '.join(dims)} only" if dims else "is not cut"
            raise RefusalError(
                f"Rank {mesh.ranks[other]} holds a shard {list(shapes[other])} and rank "
                f"{mesh.ranks[position]} one of {list(shapes[position])}, though tensor dim "
                f"{tensor_dim} {expected}.",
                "Pass the tensor dim that each process group cuts: fsdp_shard_dim, tp_shard_dim.",
            )
    return [shapes[first_position[i]][tensor_dim] for i in range(len(first_position))]


def flat_layout_from_shards(
    mesh: MeshSpec,
    mesh_dim: str,
    shape: tuple[int, ...],
    slices: Mapping[int, tuple[int | None, int]],
) -> Layout:
    """Return the layout of a tensor of `shape` stored flat and cut into slices along `mesh_dim`.

    Args:
        mesh: the mesh of the slices.
        mesh_dim: the mesh dim that cuts; all others replicate.
        shape: shape of the full tensor.
        slices: (start, numel) of the slice at each position; start is None for an empty slice.

    Raises:
        RefusalError: the slices are not consecutive or do not cover the tensor.
    """
    shapes = {position: (numel,) for position, (_, numel) in slices.items()}
    layout = layout_from_shards(mesh, [(mesh_dim,)], shapes)
    for position, (start, numel) in slices.items():
        (expected,) = layout.region(position).start
        if numel and start != expected:
            raise RefusalError(
                f"Rank {mesh.ranks[position]} holds a slice that starts at element {start}; in the "
                f"order of {mesh_dim} it would start at {expected}.",
                "Pass each process group that the model was wrapped with as the matching argument.",
            )
    if layout.shape != (prod(shape),):
        raise RefusalError(
            f"The slices over {mesh_dim} have {layout.shape[0]} elements, its shape {list(shape)} "
            f"has {prod(shape)}.",
            "Pass the process groups that the model was wrapped with.",
        )
    return layout
