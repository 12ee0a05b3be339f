"""bfloat16 weights that move: stochastic rounding and compensation, the same on every layout."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Placement

from muon_dtensor import DistributedConfig, GroupOptionError, Muon
from muon_dtensor.algorithms.rounding import (
    RandomKey,
    apply_rounded,
    random_bits,
    stochastically_rounded,
)
from muon_dtensor.algorithms.update import MatrixSlice
from muon_dtensor.layout import Region
from muon_dtensor.runtime.packing import box_of, element_numbers, view_box
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.layouts import LAYOUTS
from tests.support.pool import run_processes
from tests.support.separate import Separate
from tests.support.threads import run_threads

ROUNDINGS = ("stochastic", "compensated")
INTERLEAVED = {"matrix": "(i part) h -> part i h", "matrix_axes": {"part": 2}}
KEY = RandomKey(seed=3, step=5, stream=7)


def test_random_bits_are_uniform_and_depend_on_everything():
    elements = torch.arange(1 << 18)
    bits = random_bits(elements, KEY)
    assert (int(bits.min()) >= 0, int(bits.max()) < 1 << 16) == (True, True)
    spread_of_mean = (1 << 16) / 12**0.5 / len(bits) ** 0.5
    assert abs(float(bits.double().mean()) - ((1 << 16) - 1) / 2) < 4 * spread_of_mean
    for bit in range(16):
        share = float(((bits >> bit) & 1).double().mean())
        assert abs(share - 0.5) < 4 * 0.5 / len(bits) ** 0.5
    for other in (RandomKey(4, 5, 7), RandomKey(3, 6, 7), RandomKey(3, 5, 8)):
        agreeing = (random_bits(elements, other) == bits).double().mean()
        assert float(agreeing) < 1e-3
    correlation = torch.corrcoef(torch.stack([bits[1:], bits[:-1]]).double())[0, 1]
    assert abs(float(correlation)) < 0.01
    assert torch.equal(random_bits(elements[1000:2000], KEY), bits[1000:2000])
    assert not torch.equal(random_bits(elements + (1 << 32), KEY), bits)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_value_is_rounded_up_with_the_probability_of_its_distance(sign):
    """1 + k 2^-10 lies k eighths between two numbers of bfloat16."""
    for k in range(8):
        values = torch.full((1 << 16,), sign * (1 + k * 2.0**-10))
        rounded = stochastically_rounded(values, random_bits(torch.arange(len(values)), KEY))
        assert set(rounded.abs().tolist()) <= {1.0, 1.0078125}
        share = float((rounded.abs() > 1).double().mean())
        assert share == pytest.approx(k / 8, abs=0.01 if k else 0)


def test_values_of_bfloat16_infinities_and_nan_stay():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4096, generator=generator).bfloat16().float()
    values[:6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 2.0**-133])
    rounded = stochastically_rounded(values, random_bits(torch.arange(4096), KEY)).float()
    assert torch.equal(rounded.nan_to_num(7.0), values.nan_to_num(7.0))
    largest = torch.full((4096,), 3.3961e38)
    assert set(stochastically_rounded(largest, torch.full((4096,), 65535)).tolist()) == {torch.inf}


def test_numbers_of_the_elements_of_a_region():
    numbers = torch.arange(24 * 5).view(24, 5)
    oracle = Separate(torch.zeros(24, 5), INTERLEAVED)
    param = nn.Parameter(torch.zeros(24, 5))
    plan = Muon([{"params": [param], **INTERLEAVED}]).plan
    for matrix, expected in zip(plan.params[0].matrices, oracle.indices, strict=True):
        actual = element_numbers(matrix.region, (24, 5), torch.device("cpu"))
        assert torch.equal(actual.flatten(), expected)
    box = Region((3, 1), (7, 4))
    actual = element_numbers(box, (24, 5), torch.device("cpu"))
    assert torch.equal(actual, view_box(numbers, box_of(box, Region.of_shape((24, 5)))))


def test_a_skipped_update_changes_nothing():
    weight, update = (t.bfloat16() for t in tensors_like([(4, 6)] * 2, 0))
    half = (weight.abs() * 2.0**-9).bfloat16()
    place = MatrixSlice(4, 6, 0, is_transposed=False)
    for compensation in (half, None):
        param, kept = weight.clone(), None if compensation is None else compensation.clone()
        apply_rounded(
            param,
            update,
            place,
            decay=0.9,
            matrix_lr=0.1,
            keep=torch.tensor(False),
            compensation=kept,
            bits=torch.full((4, 6), 65535),
        )
        assert torch.equal(param, weight)
        assert kept is None or torch.equal(kept, half)


SHAPES = ((12, 10), (7, 20), (24, 6), (3, 8, 5))


def stepped(
    mesh_shape: tuple[int, ...], placements: tuple[Placement, ...], options: dict[str, Any]
) -> list[str]:
    """Return what differs after three steps from the same steps on whole matrices."""
    mesh = mesh_of(mesh_shape)
    weights = tensors_like(SHAPES, 0, torch.bfloat16)
    sharded = [nn.Parameter(spread(w, mesh, placements)) for w in weights]
    whole = [nn.Parameter(w.clone()) for w in weights]
    optimizers = []
    for params in (sharded, whole):
        named = [(f"w{i}", p) for i, p in enumerate(params)]
        groups = [{"params": named[:2] + named[3:]}, {"params": named[2:3], **INTERLEAVED}]
        optimizers.append(Muon(groups, lr=1e-3, **options))
    differing = []
    for step in range(3):
        for a, b, grad in zip(
            sharded, whole, tensors_like(SHAPES, 1 + step, torch.bfloat16), strict=True
        ):
            a.grad, b.grad = spread(grad, mesh, placements), grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for index, (a, b) in enumerate(zip(sharded, whole, strict=True)):
            pairs = [("value", a.detach(), b.detach())]
            states = (optimizers[0].state[a], optimizers[1].state[b])
            pairs += [(key, states[0][key], value) for key, value in states[1].items()]
            for key, actual, expected in pairs:
                shard = spread(expected, mesh, placements).to_local()
                if not torch.equal(actual.to_local(), shard):
                    differing.append(f"{key} of w{index} after step {step}")
    return differing


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS)
def test_steps_are_the_same_on_every_layout(mesh_shape, placements, rounding):
    num_ranks = torch.Size(mesh_shape).numel()
    options = {"weight_rounding": rounding, "rounding_seed": 9, "cautious_weight_decay": True}
    assert run_threads(num_ranks, stepped, mesh_shape, placements, options) == [[]] * num_ranks


@pytest.mark.P1
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("mesh_shape", "placements"), [LAYOUTS[3].values, LAYOUTS[-2].values])
def test_over_gloo(mesh_shape, placements, rounding):
    num_ranks = torch.Size(mesh_shape).numel()
    options = {"weight_rounding": rounding}
    assert run_processes(num_ranks, stepped, mesh_shape, placements, options) == [[]] * num_ranks


def trained(rounding: str | None, dtype: torch.dtype, steps: int = 200) -> tuple[Tensor, Tensor]:
    """Return weights, and how far they moved in some steps at lr 1e-3, without momentum."""
    (weight,) = tensors_like([(64, 64)], 0, torch.bfloat16)
    param = nn.Parameter(weight.to(dtype, copy=True))
    options = {} if rounding is None else {"weight_rounding": rounding}
    optimizer = Muon([("w", param)], lr=1e-3, weight_decay=0.1, momentum=0.0, **options)
    (drift,) = tensors_like([(64, 64)], 1)
    for step in range(steps):
        (noise,) = tensors_like([(64, 64)], 2 + step)
        param.grad = (drift + noise).bfloat16().to(dtype)
        optimizer.step()
    return param.detach().float(), param.detach().float() - weight.float()


def test_rounded_weights_follow_those_of_float32():
    """Torch's rounding leaves most weights where they were."""
    wide, expected = trained(None, torch.float32)
    _, nearest = trained("nearest", torch.bfloat16)
    assert float((nearest == 0).double().mean()) > 0.8
    assert float((nearest - expected).norm() / expected.norm()) > 0.5
    _, compensated = trained("compensated", torch.bfloat16)
    rounded_once = (wide.bfloat16().float() - wide).norm()
    assert float((compensated - expected).norm()) < 1.02 * float(rounded_once)
    _, stochastic = trained("stochastic", torch.bfloat16)
    assert float((stochastic - expected).norm() / expected.norm()) < 0.5
    slope = torch.sum(stochastic * expected) / torch.sum(expected * expected)
    assert float(slope) == pytest.approx(1, abs=0.05)


def test_weight_and_compensation_together_follow_float32_closely():
    (weight,) = tensors_like([(64, 64)], 0, torch.bfloat16)
    params = [nn.Parameter(weight.clone()), nn.Parameter(weight.float())]
    optimizers = [
        Muon([params[0]], lr=1e-3, momentum=0.0, weight_rounding="compensated"),
        Muon([params[1]], lr=1e-3, momentum=0.0),
    ]
    for step in range(100):
        (grad,) = tensors_like([(64, 64)], 1 + step, torch.bfloat16)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.to(param.dtype)
            optimizer.step()
    kept = optimizers[0].state[params[0]]["weight_compensation"].float()
    total = params[0].detach().float() + kept
    wide = params[1].detach()
    assert float((total - wide).norm() / wide.norm()) < 2.0**-15


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_resumed_run_goes_on_bitwise(rounding):
    (weight,) = tensors_like([(12, 10)], 0, torch.bfloat16)
    grads = tensors_like([(12, 10)] * 4, 1, torch.bfloat16)

    def run(param: nn.Parameter, optimizer: Muon, steps: range) -> None:
        for step in steps:
            param.grad = grads[step].clone()
            optimizer.step()

    def made(value: Tensor) -> tuple[nn.Parameter, Muon]:
        param = nn.Parameter(value.clone())
        return param, Muon([("w", param)], lr=1e-3, weight_rounding=rounding)

    param, optimizer = made(weight)
    run(param, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed, other = made(param.detach())
    other.load_state_dict(saved)
    run(param, optimizer, range(2, 4))
    run(resumed, other, range(2, 4))
    assert torch.equal(param, resumed)
    assert other.param_groups[0]["rounding_step"] == (4 if rounding == "stochastic" else 0)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_cannot_be_rounded_raises(rounding):
    options = {"weight_rounding": rounding}
    param = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    with pytest.raises(GroupOptionError, match=r"for bfloat16 weights.*float32"):
        Muon([nn.Parameter(torch.ones(4, 4))], **options)
    with pytest.raises(GroupOptionError, match="for Muon's groups only"):
        Muon([{"params": [param], "algorithm": "adamw", **options}])
    config = DistributedConfig(lambda *_: {}, lambda *_: None, lambda *_: None, {})
    with pytest.raises(GroupOptionError, match="needs a plan"):
        Muon([param], distributed_config=config, **options)
    with pytest.raises(GroupOptionError, match="weight_rounding must be one of"):
        Muon([param], weight_rounding="up")


def test_a_graph_cannot_round_stochastically():
    param = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    with pytest.raises(GroupOptionError, match="counts steps on the host"):
        Muon([param], weight_rounding="stochastic", capturable=True)
    Muon([param], weight_rounding="compensated", capturable=True)


def error_of_differing_counts() -> str:
    mesh = mesh_of((2,))
    param = nn.Parameter(spread(torch.ones(6, 4).bfloat16(), mesh, LAYOUTS[3].values[1]))
    optimizer = Muon([("w", param)], weight_rounding="stochastic")
    optimizer.param_groups[0]["rounding_step"] = 3 + dist.get_rank()
    param.grad = torch.ones_like(param)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_that_count_differently_raise():
    for message in run_threads(2, error_of_differing_counts):
        assert "rounding_step=3" in message
        assert "rounding_step=4" in message
