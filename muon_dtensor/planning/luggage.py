"""Matrices as parcels: what each adds to the buffers of a bucket, and which are held together.

An upper bound that can be added up, parcel by parcel; `volumes` has the exact figures.
"""

from itertools import pairwise
from typing import assert_never

from muon_dtensor.layout import Layout, Matrix
from muon_dtensor.planning.buckets import Footprint, Moment, Parcel
from muon_dtensor.planning.ir import Gathered, Gram, Local, Owned, Strategy
from muon_dtensor.planning.strategies import stages
from muon_dtensor.planning.teams import slabs


def footprint_of(strategy: Strategy, copies: int) -> Footprint:
    """An empty footprint; `copies`: how many replicas there are."""
    both = ((1, "pieces"), (1, "wholes"))
    match strategy:
        case Local() | Gathered(unshard_dims=()):
            return Footprint((((1, "wholes"),),))
        case Gathered():
            return Footprint((((1, "spread"), (1, "sent")), ((1, "sent"), (1, "wholes"))))
        case Gram():
            back: Moment = ((copies, "wholes"), (1, "spread"))
            return Footprint((both, back, ((copies + 1, "wholes"),)))
        case Owned(hops=1, is_staged=False, unshard_dims=apart):
            there = both if apart else ((1, "wholes"),)
            if copies == 1:
                return Footprint((there,))
            return Footprint(
                (there, ((copies + 1, "wholes"),), ((copies, "wholes"), (1, "spread")))
            )
        case Owned():
            moments: list[Moment] = []
            buffers = ["pieces", *(f"mid{i}" for i in range(len(stages(strategy)) - 1)), "wholes"]
            for first, then in pairwise(buffers):
                moments += [((1, first), (1, then)), ((2, first),), ((1, then), (1, first))]
            if copies > 1:
                moments += [((copies + 1, "pieces"),), ((copies, "pieces"), (1, "spread"))]
            return Footprint(tuple(moments))
        case _:
            assert_never(strategy)


def parcel(
    index: int,
    strategy: Strategy,
    layout: Layout,
    matrix: Matrix,
    *,
    owner: int,
    itemsize: int,
    flops: int,
    name: tuple[str, int],
) -> Parcel:
    """A matrix that travels by a strategy; `itemsize` on the wire."""
    holders = layout.holders(matrix.region)
    piece = itemsize * max(box.numel for box in holders.values())
    whole = itemsize * matrix.numel
    # a matrix that lies apart has pieces at many homes, and they count as one place
    home = 0 if len(holders) > 1 else layout.home(owner)
    replica = layout.replica_offset(owner)
    loads = [("spread", home, piece)]
    match strategy:
        case Local():
            loads.append(("wholes", owner, whole))
        case Gathered():
            loads += [("sent", home, len(holders) * piece), ("wholes", home, whole)]
        case Gram(team_dims=team):
            size = layout.mesh.num_ranks_along(team)
            slab = itemsize * slabs(matrix, size)[0].numel
            loads += [("pieces", 0, piece), ("wholes", owner, slab)]
        case Owned():
            loads += [("pieces", replica, piece), ("wholes", owner, whole)]
            done: tuple[str, ...] = ()
            for number, dims in enumerate(stages(strategy)[:-1]):
                done = (*done, *dims)
                along = layout.mesh.offset_of(layout.mesh.index_along(owner, done), done)
                most = min(whole, layout.mesh.num_ranks_along(done) * piece)
                loads.append((f"mid{number}", replica + along, most))
        case _:
            assert_never(strategy)
    return Parcel(index, owner, flops, name, tuple(loads))
