"""Where the elements of a parameter live: meshes, cuts and the boxes they make.

Integers and names only. Does not know torch, and does not know what a matrix is.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, permutations
from math import prod
from operator import sub


@dataclass(frozen=True, slots=True)
class Region:
    """A box in some tensor's coordinates: per tensor dim a half-open interval."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.start) == len(self.stop), (self.start, self.stop)
        assert all(0 <= a <= b for a, b in zip(self.start, self.stop, strict=True)), self

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Region":
        """The region that covers a tensor of this shape."""
        return cls((0,) * len(shape), shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(sub, self.stop, self.start))

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def intersect(self, other: "Region") -> "Region":
        """The common box; where there is none, a box of zero elements."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(max, start, map(min, self.stop, other.stop)))
        return Region(start, stop)

    def relative_to(self, origin: "Region") -> "Region":
        """The same box in the coordinates of a tensor that begins where `origin` begins."""
        return Region(
            tuple(a - o for a, o in zip(self.start, origin.start, strict=True)),
            tuple(b - o for b, o in zip(self.stop, origin.start, strict=True)),
        )

    def offset_in(self, shape: tuple[int, ...]) -> int:
        """Row-major index of this box's first element in a tensor of this shape."""
        index = 0
        for start, size in zip(self.start, shape, strict=True):
            index = index * size + start
        return index

    def covers(self, other: "Region") -> bool:
        """Whether every element of `other` lies in this box."""
        return other.numel == 0 or self.intersect(other) == other


@dataclass(frozen=True, slots=True)
class Matrix:
    """A box of a parameter that is orthogonalized on its own, as `rows` x `cols`.

    The box has as many elements as the matrix, and need not have its shape: a convolution's is
    folded, a parameter stored flat holds each matrix as an interval. Without a `pattern` the
    elements are in the same row-major order; else einops brings the box to [rows, cols] by it,
    with these `axes`.
    """

    region: Region
    rows: int
    cols: int
    pattern: str = ""
    axes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.rows * self.cols != self.region.numel:
            raise ValueError(f"{self.rows} x {self.cols} elements do not fill {self.region}")

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    def moved_by(self, offset: tuple[int, ...]) -> "Matrix":
        """The same matrix of a tensor in which this one's tensor begins at `offset`."""
        start, stop = (
            tuple(a + o for a, o in zip(ends, offset, strict=True))
            for ends in (self.region.start, self.region.stop)
        )
        return replace(self, region=Region(start, stop))


@dataclass(frozen=True)
class MeshSpec:
    """A device mesh as values: named dims, their sizes, and the global rank of each position.

    A position is the row-major index of a coordinate. A mesh without dims is one rank by itself;
    parameters that no mesh holds (plain tensors) live there.
    """

    dim_names: tuple[str, ...]
    shape: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(set(self.dim_names)) != len(self.dim_names):
            raise ValueError(f"mesh dim names must differ, got {self.dim_names}")
        if len(self.dim_names) != len(self.shape):
            raise ValueError(f"{len(self.dim_names)} mesh dim names for shape {self.shape}")
        if any(size < 1 for size in self.shape):
            raise ValueError(f"mesh dims must have at least one rank, got {self.shape}")
        if len(self.ranks) != prod(self.shape):
            raise ValueError(f"mesh {self.shape} needs {prod(self.shape)} ranks")
        if len(set(self.ranks)) != len(self.ranks):
            raise ValueError("a mesh holds every rank at most once")
        if any(type(rank) is not int or rank < 0 for rank in self.ranks):
            raise ValueError("ranks are integers from 0 on")

    @classmethod
    def of(cls, /, **sizes: int) -> "MeshSpec":
        """The mesh of these named sizes over ranks 0, 1, 2, ... in row-major order.

        >>> MeshSpec.of(dp=2, tp=4).num_ranks
        8
        """
        return cls(tuple(sizes), tuple(sizes.values()), tuple(range(prod(sizes.values()))))

    def __hash__(self) -> int:
        # cheaper than thousands of ranks, and meshes of one plan rarely differ in ranks alone
        return hash((self.dim_names, self.shape, self.ranks[0]))

    @cached_property
    def num_ranks(self) -> int:
        return len(self.ranks)

    @cached_property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.dim_names, self.shape, strict=True))

    @cached_property
    def strides(self) -> dict[str, int]:
        """Per mesh dim, how far apart in position two neighbours along it are."""
        return {name: prod(self.shape[index + 1 :]) for index, name in enumerate(self.dim_names)}

    @cached_property
    def rank_set(self) -> frozenset[int]:
        return frozenset(self.ranks)

    def holds(self, rank: int) -> bool:
        """Whether this global rank is on the mesh; a mesh without dims is every rank's own."""
        return not self.dim_names or rank in self.rank_set

    def position_of(self, rank: int) -> int:
        """The position of a global rank that the mesh holds."""
        return self._positions[rank] if self.dim_names else 0

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {rank: position for position, rank in enumerate(self.ranks)}

    def index_along(self, position: int, mesh_dims: tuple[str, ...]) -> int:
        """Row-major index of a position among the coordinates of some mesh dims."""
        index = 0
        for name in mesh_dims:
            size = self.sizes[name]
            index = index * size + position // self.strides[name] % size
        return index

    def offset_of(self, index: int, mesh_dims: tuple[str, ...]) -> int:
        """Inverse of `index_along`: the position of this index, with 0 on all other mesh dims."""
        offset = 0
        for name in reversed(mesh_dims):
            index, coordinate = divmod(index, self.sizes[name])
            offset += coordinate * self.strides[name]
        return offset

    def moved(self, position: int, mesh_dims: tuple[str, ...], to: int) -> int:
        """The position that is where `to` is along some mesh dims, else where `position` is."""
        here, there = (self.index_along(p, mesh_dims) for p in (position, to))
        return position + self.offset_of(there, mesh_dims) - self.offset_of(here, mesh_dims)

    def num_ranks_along(self, mesh_dims: tuple[str, ...]) -> int:
        """How many ranks lie along these mesh dims."""
        return prod(self.sizes[name] for name in mesh_dims)

    def peers(self, position: int, mesh_dims: tuple[str, ...]) -> tuple[int, ...]:
        """Positions that differ from this one along `mesh_dims` only, in order of global rank.

        That is the order of ranks inside a process group (torch sorts them).
        """
        base = position - self.offset_of(self.index_along(position, mesh_dims), mesh_dims)
        peers = (
            base + self.offset_of(index, mesh_dims)
            for index in range(self.num_ranks_along(mesh_dims))
        )
        return tuple(sorted(peers, key=self.ranks.__getitem__))

    def names_on(self, whole: "MeshSpec", rank: int) -> tuple[str, ...] | None:
        """The names that the dims of this mesh have on a larger one, if it is a sub-mesh there.

        That is, if it is what one gets of `whole` from `rank` by walking along those dims alone.
        """
        if not (whole.dim_names and whole.holds(rank) and self.rank_set < whole.rank_set):
            return None
        start = whole.position_of(rank)
        for names in permutations(whole.dim_names, len(self.dim_names)):
            if tuple(whole.sizes[name] for name in names) != self.shape:
                continue
            base = start - whole.offset_of(whole.index_along(start, names), names)
            line = (base + whole.offset_of(index, names) for index in range(self.num_ranks))
            if tuple(whole.ranks[position] for position in line) == self.ranks:
                return names
        return None

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        return f"({sizes})" if sizes else "this rank alone"


@dataclass(frozen=True)
class Layout:
    """A tensor's global shape and, per tensor dim, the mesh dims that cut it, outermost first.

    Without `bounds` every cut follows torch.chunk: n rows over k ranks are pieces of ceil(n / k)
    rows, the last one shorter, the rest empty. With them a tensor dim is cut anywhere: per tensor
    dim the ends of its pieces in the order of `cuts`, beginning with 0. Bounds that are
    torch.chunk's are dropped. Mesh dims that cut nothing replicate the tensor.
    """

    mesh: MeshSpec
    shape: tuple[int, ...]
    cuts: tuple[tuple[str, ...], ...]
    bounds: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if any(type(size) is not int or size < 0 for size in self.shape):
            raise ValueError(f"tensor dims are integers from 0 on, got {self.shape}")
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
        """The box of the global tensor that the rank at this position stores."""
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
        """Who in one replica holds which part of a region: {home: its part}, homes ascending.

        A home is a position with coordinate 0 along the replica dims. Empty parts are left out.
        """
        known = self._holders.get(region)
        if known is None:
            known = self._holders[region] = self._find_holders(region)
        return known

    @cached_property
    def _largest_parts(self) -> dict[Region, int]:
        return {}

    def largest_part(self, region: Region) -> int:
        """Elements of the largest part of a region that any rank holds."""
        if region not in self._largest_parts:
            holders = self.holders(region)
            self._largest_parts[region] = max(part.numel for part in holders.values())
        return self._largest_parts[region]

    def _find_holders(self, region: Region) -> dict[int, Region]:
        parts: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = [(0, (), ())]
        for tensor_dim, (dims, bounds) in enumerate(zip(self.cuts, self._bounds, strict=True)):
            low, high = region.start[tensor_dim], region.stop[tensor_dim]
            touched = [
                (self.mesh.offset_of(index, dims), max(low, first), min(high, last))
                for index, (first, last) in enumerate(pairwise(bounds))
                if max(low, first) < min(high, last)
            ]
            parts = [
                (offset + more, (*start, first), (*stop, last))
                for offset, start, stop in parts
                for more, first, last in touched
            ]
        return {home: Region(start, stop) for home, start, stop in sorted(parts)}

    def home(self, position: int) -> int:
        """The position in the first replica that stores the same shard as this one."""
        return position - self.replica_offset(position)

    def replica_offset(self, position: int) -> int:
        """What separates this position from its home: it tells the replica."""
        index = self.mesh.index_along(position, self.replica_dims)
        return self.mesh.offset_of(index, self.replica_dims)

    @cached_property
    def replica_offsets(self) -> tuple[int, ...]:
        """The offsets of all replicas, the first one 0."""
        dims = self.replica_dims
        return tuple(self.mesh.offset_of(i, dims) for i in range(self.mesh.num_ranks_along(dims)))


def _chunk_bounds(num_rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Ends of the pieces that torch.chunk makes of so many rows, size after size."""
    bounds = [0, num_rows]
    for size in sizes:
        cut = [0]
        for first, last in pairwise(bounds):
            step = -(-(last - first) // size)
            cut += [min(first + step * (index + 1), last) for index in range(size)]
        bounds = cut
    return tuple(bounds)


@dataclass(frozen=True)
class ParamSpec:
    """All a planner may know of one parameter.

    `matrices` hold each of its elements once. `num_iterations` of Newton-Schulz, in `wire_dtype`,
    which is also what travels. `dtype` is that of the stored parameter. `moment_cuts`:
    the mesh dims that cut NorMuon's row second moments, see `planning.normuon_state`; None without
    them.
    """

    fqn: str
    layout: Layout
    dtype: str
    matrices: tuple[Matrix, ...]
    num_iterations: int = 5
    wire_dtype: str = "bfloat16"
    moment_cuts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not all(type(text) is str for text in (self.fqn, self.dtype, self.wire_dtype)):
            raise ValueError("names and dtypes are strings")
        if self.moment_cuts and (not self.layout.cuts or self.moment_cuts != self.layout.cuts[0]):
            raise ValueError(f"moments are cut as tensor dim 0 is or not, got {self.moment_cuts}")
        if type(self.num_iterations) is not int or self.num_iterations < 0:
            raise ValueError(f"num_iterations is an integer from 0 on, got {self.num_iterations}")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape
