"""Layouts of DTensors, compared with torch's own conversion and with real shards."""

import itertools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

from muon_dtensor.layout import Layout, MeshSpec, Region
from muon_dtensor.runtime.dtensors import LayoutCache, _cut_order, describe_mesh
from muon_dtensor.runtime.torch_private import this_rank
from tests.support.cases import mesh_of, spread
from tests.support.threads import run_threads


class MeshOfSizes:
    """The part of DeviceMesh that torch's own conversion reads."""

    def __init__(self, *sizes: int) -> None:
        self.shape = sizes
        self.ndim = len(sizes)

    def size(self, dim: int) -> int:
        return self.shape[dim]


KINDS = [
    *(Replicate(), Shard(0), Shard(1)),
    *(_StridedShard(0, split_factor=factor) for factor in (2, 3, 4, 6)),
    _StridedShard(1, split_factor=2),
]


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2), (2, 2, 3), (4, 3, 2)], ids=str)
def test_cut_order_is_torch_s(sizes):
    for placements in itertools.product(KINDS, repeat=len(sizes)):
        torch_order = DTensorSpec._maybe_convert_StridedShard_to_shard_order(
            placements, MeshOfSizes(*sizes)
        )
        if torch_order is None:
            with pytest.raises(ValueError, match="define no order"):
                _ = [_cut_order(placements, sizes, tensor_dim) for tensor_dim in (0, 1)]
            continue
        orders = {entry.tensor_dim: entry.mesh_dims for entry in torch_order}
        for tensor_dim in (0, 1):
            assert _cut_order(placements, sizes, tensor_dim) == orders.get(tensor_dim, ())


def real_shards(shape: tuple[int, int], num_rows: int, num_cols: int) -> list[str]:
    """Return differences between each rank's real shard and its region, by numbered elements."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    wrong = []
    for style in (ColwiseParallel(), RowwiseParallel()):
        linear = nn.Linear(num_cols, num_rows, bias=False)
        numbers = torch.arange(num_rows * num_cols, dtype=torch.float32).view(num_rows, num_cols)
        linear.weight.data.copy_(numbers)
        model = nn.Sequential(linear)
        parallelize_module(model, mesh["tp"], {"0": style})
        fully_shard(model, mesh=mesh["dp"])
        weight = linear.weight
        layout = LayoutCache().layout(weight)
        region = layout.region(layout.mesh.position_of(this_rank()))
        box = tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))
        if not torch.equal(weight.to_local(), numbers[box]):
            wrong.append(f"{weight.placements} {region}")
    return wrong


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (2, 3), (4, 2)], ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 5, 7, 12, 13, 33])
def test_regions_are_the_real_shards(shape, num_rows):
    outcomes = run_threads(torch.Size(shape).numel(), real_shards, shape, num_rows, 7)
    assert outcomes == [[]] * len(outcomes)


def plain_shards(mesh_shape: tuple[int, ...]) -> list[str]:
    mesh = mesh_of(mesh_shape)
    wrong = []
    for placements in itertools.product([Replicate(), Shard(0), Shard(1)], repeat=len(mesh_shape)):
        for shape in ((13, 7), (3, 2), (1, 1), (0, 5), (16, 8)):
            numbers = torch.arange(shape[0] * shape[1]).view(shape)
            tensor = spread(numbers, mesh, placements)
            layout = LayoutCache().layout(tensor)
            region = layout.region(layout.mesh.position_of(this_rank()))
            box = tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))
            if not torch.equal(tensor.to_local(), numbers[box]):
                wrong.append(f"{shape} {placements} {region}")
    return wrong


@pytest.mark.parametrize("mesh_shape", [(4,), (3, 2), (2, 2, 2), (2, 3, 2)], ids=str)
def test_regions_of_plain_placements(mesh_shape):
    outcomes = run_threads(torch.Size(mesh_shape).numel(), plain_shards, mesh_shape)
    assert outcomes == [[]] * len(outcomes)


def described() -> tuple[bool, bool, str]:
    mesh = init_device_mesh("cpu", (2, 2))
    layout_cache = LayoutCache()
    first = DTensor.from_local(torch.ones(2, 4), mesh, (Shard(0), Replicate()))
    second = DTensor.from_local(torch.ones(2, 4), mesh, (Shard(0), Replicate()))
    same_mesh = layout_cache.mesh(mesh) is layout_cache.mesh(init_device_mesh("cpu", (2, 2)))
    same_layout = layout_cache.layout(first) is layout_cache.layout(second)
    return same_mesh, same_layout, str(describe_mesh(mesh))


def test_equal_meshes_and_layouts_are_one_object():
    assert run_threads(4, described) == [(True, True, "(dim0=2, dim1=2)")] * 4


def test_mesh_arithmetic():
    mesh = MeshSpec.of(a=2, b=3, c=4)
    for position in range(24):
        for dims in [("a",), ("c", "a"), ("a", "b", "c"), ()]:
            index = mesh.index_along(position, dims)
            assert mesh.index_along(mesh.offset_of(index, dims), dims) == index
    assert mesh.peers(5, ("a", "c")) == (4, 5, 6, 7, 16, 17, 18, 19)
    turned = MeshSpec(("a", "b"), (2, 2), (0, 2, 1, 3))
    assert [turned.ranks[p] for p in turned.peers(0, ("a", "b"))] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeshSpec(("a", "a"), (2, 2), (0, 1, 2, 3)), "must differ"),
        (lambda: MeshSpec(("a",), (2,), (0, 1, 2)), "needs 2 ranks"),
        (lambda: MeshSpec(("a",), (2,), (1, 1)), "at most once"),
        (lambda: MeshSpec(("a",), (0,), ()), "at least one rank"),
        (lambda: Layout(MeshSpec.of(a=2), (4, 4), (("a",), ("a",))), "at most once"),
        (lambda: Layout(MeshSpec.of(a=2), (4, 4), (("x",), ())), "unknown mesh dims"),
        (lambda: Layout(MeshSpec.of(a=2), (4, 4), ((),)), "1 cuts for 2 tensor dims"),
    ],
)
def test_values_that_exist_are_valid(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_regions():
    full, part = Region.of_shape((4, 6)), Region((1, 2), (3, 9))
    assert full.intersect(part) == Region((1, 2), (3, 6))
    assert full.intersect(Region((4, 0), (5, 1))).numel == 0
    assert part.relative_to(Region((1, 1), (9, 9))) == Region((0, 1), (2, 8))
    assert full.covers(Region((1, 1), (2, 2)))
    assert not full.covers(part)
