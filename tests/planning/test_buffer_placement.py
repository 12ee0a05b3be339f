"""Exchange buffers in one block: none is overwritten while it lives, and the block is small."""

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
def test_no_two_that_live_together_share_a_byte(found):
    offsets, total = assign_offsets(found)
    rounded = [-(-nbytes // ALIGNMENT) * ALIGNMENT for nbytes, _ in found]
    spans = [(o, o + n, life) for o, n, (_, life) in zip(offsets, rounded, found, strict=True) if n]
    for (a, b, life), (c, d, other) in combinations(spans, 2):
        assert not live_together(life, other) or b <= c or d <= a
    assert all(a >= 0 and b <= total and a % ALIGNMENT == 0 for a, b, _ in spans)
    moments = {life.first for _, life in found}
    fullest = [
        sum(n for n, (_, life) in zip(rounded, found, strict=True) if life.first <= m <= life.last)
        for m in moments
    ]
    assert max(fullest, default=0) <= total <= sum(rounded)


def test_a_chain_needs_no_more_than_two_neighbours():
    sizes = [640, 6400, 1280, 5120, 640]
    chain = [(n, Lifetime(i, i + 1)) for i, n in enumerate(sizes)]
    assert assign_offsets(chain)[1] == 6400 + 1280


@pytest.mark.parametrize("prefetch_count", [0, 1, 2])
def test_buffers_of_a_real_plan(prefetch_count):
    """HSDP with hops that repack, several buckets in flight: walked as the executor does."""
    mesh, cuts = MeshSpec.of(dp_replicate=2, dp_shard=2), (("dp_shard",), ())
    specs = [param_spec(mesh, f"w{i}", (64 + 8 * i, 32), cuts) for i in range(9)]
    options = PlanOptions(bucket_nbytes=12_000, prefetch_count=prefetch_count, strategy="owned")
    plan = plan_update(specs, options)
    assert len(plan.buckets) > 2
    for rank in range(4):
        chains = {
            i: rank_bucket(plan, bucket, bucket.mesh.position_of(rank))
            for i, bucket in enumerate(plan.buckets)
        }
        program = lower(plan.schedule, {i: chain.sequence for i, chain in chains.items()})
        lives = lifetimes(program)
        assert set(lives) == {(i, n) for i, c in chains.items() for n in range(len(c.numels))}
        order = [a.bucket for a in plan.schedule if a.phase is Phase.UNSHARD]
        for bucket, chain in chains.items():
            for hop in chain.sequence.hops:
                assert live_together(lives[bucket, hop.send], lives[bucket, hop.recv])
        if prefetch_count:
            first, second = order[:2]
            assert live_together(lives[first, chains[first].sequence.wholes], lives[second, 0])
        kinds = dict.fromkeys(chains, (torch.bfloat16, torch.device("cpu")))
        lent = ExchangeBuffers(program, chains, kinds)
        assert lent.take(0, 0).numel() == chains[0].numels[0]
        held = {key: lent.take(*key) for key in lives}  # alive, so that no other gets their place
        again = {key: lent.take(*key) for key in lives}
        assert all(again[key].data_ptr() == held[key].data_ptr() for key in lives), "kept"
        assert len({t.untyped_storage().data_ptr() for t in held.values()}) == 1, "one block"
        lent.forget()
        first = next(key for key in lives if held[key].numel())
        assert lent.take(*first).data_ptr() != held[first].data_ptr()
        assert (
            lent.block_nbytes <= 1.05 * PlanReport(plan).cost.buffer_nbytes[rank] + 10 * ALIGNMENT
        )
