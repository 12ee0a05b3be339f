"""Layout and synchronization of NorMuon's row second moments: one float32 per matrix row."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate

from muon_dtensor.layout import Layout, Matrix, MeshSpec
from muon_dtensor.planning.plan import ParamSpec, Plan

MOMENT_ITEMSIZE = 4


@dataclass(frozen=True, slots=True)
class Reduction:
    """A sum over `mesh_dims` in which each number comes from one rank and zeros from the others.

    The owner of a matrix tells its moments. `params`: whose, in order; `numel`: the most of them
    that a rank holds.
    """

    mesh: MeshSpec
    mesh_dims: tuple[str, ...]
    params: tuple[int, ...]
    numel: int

    @property
    def sent_nbytes(self) -> int:
        """What a rank sends of it, round a ring."""
        num_ranks = self.mesh.num_ranks_along(self.mesh_dims)
        return 2 * (num_ranks - 1) * MOMENT_ITEMSIZE * self.numel // num_ranks


def moment_shape(matrices: tuple[Matrix, ...]) -> tuple[int, ...]:
    """[matrices, rows], or [rows of all] where matrices differ in rows."""
    rows = [matrix.rows for matrix in matrices]
    return (len(rows), rows[0]) if len(set(rows)) == 1 else (sum(rows),)


def moment_cuts(layout: Layout, matrices: tuple[Matrix, ...]) -> tuple[str, ...]:
    """The mesh dims that can cut the moments as they cut tensor dim 0 of the parameter.

    So they can where every rank then holds the moments of all matrices it has a part of, and of
    no others: whole experts, whole heads. Else none do, and each rank holds all moments.
    """
    dims = layout.cuts[0] if layout.cuts else ()
    if not dims or layout.bounds is not None or not matrices:
        return ()
    cut = _layout(layout.mesh, matrices, dims)
    offsets = _offsets(matrices)
    for index in range(layout.mesh.num_ranks_along(dims)):
        position = layout.mesh.offset_of(index, dims)
        here = layout.region(position)
        low, high = here.start[0], here.stop[0]
        touched = [
            number
            for number, matrix in enumerate(matrices)
            if max(low, matrix.region.start[0]) < min(high, matrix.region.stop[0])
        ]
        rows = {offset for n in touched for offset in range(offsets[n], offsets[n + 1])}
        first, last = _interval(cut, position)
        if rows != set(range(first, last)):
            return ()
    return dims


def moment_layout(spec: ParamSpec) -> Layout:
    """How the moments of a parameter of NorMuon lie on its mesh."""
    assert spec.moment_cuts is not None, f"{spec.fqn} is not stepped by NorMuon"
    return _layout(spec.layout.mesh, spec.matrices, spec.moment_cuts)


def moment_slice(spec: ParamSpec, matrix: int, position: int) -> slice:
    """Where the moments of a matrix are among those this rank holds, taken as one row."""
    first, _ = _interval(moment_layout(spec), position)
    offsets = _offsets(spec.matrices)
    return slice(offsets[matrix] - first, offsets[matrix + 1] - first)


def reductions(plan: Plan) -> tuple[Reduction, ...]:
    """What ranks tell each other of moments after a step, in the order of their parameters."""
    found: dict[tuple[MeshSpec, tuple[str, ...]], list[int]] = defaultdict(list)
    for index, spec in enumerate(plan.params):
        if spec.moment_cuts is not None and spec.matrices:
            mesh = spec.layout.mesh
            dims = tuple(
                n for n in mesh.dim_names if n not in spec.moment_cuts and mesh.sizes[n] > 1
            )
            if dims:
                found[mesh, dims].append(index)
    return tuple(
        Reduction(mesh, dims, tuple(params), sum(_local_numel(plan.params[p]) for p in params))
        for (mesh, dims), params in found.items()
    )


def _layout(mesh: MeshSpec, matrices: tuple[Matrix, ...], dims: tuple[str, ...]) -> Layout:
    shape = moment_shape(matrices)
    return Layout(mesh, shape, (dims, *((),) * (len(shape) - 1)))


def _interval(layout: Layout, position: int) -> tuple[int, int]:
    """The first and last of the moments, taken as one row, that a rank holds."""
    region = layout.region(position)
    width = layout.shape[1] if len(layout.shape) == 2 else 1
    return region.start[0] * width, region.stop[0] * width


def _local_numel(spec: ParamSpec) -> int:
    layout = moment_layout(spec)
    positions = range(spec.layout.mesh.num_ranks) if spec.moment_cuts else (0,)
    return max(layout.region(position).numel for position in positions)


def _offsets(matrices: tuple[Matrix, ...]) -> list[int]:
    return [0, *accumulate(matrix.rows for matrix in matrices)]
