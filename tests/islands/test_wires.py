"""Wires: sizes, errors, rows, packing, and what a top-k wire sends."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muon_dtensor.islands.wires import (
    STEEPNESS,
    Integer,
    TopK,
    Wire,
    expanded,
    flat,
    row_maxima,
    unflattened,
    wire_of,
)
from muon_dtensor.planning.outer import TOP_K_CHUNK, WireCost

NAMES = ("float32", "bfloat16", "float16", "int8", "int4", "int2")
WIRES = [*map(wire_of, NAMES), TopK(0.01), TopK(0.1), TopK(1.0)]
LARGEST_ERROR = {
    "float32": 0.0,
    "bfloat16": 2**-8,
    "float16": 2**-11,
    "int8": 1 / 254,
    "int4": 1 / 14,
}
"""Relative to the largest element of the row."""


def sent(wire: Wire, tensors: list[Tensor]) -> list[Tensor]:
    """Encode and decode tensors."""
    vector = flat(tensors)
    scales = expanded([row_maxima(t) for t in tensors], tensors)
    codes = wire.encode(vector, scales)
    assert codes.dtype == torch.uint8
    assert len(codes) == WireCost.of(wire.text).nbytes(len(vector))
    return unflattened(wire.decode(codes, len(vector), scales), tensors)


@st.composite
def tensors(draw) -> list[Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shapes = st.lists(st.integers(0, 7), min_size=0, max_size=3)
    scale = draw(st.sampled_from([1e-30, 1e-3, 1.0]))
    return [
        scale * torch.randn(shape, generator=generator)
        for shape in draw(st.lists(shapes, min_size=1, max_size=4))
    ]


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.text)
@settings(deadline=None, derandomize=True)
@given(tensors())
def test_every_shape_arrives(wire, tensors):
    for tensor, arrived in zip(tensors, sent(wire, tensors), strict=True):
        assert arrived.shape == tensor.shape
        if wire.text in LARGEST_ERROR and tensor.numel():
            maxima = row_maxima(tensor).repeat_interleave(tensor.numel() // len(row_maxima(tensor)))
            bound = LARGEST_ERROR[wire.text] * 1.001 * maxima.view(tensor.shape) + 6e-8
            assert ((arrived - tensor).abs() <= bound).all()


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.text)
def test_zeros_and_constants(wire):
    zeros, ones = sent(wire, [torch.zeros(3, 4), torch.full((2, 5), -0.25)])
    assert torch.equal(zeros, torch.zeros(3, 4))
    expected = -0.25 * STEEPNESS.get(getattr(wire, "bits", 8), 1.0)
    if not isinstance(wire, TopK) or wire.ratio == 1:
        assert torch.allclose(ones, torch.full((2, 5), expected))


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [("float32", 4000), ("float16", 2000), ("int8", 1000), ("int4", 500), ("int2", 250)],
)
def test_bytes(name, nbytes):
    assert WireCost.of(name).nbytes(1000) == nbytes


def test_each_row_has_its_own_scale():
    rows = torch.tensor([[1.0, 0.5], [1e-6, 1e-6]])
    (arrived,) = sent(Integer(8), [rows])
    assert torch.allclose(arrived, rows, rtol=1e-2)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_of_a_part_are_those_of_the_whole(bits):
    wire = Integer(bits)
    values = torch.randn(64)
    scales = torch.full((64,), float(values.abs().max()))
    whole = wire.decode(wire.encode(values, scales), 64, scales)
    for part in (slice(0, 16), slice(16, 64)):
        codes = wire.encode(values[part], scales[part])
        assert torch.equal(wire.decode(codes, len(values[part]), scales[part]), whole[part])


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.text)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_stays_so(wire, bad):
    tensor = torch.randn(4, 6)
    tensor[2, 3] = bad
    (arrived,) = sent(wire, [tensor])
    assert not arrived.isfinite().all()


def test_top_k_keeps_the_largest_exactly_at_five_times_fewer_bytes():
    tensor = torch.randn(40, 512, generator=torch.Generator().manual_seed(0))
    wire = TopK(0.13)
    (arrived,) = sent(wire, [tensor])
    assert 4 * tensor.numel() / WireCost.of(wire.text).nbytes(tensor.numel()) >= 5
    kept = arrived != 0
    assert torch.equal(arrived[kept], tensor[kept])
    for chunk, is_kept in zip(
        tensor.view(-1, TOP_K_CHUNK), kept.view(-1, TOP_K_CHUNK), strict=True
    ):
        assert int(is_kept.sum()) == wire.per_chunk
        assert chunk[is_kept].abs().min() >= chunk[~is_kept].abs().max()


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.text)
def test_with_feedback_nothing_is_lost(wire):
    """What arrived over several rounds, and what is left, add up to what was sent."""
    generator = torch.Generator().manual_seed(0)
    total, arrived = torch.zeros(8, 700), torch.zeros(8, 700)
    error = torch.zeros(8, 700)
    for _ in range(40):
        update = torch.randn(8, 700, generator=generator)
        total += update
        (received,) = sent(wire, [update + error])
        error = update + error - received
        arrived += received
    assert torch.allclose(arrived + error, total, atol=1e-3)
    if not isinstance(wire, TopK):
        assert error.norm() < 2 * math.sqrt(8 * 700), "the error does not grow"


@pytest.mark.parametrize("name", ["int3", "topk:0", "topk:2", "topk:x", "topk:", 8, "fp16"])
def test_other_names_raise(name):
    with pytest.raises(ValueError, match="wire must be one of float32"):
        wire_of(name)


def test_names():
    for wire in WIRES:
        assert wire_of(wire.text) == wire


def test_directions_are_kept():
    """Cosine similarity of what arrives with what was sent."""
    tensor = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    cosines = {}
    for wire in WIRES:
        (arrived,) = sent(wire, [tensor])
        cosines[wire.text] = float((arrived * tensor).sum() / arrived.norm() / tensor.norm())
    assert cosines["int8"] > 0.9999
    assert cosines["int4"] > 0.98
    assert cosines["int2"] > 0.8
    assert cosines["topk:0.1"] > 0.6
