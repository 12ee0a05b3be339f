"""Recognized matrices are those that each family's own forward pass splits off its weights."""

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muon_dtensor import Muon, group_parameters, grouping, recognition
from muon_dtensor.recognition import GRANULARITIES, KNOWN
from tests.support.cases import tensors_like
from tests.support.families import (
    HF,
    TITAN,
    Taps,
    elements_of,
    hf_model,
    is_transposed,
    recorded,
    titan_taps,
)
from tests.support.pool import run_processes

pytestmark = pytest.mark.integrations

Parts = dict[str, tuple[set[frozenset[int]], bool]]
"""By name of a weight: the elements of each of its matrices, and whether it is transposed."""


def inputs_of(name: str) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(1, 3, 8, 8)}
    return {"input_ids": torch.randint(64, (1, 24), generator=torch.Generator().manual_seed(0))}


def parts_of_attention(model: nn.Module, taps: Any, granularity: str) -> Iterator[tuple[str, Any]]:
    """Yield the parts of the weights that make queries, keys and values."""
    ((query, key, value),) = taps.attention
    for fqn, param in model.named_parameters():
        if param.ndim != 2 or not re.search("q|k|v|attn|in_proj", fqn) or "embed" in fqn:
            continue
        parts = set()
        for tensor in (query, key, value):
            units = tensor.unbind(1) if granularity == "heads" else [tensor]
            parts |= {elements_of(unit, param) for unit in units}
        if "kv_a" in fqn:  # values depend on the latent rows, keys on these and on the rest
            latent = elements_of(value, param)
            parts = {latent, frozenset(range(param.numel())) - latent}
        elif "q_a" in fqn:
            continue
        parts -= {frozenset()}
        if parts:
            source = next(t for t in (query, key, value) if elements_of(t, param))
            output = source.flatten(0, 2)[0, 0]
            yield fqn, (parts, is_transposed(output, param))


def parts_of_gates(model: nn.Module, taps: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of weights that hold gate and up, of each expert."""
    for fqn, param in model.named_parameters():
        if not re.search("gate_up_proj|mlp1_weight", fqn) or fqn.endswith("bias"):
            continue
        size = param[0].numel() if param.ndim == 3 else param.numel()
        parts, transposed = set(), False
        for gate in taps.gates:
            if elements := elements_of(gate, param):
                for first in {element // size * size for element in elements}:  # of each expert
                    of_expert = frozenset(range(first, first + size))
                    parts |= {of_expert & elements, of_expert - elements}
                transposed = is_transposed(gate.flatten()[0], param)
        yield fqn, (parts, transposed)


def parts_of(name: str, granularity: str) -> tuple[nn.Module, Parts]:
    if name in TITAN:
        model, taps = titan_taps(name)
    else:
        model = hf_model(name)
        with recorded() as taps:
            model(**inputs_of(name))
    parts = dict(parts_of_attention(model, taps, granularity))
    return model, parts | dict(parts_of_gates(model, taps))


def matrix_of(full: Tensor, elements: frozenset[int], transposed: bool) -> Tensor:
    """Return the matrix [out, in] of these elements."""
    columns = full.size(-1) if not transposed else None
    flat = full.flatten()[sorted(elements)]
    if columns is not None:
        return flat.view(-1, columns).clone()
    return flat.view(full.size(-2), -1).T.contiguous()


NAMES = [*HF, "vit", *TITAN]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_separately_stored_matrices(name, granularity):
    """Of the elements that the forward pass uses together, for each weight of a family."""
    model, expected = parts_of(name, granularity)
    groups = group_parameters(model, recognize=granularity)
    declared = {n for g in groups if g.get("recognized") for n, _ in g["params"]}
    fused = {n for n, (parts, transposed) in expected.items() if len(parts) > 1 or transposed}
    assert fused <= declared
    optimizer = Muon(groups, lr=0.1)
    for param in model.parameters():
        (param.grad,) = tensors_like([tuple(param.shape)], param.numel())
    separate: dict[str, list[Tensor]] = {}
    params = dict(model.named_parameters())
    for fqn, (parts, transposed) in expected.items():
        ordered = sorted(parts, key=min)
        matrices = [nn.Parameter(matrix_of(params[fqn].detach(), p, transposed)) for p in ordered]
        for matrix, part in zip(matrices, ordered, strict=True):
            matrix.grad = matrix_of(params[fqn].grad, part, transposed)
        torch.optim.Muon(matrices, lr=0.1).step()
        separate[fqn] = [m.detach() for m in matrices]
    optimizer.step()
    for fqn, (parts, transposed) in expected.items():
        for part, result in zip(sorted(parts, key=min), separate[fqn], strict=True):
            assert torch.equal(matrix_of(params[fqn].detach(), part, transposed), result), fqn


def test_gpt2_stores_all_weights_transposed():
    model = hf_model("gpt2")
    optimizer = Muon(group_parameters(model, recognize=True))
    spec = next(s for s in optimizer.plan.params if "mlp.c_fc" in s.fqn)
    assert [(m.rows, m.cols) for m in spec.matrices] == [(128, 32)]
    assert "recognized: stored transposed (transformers: GPT-2)" in optimizer.plan.explain(spec.fqn)
    assert "recognized in 2 parameters: stored transposed" in str(optimizer.plan)


def test_every_row_of_the_table_is_tested(monkeypatch):
    """Each entry recognizes a weight of a model above, or of torch's attention."""
    models = [titan_taps(name)[0] if name in TITAN else hf_model(name) for name in NAMES]
    for known in KNOWN:
        monkeypatch.setattr(recognition, "KNOWN", (known,))
        texts = [
            entry.why
            for model in (*models, nn.ModuleList([nn.MultiheadAttention(8, 2)]))
            for entry in grouping._classify(model, "heads")
        ]
        assert any(f"({known.package}: {known.family})" in text for text in texts), known


def test_torch_s_attention(monkeypatch):
    """Query, key and value are those of torch.nn.functional.multi_head_attention_forward."""
    taps, attention = Taps(), nn.functional.scaled_dot_product_attention

    def recording(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        taps.attention.append((query, key, value))
        return attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", recording)
    model = nn.ModuleDict({"layer": nn.MultiheadAttention(8, 2, bias=False)})
    optimizer = Muon(group_parameters(model, recognize="heads"), lr=0.1)
    weight = model["layer"].in_proj_weight
    model["layer"].eval()
    x = torch.randn(1, 5, 8, requires_grad=True)
    model["layer"](x, x, x, need_weights=False)
    expected, _ = dict(parts_of_attention(model, taps, "heads"))["layer.in_proj_weight"]
    assert sorted(map(min, expected)) == [0, 32, 64, 96, 128, 160]
    (spec,) = [s for s in optimizer.plan.params if s.shape == weight.shape]
    assert {m.region.start[0] * 8 for m in spec.matrices} == set(map(min, expected))


def sharded_step() -> bool:
    """fully_shard derives new classes, which are recognized too."""
    mesh = init_device_mesh("cpu", (2,))
    results = []
    for is_sharded in (True, False):
        model = hf_model("gpt-neox")
        if is_sharded:
            for layer in model.gpt_neox.layers:
                fully_shard(layer.attention, mesh=mesh)
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = Muon(group_parameters(model, recognize=True), lr=0.1)
        model(**inputs_of("gpt-neox")).logits.square().mean().backward()
        optimizer.step()
        (weight,) = [p for n, p in model.named_parameters() if n.endswith("query_key_value.weight")]
        assert len(next(s for s in optimizer.plan.params if "query_key" in s.fqn).matrices) == 3
        results.append(weight.full_tensor() if is_sharded else weight.detach())
    return bool(torch.allclose(*results, atol=1e-5))


def test_a_sharded_model_is_recognized():
    assert run_processes(2, sharded_step) == [True, True]


def test_torchtitan_s_container_recognizes():
    from muon_dtensor.integrations.torchtitan import muon_optimizers

    model, _ = titan_taps("titan-llama3")
    config = muon_optimizers(recognize=True, splits={"wo": {"matrix": "h m -> h m"}})
    (optimizer,) = config.build(model_parts=[model]).optimizers
    numbers = {spec.fqn: len(spec.matrices) for spec in optimizer.plan.params}
    assert numbers["layers.0.attention.qkv_linear.wqkv.weight"] == 3
    assert numbers["layers.0.attention.wo.weight"] == 1
    assert "query, key, value by group (torchtitan: Llama 3" in str(optimizer.plan)


def test_rules_take_precedence_and_unknown_fusions_log_a_warning(caplog):
    model = hf_model("gpt-neox")
    groups = group_parameters(
        model,
        recognize=True,
        rules=[("query_key_value", {"matrix": "(head d) h -> head d h", "matrix_axes": {"d": 24}})],
    )
    (group,) = [g for g in groups if any("query_key_value.weight" in n for n, _ in g["params"])]
    assert group["matrix_axes"] == {"d": 24}
    assert "recognized" not in group
    model.gpt_neox.layers[0].attention.query_key_value = nn.Linear(32, 20)
    with caplog.at_level(logging.WARNING, logger="muon_dtensor"):
        groups = group_parameters(model, recognize=True)
    assert "query_key_value.weight looks like several matrices in one" in caplog.text
    assert not any(g.get("recognized") for g in groups)
