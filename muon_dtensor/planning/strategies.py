"""Every legal way to bring one matrix together.

Knows where its pieces lie; knows neither its price nor its owner.
"""

from muon_dtensor.layout import Layout, Region
from muon_dtensor.planning.ir import AllToAll, Collective, Local, Owned, Route, Strategy

MOST_DIRECT_RANKS = 64
"""The owner sends to all holders directly only among this many ranks: one exchange less, but
every owner opens a connection to every holder of every replica."""

DIRECT_SLACK = 1.25
"""... and only if its busiest rank sends at most this many times what it would with two hops."""


def strategies_for(layout: Layout, matrix: Region) -> tuple[Strategy, ...]:
    """Legal strategies for a matrix with at least one element, fewest collectives first."""
    unshard_dims = _dims_apart(layout, matrix)
    if not unshard_dims and not layout.replica_dims:
        return (Local(),)
    direct = Owned(unshard_dims, layout.replica_dims, hops=1)
    if not unshard_dims or not layout.replica_dims:
        return (direct,)
    return (direct, Owned(unshard_dims, layout.replica_dims, hops=2))


def _dims_apart(layout: Layout, matrix: Region) -> tuple[str, ...]:
    """Mesh dims along which the pieces of a matrix lie at different coordinates."""
    homes = layout.holders(matrix)
    return tuple(
        name
        for name in layout.cut_dims
        if len({layout.mesh.index_along(home, (name,)) for home in homes}) > 1
    )


def can_own(layout: Layout, matrix: Region, position: int) -> bool:
    """Whether the collectives of its strategies can bring a matrix to this position."""
    apart = _dims_apart(layout, matrix)
    fixed = tuple(name for name in layout.cut_dims if name not in apart)
    along = layout.mesh.index_along
    return along(position, fixed) == along(next(iter(layout.holders(matrix))), fixed)


def unshard_collectives(strategy: Strategy) -> tuple[Collective, ...]:
    """What brings the pieces of a matrix to its owner."""
    match strategy:
        case Local() | Owned(unshard_dims=()):
            return ()
        case Owned(unshard_dims=dims):
            return (AllToAll(dims, Route.TO_OWNER),)


def reshard_collectives(strategy: Strategy, mesh_dims: tuple[str, ...]) -> tuple[Collective, ...]:
    """What hands the result back; `mesh_dims` are all names of the mesh, in its order."""
    match strategy:
        case Local():
            return ()
        case Owned(unshard_dims=apart, replica_dims=same, hops=1):
            both = tuple(name for name in mesh_dims if name in apart or name in same)
            return (AllToAll(both, Route.TO_HOLDERS),)
        case Owned(unshard_dims=apart, replica_dims=same):
            return (AllToAll(apart, Route.TO_HOLDERS), AllToAll(same, Route.TO_REPLICAS))
