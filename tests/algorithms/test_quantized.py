"""Momentum in 8 and 4 bits: codes, and the same bits on every layout."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Shard

from muon_dtensor import DistributedConfig, GroupOptionError, Muon
from muon_dtensor.algorithms.quantized import (
    BLOCK,
    QuantizedMomentum,
    code_dtype,
    num_blocks,
    num_codes,
)
from muon_dtensor.distributed_config.full_tensor import cut_like
from muon_dtensor.runtime.torch_private import local_part
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.layouts import LAYOUTS
from tests.support.pool import run_processes
from tests.support.threads import run_threads

BITS = (8, 4)


def quantized(values: Tensor, bits: int) -> QuantizedMomentum:
    lead, size = values.shape[:-1], values.size(-1)
    momentum = QuantizedMomentum(
        torch.zeros((*lead, num_codes(size, bits)), dtype=code_dtype(bits)),
        torch.zeros((*lead, num_blocks(size))),
        bits,
        size,
    )
    momentum.store(values)
    return momentum


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(3, 64), (2, 129), (4, 1), (2, 3, 70), (0, 5), (3, 0)], ids=str)
def test_codes_are_near_and_encoding_is_idempotent(shape, bits):
    (values,) = tensors_like([shape], 0)
    momentum = quantized(values, bits)
    decoded = momentum.decoded()
    assert decoded.shape == shape
    again = quantized(decoded, bits)
    assert torch.equal(again.codes, momentum.codes)
    assert torch.equal(again.scales, momentum.scales)
    for block, original in zip(
        decoded.split(BLOCK, dim=-1), values.split(BLOCK, dim=-1), strict=True
    ):
        if not block.numel():
            continue
        largest = original.abs().amax(dim=-1, keepdim=True)
        relative = original.abs() / largest
        # half a step: of 1 / 127, or of (k / 7)^2 at this k
        step = 1 / 127 if bits == 8 else 2 * (relative.sqrt() + 0.5 / 7) / 7
        assert ((block - original).abs() <= 0.51 * step * largest).all()
        assert ((block.sign() == original.sign()) | (block == 0)).all()


@pytest.mark.parametrize("bits", BITS)
def test_zeros_and_extreme_scales(bits):
    values = torch.tensor([[0.0], [2.0**100], [2.0**-100]]).expand(3, 64)
    assert torch.equal(quantized(values, bits).decoded(), values)


def test_four_bits_pack_two_codes_per_byte():
    momentum = quantized(torch.tensor([[1.0, -1.0, 0.0, (3 / 7) ** 2, -((2 / 7) ** 2)]]), 4)
    assert momentum.codes.tolist() == [[7 | 15 << 4, 0 | 3 << 4, 10]]


SHAPES = ((12, 128), (7, 192), (24, 70), (3, 8, 130))
"""Last dims that are cut at multiples of 64 where a mesh dim of 2 or 4 cuts them, or not cut."""


def comparable(shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: Any) -> bool:
    """Whether the last dim of the shape is cut at blocks."""
    size = shape[-1]
    for ranks, placement in zip(mesh_shape, placements, strict=True):
        if placement == Shard(len(shape) - 1):
            if size % BLOCK or size // BLOCK % ranks:
                return False
            size //= ranks
    return True


def stepped(
    mesh_shape: tuple[int, ...], placements: tuple[Placement, ...], bits: int, dtype: torch.dtype
) -> list[str]:
    """Return what differs after three steps from the same steps on whole matrices."""
    mesh = mesh_of(mesh_shape)
    shapes = [s for s in SHAPES if comparable(s, mesh_shape, placements)]
    weights = tensors_like(shapes, 0, dtype)
    sharded = [nn.Parameter(spread(w, mesh, placements)) for w in weights]
    whole = [nn.Parameter(w.clone()) for w in weights]
    optimizers = []
    for params in (sharded, whole):
        groups = []
        for i, param in enumerate(params):
            group: dict[str, Any] = {"params": [(f"w{i}", param)]}
            if param.shape == (12, 128):  # blocks with elements of two matrices
                group |= {"split_sizes": (40, 88), "split_dim": 1}
            groups.append(group)
        cap = 1e-3 if params is sharded else 256
        optimizers.append(Muon(groups, lr=0.1, momentum_bits=bits, bucket_mb=cap))
    differing = []
    for step in range(3):
        for a, b, grad in zip(sharded, whole, tensors_like(shapes, 1 + step, dtype), strict=True):
            a.grad, b.grad = spread(grad, mesh, placements), grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for index, (a, b) in enumerate(zip(sharded, whole, strict=True)):
            states = (optimizers[0].state[a], optimizers[1].state[b])
            assert states[0].keys() == states[1].keys() == {"momentum_codes", "momentum_scales"}
            pairs = [("value", a.detach(), b.detach())]
            pairs += [(key, states[0][key], value) for key, value in states[1].items()]
            for key, actual, expected in pairs:
                if not torch.equal(actual.to_local(), cut_like(expected, actual).to_local()):
                    differing.append(f"{key} of w{index} after step {step}")
    return differing


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS)
def test_steps_are_the_same_on_every_layout(mesh_shape, placements, bits):
    num_ranks = torch.Size(mesh_shape).numel()
    dtype = torch.bfloat16 if bits == 4 else torch.float32
    assert run_threads(num_ranks, stepped, mesh_shape, placements, bits, dtype) == [[]] * num_ranks


@pytest.mark.P1
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("mesh_shape", "placements"), [LAYOUTS[4].values, LAYOUTS[-4].values])
def test_over_gloo(mesh_shape, placements, bits):
    num_ranks = torch.Size(mesh_shape).numel()
    outcomes = run_processes(num_ranks, stepped, mesh_shape, placements, bits, torch.float32)
    assert outcomes == [[]] * num_ranks


def updates(bits: int | None, steps: int = 10) -> Tensor:
    param = nn.Parameter(torch.zeros(32, 128))
    optimizer = Muon([param], lr=0.01, momentum_bits=bits)
    for step in range(steps):
        (param.grad,) = tensors_like([(32, 128)], step)
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.2)])
def test_steps_are_near_those_of_a_dense_momentum(bits, most):
    expected = updates(None)
    assert float((updates(bits) - expected).norm() / expected.norm()) < most


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(70, 12, bias=False), nn.Linear(12, 70, bias=False)


def resharded(bits: int, folder: Path) -> bool:
    """Save on four ranks by rows, load on 2 x 2 replicas and shards, and step."""
    values = []
    for mesh_shape in ((4,), (2, 2)):
        torch.manual_seed(0)
        model = Net()
        fully_shard(model, mesh=mesh_of(mesh_shape))
        optimizer = Muon(model.named_parameters(), lr=0.1, momentum_bits=bits)
        if mesh_shape == (4,):
            step(model, optimizer, 0)
            weights = {n: p.detach().full_tensor() for n, p in model.named_parameters()}
            dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=folder)
        else:
            for name, param in model.named_parameters():
                with torch.no_grad():
                    local_part(param).copy_(cut_like(weights[name], param).to_local())  # type: ignore[arg-type]
            state = get_optimizer_state_dict(model, optimizer)
            dcp.load(state, checkpoint_id=folder)
            set_optimizer_state_dict(model, optimizer, state)
        step(model, optimizer, 1)
        values.append([p.detach().full_tensor() for p in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def step(model: nn.Module, optimizer: Muon, seed: int) -> None:
    shapes = [tuple(p.shape) for p in model.parameters()]
    for param, grad in zip(model.parameters(), tensors_like(shapes, seed), strict=True):
        param.grad = cut_like(grad, param)  # type: ignore[arg-type]
    optimizer.step()


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_resharded_by_dcp(bits, tmp_path):
    assert run_processes(4, resharded, bits, tmp_path) == [True] * 4


def test_the_bits_of_a_group_may_change():
    """The momentum is converted; a state dict has the bits of its group."""
    param = nn.Parameter(torch.ones(4, 70))
    optimizer = Muon([param], lr=0.1)
    param.grad = torch.randn(4, 70, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    dense = optimizer.state[param]["momentum_buffer"].clone()
    for bits, most in ((8, 0.01), (4, 0.2), (None, 0.2)):
        optimizer.param_groups[0]["momentum_bits"] = bits
        param.grad = None
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        other = Muon([nn.Parameter(torch.ones(4, 70))], lr=0.1)
        other.load_state_dict(saved)
        (state,) = other.state.values()
        if bits is None:
            value = state["momentum_buffer"]
        else:
            assert state["momentum_codes"].dtype == code_dtype(bits)
            value = QuantizedMomentum(
                state["momentum_codes"], state["momentum_scales"], bits, 70
            ).decoded()
        assert float((value - dense).norm() / dense.norm()) < most


def cut_inside_a_block() -> str:
    param = nn.Parameter(spread(torch.ones(4, 100), mesh_of((2,)), (Shard(1),)))
    try:
        Muon([("layer.w", param)], momentum_bits=8)
    except GroupOptionError as error:
        return str(error)
    return ""


def test_what_cannot_be_quantized_raises():
    for message in run_threads(2, cut_inside_a_block):
        assert "momentum_bits=8 needs shards that begin at blocks of 64" in message
        assert "layer.w [4, 100] is cut at 50" in message
    param = nn.Parameter(torch.ones(4, 4))
    for name, value in (
        ("offload_momentum", True),
        ("shard_momentum", True),
        ("momentum_dtype", torch.bfloat16),
    ):
        with pytest.raises(GroupOptionError, match=f"momentum_bits and {name} exclude"):
            Muon([param], momentum_bits=8, **{name: value})
    with pytest.raises(GroupOptionError, match="momentum_bits must be one of"):
        Muon([param], momentum_bits=2)
    with pytest.raises(GroupOptionError, match="for Muon's groups only"):
        Muon([{"params": [param], "algorithm": "adamw", "momentum_bits": 8}])
    config = DistributedConfig(lambda *_: {}, lambda *_: None, lambda *_: None, {})
    with pytest.raises(GroupOptionError, match="needs a plan"):
        Muon([param], distributed_config=config, momentum_bits=8)
