"""Every legal way to bring one matrix together.

Knows where its pieces lie; knows neither its price nor its owner.
"""

from typing import assert_never

from muon_dtensor.layout import Layout, Matrix, ParamSpec, Region
from muon_dtensor.planning.ir import (
    AllToAll,
    Collective,
    Gathered,
    Gram,
    Local,
    Owned,
    Route,
    Strategy,
)
from muon_dtensor.planning.teams import can_share, lies_in_slabs


def strategies_for(spec: ParamSpec, matrix: Matrix) -> tuple[Strategy, ...]:
    """Legal strategies for a matrix with at least one element, fewest collectives first.

    Teams of Gram are those of the innermost dims, one more at a time.
    """
    layout = spec.layout
    apart, same = _dims_apart(layout, matrix.region), layout.replica_dims
    if not apart and not same:
        return (Local(),)
    found: list[Strategy] = [Owned(apart, same, hops=1)]
    if apart and same:
        found.append(Owned(apart, same, hops=2))
    if len(apart) > 1:
        found.append(Owned(apart, same, hops=2 if same else 1, is_staged=True))
    found.append(Gathered(apart, same))
    if can_share(spec, matrix):
        both = tuple(name for name in layout.mesh.dim_names if name in apart or name in same)
        for count in range(1, len(both) + 1):
            team = both[-count:]
            in_place = team == apart and lies_in_slabs(layout, matrix, team)
            found.append(Gram(apart, same, team, in_place))
    return tuple(found)


def kind_of(strategy: Strategy) -> str:
    """The word of `STRATEGIES` for it, or "local"."""
    match strategy:
        case Local():
            return "local"
        case Owned(is_staged=staged):
            return "owned_staged" if staged else "owned"
        case Gathered():
            return "gathered"
        case Gram():
            return "gram"


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


def stages(strategy: Owned) -> tuple[tuple[str, ...], ...]:
    """The mesh dims of each exchange on the way to the owner."""
    if strategy.is_staged:
        return tuple((name,) for name in reversed(strategy.unshard_dims))
    return (strategy.unshard_dims,) if strategy.unshard_dims else ()


def unshard_collectives(strategy: Strategy) -> tuple[Collective, ...]:
    """What brings the pieces of a matrix to those who orthogonalize it."""
    match strategy:
        case Local() | Gathered(unshard_dims=()) | Gram(unshard_dims=()) | Gram(is_in_place=True):
            return ()
        case Owned():
            return tuple(AllToAll(dims, Route.TO_OWNER) for dims in stages(strategy))
        case Gathered(unshard_dims=dims):
            return (AllToAll(dims, Route.TO_ALL),)
        case Gram(unshard_dims=dims):
            return (AllToAll(dims, Route.TO_TEAM),)
        case _:
            assert_never(strategy)


def reshard_collectives(strategy: Strategy, mesh_dims: tuple[str, ...]) -> tuple[Collective, ...]:
    """What hands the result back; `mesh_dims` are all names of the mesh, in its order."""
    match strategy:
        case Local() | Gathered():
            return ()
        case Owned(unshard_dims=apart, replica_dims=same, hops=1, is_staged=False):
            both = tuple(name for name in mesh_dims if name in apart or name in same)
            return (AllToAll(both, Route.TO_HOLDERS),)
        case Owned(replica_dims=same):
            back = (AllToAll(dims, Route.TO_HOLDERS) for dims in reversed(stages(strategy)))
            return (*back, *((AllToAll(same, Route.TO_REPLICAS),) if same else ()))
        case Gram(replica_dims=same, is_in_place=True):
            return (AllToAll(same, Route.TO_REPLICAS),) if same else ()
        case Gram(unshard_dims=apart, replica_dims=same):
            both = tuple(name for name in mesh_dims if name in apart or name in same)
            return (AllToAll(both, Route.FROM_TEAM),)
        case _:
            assert_never(strategy)
