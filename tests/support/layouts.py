"""Tables of layouts and shapes, and functions that step them and compare with the oracle."""

import pytest
from torch.distributed.tensor import Replicate, Shard

from tests.support.cases import Case, Outcome, compare_with_oracle
from tests.support.meter import installed
from tests.support.threads import run_threads

R, S0, S1 = Replicate(), Shard(0), Shard(1)
EVEN = ((8, 16), (16, 8), (12, 12), (8, 8))
ODD = ((13, 7), (7, 13), (5, 5), (1, 9), (9, 1), (1, 1), (3, 2), (0, 4), (4, 0), (0, 0))
EXPERTS = ((4, 6, 5), (5, 3, 8), (3, 7, 7), (1, 4, 4), (0, 3, 3))


LAYOUTS = [
    pytest.param((1,), (R,), id="one-rank"),
    pytest.param((1,), (S0,), id="one-rank-shard"),
    pytest.param((4,), (R,), id="replicate"),
    pytest.param((4,), (S0,), id="rows"),
    pytest.param((4,), (S1,), id="cols"),
    pytest.param((3,), (S0,), id="rows-over-3"),
    pytest.param((2, 2), (R, S0), id="hsdp"),
    pytest.param((2, 2), (S0, R), id="hsdp-replicas-inside"),
    pytest.param((2, 2), (S0, S1), id="rows-and-cols"),
    pytest.param((2, 2), (S0, S0), id="rows-twice"),
    pytest.param((3, 2), (S1, S1), id="cols-twice"),
    pytest.param((2, 2), (R, R), id="two-replicate-dims"),
    pytest.param((2, 2, 2), (R, S0, S1), id="hsdp-tp"),
    pytest.param((2, 2, 2), (R, S0, S0), id="hsdp-tp-rows"),
    pytest.param((2, 2, 2), (R, R, S1), id="two-replicate-dims-and-cols"),
    pytest.param((2, 3, 2), (S0, R, S0), id="replicas-in-the-middle"),
    pytest.param((2, 1, 2), (S0, S1, R), id="a-dim-of-one"),
]


def case(mesh_shape, shapes, placements, **kwargs) -> Case:
    return Case(mesh_shape, tuple((shape, placements) for shape in shapes), **kwargs)


def run(case: Case) -> list[Outcome]:
    with installed():
        return run_threads(case.num_ranks, compare_with_oracle, case)


def hold_to_plan(outcomes: list[Outcome]) -> None:
    assert [o.differences for o in outcomes] == [[]] * len(outcomes)
    assert sum(o.num_matrices for o in outcomes) == outcomes[0].model_matrices
    assert [o.sent_nbytes for o in outcomes] == [o.planned_sent_nbytes for o in outcomes]
    assert [o.flops for o in outcomes] == [o.planned_flops for o in outcomes]
    assert len({o.digest for o in outcomes}) == 1
