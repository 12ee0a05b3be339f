"""On every layout parameters are bitwise torch.optim.Muon's, and each matrix is computed once.

Ranks are threads here; `test_gloo.py` repeats the hard cases with processes.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

from tests.support.cases import Case
from tests.support.layouts import EVEN, EXPERTS, LAYOUTS, ODD, case, hold_to_plan, run

R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)


@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS)
@pytest.mark.parametrize("shapes", [EVEN, ODD], ids=["even", "odd"])
def test_matrices(mesh_shape, placements, shapes):
    outcomes = run(case(mesh_shape, shapes, placements))
    hold_to_plan(outcomes)
    if shapes is EVEN and 3 not in mesh_shape:  # every dim of EVEN divides by 4
        assert sum(o.sent_nbytes for o in outcomes) == outcomes[0].bound_nbytes


@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [
        pytest.param((4,), (S0,), id="experts"),
        pytest.param((4,), (S1,), id="rows"),
        pytest.param((4,), (S2,), id="cols"),
        pytest.param((2, 2), (S0, S1), id="experts-and-rows"),
        pytest.param((2, 2), (S0, S0), id="experts-twice"),
        pytest.param((2, 2), (R, S0), id="replicated-experts"),
        pytest.param((2, 2, 2), (R, S0, S2), id="replicated-experts-and-cols"),
        pytest.param((2, 2), (R, R), id="replicate"),
    ],
)
def test_experts(mesh_shape, placements):
    hold_to_plan(run(case(mesh_shape, EXPERTS, placements)))


@pytest.mark.parametrize("prefetch_count", [0, 1, 2, 5])
@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS[3:14:3])
def test_any_buckets_and_prefetch(mesh_shape, placements, prefetch_count):
    many = (*EVEN, *ODD, *EVEN)
    options = {"bucket_mb": 1e-4, "prefetch_count": prefetch_count}
    hold_to_plan(run(case(mesh_shape, many, placements, ours=options)))


@pytest.mark.parametrize(
    "muon",
    [
        {"nesterov": False},
        {"weight_decay": 0.0},
        {"adjust_lr_fn": "original", "weight_decay": 0.3},
        {"adjust_lr_fn": "match_rms_adamw", "lr": 0.02},
        {"momentum": 0.0, "ns_steps": 3, "ns_coefficients": (3.0, -3.2, 1.2)},
        {"momentum": 0.4, "nesterov": False, "weight_decay": 0.0, "eps": 1e-3},
    ],
    ids=str,
)
@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS)
def test_options(mesh_shape, placements, muon):
    hold_to_plan(run(case(mesh_shape, EVEN + ODD, placements, muon=muon)))


@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS)
def test_bf16_parameters(mesh_shape, placements):
    hold_to_plan(run(case(mesh_shape, EVEN + ODD, placements, dtype=torch.bfloat16)))


@pytest.mark.P1
@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [
        pytest.param((16,), (S0,), id="16-rows"),
        pytest.param((4, 4), (R, S0), id="16-hsdp"),
        pytest.param((2, 4, 2), (R, S0, S0), id="16-hsdp-tp-rows"),
        pytest.param((2, 4, 4), (R, S0, S1), id="32-hsdp-tp", marks=pytest.mark.P2),
        pytest.param((32,), (R,), id="32-replicate", marks=pytest.mark.P2),
        pytest.param((2, 16), (S1, S0), id="32-tp-fsdp"),
    ],
)
def test_many_ranks(mesh_shape, placements):
    hold_to_plan(run(case(mesh_shape, (*EVEN, *ODD, (40, 33)), placements)))


@st.composite
def random_cases(draw) -> Case:
    mesh_shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    params = []
    for _ in range(draw(st.integers(1, 5))):
        ndim = draw(st.integers(2, 3))
        shape = tuple(draw(st.lists(st.integers(0, 12), min_size=ndim, max_size=ndim)))
        kinds = [R, *(Shard(dim) for dim in range(ndim))]
        count = len(mesh_shape)
        params.append(
            (shape, tuple(draw(st.lists(st.sampled_from(kinds), min_size=count, max_size=count))))
        )
    return Case(
        mesh_shape,
        tuple(params),
        muon={
            "nesterov": draw(st.booleans()),
            "adjust_lr_fn": draw(st.sampled_from([None, "match_rms_adamw"])),
            "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        },
        ours={
            "bucket_mb": draw(st.sampled_from([1e-5, 3e-4, 256])),
            "prefetch_count": draw(st.integers(0, 3)),
            "shard_momentum": draw(st.booleans()),
        },
        num_steps=2,
    )


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(random_cases())
def test_any_case(case):
    hold_to_plan(run(case))
