"""Layout and synchronization of NorMuon's row second moments: one float32 per matrix row."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate

from muon_dtensor.layout import Layout, Matrix, MeshSpec
from muon_dtensor.planning.plan import ParamSpec, Plan

MOMENT_ITEMSIZE = 4


@dataclass(frozen=True, slots=True)
class Reduction:
    """An all-reduce over `mesh_dims` that brings second moments from owners to all ranks.

    The owner of a matrix contributes its moments and every other rank contributes zeros. `params`:
    indices of the parameters whose moments are reduced, in order. `numel`: the most moments of
    these parameters that a rank stores.
    """

    mesh: MeshSpec
    mesh_dims: tuple[str, ...]
    params: tuple[int, ...]
    numel: int

    @property
    def sent_nbytes(self) -> int:
        """Bytes that a rank sends in a ring all-reduce."""
        num_ranks = self.mesh.num_ranks_along(self.mesh_dims)
        return 2 * (num_ranks - 1) * MOMENT_ITEMSIZE * self.numel // num_ranks


def moment_shape(matrices: tuple[Matrix, ...]) -> tuple[int, ...]:
    """Return [matrices, rows], or [total rows] if matrices differ in rows."""
    rows = [matrix.rows for matrix in matrices]
    return (len(rows), rows[0]) if len(set(rows)) == 1 else (sum(rows),)


def moment_cuts(layout: Layout, matrices: tuple[Matrix, ...]) -> tuple[str, ...]:
    """Return the mesh dims that cut the moments: those that cut tensor dim 0 of the parameter.

    The result is empty, and every rank stores all moments, unless each rank would store the moments
    of exactly the matrices that it stores a part of. That holds for complete experts or heads.
    """
    dims = layout.cuts[0] if layout.cuts else ()
    if not dims or layout.bounds is not None or not matrices:
        return ()
    cut = _layout(layout.mesh, matrices, dims)
    offsets = _offsets(matrices)
    boxes = [matrix.region.bounding_box for matrix in matrices]
    for index in range(layout.mesh.num_ranks_along(dims)):
        position = layout.mesh.offset_of(index, dims)
        region = layout.region(position)
        low, high = region.start[0], region.stop[0]
        overlapping = [
            number
            for number in range(len(matrices))
            if max(low, boxes[number].start[0]) < min(high, boxes[number].stop[0])
        ]
        rows = {offset for n in overlapping for offset in range(offsets[n], offsets[n + 1])}
        first, last = _interval(cut, position)
        if rows != set(range(first, last)):
            return ()
    return dims


def moment_layout(spec: ParamSpec) -> Layout:
    """Return the layout of the moments of a parameter that NorMuon updates."""
    assert spec.moment_cuts is not None, f"{spec.fqn} is not stepped by NorMuon"
    return _layout(spec.layout.mesh, spec.matrices, spec.moment_cuts)


def moment_slice(spec: ParamSpec, matrix: int, position: int) -> slice:
    """Return the slice of a matrix's moments in the flattened moments that this rank stores."""
    first, _ = _interval(moment_layout(spec), position)
    offsets = _offsets(spec.matrices)
    return slice(offsets[matrix] - first, offsets[matrix + 1] - first)


def reductions(plan: Plan) -> tuple[Reduction, ...]:
    """Return the all-reduces of moments after a step, in the order of their first parameters."""
    params_by_dims: dict[tuple[MeshSpec, tuple[str, ...]], list[int]] = defaultdict(list)
    for index, spec in enumerate(plan.params):
        if spec.moment_cuts is not None and spec.matrices:
            mesh = spec.layout.mesh
            dims = tuple(
                n for n in mesh.dim_names if n not in spec.moment_cuts and mesh.sizes[n] > 1
            )
            if dims:
                params_by_dims[mesh, dims].append(index)
    return tuple(
        Reduction(mesh, dims, tuple(params), sum(_local_numel(plan.params[p]) for p in params))
        for (mesh, dims), params in params_by_dims.items()
    )


def _layout(mesh: MeshSpec, matrices: tuple[Matrix, ...], dims: tuple[str, ...]) -> Layout:
    shape = moment_shape(matrices)
    return Layout(mesh, shape, (dims, *((),) * (len(shape) - 1)))


def _interval(layout: Layout, position: int) -> tuple[int, int]:
    """Return (start, stop) of the flattened moments that a rank stores."""
    region = layout.region(position)
    width = layout.shape[1] if len(layout.shape) == 2 else 1
    return region.start[0] * width, region.stop[0] * width


def _local_numel(spec: ParamSpec) -> int:
    layout = moment_layout(spec)
    positions = range(spec.layout.mesh.num_ranks) if spec.moment_cuts else (0,)
    return max(layout.region(position).numel for position in positions)


def _offsets(matrices: tuple[Matrix, ...]) -> list[int]:
    return [0, *accumulate(matrix.rows for matrix in matrices)]
