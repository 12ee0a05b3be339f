"""Owners: within Graham's bound, deterministic, only among the ranks that may own a matrix."""

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from muon_dtensor.layout import Layout, Matrix, MeshSpec, Region
from muon_dtensor.planning.owners import Candidate, Work, assign_owners, possible_owners


def candidate(flops: int, index: int) -> Candidate:
    return Candidate(index, 0, Matrix(Region((0, 0), (1, 1)), 1, 1), flops, (f"w{index:02}", 0))


def work(flops: int, index: int, ranks: tuple[int, ...]) -> Work:
    return Work(candidate(flops, index), tuple((rank,) for rank in ranks), flops)


def makespan(flops: list[int], owners: tuple[int, ...], num_ranks: int) -> int:
    loads = [0] * num_ranks
    for cost, owner in zip(flops, owners, strict=True):
        loads[owner] += cost
    return max(loads)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_the_makespan_is_within_grahams_bound(flops, num_ranks):
    """At most 4/3 - 1/(3 m) times the smallest makespan of all assignments."""
    ranks = tuple(range(num_ranks))
    teams = assign_owners([work(f, i, ranks) for i, f in enumerate(flops)])
    owners = tuple(owner for (owner,) in teams)
    best = min(
        makespan(flops, assignment, num_ranks) for assignment in product(ranks, repeat=len(flops))
    )
    assert makespan(flops, owners, num_ranks) <= (4 / 3 - 1 / (3 * num_ranks)) * best + 1e-9


def test_only_allowed_ranks_own_and_their_loads_count():
    works = [work(5, 0, (2,)), work(4, 1, (1, 2)), work(3, 2, (1, 2))]
    assert assign_owners(works) == ((2,), (1,), (1,))


def test_a_team_is_as_busy_as_its_busiest_member():
    teams = ((0, 1), (2, 3))
    works = [work(5, 0, (1,)), Work(candidate(8, 1), teams, 4), work(3, 2, (0, 2))]
    assert assign_owners(works) == ((1,), (2, 3), (0,))


def test_ties_are_broken_by_name_and_order_of_ranks():
    works = [work(5, i, (3, 1)) for i in range(4)]
    assert assign_owners(works) == ((3,), (1,), (3,), (1,))
    assert assign_owners(works[::-1]) == ((1,), (3,), (1,), (3,))


def test_holders_of_larger_pieces_are_preferred():
    layout = Layout(MeshSpec.of(dp=4), (5, 3), (("dp",), ()))  # pieces of 2, 2, 1 and 0 rows
    assert possible_owners(layout, Region((0, 0), (5, 3))) == (0, 1, 2)


def test_consecutive_owners_differ_in_replica_first():
    layout = Layout(MeshSpec.of(r=2, dp=2), (4, 3), (("dp",), ()))
    assert possible_owners(layout, Region((0, 0), (4, 3))) == (0, 2, 1, 3)
