"""Layouts: which mesh dims cut which tensor dim, in which order."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import prod

from muon_dtensor.layout.mesh import MeshSpec
from muon_dtensor.layout.region import Region


@dataclass(frozen=True)
class Layout:
    """A tensor's global shape and, per tensor dim, the mesh dims that cut it, outermost first.

    Without `bounds` every cut follows torch.chunk: n rows over k ranks are pieces of ceil(n / k)
    rows, the last non-empty one may be shorter, and those after it are empty. `bounds` describe
    other cuts: per tensor dim the ends of its pieces in the order of `cuts`, beginning with 0.
    Bounds equal to torch.chunk's become None. Mesh dims that cut no tensor dim replicate the
    tensor.
    """

    mesh: MeshSpec
    shape: tuple[int, ...]
    cuts: tuple[tuple[str, ...], ...]
    bounds: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if any(type(size) is not int or size < 0 for size in self.shape):
            raise ValueError(f"tensor dims must be integers of at least 0, got {self.shape}")
        if len(self.cuts) != len(self.shape):
            raise ValueError(f"{len(self.cuts)} cuts for {len(self.shape)} tensor dims")
        used = [name for dims in self.cuts for name in dims]
        if len(set(used)) != len(used):
            raise ValueError(f"a mesh dim cuts a tensor at most once, got {self.cuts}")
        if unknown := set(used) - set(self.mesh.dim_names):
            raise ValueError(f"unknown mesh dims {sorted(unknown)} on mesh {self.mesh}")
        if self.bounds is not None:
            self._check_bounds(self.bounds)
            if self.bounds == self._chunk_bounds:
                object.__setattr__(self, "bounds", None)

    @cached_property
    def over_replicas(self) -> "Layout":
        """This layout with each shard cut further over the replica dims, into disjoint shards.

        All replica dims cut one tensor dim: the one that leaves the smallest largest shard, of
        these one that they divide with the dims that cut it already, of these the first. It is this
        layout if nothing is replicated, or if `bounds` are given, which the replicas cannot share.
        """
        if not self.replica_dims or self.bounds is not None or not self.shape:
            return self

        def cut(tensor_dim: int) -> Layout:
            cuts = list(self.cuts)
            cuts[tensor_dim] = (*cuts[tensor_dim], *self.replica_dims)
            return replace(self, cuts=tuple(cuts))

        def order(tensor_dim: int) -> tuple[int, bool]:
            layout = cut(tensor_dim)
            sizes = [max(b - a for a, b in pairwise(bounds)) for bounds in layout._bounds]
            dims = layout.cuts[tensor_dim]
            count = self.mesh.num_ranks_along(dims)
            return prod(sizes), len(dims) > 1 and self.shape[tensor_dim] % count > 0

        return cut(min(range(len(self.shape)), key=order))

    def _check_bounds(self, bounds: tuple[tuple[int, ...], ...]) -> None:
        if len(bounds) != len(self.shape):
            raise ValueError(f"{len(bounds)} bounds for {len(self.shape)} tensor dims")
        for size, dims, ends in zip(self.shape, self.cuts, bounds, strict=True):
            if (
                any(type(end) is not int for end in ends)
                or len(ends) != self.mesh.num_ranks_along(dims) + 1
                or (ends[0], ends[-1]) != (0, size)
                or any(first > last for first, last in pairwise(ends))
            ):
                raise ValueError(f"bounds {ends} do not cut {size} over {dims} of {self.mesh}")

    @cached_property
    def cut_dims(self) -> tuple[str, ...]:
        """Mesh dims of more than one rank that cut some tensor dim, in mesh order."""
        used = {name for dims in self.cuts for name in dims}
        return tuple(n for n in self.mesh.dim_names if n in used and self.mesh.sizes[n] > 1)

    @cached_property
    def replica_dims(self) -> tuple[str, ...]:
        """Mesh dims along which every rank holds the same shard, in mesh order."""
        cut = self.cut_dims
        return tuple(n for n in self.mesh.dim_names if n not in cut and self.mesh.sizes[n] > 1)

    @cached_property
    def _bounds(self) -> tuple[tuple[int, ...], ...]:
        """Per tensor dim the ends of its consecutive pieces, beginning with 0."""
        return self._chunk_bounds if self.bounds is None else self.bounds

    @property
    def _chunk_bounds(self) -> tuple[tuple[int, ...], ...]:
        return tuple(
            _chunk_bounds(num_rows, tuple(self.mesh.sizes[name] for name in mesh_dims))
            for num_rows, mesh_dims in zip(self.shape, self.cuts, strict=True)
        )

    def region(self, position: int) -> Region:
        """Return the box of the global tensor that the rank at this position stores."""
        start, stop = [], []
        for dims, bounds in zip(self.cuts, self._bounds, strict=True):
            index = self.mesh.index_along(position, dims)
            start.append(bounds[index])
            stop.append(bounds[index + 1])
        return Region(tuple(start), tuple(stop))

    @cached_property
    def _holders(self) -> dict[Region, dict[int, Region]]:
        return {}

    def holders(self, region: Region) -> dict[int, Region]:
        """Return {home: the part of the region that it stores}, homes ascending.

        A home is a position with coordinate 0 along the replica dims. Empty parts are omitted.
        Equal regions return the same dict object, so its id is a key for equal holders.
        """
        holders = self._holders.get(region)
        if holders is None:
            holders = self._holders[region] = self._find_holders(region)
        return holders

    @cached_property
    def _holder_numels(self) -> dict[int, tuple[tuple[int, int], ...]]:
        return {}

    def holder_numels(self, region: Region) -> tuple[tuple[int, int], ...]:
        """Return (home, elements of its part) for each of `holders`, homes ascending."""
        holders = self.holders(region)
        numels = self._holder_numels.get(id(holders))
        if numels is None:
            numels = tuple((home, part.numel) for home, part in holders.items())
            self._holder_numels[id(holders)] = numels
        return numels

    @cached_property
    def _largest_parts(self) -> dict[Region, int]:
        return {}

    def largest_part(self, region: Region) -> int:
        """Return the number of elements of the largest part of a region that any rank stores."""
        if region not in self._largest_parts:
            numels = self.holder_numels(region)
            self._largest_parts[region] = max(numel for _, numel in numels)
        return self._largest_parts[region]

    def _find_holders(self, region: Region) -> dict[int, Region]:
        parts: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = [(0, (), ())]
        for tensor_dim, (dims, bounds) in enumerate(zip(self.cuts, self._bounds, strict=True)):
            low, high = region.start[tensor_dim], region.stop[tensor_dim]
            indices = region.index_sets[tensor_dim] if region.index_sets else None
            if indices is not None:
                bounds = tuple(map(indices.count_below, bounds))
            overlaps = [
                (self.mesh.offset_of(index, dims), max(low, first), min(high, last))
                for index, (first, last) in enumerate(pairwise(bounds))
                if max(low, first) < min(high, last)
            ]
            parts = [
                (home + offset, (*start, first), (*stop, last))
                for home, start, stop in parts
                for offset, first, last in overlaps
            ]
        sets = region.index_sets
        return {home: Region(start, stop, sets) for home, start, stop in sorted(parts)}

    def home(self, position: int) -> int:
        """Return the position in the first replica that stores the same shard as this one."""
        return position - self.replica_offset(position)

    def replica_offset(self, position: int) -> int:
        """Return the position minus its home; it identifies the replica."""
        index = self.mesh.index_along(position, self.replica_dims)
        return self.mesh.offset_of(index, self.replica_dims)

    @cached_property
    def replica_offsets(self) -> tuple[int, ...]:
        """The offsets of all replicas; the first is 0."""
        dims = self.replica_dims
        return tuple(self.mesh.offset_of(i, dims) for i in range(self.mesh.num_ranks_along(dims)))


def _chunk_bounds(num_rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the ends of the pieces that torch.chunk makes of these rows, one size at a time."""
    bounds = [0, num_rows]
    for size in sizes:
        cut = [0]
        for first, last in pairwise(bounds):
            step = -(-(last - first) // size)
            cut += [min(first + step * (index + 1), last) for index in range(size)]
        bounds = cut
    return tuple(bounds)
