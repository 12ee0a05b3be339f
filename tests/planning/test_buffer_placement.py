"""Exchange buffers in one block: live buffers do not overlap, and the block is small."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from muon_dtensor.layout import MeshSpec
from muon_dtensor.planning.buffer_placement import ALIGNMENT, assign_offsets
from muon_dtensor.planning.plan import Phase, PlanOptions
from muon_dtensor.planning.planner import plan_update
from muon_dtensor.planning.report import PlanReport
from muon_dtensor.planning.routes import rank_bucket
from muon_dtensor.planning.schedule import Lifetime, lifetimes, lower
from muon_dtensor.runtime.buffers import ExchangeBuffers
from tests.support.models import param_spec

buffers = st.lists(
    st.builds(
        lambda nbytes, first, length: (nbytes, Lifetime(first, first + length)),
        st.integers(0, 5000),
        st.integers(0, 12),
        st.integers(0, 6),
    ),
    max_size=14,
)


def live_together(a: Lifetime, b: Lifetime) -> bool:
    return a.first <= b.last and b.first <= a.last


@given(buffers)
def test_buffers_live_at_the_same_time_do_not_overlap(sizes_and_lives):
    offsets, total = assign_offsets(sizes_and_lives)
    rounded = [-(-nbytes // ALIGNMENT) * ALIGNMENT for nbytes, _ in sizes_and_lives]
    lives = [life for _, life in sizes_and_lives]
    spans = [(o, o + n, life) for o, n, life in zip(offsets, rounded, lives, strict=True) if n]
    for (a, b, life), (c, d, other) in combinations(spans, 2):
        assert not live_together(life, other) or b <= c or d <= a
    assert all(a >= 0 and b <= total and a % ALIGNMENT == 0 for a, b, _ in spans)
    live_nbytes = [
        sum(n for n, life in zip(rounded, lives, strict=True) if life.first <= event <= life.last)
        for event in {life.first for life in lives}
    ]
    assert max(live_nbytes, default=0) <= total <= sum(rounded)


def test_a_chain_needs_no_more_than_two_neighbours():
    sizes = [640, 6400, 1280, 5120, 640]
    chain = [(n, Lifetime(i, i + 1)) for i, n in enumerate(sizes)]
    assert assign_offsets(chain)[1] == 6400 + 1280


@pytest.mark.parametrize("prefetch_count", [0, 1, 2])
def test_buffers_of_a_real_plan(prefetch_count):
    """HSDP with hops that repack and several buckets in flight, in the order of the executor."""
    mesh, cuts = MeshSpec.of(dp_replicate=2, dp_shard=2), (("dp_shard",), ())
    specs = [param_spec(mesh, f"w{i}", (64 + 8 * i, 32), cuts) for i in range(9)]
    options = PlanOptions(bucket_nbytes=12_000, prefetch_count=prefetch_count, strategy="owned")
    plan = plan_update(specs, options)
    assert len(plan.buckets) > 2
    for rank in range(4):
        rank_buckets = {
            i: rank_bucket(plan, bucket, bucket.mesh.position_of(rank))
            for i, bucket in enumerate(plan.buckets)
        }
        program = lower(plan.schedule, {i: local.sequence for i, local in rank_buckets.items()})
        lives = lifetimes(program)
        keys = {(i, n) for i, local in rank_buckets.items() for n in range(len(local.numels))}
        assert set(lives) == keys
        order = [a.bucket for a in plan.schedule if a.phase is Phase.UNSHARD]
        for bucket, local in rank_buckets.items():
            for hop in local.sequence.hops:
                assert live_together(lives[bucket, hop.send], lives[bucket, hop.recv])
        if prefetch_count:
            first, second = order[:2]
            wholes = rank_buckets[first].sequence.wholes
            assert live_together(lives[first, wholes], lives[second, 0])
        kinds = dict.fromkeys(rank_buckets, (torch.bfloat16, torch.device("cpu")))
        exchange_buffers = ExchangeBuffers(program, rank_buckets, kinds, links={})
        assert exchange_buffers.acquire(0, 0).numel() == rank_buckets[0].numels[0]
        # References to these tensors prevent reuse of their memory by a new block.
        tensors = {key: exchange_buffers.acquire(*key) for key in lives}
        again = {key: exchange_buffers.acquire(*key) for key in lives}
        assert all(again[key].data_ptr() == tensors[key].data_ptr() for key in lives), "reused"
        assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == 1, "one block"
        exchange_buffers.drop_all()
        first = next(key for key in lives if tensors[key].numel())
        assert exchange_buffers.acquire(*first).data_ptr() != tensors[first].data_ptr()
        peak_nbytes = PlanReport(plan).cost.buffer_nbytes[rank]
        assert exchange_buffers.block_nbytes <= 1.05 * peak_nbytes + 10 * ALIGNMENT
