"""Plain shards and FSDP1 slices of any sizes: results are bitwise torch's; owners of assign_fn."""

from itertools import accumulate, pairwise
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import Replicate, Shard

from muon_dtensor import (
    AssignmentError,
    Muon,
    PlanReport,
    create_auto_config,
    create_devicemesh_config,
    create_dtensor_config,
    create_processgroup_config,
    group_parameters,
)
from muon_dtensor.errors import RefusalError
from muon_dtensor.layout import Layout, Matrix, MeshSpec, Region
from muon_dtensor.layout.from_shards import flat_layout_from_shards, layout_from_shards
from muon_dtensor.layout.matrices import flattened, matrices_of
from muon_dtensor.planning.check import check
from muon_dtensor.planning.plan import ParamSpec
from muon_dtensor.planning.report import plan_report
from tests.support.cases import Oracle, mesh_of, spread, tensors_like
from tests.support.meter import counting, installed
from tests.support.pool import run_processes
from tests.support.routes import check_routes
from tests.support.threads import run_threads

R, S0, S1 = Replicate(), Shard(0), Shard(1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_layout_of_shards_of_any_sizes(data):
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    mesh = MeshSpec.of(**dict(zip("abc", sizes, strict=False)))
    cuts: list[tuple[str, ...]] = [(), ()]
    for name in data.draw(st.permutations(mesh.dim_names)):
        tensor_dim = data.draw(st.sampled_from([None, 0, 1]))
        if tensor_dim is not None:
            cuts[tensor_dim] = (*cuts[tensor_dim], name)
    pieces = [
        data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
        for n in (mesh.num_ranks_along(dims) for dims in cuts)
    ]
    shapes = {
        position: tuple(
            sizes[mesh.index_along(position, dims)]
            for sizes, dims in zip(pieces, cuts, strict=True)
        )
        for position in range(mesh.num_ranks)
    }
    layout = layout_from_shards(mesh, cuts, shapes)
    assert layout.shape == tuple(map(sum, pieces))
    for position, shape in shapes.items():
        assert layout.region(position).shape == shape
    spec = ParamSpec("w", layout, "float32", matrices_of(layout.shape))
    plan = plan_report([spec])
    check(plan.plan)
    check_routes(plan.plan)
    assert PlanReport.from_json(plan.to_json()) == plan


def test_layouts_of_chunks_have_no_bounds():
    mesh = MeshSpec.of(fsdp=4)
    shapes = {0: (3, 5), 1: (3, 5), 2: (3, 5), 3: (1, 5)}
    assert layout_from_shards(mesh, [("fsdp",), ()], shapes) == Layout(
        mesh, (10, 5), (("fsdp",), ())
    )


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        (((0, 4, 8),), "1 bounds for 2"),
        (((0, 4, 7), (0, 3)), "do not cut"),
        (((0, 9, 8), (0, 3)), "do not cut"),
        (((1, 4, 8), (0, 3)), "do not cut"),
        (((0, 8), (0, 3)), "do not cut"),
        (((0, 4.0, 8), (0, 3)), "do not cut"),
    ],
    ids=str,
)
def test_invalid_bounds_raise(bounds, words):
    with pytest.raises(ValueError, match=words):
        Layout(MeshSpec.of(a=2), (8, 3), (("a",), ()), bounds)


def test_a_matrix_fills_its_region():
    with pytest.raises(ValueError, match="2 x 3 elements do not fill"):
        Matrix(Region((0,), (5,)), 2, 3)


def test_slices_that_do_not_form_the_tensor_raise():
    with pytest.raises(RefusalError, match="have 9 elements"):
        flat_layout_from_shards(MeshSpec.of(fsdp=2), "fsdp", (2, 5), {0: (0, 4), 1: (4, 5)})
    with pytest.raises(RefusalError, match=r"starts at element 0; .* would start at 5"):
        flat_layout_from_shards(MeshSpec.of(fsdp=2), "fsdp", (2, 5), {0: (0, 5), 1: (0, 5)})


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(4, 6), (7, 3), (1, 5), (3, 2, 4), (2, 1, 1)]),
    cuts=st.lists(st.integers(0, 30), min_size=3, max_size=3),
    owner=st.none() | st.integers(0, 3),
)
def test_flat_plans_route_every_element_once(shape, cuts, owner):
    numel = prod(shape)
    ends = [0, *sorted(min(cut, numel) for cut in cuts), numel]
    mesh = MeshSpec.of(fsdp=4)
    slices = {index: (a, b - a) for index, (a, b) in enumerate(pairwise(ends))}
    layout = flat_layout_from_shards(mesh, "fsdp", shape, slices)
    spec = ParamSpec("w", layout, "float32", tuple(flattened(m, shape) for m in matrices_of(shape)))
    plan = plan_report([spec], owners=None if owner is None else {"w": owner})
    check(plan.plan)
    check_routes(plan.plan)
    assert plan.cost.sent_nbytes
    assert f"[{', '.join(map(str, shape))}] stored flat" in str(plan)
    assert PlanReport.from_json(plan.to_json()) == plan
    if owner is not None:
        for matrix, rank in zip(spec.matrices, plan.owners["w"], strict=True):
            assert rank == owner or len(layout.holders(matrix.region)) == 1


def split_along(full: Tensor, sizes: list[int], tensor_dim: int, index: int) -> Tensor:
    return full.split(sizes, tensor_dim)[index].contiguous()


SHAPES = [(11, 6), (6, 11), (4, 4), (3, 5, 7), (1, 9)]


def parts(size: int, count: int, seed: int) -> list[int]:
    """Return uneven sizes of `count` pieces, some of them empty."""
    generator = torch.Generator().manual_seed(seed)
    ends = sorted(torch.randint(0, size + 1, (count - 1,), generator=generator).tolist())
    return [b - a for a, b in pairwise([0, *ends, size])]


def step_plain_shards(
    mesh_shape: tuple[int, ...], names: tuple[str, ...], dims: dict[str, Any], dtype: torch.dtype
) -> tuple[list[str], int, int]:
    """Step plain shards. `dims`: per group that cuts, one tensor dim, or one per parameter."""
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)

    def shard(full: Tensor, index: int) -> Tensor:
        for name in ("tp", "fsdp"):  # tensor parallelism cuts first
            if name not in dims:
                continue
            tensor_dim = dims[name] if isinstance(dims[name], int) else dims[name][index]
            if tensor_dim is not None:
                count, turn = mesh[name].size(), mesh.get_local_rank(name)
                sizes = parts(full.size(tensor_dim), count, index + len(name))
                full = split_along(full, sizes, tensor_dim, turn)
        return full.clone()

    weights = tensors_like(SHAPES, 0, dtype)
    params = [nn.Parameter(shard(w, i)) for i, w in enumerate(weights)]
    groups = {f"{name}_pg": mesh.get_group(name) for name in names}
    shard_dims = {f"{name}_shard_dim": tensor_dim for name, tensor_dim in dims.items()}
    config = create_processgroup_config(**groups, **shard_dims)
    optimizer = Muon(
        [(f"p{i}", p) for i, p in enumerate(params)],
        distributed_config=config,
        bucket_mb=2e-3,
        strategy="owned",
    )
    oracle = Oracle(weights)
    differing: list[str] = []
    with counting() as count:
        for step in range(3):
            grads = tensors_like(SHAPES, 1 + step, dtype)
            for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
                param.grad = shard(grad, index)
            optimizer.step()
            oracle.step(grads)
            for i, (param, *full_values) in enumerate(
                zip(params, oracle.results(), oracle.momenta(), strict=True)
            ):
                values = (param, optimizer.state[param]["momentum_buffer"])
                if not all(map(torch.equal, values, (shard(value, i) for value in full_values))):
                    differing.append(f"p{i} after step {step}")
    assert count.sent_nbytes == 3 * optimizer.plan.cost.sent_nbytes[dist.get_rank()]
    return differing, count.num_matrices, optimizer.plan.cost.num_matrices


PLAIN = [
    pytest.param((4,), ("fsdp",), {"fsdp": 0}, id="fsdp"),
    pytest.param((4,), ("tp",), {"tp": 1}, id="tp-1"),
    pytest.param((4,), ("tp",), {"tp": [0, 1, None, 2, 1]}, id="tp-mixed"),
    pytest.param((2, 2), ("fsdp", "tp"), {"fsdp": 0, "tp": 0}, id="fsdp-tp-same-dim"),
    pytest.param((3, 2), ("fsdp", "tp"), {"fsdp": 0, "tp": -1}, id="fsdp-tp"),
    pytest.param((2, 3), ("dp", "fsdp"), {"fsdp": 0}, id="hsdp"),
    pytest.param((2, 2), ("cp", "tp"), {"tp": 1}, id="cp-tp"),
    pytest.param((2, 2, 2), ("dp", "fsdp", "tp"), {"fsdp": 1, "tp": 0}, id="hsdp-tp"),
    pytest.param((1, 4), ("dp", "fsdp"), {"fsdp": 0}, id="a-group-of-one"),
    pytest.param((4,), ("dp",), {}, id="ddp"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("mesh_shape", "names", "dims"), PLAIN)
def test_plain_shards_are_bitwise_and_shared(mesh_shape, names, dims, dtype):
    num_ranks = prod(mesh_shape)
    with installed():
        outcomes = run_threads(num_ranks, step_plain_shards, mesh_shape, names, dims, dtype)
    assert [wrong for wrong, *_ in outcomes] == [[]] * num_ranks
    assert sum(done for _, done, _ in outcomes) == 3 * outcomes[0][2]


def shards_over_gloo() -> tuple[list[str], int, int]:
    with installed():
        return step_plain_shards(
            (2, 2), ("fsdp", "tp"), {"fsdp": 0, "tp": [0, 1, None, 2, 1]}, torch.float32
        )


@pytest.mark.P1
def test_plain_shards_over_gloo():
    assert [wrong for wrong, *_ in run_processes(4, shards_over_gloo)] == [[]] * 4


class Mixed(nn.Module):
    """Matrices, a bias, a norm, and a layer that can be left out of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 9)
        self.norm = nn.LayerNorm(9)
        self.second = nn.Linear(9, 5, bias=False)
        self.unused = nn.Linear(5, 5, bias=False)

    def forward(self, x: Tensor, with_unused: bool) -> Tensor:
        out = self.second(torch.tanh(self.norm(self.first(x))))
        return self.unused(out) if with_unused else out


def fsdp1_with_adamw(dtype: torch.dtype) -> tuple[list[str], set[str], set[str]]:
    """Step FSDP1 slices with set gradients; torch's Muon and AdamW step the full tensors."""
    torch.manual_seed(0)
    full_model = Mixed().to(dtype)
    names = [name for name, _ in full_model.named_parameters()]
    weights = [p.detach().clone() for p in full_model.parameters()]
    strategy = ShardingStrategy.NO_SHARD if dist.get_world_size() == 1 else None
    model = FullyShardedDataParallel(
        full_model, sharding_strategy=strategy, use_orig_params=True, device_id=torch.device("cpu")
    )
    groups = group_parameters(model, adamw={"lr": 2e-3})
    kinds = {g["algorithm"]: {name for name, _ in g["params"]} for g in groups}
    config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    optimizer = Muon(groups, lr=1e-3, distributed_config=config)
    params = dict(zip(names, model.parameters(), strict=True))
    starts = slice_starts(list(params.values()))
    plain = [nn.Parameter(w.clone()) for w in weights]
    matrices = [p for p in plain if p.ndim == 2]
    vectors = [p for p in plain if p.ndim != 2]
    oracles: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=1e-3),
        torch.optim.AdamW(vectors, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    differing: list[str] = []
    for step in range(4):
        grads = tensors_like([tuple(w.shape) for w in weights], 1 + step, dtype)
        for index, (name, param) in enumerate(params.items()):
            skipped = step == 2 and name == "unused.weight"
            flat = grads[index].flatten()[starts[index] : starts[index] + param.numel()]
            param.grad = None if skipped or not param.numel() else flat.clone().view_as(param)
            plain[index].grad = None if skipped else grads[index].clone()
        optimizer.step()
        for opt in oracles:
            opt.step()
        oracle_state = {p: values for opt in oracles for p, values in opt.state.items()}
        for index, (name, param) in enumerate(params.items()):
            own_slice = slice(starts[index], starts[index] + param.numel())
            own_state, vectors = optimizer.state[param], oracle_state[plain[index]]
            pairs = [(param, plain[index]), *((own_state[key], vectors[key]) for key in vectors)]
            if not all(
                torch.equal(a, b)
                if b.ndim == 0
                else torch.equal(a.flatten(), b.flatten()[own_slice])
                for a, b in pairs
            ):
                differing.append(f"{name} after step {step}")
    return differing, kinds["muon"], kinds["adamw"]


def slice_starts(params: list[nn.Parameter]) -> list[int]:
    """Return the offset of this rank's slice in each parameter."""
    numels: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(numels, [p.numel() for p in params])
    ends = [list(accumulate(by_param[i] for by_param in numels)) for i in range(len(params))]
    return [end[dist.get_rank()] - param.numel() for end, param in zip(ends, params, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_fsdp1_slices_are_bitwise(num_ranks, dtype):
    for wrong, muon, adamw in run_processes(num_ranks, fsdp1_with_adamw, dtype):
        assert wrong == []
        assert muon == {"first.weight", "second.weight", "unused.weight"}
        assert adamw == {"first.bias", "norm.weight", "norm.bias"}


def fsdp1_missing() -> str:
    model = FullyShardedDataParallel(Mixed(), use_orig_params=True, device_id=torch.device("cpu"))
    config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    optimizer = Muon(group_parameters(model), distributed_config=config)
    for param in model.parameters():
        if param.numel():
            param.grad = torch.ones_like(param)
    holders = [name for name, p in model.named_parameters() if p.numel()]
    if dist.get_rank() == 0:
        dict(model.named_parameters())[holders[0]].grad = None
    try:
        optimizer.step()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_missing_gradient_of_a_slice_raises_on_every_rank():
    for text in run_processes(3, fsdp1_missing):
        assert text.startswith("MissingGradientError")
        assert "first.weight: no gradient on rank 0" in text


def masked_slices() -> tuple[bool, str]:
    """Run a masked step, as on a GPU, with a slice that has no gradient on one rank."""
    model = FullyShardedDataParallel(Mixed(), use_orig_params=True, device_id=torch.device("cpu"))
    config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    optimizer = Muon(group_parameters(model), distributed_config=config, deferred_checks=True)
    params = dict(model.named_parameters())

    def give() -> None:
        for param in params.values():
            param.grad = torch.ones_like(param) if param.numel() else None

    give()
    optimizer.step()
    give()
    holders = [name for name, p in params.items() if p.numel()]
    if dist.get_rank() == 0:
        params[holders[0]].grad = None
    values = [*params.values(), *(v for p in params.values() for v in optimizer.state[p].values())]
    before = [value.detach().clone() for value in values]
    optimizer.step()
    same = all(map(torch.equal, before, values))
    give()
    try:
        optimizer.step()
    except RuntimeError as error:
        return same, type(error).__name__
    return same, ""


def test_a_masked_step_without_a_gradient_of_a_slice_changes_no_rank():
    assert run_processes(3, masked_slices) == [(True, "MissingGradientError")] * 3


def refusals(kind: str) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    group = mesh.get_group("tp")
    weight = nn.Parameter(torch.ones(4, 4))
    tensors: list[Any] = [("w", weight)]
    config: Any = create_auto_config(tp_process_group=group)
    match kind:
        case "beside-dtensors":
            tensors.append(("d", nn.Parameter(spread(torch.ones(4, 4), mesh["tp"], (S0,)))))
            config = create_auto_config(tp_process_group=group, tp_shard_dim=0)
        case "no-such-dim":
            config = create_auto_config(tp_process_group=group, tp_shard_dim=2)
        case "too-few":
            config = create_auto_config(tp_process_group=group, tp_shard_dim=[])
        case "not-named":
            config = create_auto_config(tp_process_group=group, tp_shard_dim={"v": 0})
        case "other-sizes":
            tensors = [("w", nn.Parameter(torch.ones(4, 4 + mesh.get_local_rank("tp"))))]
            config = create_auto_config(tp_process_group=group, tp_shard_dim=0)
        case "other-dims":
            shape = (4, 4) if mesh.get_local_rank("tp") else (2, 4, 4)
            tensors = [("w", nn.Parameter(torch.ones(shape)))]
            config = create_auto_config(tp_process_group=group, tp_shard_dim=0)
        case "other-names":
            tensors = [(f"w{mesh.get_local_rank('tp')}", weight)]
            config = create_auto_config(tp_process_group=group, tp_shard_dim=0)
        case "flat":
            model = FullyShardedDataParallel(
                nn.Linear(4, 4, bias=False), device_id=torch.device("cpu")
            )
            tensors, config = list(model.named_parameters()), None
        case "slices":
            model = FullyShardedDataParallel(
                nn.Linear(4, 4, bias=False), use_orig_params=True, device_id=torch.device("cpu")
            )
            tensors, config = list(model.named_parameters()), None
        case "two-cuts":
            model = FullyShardedDataParallel(
                nn.Linear(4, 4, bias=False),
                use_orig_params=True,
                device_id=torch.device("cpu"),
                process_group=mesh.get_group("dp"),
            )
            tensors = list(model.named_parameters())
            config = create_auto_config(
                fsdp_process_group=mesh.get_group("dp"), tp_process_group=group, tp_shard_dim=0
            )
    try:
        Muon(tensors, distributed_config=config)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no-dim", "PlanError.*which tensor dim the process group 'tp' cuts.*Give tp_shard_dim"),
        ("beside-dtensors", "PlanError.*It is a plain tensor beside DTensors or slices"),
        ("no-such-dim", "PlanError.*2 tensor dims, and 'tp' cuts dim 2"),
        ("too-few", "PlanError.*tensor dims were given for 0"),
        ("not-named", "PlanError.*Tensor dims were given for v.*Name it too"),
        ("other-sizes", "PlanError.*though tensor dim 1 is not cut"),
        ("other-dims", "PlanError.*Ranks hold shards of 2 and 3 tensor dims"),
        ("other-names", "PlanMismatchError.*different plain parameters.*w0.*w1"),
        ("flat", "PlanError.*use_orig_params=True"),
        ("slices", r"PlanError.*full shape is \[4, 4\].*create_auto_config"),
        ("two-cuts", "PlanError.*cut over one mesh dim, not over tp and fsdp"),
    ],
)
def test_invalid_plain_tensors_raise_on_every_rank(kind, words):
    import re

    for text in run_processes(4, refusals, kind):
        assert re.search(words, text.replace("\n", " ")), text


def with_owners(
    assignments: Any, placements: Any, plain: bool
) -> tuple[list[str], dict[str, tuple[int, ...]], int]:
    mesh = mesh_of((2, 2))
    weights = tensors_like([(8, 6), (3, 5), (6, 8), (2, 4, 3)], 0)
    called: list[int] = []

    def assign(params: Any, state: dict[str, Any]) -> Any:
        called.append(len(params))
        assert [tuple(p.shape) for p in params] == [tuple(w.shape) for w in weights]
        return assignments

    def place(full: Tensor) -> Tensor:
        return full.clone() if plain else spread(full, mesh, placements)

    config = create_devicemesh_config(mesh)
    config.assign_fn = assign
    params = [nn.Parameter(place(w)) for w in weights]
    named_params = [(f"p{i}", p) for i, p in enumerate(params)]
    optimizer = Muon(named_params, distributed_config=config, strategy="owned")
    oracle = Oracle(weights)
    for step in range(3):
        grads = tensors_like([tuple(w.shape) for w in weights], 1 + step)
        for param, grad in zip(params, grads, strict=True):
            param.grad = place(grad)
        optimizer.step()
        oracle.step(grads)
    differing = [
        f"p{i}"
        for i, (param, value) in enumerate(zip(params, oracle.results(), strict=True))
        if not torch.equal(local(param), local(place(value)))
    ]
    return differing, optimizer.plan.owners, len(called)


def local(tensor: Tensor) -> Tensor:
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard


@pytest.mark.parametrize(
    "assignments", [{0: 3, 1: 3, 2: 0, 3: 1}, {3: [0, 1], 0: [2], 1: (3,), 2: []}], ids=str
)
@pytest.mark.parametrize(
    ("placements", "plain"),
    [((S0, S0), False), ((R, S0), False), ((S0, S1), False), ((R, R), True)],
    ids=["rows-twice", "hsdp", "rows-and-cols", "plain"],
)
def test_owners_that_the_user_names(assignments, placements, plain):
    """Rank 3 holds no element of [3, 5] with rows cut twice, but can own it."""
    for wrong, owners, num_calls in run_processes(4, with_owners, assignments, placements, plain):
        assert wrong == []
        assert num_calls == 1
        assert (owners["p0"], owners["p1"], owners["p2"]) == ((3,), (3,), (0,))
        if plain:
            assert owners["p3"] == (1, 1)


def owner_elsewhere() -> str:
    """Assign a weight on each pair of ranks to rank 3; return the error."""
    mesh = mesh_of((2, 2))
    config = create_dtensor_config()
    config.assign_fn = lambda params, state: {0: 3}
    weight = nn.Parameter(spread(torch.ones(4, 4), mesh["b"], (S0,)))
    try:
        Muon([("w", weight)], distributed_config=config)
    except AssignmentError as error:
        return str(error)
    return ""


def test_an_owner_on_another_mesh():
    first, second, *other_ranks = run_threads(4, owner_elsewhere)
    for text in (first, second):
        assert "w is assigned to rank 3, but none of its matrices can be sent there" in text
        assert "stored on ranks [0, 1]" in text
    assert other_ranks == ["", ""]


def tp_under_ddp(permuted: bool) -> tuple[list[str], int, int, str]:
    ranks = torch.tensor([[3, 1], [0, 2]] if permuted else [[0, 1], [2, 3]])
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("dp", "tp"))
    weights = tensors_like([(8, 6), (6, 4), (4, 4)], 0)
    placements = [(S0,), (S1,), (R,)]
    params = [
        nn.Parameter(spread(w, mesh["tp"], p)) for w, p in zip(weights, placements, strict=True)
    ]
    optimizer = Muon(
        [(f"p{i}", p) for i, p in enumerate(params)],
        distributed_config=create_devicemesh_config(mesh),
        strategy="owned",
    )
    oracle = Oracle(weights)
    differing: list[str] = []
    with counting() as count:
        for step in range(3):
            grads = tensors_like([tuple(w.shape) for w in weights], 1 + step)
            for param, grad, placement in zip(params, grads, placements, strict=True):
                param.grad = spread(grad, mesh["tp"], placement)
            optimizer.step()
            oracle.step(grads)
    differing = [
        f"p{i}"
        for i, (param, value) in enumerate(zip(params, oracle.results(), strict=True))
        if not torch.equal(param.to_local(), spread(value, mesh["tp"], placements[i]).to_local())
    ]
    plan = optimizer.plan
    return differing, count.num_matrices, plan.cost.num_matrices, str(plan.meshes[0])


@pytest.mark.parametrize("permuted", [False, True])
def test_tensor_parallelism_under_ddp_shares_the_work(permuted):
    with installed():
        outcomes = run_threads(4, tp_under_ddp, permuted)
    assert [wrong for wrong, *_ in outcomes] == [[]] * 4
    assert sum(done for _, done, *_ in outcomes) == 3 * 3
    assert {mesh for *_, mesh in outcomes} == {"(dp=2, tp=2)"}
