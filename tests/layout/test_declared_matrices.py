"""Declared matrices: on every mesh, bitwise equal to matrices stored as separate parameters."""

import copy
import logging
from collections import Counter
from math import prod
from typing import Any

import einops
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from muon_dtensor import (
    GroupOptionError,
    Muon,
    PlanError,
    PlanReport,
    create_auto_config,
    group_parameters,
)
from muon_dtensor.distributed_config.full_tensor import cut_like
from muon_dtensor.layout import Layout, MeshSpec, Region
from muon_dtensor.layout.declarations import Declaration
from muon_dtensor.optimizer.options import DECLARED
from muon_dtensor.planning.check import check
from muon_dtensor.planning.plan import ParamSpec
from muon_dtensor.planning.report import plan_report
from muon_dtensor.planning.routes import rank_bucket
from muon_dtensor.runtime.packing import box_of, from_matrix, to_matrix, view_box
from tests.support.cases import mesh_of, spread, tensors_like
from tests.support.layouts import LAYOUTS
from tests.support.meter import counting, installed
from tests.support.pool import run_processes
from tests.support.routes import check_routes
from tests.support.separate import Separate
from tests.support.threads import run_threads

R, S0, S1 = Replicate(), Shard(0), Shard(1)

HEADS = "(qkv head dim) model -> qkv head dim model"
DECLARATIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "fused-heads": ((24, 10), {"matrix": HEADS, "matrix_axes": {"qkv": 3, "head": 2}}),
    "split": ((15, 8), {"split_sizes": (9, 3, 3)}),
    "split-cols": ((6, 14), {"split_sizes": (4, 8, 2), "split_dim": 1}),
    "split-then-heads": (
        (16, 6),
        {
            "split_sizes": (8, 4, 4),
            "matrix": ("(head dim) m -> head dim m", "(head dim) m -> head dim m", None),
            "matrix_axes": {"dim": 2},
        },
    ),
    "output-heads": ((7, 12), {"matrix": "m (h d) -> h m d", "matrix_axes": {"h": 4}}),
    "convolution": ((9, 4, 3, 2), {"matrix": "o i kh kw -> o (i kh kw)"}),
    "experts": ((5, 6, 4), {"matrix": "e m n -> e m n"}),
    "experts-folded": ((12, 5), {"matrix": "(e m) n -> e m n", "matrix_axes": {"e": 3}}),
    "transposed": ((6, 9), {"matrix": "i o -> o i"}),
    "transposed-fused": ((6, 15), {"matrix": "i (k o) -> k o i", "matrix_axes": {"k": 3}}),
    "depthwise": ((8, 1, 3), {"matrix": "c 1 k -> c k"}),
    "folded-both": ((4, 6, 5), {"matrix": "a b c -> (c a) b"}),
    "gate-up": ((22, 6), {"matrix": "(i two) h -> two i h", "matrix_axes": {"two": 2}}),
    "gate-up-of-experts": (
        (3, 10, 4),
        {"matrix": "e h (i two) -> e two h i", "matrix_axes": {"two": 2}},
    ),
    "grouped-qkv": (
        (36, 5),
        {
            "matrix": "(group part dim) h -> (group part dim) h",
            "matrix_axes": {"dim": 2},
            "split_sizes": (4, 1, 1),
            "split_dim": "part",
        },
    ),
    "grouped-queries-by-head": (
        (24, 5),
        {
            "matrix": (
                "(group part dim) h -> group part dim h",
                *["(group part dim) h -> (group part dim) h"] * 2,
            ),
            "matrix_axes": {"group": 2, "dim": 3},
            "split_sizes": (2, 1, 1),
            "split_dim": "part",
        },
    ),
    "interleaved-twice": (
        (8, 9),
        {"matrix": "(a e) (b f) -> e f b a", "matrix_axes": {"e": 2, "f": 3}},
    ),
    "three-levels": (
        (24, 4),
        {"matrix": "(a x b y) n -> x y (a b) n", "matrix_axes": {"a": 2, "x": 3, "b": 2}},
    ),
}


def compare(
    mesh_shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    dtype: torch.dtype,
    muon: dict[str, Any],
    ours: dict[str, Any] | None = None,
) -> tuple[list[str], int, int]:
    mesh = mesh_of(mesh_shape)
    shapes = [shape for shape, _ in DECLARATIONS.values()]
    weights = tensors_like(shapes, 0, dtype)
    params = [nn.Parameter(spread(w, mesh, placements)) for w in weights]
    groups = [
        {"params": [(name, param)], **options}
        for (name, (_, options)), param in zip(DECLARATIONS.items(), params, strict=True)
    ]
    optimizer = Muon(groups, **{"bucket_mb": 2e-3, "strategy": "owned", **muon, **(ours or {})})
    oracles = [
        Separate(w, options, **muon)
        for w, (_, options) in zip(weights, DECLARATIONS.values(), strict=True)
    ]
    mismatches: list[str] = []
    with counting() as count:
        for step in range(3):
            for param, grad, oracle in zip(
                params, tensors_like(shapes, 1 + step, dtype), oracles, strict=True
            ):
                param.grad = spread(grad, mesh, placements)
                oracle.step(grad)
            optimizer.step()
            for name, param, oracle in zip(DECLARATIONS, params, oracles, strict=True):
                momentum = optimizer.state[param]["momentum_buffer"]
                for actual, expected in (
                    (param, oracle.full_tensor()),
                    (momentum, oracle.momentum()),
                ):
                    shard = cut_like(expected, actual).to_local()
                    if not torch.equal(actual.to_local(), shard):
                        mismatches.append(f"{name} after step {step}")
    plan = optimizer.plan
    assert count.sent_nbytes == 3 * plan.cost.sent_nbytes[dist.get_rank()]
    check(plan.plan)
    check_routes(plan.plan)
    assert PlanReport.from_json(plan.to_json()) == plan
    return mismatches, count.num_matrices, plan.cost.num_matrices


@pytest.mark.parametrize(
    ("dtype", "muon"),
    [
        pytest.param(torch.float32, {}, id="fp32"),
        pytest.param(torch.bfloat16, {}, id="bf16"),
        pytest.param(torch.float32, {"adjust_lr_fn": "match_rms_adamw"}, id="match-rms"),
    ],
)
@pytest.mark.parametrize(
    ("mesh_shape", "placements"), [*LAYOUTS, pytest.param((3, 2), (S0, S0), id="rows-3-by-2")]
)
def test_bitwise_equal_to_separate_parameters(mesh_shape, placements, dtype, muon):
    num_ranks = torch.Size(mesh_shape).numel()
    with installed():
        outcomes = run_threads(num_ranks, compare, mesh_shape, placements, dtype, muon)
    assert [mismatches for mismatches, *_ in outcomes] == [[]] * num_ranks
    assert sum(num_done for _, num_done, _ in outcomes) == 3 * outcomes[0][2]


@pytest.mark.parametrize(
    "ours",
    [
        {"shard_momentum": True},
        {"strategy": "owned_staged"},
        {"deferred_checks": True},
        {"bucket_mb": 1e-5, "prefetch_count": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS[1::3])
def test_options(mesh_shape, placements, ours):
    num_ranks = torch.Size(mesh_shape).numel()
    arguments = (mesh_shape, placements, torch.float32, {}, ours)
    with installed():
        outcomes = run_threads(num_ranks, compare, *arguments)
    assert [mismatches for mismatches, *_ in outcomes] == [[]] * num_ranks


def over_gloo(placements: tuple[Placement, ...]) -> list[str]:
    with installed():
        return compare((2, 2), placements, torch.float32, {})[0]


@pytest.mark.P1
@pytest.mark.parametrize("placements", [(R, S0), (S0, S1), (S0, S0)])
def test_bitwise_over_gloo(placements):
    assert run_processes(4, over_gloo, placements) == [[]] * 4


class FusedAttention(nn.Module):
    """Two heads of 5 features: query, key and value in one weight, and the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.wqkv, self.wo = nn.Linear(8, 30, bias=False), nn.Linear(30, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(torch.tanh(self.wqkv(x)))


def real_tp_and_fsdp() -> list[str]:
    """Train with parallelize_module, then fully_shard: rows are cut by tp first (_StridedShard).

    Returns the names of parameters that differ from separate ones.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(3)
    model = FusedAttention()
    styles = {"wqkv": ColwiseParallel(), "wo": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], styles)
    fully_shard(model, mesh=mesh["dp"])
    options: dict[str, dict[str, Any]] = {
        "wqkv.weight": {"split_sizes": (10, 10, 10), "matrix": "(h d) m -> h d m"},
        "wo.weight": {"matrix": "m (h d) -> h m d"},
    }
    for option in options.values():
        option["matrix_axes"] = {"d": 5}
    params = dict(model.named_parameters())
    groups = [{"params": [(name, params[name])], **options[name]} for name in options]
    optimizer = Muon(groups)
    oracles = {n: Separate(params[n].full_tensor().detach(), o) for n, o in options.items()}
    for step in range(3):
        model(tensors_like([(6, 8)], step)[0]).square().mean().backward()
        for name, oracle in oracles.items():
            oracle.step(params[name].grad.full_tensor())
        optimizer.step()
        optimizer.zero_grad()
    return [
        n for n, o in oracles.items() if not torch.equal(params[n].full_tensor(), o.full_tensor())
    ]


def test_real_tensor_parallelism_under_fsdp():
    assert run_processes(4, real_tp_and_fsdp) == [[]] * 4


def flat_parameters_of_fsdp1() -> list[str]:
    """Train with FSDP1, whose shards are slices of flat weights.

    Returns the names of parameters that differ from separate ones.
    """
    torch.manual_seed(3)
    model = FusedAttention()
    plain = copy.deepcopy(model)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    options: dict[str, dict[str, Any]] = {
        "wqkv.weight": {"matrix": "(d part) m -> part m d", "matrix_axes": {"d": 10}},
        "wo.weight": {"matrix": "m (h d) -> h m d", "matrix_axes": {"d": 5}},
    }
    params = dict(wrapped.module.named_parameters())
    groups = [{"params": [(name, params[name])], **options[name]} for name in options]
    config = create_auto_config(fsdp_process_group=dist.group.WORLD)
    optimizer = Muon(groups, distributed_config=config)
    oracles = {n: Separate(p.detach(), options[n]) for n, p in plain.named_parameters()}
    for step in range(3):
        (x,) = tensors_like([(6, 8)], step)
        for each in (wrapped, plain):
            each(x).square().mean().backward()
        for name, param in plain.named_parameters():
            oracles[name].step(param.grad)
            with torch.no_grad():
                param.copy_(oracles[name].full_tensor())
        optimizer.step()
        for zeroed in (optimizer, plain):
            zeroed.zero_grad()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        full = {name: param.detach().clone() for name, param in wrapped.module.named_parameters()}
    return [n for n, o in oracles.items() if not torch.equal(full[n], o.full_tensor())]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_flat_parameters_of_fsdp1(num_ranks):
    assert run_processes(num_ranks, flat_parameters_of_fsdp1) == [[]] * num_ranks


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_boxes_match_einops_rearrange(data):
    """Any pattern, on a tensor that holds the element indices."""
    lengths = {n: data.draw(st.integers(1, 3)) for n in "abcdef"[: data.draw(st.integers(2, 6))]}
    axes = list(data.draw(st.permutations(list(lengths))))
    batch = set(data.draw(st.lists(st.sampled_from(axes), max_size=3)))
    composites: list[list[str]] = [[] for _ in range(data.draw(st.integers(1, 4)))]
    for name in axes:
        data.draw(st.sampled_from(composites)).append(name)
    left = composites
    inner = list(data.draw(st.permutations([n for n in axes if n not in batch])))
    num_row_axes = data.draw(st.integers(0, len(inner)))
    outer = list(data.draw(st.permutations(sorted(batch))))
    right = [*([n] for n in outer), inner[:num_row_axes], inner[num_row_axes:]]
    pattern = " -> ".join(" ".join(f"({' '.join(c)})" for c in side) for side in (left, right))
    shape = tuple(prod(lengths[n] for n in c) for c in left)
    numbers = torch.arange(prod(shape)).view(shape)
    expected = einops.rearrange(numbers, pattern, **lengths)
    matrices = Declaration(pattern, tuple(lengths.items())).matrices(shape)
    tensors = [
        to_matrix(view_box(numbers, box_of(m.region, Region.of_shape(shape))).contiguous(), m)
        for m in matrices
    ]
    assert torch.equal(torch.stack(tensors), expected.reshape(-1, *expected.shape[-2:]))
    for matrix, tensor in zip(matrices, tensors, strict=True):
        box = view_box(numbers, box_of(matrix.region, Region.of_shape(shape)))
        assert torch.equal(from_matrix(tensor, matrix), box.reshape(matrix.region.shape))


def plan_of(sizes: dict[str, int], shape: tuple[int, ...], cuts: Any, **options: Any) -> PlanReport:
    axes = tuple(options.pop("matrix_axes", {}).items())
    declaration = Declaration(options.pop("matrix", None), axes, **options)
    layout = Layout(MeshSpec.of(**sizes), shape, cuts)
    return plan_report([ParamSpec("w", layout, "float32", declaration.matrices(shape))])


def test_heads_on_one_rank_send_no_bytes():
    plan = plan_of(
        *({"fsdp": 4}, (32 * 8, 64), (("fsdp",), ())),
        matrix="(h d) m -> h d m",
        matrix_axes={"h": 32},
    )
    assert plan.cost.num_matrices == 32
    assert plan.cost.total_nbytes == 0


def test_only_heads_cut_over_ranks_are_sent():
    """Six heads of 8 rows on ranks of 12 rows: each odd head is cut in half."""
    plan = plan_of(
        *({"fsdp": 4}, (48, 64), (("fsdp",), ())), matrix="(h d) m -> h d m", matrix_axes={"h": 6}
    )
    half_a_head = 4 * 64 * 2
    assert plan.cost.total_nbytes == 2 * 2 * half_a_head, "half of two heads, to the owner and back"


def test_interleaved_halves_send_each_element_once_to_its_owner():
    """Two matrices of alternate rows, on ranks of 3 rows: 2 of one and 1 of the other."""
    plan = plan_of(
        *({"fsdp": 4}, (12, 64), (("fsdp",), ())),
        matrix="(i two) h -> two i h",
        matrix_axes={"two": 2},
    )
    assert plan.cost.total_nbytes == 2 * 2 * (6 - 2) * 64 * 2, "all but two rows, out and back"


def test_a_rank_packs_a_part_of_an_interleaved_matrix_as_at_most_three_views():
    """Whole groups are one view; a group that a shard begins or ends in is another."""
    shape, options = (36 * 20, 5), DECLARATIONS["grouped-qkv"][1]
    plan = plan_of({"fsdp": 7}, shape, (("fsdp",), ()), **options).plan
    for position in range(7):
        for collective in rank_bucket(plan, plan.buckets[0], position).unshard:
            counts = Counter(slot.assignment for slot in collective.send.slots)
            assert max(counts.values()) <= 3


def test_a_fused_qkv_sends_at_most_its_boundary_matrices_twice():
    plan = plan_of({"fsdp": 3}, (768, 256), (("fsdp",), ()), split_sizes=(512, 128, 128))
    layout = plan.params[0].layout
    cut = [m for m in plan.params[0].matrices if len(layout.holders(m.region)) > 1]
    assert 0 < plan.cost.total_nbytes <= 2 * sum(2 * matrix.numel for matrix in cut)


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((6, 4), {"matrix": "(e m) n -> e m n"}, ["lengths of e, m", "matrix_axes"]),
        ((7, 4), {"matrix": "(e m) n -> e m n", "matrix_axes": {"e": 2}}, ["is 2 x m", "dim is 7"]),
        (
            (6, 4),
            {"matrix": "(g s) n -> (g s) n", "split_sizes": (2, 2), "split_dim": "s"},
            ["(g s) is g x 4", "dim is 6"],
        ),
        (
            (6, 4),
            {"matrix": "(g s) n -> (g s) n", "split_sizes": (2, 2), "split_dim": "s"}
            | {"matrix_axes": {"s": 3}},
            ["(2, 2) sum to 4", "axis s has length 3"],
        ),
        (
            (6, 4),
            {"matrix": "g n -> g n", "split_sizes": (2, 2), "split_dim": "s"},
            ["split_dim is 's'", "g, n"],
        ),
        ((6, 4), {"matrix": "a b c -> a b c"}, ["names 3 stored axes", "has 2 dims"]),
        ((6, 4), {"matrix": "a b -> (a b)"}, ["fewer than two axes"]),
        ((6, 4), {"matrix": "a b -> a c"}, ["on one side only: b, c"]),
        ((6, 4), {"matrix": "a a -> a a"}, ["occurs twice"]),
        ((6, 4), {"matrix": "a b"}, ["exactly one '->'"]),
        ((6, 4), {"matrix": "... b -> ... b"}, ["'... b' is not a list of axes"]),
        ((6, 4), {"matrix": "(a (b c)) d -> a b d"}, ["is not a list of axes"]),
        ((6, 4), {"matrix": "2 b -> 2 b"}, ["'2' is not an axis name"]),
        ((6, 4), {"matrix": "_a b -> b _a"}, ["'_a' is not an axis name"]),
        ((6, 4), {"split_sizes": (4, 4)}, ["(4, 4) sum to 8", "has 6"]),
        ((6, 4), {"split_sizes": (6,), "split_dim": 2}, ["split_dim is 2", "2 tensor dims"]),
        ((6, 4), {"split_sizes": (3, 3), "matrix": ("a b -> a b",)}, ["1 patterns for 2 blocks"]),
        ((6,), {"split_sizes": (3, 3)}, ["one tensor dim"]),
    ],
    ids=str,
)
def test_declarations_that_do_not_fit_raise(shape, options, words):
    param = nn.Parameter(torch.ones(shape))
    with pytest.raises(PlanError) as caught:
        Muon([{"params": [("layer.w", param)], **options}])
    for word in ["layer.w", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"matrix": 3},
        {"matrix": ("a b -> a b",)},
        {"matrix_axes": {"a": 0}},
        {"matrix_axes": [("a", 2)]},
        {"split_sizes": 4},
        {"split_sizes": ()},
        {"split_sizes": (4, 0)},
        {"split_dim": "rows"},
        {"split_dim": "rows", "split_sizes": (2, 2)},
        {"split_dim": 1.0, "split_sizes": (2, 2)},
        {"split_dim": 1},
        {"matrix_axes": {"a": 2}},
        {"matrix": "a b -> a b", "matrix_axes": {"c": 2}},
        {"orthogonalizer": "svd"},
        {"orthogonalizer": None},
    ],
    ids=str,
)
def test_invalid_group_options_raise(options):
    with pytest.raises(GroupOptionError):
        Muon([{"params": [nn.Parameter(torch.ones(4, 4))], **options}])


def test_the_plan_lists_the_matrices():
    param = nn.Parameter(torch.ones(24, 10))
    options = DECLARATIONS["fused-heads"][1]
    plan = Muon([{"params": [("wqkv", param)], **options}]).plan
    assert "6 matrices" in str(plan)
    assert "6 matrices [0:4, 0:10] to [20:24, 0:10]" in plan.explain("wqkv")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gate-up", "2 matrices [0:21:2, 0:6] to [1:22:2, 0:6]"),
        ("grouped-qkv", "matrix [(0:8, 3 times every 12), 0:5]"),
        ("interleaved-twice", "6 matrices [0:7:2, 0:7:3] to [1:8:2, 2:9:3]"),
    ],
)
def test_the_plan_lists_interleaved_matrices(name, text):
    shape, options = DECLARATIONS[name]
    plan = Muon([{"params": [("w", nn.Parameter(torch.ones(shape)))], **options}]).plan
    assert text in plan.explain("w")


class Fused(nn.Module):
    """A fused projection, a convolution and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(8, 16, bias=False)
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.norm = nn.LayerNorm(8)


def fused_optimizer(model: nn.Module) -> Muon:
    rules = [
        (
            "wqkv",
            {
                "split_sizes": (8, 4, 4),
                "matrix": ("(head dim) m -> head dim m", None, None),
                "matrix_axes": {"head": 2},
            },
        ),
        ("conv", {"matrix": "o i kh kw -> o (i kh kw)", "orthogonalizer": "polar_express"}),
    ]
    return Muon(group_parameters(model, rules=rules))


def declared(optimizer: Muon) -> list[Any]:
    names = ("matrix", "matrix_axes", "split_sizes", "split_dim", "orthogonalizer")
    return [[group[name] for name in names] for group in optimizer.param_groups]


def set_gradients(model: nn.Module, seed: int) -> None:
    params = list(model.parameters())
    grads = tensors_like([tuple(p.shape) for p in params], seed)
    for param, grad in zip(params, grads, strict=True):
        param.grad = distribute_tensor(grad, param.device_mesh, param.placements)  # type: ignore[attr-defined]


def through_checkpoints(flatten: bool) -> tuple[bool, bool]:
    """Return whether (a step after loading equals one without, declarations are equal)."""
    mesh = mesh_of((2,))
    models, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = fully_shard(Fused(), mesh=mesh)
        models.append(model)
        optimizers.append(fused_optimizer(model))
    set_gradients(models[0], 1)
    optimizers[0].step()
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = copy.deepcopy(get_optimizer_state_dict(models[0], optimizers[0], options=options))
    with torch.no_grad():
        for target, source in zip(models[1].parameters(), models[0].parameters(), strict=True):
            target.to_local().copy_(source.to_local())  # type: ignore[attr-defined]
    set_optimizer_state_dict(models[1], optimizers[1], saved, options=options)
    for model, optimizer in zip(models, optimizers, strict=True):
        set_gradients(model, 2)
        optimizer.step()
    same = [
        torch.equal(a.to_local(), b.to_local())  # type: ignore[attr-defined]
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True)
    ]
    return all(same), declared(optimizers[0]) == declared(optimizers[1])


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
def test_declarations_survive_dcp_state_dicts(flatten):
    assert run_processes(2, through_checkpoints, flatten) == [(True, True)] * 2


@pytest.mark.parametrize("live", ["declared", "undeclared"])
def test_the_live_declaration_wins_over_that_of_a_checkpoint(live, caplog):
    """One warning reports the difference."""
    group = fused_optimizer(Fused()).param_groups[0]
    declaration = {name: group[name] for name in DECLARED}
    with_heads = Muon([{"params": [Fused().wqkv.weight], **declaration}])
    undeclared = Muon([Fused().wqkv.weight])
    optimizer, other = (with_heads, undeclared) if live == "declared" else (undeclared, with_heads)
    before, digest = declared(optimizer), optimizer.plan.digest
    optimizer.load_state_dict(other.state_dict())
    assert declared(optimizer) == before
    assert optimizer.plan.digest == digest
    assert caplog.text.count("the checkpoint declares other matrices") == 1
    caplog.clear()
    optimizer.load_state_dict(optimizer.state_dict())
    assert "the checkpoint declares" not in caplog.text


def test_declarations_survive_deepcopy():
    optimizer = fused_optimizer(Fused())
    assert declared(copy.deepcopy(optimizer)) == declared(optimizer)


def test_a_checkpoint_without_declarations_leaves_the_live_ones():
    optimizer = fused_optimizer(Fused())
    del optimizer.param_groups[1:]  # torch's Muon has the projection only
    before = declared(optimizer)
    torch_optimizer = torch.optim.Muon([Fused().wqkv.weight])
    optimizer.load_state_dict(torch_optimizer.state_dict())
    assert declared(optimizer) == before
    assert optimizer.plan.cost.num_matrices == 4


def test_a_declaration_that_does_not_fit_is_not_loaded():
    optimizer = fused_optimizer(Fused())
    before, digest = declared(optimizer), optimizer.plan.digest
    broken = copy.deepcopy(optimizer.state_dict())
    broken["param_groups"][0].update({"orthogonalizer": "custom"})
    with pytest.raises(ValueError, match="custom"):
        optimizer.load_state_dict(broken)
    assert declared(optimizer) == before
    assert optimizer.plan.digest == digest


def test_a_declaration_that_changes_between_steps_gives_a_new_plan():
    model, expected = Fused(), Fused()
    expected.load_state_dict(model.state_dict())
    optimizer, oracle = Muon([model.wqkv.weight]), fused_optimizer(expected)
    del oracle.param_groups[1:]
    declaration = {name: oracle.param_groups[0][name] for name in DECLARED}
    optimizer.param_groups[0].update(declaration)
    for module, stepped in ((model, optimizer), (expected, oracle)):
        module.wqkv.weight.grad = tensors_like([tuple(module.wqkv.weight.shape)], 1)[0]
        for group in stepped.param_groups:
            group["lr"] = 0.1
        stepped.step()
    assert torch.equal(model.wqkv.weight, expected.wqkv.weight)
    assert optimizer.plan.cost.num_matrices == oracle.plan.cost.num_matrices > 1
    axes = {"head": 2}
    heads = Muon(
        [
            {
                "params": [expected.wqkv.weight],
                "matrix": "(head d) m -> head d m",
                "matrix_axes": axes,
            }
        ]
    )
    heads.param_groups[0]["matrix_axes"]["head"] = 4  # in place
    heads.step()
    assert heads.plan.cost.num_matrices == 4


@pytest.mark.parametrize("pattern", ["tensor axis -> axis tensor", "in pattern -> pattern in"])
def test_axes_may_have_names_that_einops_rejects(pattern):
    param = nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([{"params": [param], "matrix": pattern}])
    param.grad = torch.randn(4, 6)
    optimizer.step()
    assert optimizer.plan.params[0].matrices[0].rows == 6


def error_of_differing_declarations() -> str:
    mesh = mesh_of((2,))
    sizes = (2, 4) if dist.get_rank() else (3, 3)
    param = nn.Parameter(spread(torch.ones(6, 4), mesh, (R,)))
    optimizer = Muon([{"params": [("w", param)], "split_sizes": sizes}])
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def test_declarations_that_differ_between_ranks_raise_on_both():
    for message in run_threads(2, error_of_differing_declarations):
        assert "split_sizes=(2, 4)" in message
        assert "split_sizes=(3, 3)" in message


def test_folded_experts_without_a_rule_log_a_warning(caplog):
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.ones(12, 4))
            self.stacked_experts = nn.Parameter(torch.ones(3, 4, 4))

    rule = {"matrix": "(e m) n -> e m n", "matrix_axes": {"e": 3}}
    with caplog.at_level(logging.WARNING, logger="muon_dtensor"):
        optimizer = Muon(group_parameters(Experts(), rules=[(r"^experts", rule)]))
        assert caplog.text == ""
        group_parameters(nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])}))
        assert caplog.text == ""
        group_parameters(Experts())
    assert optimizer.plan.cost.num_matrices == 6
    assert caplog.text.count("looks like experts folded") == 1
    assert "rules=[(r'experts', {'matrix': '(e m) n -> e m n'" in caplog.text


def test_fused_names_without_a_rule_log_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="muon_dtensor"):
        group_parameters(Fused(), rules=[("wqkv", {"split_sizes": (8, 4, 4)})])
        assert caplog.text == ""
        group_parameters(Fused())
    assert "wqkv.weight looks like several matrices in one" in caplog.text
    assert "rules=[(r'wqkv', {'split_sizes': (q, k, v)})]" in caplog.text
