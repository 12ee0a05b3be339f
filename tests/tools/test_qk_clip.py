"""QK-clip: logits after clipping, all layouts, GQA and MLA, and as a hook of the optimizer."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from muon_dtensor import Muon
from muon_dtensor.qk_clip import HeadRows, QKClip, fused, multi_head, multi_head_latent
from muon_dtensor.runtime.torch_private import local_part
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.pool import run_processes
from tests.support.threads import run_threads

R, S0, S1 = Replicate(), Shard(0), Shard(1)
HEADS, HEAD_DIM, MODEL = 4, 6, 8


def logits_of(query: Tensor, key: Tensor, x: Tensor) -> Tensor:
    """Return the logits [heads, tokens, tokens], divided by sqrt(d), in float64."""
    q, k = ((x.double() @ w.double().T).unflatten(-1, (-1, HEAD_DIM)) for w in (query, key))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return torch.einsum("thd,shd->hts", q, k) / math.sqrt(HEAD_DIM)


def weights(key_heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(HEADS * HEAD_DIM, MODEL), (key_heads * HEAD_DIM, MODEL), (5, MODEL)]
    query, key, x = tensors_like(shapes, 0)
    return query, key, x


@pytest.mark.parametrize("key_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_logits_are_bounded_and_small_heads_stay(key_heads):
    query, key, x = weights(key_heads)
    before = logits_of(query, key, x).amax((1, 2))
    tau = float(before.sort().values[1:3].mean())  # two heads above, two below
    clip = QKClip([multi_head(query, key, HEAD_DIM)], tau=tau)
    clip.observe(0, before)
    key_before = key.clone()
    clip(None)
    after = logits_of(query, key, x).amax((1, 2))
    torch.testing.assert_close(after, before.clamp(max=tau), rtol=1e-5, atol=1e-5)
    assert (key_heads == HEADS) != torch.equal(key, key_before), "a shared key must not change"
    clip(None)  # nothing observed since
    assert torch.equal(logits_of(query, key, x).amax((1, 2)), after)


def test_a_fused_weight_is_clipped_like_its_parts():
    query, key, _ = weights()
    value = torch.ones(HEADS * HEAD_DIM, MODEL)
    wqkv = torch.cat([query, key, value])
    max_logits = torch.tensor([300.0, 1.0, 150.0, 400.0])
    for layers in ([multi_head(query, key, HEAD_DIM)], [fused(wqkv, HEADS, HEADS, HEAD_DIM)]):
        clip = QKClip(layers)
        clip.observe(0, max_logits)
        clip(None)
    assert torch.equal(wqkv, torch.cat([query, key, value]))
    assert torch.equal(value, torch.ones_like(value))


def test_mla_does_not_scale_values():
    nope, rope, value = 4, 2, 3
    query, key_value = torch.ones(2 * (nope + rope), 5), torch.ones(2 * (nope + value), 5)
    clip = QKClip([multi_head_latent(query, key_value, 2, nope, rope, value)], tau=100.0)
    clip.observe(0, torch.tensor([400.0, 10.0]))
    clip(None)
    head, other = query.unflatten(0, (2, -1))
    assert torch.equal(head[:nope], torch.full((nope, 5), 0.5))
    assert torch.equal(head[nope:], torch.full((rope, 5), 0.25))
    assert torch.equal(other, torch.ones_like(other))
    head, other = key_value.unflatten(0, (2, -1))
    assert torch.equal(head[:nope], torch.full((nope, 5), 0.5))
    assert torch.equal(head[nope:], torch.ones(value, 5))
    assert torch.equal(other, torch.ones_like(other))


def clipped(layout: Any, dtype: torch.dtype) -> list[bool]:
    """Ranks observe different logits; compare with one process that observes all of them."""
    mesh = mesh_of(layout[0])
    query, key, _ = (w.to(dtype) for w in weights())
    by_rank = [
        100.0 * torch.rand(2, HEADS, generator=torch.Generator().manual_seed(r)) * 3
        for r in range(mesh.size())
    ]
    params = [spread(w, mesh, layout[1]) for w in (query, key)]
    clip = QKClip([multi_head(*params, HEAD_DIM), multi_head(*params, HEAD_DIM)])
    oracle = QKClip([multi_head(query, key, HEAD_DIM), multi_head(query, key, HEAD_DIM)])
    for layer in range(2):
        clip.observe(layer, by_rank[dist.get_rank()][layer])
        for max_logits in by_rank:
            oracle.observe(layer, max_logits[layer])
    clip(None)
    oracle(None)
    return [
        torch.equal(local_part(p), local_part(spread(w, mesh, layout[1])))
        for p, w in zip(params, (query, key), strict=True)
    ]


LAYOUTS = [
    ((4,), (S0,)),
    ((3,), (S0,)),
    ((4,), (S1,)),
    ((2, 2), (R, S0)),
    ((2, 2), (S1, S0)),
    ((2, 2, 2), (R, S0, S1)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_gives_the_result_of_one_process(layout, dtype):
    answers = run_threads(math.prod(layout[0]), clipped, layout, dtype)
    assert answers == [[True, True]] * math.prod(layout[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        query, key, _ = weights()
        self.wq, self.wk = nn.Parameter(20 * query), nn.Parameter(20 * key)


def hooked(tp: bool) -> tuple[bool, float]:
    """Run QKClip as an optimizer's hook; under TP a rank observes only its own heads."""
    mesh = mesh_of((4,))
    attention, plain = Attention(), Attention()
    _, _, x = weights()
    for name in ("wq", "wk"):
        full_weight = getattr(plain, name).detach()
        setattr(attention, name, nn.Parameter(spread(full_weight.clone(), mesh, (S0,))))
    optimizer = Muon(attention.named_parameters(), lr=0.01, weight_decay=0.0)
    oracle = Muon(plain.named_parameters(), lr=0.01, weight_decay=0.0)
    clip = QKClip([multi_head(attention.wq, attention.wk, HEAD_DIM)])
    optimizer.register_step_post_hook(clip)
    plain_clip = QKClip([multi_head(plain.wq, plain.wk, HEAD_DIM)])
    oracle.register_step_post_hook(plain_clip)
    for step in range(3):
        largest = logits_of(plain.wq, plain.wk, x).amax((1, 2)).detach()
        rank = dist.get_rank()
        if tp:
            clip.observe(0, largest[rank : rank + 1], first_head=rank)
        else:
            clip.observe(0, largest)
        plain_clip.observe(0, largest)
        grads = tensors_like([plain.wq.shape, plain.wk.shape], 5 + step)
        for name, grad in zip(("wq", "wk"), grads, strict=True):
            getattr(attention, name).grad = spread(grad, mesh, (S0,))
            getattr(plain, name).grad = grad
        optimizer.step()
        oracle.step()
    same = all(
        torch.equal(local_part(a), local_part(spread(b.detach(), mesh, (S0,))))
        for a, b in zip(attention.parameters(), plain.parameters(), strict=True)
    )
    return same, float(logits_of(plain.wq, plain.wk, x).detach().max())


@pytest.mark.parametrize("tp", [False, True])
def test_as_a_hook_over_real_processes(tp):
    for same, largest in run_processes(4, hooked, tp):
        assert same
        assert largest < 150, "2,000 and more at first"


def test_wrong_shapes_and_options_raise():
    query, key, _ = weights()
    with pytest.raises(ValueError, match="do not divide into heads of 5 rows"):
        multi_head(query, key, 5)
    with pytest.raises(ValueError, match="24 rows are not 4 query and twice 4 key heads"):
        fused(query, HEADS, HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match="do not fit into a weight of 24 rows"):
        HeadRows(query, 5, HEAD_DIM, HEAD_DIM, 0.5)
    with pytest.raises(ValueError, match="tau must be above 0"):
        QKClip([multi_head(query, key, HEAD_DIM)], tau=0.0)
    clip = QKClip([multi_head(query, key, HEAD_DIM)])
    with pytest.raises(
        ValueError, match=r"layer 0 has 4 heads; got the logits of \[3\] from head 2"
    ):
        clip.observe(0, torch.ones(3), first_head=2)
    clip.observe(0, torch.full((4,), torch.nan))
    before = query.clone()
    clip(None)
    assert torch.equal(query, before), "a NaN logit must not scale weights"
