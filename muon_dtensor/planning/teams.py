"""Who is in a team that shares one matrix, which slab each member has, and what that costs.

Geometry and counts of `orthogonalize.gram`. Chooses no team.
"""

from functools import lru_cache
from itertools import pairwise

from muon_dtensor.layout import Layout, Matrix, MeshSpec, ParamSpec, Region
from muon_dtensor.planning.ir import Gram, gram_segments

GRAM_ITEMSIZE = 4
"""Bytes per element of Gram matrices and their polynomials: float32, whatever travels."""


def can_share(spec: ParamSpec, matrix: Matrix) -> bool:
    """Whether slabs of a matrix are boxes of its parameter, and its iteration a polynomial.

    Not in float64, which teams would narrow, nor for NorMuon, whose owner needs whole rows.
    """
    shape = matrix.region.shape
    return (
        not matrix.pattern
        and shape[-2:] == (matrix.rows, matrix.cols)
        and spec.num_iterations > 0
        and spec.wire_dtype != "float64"
        and spec.is_polynomial
        and spec.moment_cuts is None
    )


def members(mesh: MeshSpec, strategy: Gram, owner: int) -> tuple[int, ...]:
    """The positions of a team, in the order of their process group."""
    return mesh.peers(owner, strategy.team_dims)


@lru_cache(maxsize=4096)
def slabs(matrix: Matrix, num_members: int) -> tuple[Region, ...]:
    """A matrix cut into so many slabs of its long side, as torch.chunk cuts; rows of a square."""
    region = matrix.region
    dim = len(region.start) - (2 if matrix.rows >= matrix.cols else 1)
    start, stop = region.start[dim], region.stop[dim]
    rows_each = -(-(stop - start) // num_members)
    cuts = [min(start + index * rows_each, stop) for index in range(num_members + 1)]

    def between(low: int, high: int) -> Region:
        return Region(
            (*region.start[:dim], low, *region.start[dim + 1 :]),
            (*region.stop[:dim], high, *region.stop[dim + 1 :]),
        )

    return tuple(between(low, high) for low, high in pairwise(cuts))


def lies_in_slabs(layout: Layout, matrix: Matrix, team_dims: tuple[str, ...]) -> bool:
    """Whether each rank along these dims, in every replica, already holds exactly its slab.

    Members follow their global ranks, so on a permuted mesh replicas may disagree.
    """
    holders = layout.holders(matrix.region)
    first = next(iter(holders))
    return all(
        holders.get(home, None) == slab if slab.numel else home not in holders
        for offset in layout.replica_offsets
        for team in [layout.mesh.peers(first + offset, team_dims)]
        for member, slab in zip(team, slabs(matrix, len(team)), strict=True)
        for home in [layout.home(member)]
    )


def own_rows(num_rows: int, num_members: int, index: int) -> int:
    """How many rows of each product one member computes: its share as torch.chunk cuts."""
    rows_each = -(-num_rows // num_members)
    return min(num_rows, (index + 1) * rows_each) - min(num_rows, index * rows_each)


def member_flops(matrix: Matrix, num_iterations: int, num_members: int, index: int) -> int:
    """Floating-point operations of one member.

    Per segment its part of the Gram matrix and its slab of the result (2 r^2 c each for a slab of
    c), and its rows of the products of short x short (2 r^2 each): 3 for the first polynomial of
    a segment, 4 for each that follows, 2 for the last, 1 if that is the first.
    """
    short = min(matrix.rows, matrix.cols)
    long = max(matrix.rows, matrix.cols)
    columns, rows = own_rows(long, num_members, index), own_rows(short, num_members, index)
    segments = gram_segments(num_iterations)
    num_products = sum(1 if n == 1 else 4 * n - 3 for n in segments)
    return 4 * len(segments) * short * short * columns + 2 * num_products * rows * short * short


def num_gathers(num_iterations: int) -> int:
    """All-gathers of rows: two for each polynomial of a segment but the last, one for that."""
    return sum(2 * n - 1 for n in gram_segments(num_iterations))


def gathered_nbytes(matrix: Matrix, num_members: int) -> int:
    """Bytes each member contributes to one all-gather; all contribute the same."""
    short = min(matrix.rows, matrix.cols)
    return GRAM_ITEMSIZE * -(-short // num_members) * short


def summed_nbytes(matrix: Matrix) -> int:
    """Bytes of one Gram matrix."""
    return GRAM_ITEMSIZE * min(matrix.rows, matrix.cols) ** 2


def team_sent_nbytes(matrix: Matrix, num_iterations: int, num_members: int) -> int:
    """Bytes each member sends in rings of its team, beside what brings slabs and takes them.

    An all-gather sends one's part to all others, an all-reduce twice a share of the whole; one
    all-reduce more is that of the largest element.
    """
    gathers = num_gathers(num_iterations) * (num_members - 1) * gathered_nbytes(matrix, num_members)
    sums = len(gram_segments(num_iterations)) * ring_nbytes(summed_nbytes(matrix), num_members)
    return gathers + sums + ring_nbytes(GRAM_ITEMSIZE, num_members)


def ring_nbytes(nbytes: int, num_members: int) -> int:
    """Bytes each rank sends in a ring all-reduce of so many bytes."""
    return 2 * (num_members - 1) * nbytes // num_members
