"""Random cases: 100 in every run; 2,000, and 20,000 plans, with `pytest -m slow -k fuzz`.

Steps must be bitwise equal to those of torch.optim.Muon and AdamW on full matrices; with options
that torch does not have, to those of this package on full matrices. Plans must pass
`planning.check`, and plans with one change must not.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from muon_dtensor import Muon
from muon_dtensor.algorithms import PRESETS
from muon_dtensor.algorithms.quantized import BITS
from muon_dtensor.algorithms.rounding import ROUNDINGS
from muon_dtensor.distributed_config.full_tensor import cut_like
from muon_dtensor.planning.check import check
from muon_dtensor.planning.cost import plan_cost
from muon_dtensor.planning.plan import EXACT_STRATEGIES, Plan
from muon_dtensor.planning.planner import plan_update
from muon_dtensor.planning.serialize import from_json, to_json
from muon_dtensor.planning.traffic import link_nbytes, plan_traffic
from muon_dtensor.runtime.torch_private import local_part
from tests.support.cases import OVERWRITES_MOMENTA, mesh_of, spread, tensors_like
from tests.support.random_plans import random_params
from tests.support.separate import split_matrices
from tests.support.threads import run_threads

R, S0, S1 = Replicate(), Shard(0), Shard(1)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Param:
    """One parameter: its placements, the number of its group, the steps without a gradient."""

    shape: Shape
    placements: tuple[Placement, ...]
    group: int
    missing: tuple[bool, ...] = (False, False, False)


@dataclass(frozen=True)
class Steps:
    """Three steps of a model. `groups`: options, and the `Matrices` of their 2-D parameters."""

    mesh_shape: Shape
    params: tuple[Param, ...]
    groups: tuple[dict[str, Any], ...]
    dtype: torch.dtype = torch.float32
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Matrices:
    """How a group's 2-D parameters are divided, on one tensor dim of at least `count`^2 indices.

    `kind`: "blocks" of consecutive indices, "alternate": every `count`-th index, or "grouped": the
    index modulo `count` is below `count` - 1, or not. The last two need a size that `count`
    divides.
    """

    kind: str
    count: int
    tensor_dim: int

    def declared(self, shape: Shape) -> dict[str, Any]:
        """Return options of a param group; none if they do not fit the shape."""
        if len(shape) != 2 or 0 in shape or shape[self.tensor_dim] < self.count**2:
            return {}
        size = shape[self.tensor_dim]
        if self.kind == "blocks":
            block_size = size // self.count
            sizes = (*[block_size] * (self.count - 1), size - block_size * (self.count - 1))
            return {"split_sizes": sizes, "split_dim": self.tensor_dim}
        if size % self.count:
            return {}
        is_cols = self.tensor_dim == 1
        left = "h (i part)" if is_cols else "(i part) h"
        if self.kind == "alternate":
            right, split = "part h i" if is_cols else "part i h", {}
        else:
            right = left
            split = {"split_sizes": (self.count - 1, 1), "split_dim": "part"}
        axes = {"i": size // self.count}
        return {"matrix": f"{left} -> {right}", "matrix_axes": axes, **split}


def oracle_of(steps: Steps, weights: list[Tensor]) -> Iterator[list[dict[str, Tensor]]]:
    """Step torch's optimizers on separately stored matrices; yield full values after each step.

    For each parameter these are its "value" and its state, which is empty before its first
    gradient.
    """
    parts: list[list[nn.Parameter]] = []
    optimizers = []

    def pieces_of(param: Param, full: Tensor) -> list[Tensor]:
        group = steps.groups[param.group]
        if group.get("algorithm") == "adamw" or not full.numel():
            return [full]
        return split_matrices(full, declared(group, param.shape))

    for param, weight in zip(steps.params, weights, strict=True):
        group = {k: v for k, v in steps.groups[param.group].items() if k != "matrices"}
        is_adamw = group.pop("algorithm", "muon") == "adamw"
        matrices = [nn.Parameter(piece.clone()) for piece in pieces_of(param, weight)]
        parts.append(matrices)
        if is_adamw:
            adamw_options = {k: v for k, v in group.items() if k in ("lr", "betas", "weight_decay")}
            optimizers.append(torch.optim.AdamW(matrices, **adamw_options))
        elif weight.numel():
            optimizers.append(torch.optim.Muon(matrices, **group))
        else:
            optimizers.append(None)
    for step in range(3):
        grads = tensors_like([p.shape for p in steps.params], 1 + step, steps.dtype)
        for param, matrices, optimizer, grad in zip(
            steps.params, parts, optimizers, grads, strict=True
        ):
            if optimizer is None or param.missing[step]:
                continue
            for part, piece in zip(matrices, pieces_of(param, grad), strict=True):
                part.grad = piece.clone()
            optimizer.step()
        by_param = []
        for param, matrices, optimizer, weight in zip(
            steps.params, parts, optimizers, weights, strict=True
        ):
            values: dict[str, list[Tensor]] = {"value": [p.detach() for p in matrices]}
            keys = (
                optimizer.state[matrices[0]] if optimizer and matrices[0] in optimizer.state else ()
            )
            values |= {key: [optimizer.state[p][key] for p in matrices] for key in keys}
            numbers = pieces_of(param, torch.arange(weight.numel()).view(weight.shape))
            full_values = {key: together(parts, numbers, weight) for key, parts in values.items()}
            by_param.append(full_values if weight.numel() else {"value": weight})
        yield by_param


def declared(group: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Return the declaration of matrices for a parameter of this shape."""
    matrices = group.get("matrices")
    return {} if matrices is None else matrices.declared(shape)


def together(values: list[Tensor], numbers: list[Tensor], weight: Tensor) -> Tensor:
    """Join the values of separately stored matrices, of these elements, into their parameter's."""
    if not values[0].ndim:
        return values[0]
    flat = torch.empty(weight.numel(), dtype=values[0].dtype)
    for value, elements in zip(values, numbers, strict=True):
        flat[elements.flatten()] = value.flatten()
    return flat.view(weight.shape)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether tensors are bitwise equal, where NaN equals NaN. AdamW in float16 makes NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def differences(steps: Steps) -> list[str]:
    """Run one rank; return descriptions of values that differ from the oracle's."""
    mesh = mesh_of(steps.mesh_shape)
    shapes = [param.shape for param in steps.params]
    weights = tensors_like(shapes, 0, steps.dtype)
    params = [
        nn.Parameter(spread(w.clone(), mesh, p.placements))
        for w, p in zip(weights, steps.params, strict=True)
    ]
    groups: list[dict[str, Any]] = []
    for index, param in enumerate(steps.params):
        group = steps.groups[param.group]
        options = {k: v for k, v in group.items() if k != "matrices"}
        options |= declared(group, param.shape)
        groups.append({"params": [(f"p{index}", params[index])], **options})
    optimizer = Muon(groups, **dict(steps.options))
    differing = []
    for step, after in enumerate(oracle_of(steps, weights)):
        grads = tensors_like(shapes, 1 + step, steps.dtype)
        for param, grad, tensor in zip(steps.params, grads, params, strict=True):
            has_grad = not param.missing[step]
            tensor.grad = spread(grad, mesh, param.placements) if has_grad else None
        optimizer.step()
        for index, (tensor, expected) in enumerate(zip(params, after, strict=True)):
            for key, value in {"value": tensor.detach(), **optimizer.state[tensor]}.items():
                torch_value = expected.get(key)
                if torch_value is None:  # torch makes state with the first gradient
                    shard = torch.zeros_like(local_part(value))
                elif torch_value.ndim:
                    shard = local_part(spread(torch_value, mesh, steps.params[index].placements))
                else:
                    shard = torch_value
                # torch has no step count for a parameter without elements
                if not same(local_part(value), shard) and (value.ndim or torch_value is not None):
                    differing.append(f"{key} of p{index} after step {step}: {steps.params[index]}")
    return differing


@st.composite
def random_steps(draw) -> Steps:
    mesh_shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    while torch.Size(mesh_shape).numel() > 16:
        mesh_shape = mesh_shape[:-1]
    groups = [
        {
            "lr": draw(st.sampled_from([0.1, 0.0137])),
            "weight_decay": draw(st.sampled_from([0.0, 0.3])),
            "momentum": draw(st.sampled_from([0.95, 0.0, 0.5])),
            "nesterov": draw(st.booleans()),
            "ns_steps": draw(st.sampled_from([5, 1, 3])),
            "adjust_lr_fn": draw(st.sampled_from([None, "match_rms_adamw"])),
            "matrices": Matrices(
                draw(st.sampled_from(["blocks", "alternate", "grouped"])),
                draw(st.integers(2, 3)),
                draw(st.integers(0, 1)),
            ),
        },
        {"lr": 0.05, "weight_decay": 0.1},
        {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1, "algorithm": "adamw"},
    ]
    side = st.one_of(st.integers(0, 9), st.integers(0, 70))
    params = []
    for _ in range(draw(st.integers(1, 6))):
        ndim = draw(st.sampled_from([2, 2, 2, 3]))
        shape = tuple(draw(st.lists(side, min_size=ndim, max_size=ndim)))
        if ndim == 2 and draw(st.booleans()):  # sizes that periods divide
            shape = tuple(6 * -(-size // 6) for size in shape)
        if ndim == 3:
            shape = (min(shape[0], 6), *shape[1:])
        kinds = [R, *(Shard(dim) for dim in range(ndim))]
        count = len(mesh_shape)
        placements = tuple(draw(st.lists(st.sampled_from(kinds), min_size=count, max_size=count)))
        missing = tuple(draw(st.sampled_from([False, False, False, True])) for _ in range(3))
        params.append(Param(shape, placements, draw(st.integers(0, 2)), missing))
    options = (
        ("bucket_mb", draw(st.sampled_from([1e-5, 3e-4, 0.01, 256]))),
        ("prefetch_count", draw(st.integers(0, 4))),
        ("strategy", draw(st.sampled_from(EXACT_STRATEGIES))),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    if dtype == torch.bfloat16 and OVERWRITES_MOMENTA:
        groups[0]["nesterov"] = True
    return Steps(mesh_shape, tuple(params), tuple(groups), dtype, options)


def assert_equal_to_torch(steps: Steps) -> None:
    num_ranks = torch.Size(steps.mesh_shape).numel()
    assert run_threads(num_ranks, differences, steps) == [[]] * num_ranks


MUON = ({"lr": 0.1, "weight_decay": 0.3},)
# Regression cases.
HALF_DECAY = Steps((2,), (Param((33, 17), (S0,), 0),), MUON, torch.float16)
TWICE_CUT = Steps((2, 2), (Param((13, 7), (S0, S0), 0), Param((5, 5), (S1, S0), 0)), MUON)
EMPTY = Steps((4,), (Param((0, 3), (S0,), 0), Param((2, 3), (S0,), 0)), MUON)
MISSING = Steps((3,), (Param((7, 5), (S1,), 0, (True, False, True)), Param((4, 4), (R,), 0)), MUON)
ADAMW = ({"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1, "algorithm": "adamw"},)
NAN_OF_BOTH = Steps((1, 1, 1), (Param((6, 29, 54), (R, R, R), 0),), ADAMW, torch.float16)


@example(NAN_OF_BOTH)
@example(HALF_DECAY)
@example(TWICE_CUT)
@example(EMPTY)
@example(MISSING)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(random_steps())
def test_steps_are_bitwise_torch_s(steps):
    assert_equal_to_torch(steps)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=2000, deadline=None)
@given(random_steps())
def test_many_steps_are_bitwise_torch_s(steps):
    assert_equal_to_torch(steps)


def option_differences(steps: Steps) -> list[str]:
    """Run one rank; return what differs from our Muon on full matrices."""
    mesh = mesh_of(steps.mesh_shape)
    shapes = [param.shape for param in steps.params]
    weights = tensors_like(shapes, 0, steps.dtype)
    sharded = [
        nn.Parameter(spread(w.clone(), mesh, p.placements))
        for w, p in zip(weights, steps.params, strict=True)
    ]
    whole = [nn.Parameter(w.clone()) for w in weights]
    optimizers = []
    for tensors in (sharded, whole):
        groups: list[dict[str, Any]] = []
        for index, (param, tensor) in enumerate(zip(steps.params, tensors, strict=True)):
            group = steps.groups[param.group]
            options = {k: v for k, v in group.items() if k != "matrices"}
            options |= declared(group, param.shape)
            groups.append({"params": [(f"p{index}", tensor)], **options})
        optimizers.append(Muon(groups, **(dict(steps.options) if tensors is sharded else {})))
    differing = []
    for step in range(3):
        grads = tensors_like(shapes, 1 + step, steps.dtype)
        for param, grad, a, b in zip(steps.params, grads, sharded, whole, strict=True):
            has_grad = not param.missing[step]
            a.grad = spread(grad, mesh, param.placements) if has_grad else None
            b.grad = grad.clone() if has_grad else None
        for optimizer in optimizers:
            optimizer.step()
        for index, (a, b) in enumerate(zip(sharded, whole, strict=True)):
            state, expected = (o.state[p] for o, p in zip(optimizers, (a, b), strict=True))
            pairs = [("value", a.detach(), b.detach())]
            pairs += [(key, value, expected[key]) for key, value in state.items()]
            for key, actual, full in pairs:
                shard = cut_like(full, actual) if isinstance(actual, DTensor) else full
                if not same(local_part(actual), local_part(shard)):
                    differing.append(f"{key} of p{index} after step {step}: {steps.params[index]}")
    return differing


@st.composite
def steps_with_options(draw) -> Steps:
    """Steps in bfloat16; shards of quantized momenta begin at blocks."""
    mesh_shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    while torch.Size(mesh_shape).numel() > 8:
        mesh_shape = mesh_shape[:-1]
    groups = [
        {
            "lr": draw(st.sampled_from([0.1, 1e-3])),
            "momentum": draw(st.sampled_from([0.95, 0.5])),
            "ns_steps": draw(st.integers(1, 6)),
            "orthogonalizer": draw(st.sampled_from(["newton_schulz", *PRESETS])),
            "weight_rounding": draw(st.sampled_from(ROUNDINGS)),
            "rounding_seed": draw(st.integers(0, 9)),
            "momentum_bits": draw(st.sampled_from(BITS)),
            "cautious_weight_decay": draw(st.booleans()),
            "matrices": Matrices(
                draw(st.sampled_from(["blocks", "alternate", "grouped"])),
                draw(st.integers(2, 3)),
                draw(st.integers(0, 1)),
            ),
        }
        for _ in range(2)
    ]
    params = []
    for _ in range(draw(st.integers(1, 4))):
        kinds = [R, S0] if draw(st.booleans()) else [R, S0, S1]
        count = len(mesh_shape)
        placements = tuple(draw(st.lists(st.sampled_from(kinds), min_size=count, max_size=count)))
        cols = draw(st.integers(1, 70))
        if S1 in placements:
            cuts = prod(n for n, p in zip(mesh_shape, placements, strict=True) if p == S1)
            cols = 64 * cuts * draw(st.integers(1, 2))
        shape = (6 * draw(st.integers(0, 6)), cols)
        missing = tuple(draw(st.sampled_from([False, False, True])) for _ in range(3))
        params.append(Param(shape, placements, draw(st.integers(0, 1)), missing))
    options = (
        ("bucket_mb", draw(st.sampled_from([1e-5, 3e-4, 256]))),
        ("prefetch_count", draw(st.integers(0, 2))),
    )
    return Steps(mesh_shape, tuple(params), tuple(groups), torch.bfloat16, options)


def assert_equal_to_whole(steps: Steps) -> None:
    num_ranks = torch.Size(steps.mesh_shape).numel()
    assert run_threads(num_ranks, option_differences, steps) == [[]] * num_ranks


@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps_with_options())
def test_options_are_bitwise_the_same_on_every_layout(steps):
    assert_equal_to_whole(steps)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=1000, deadline=None)
@given(steps_with_options())
def test_many_options_are_bitwise_the_same_on_every_layout(steps):
    assert_equal_to_whole(steps)


def mutated(plan: Plan, rng: random.Random) -> Plan | None:
    """Return the plan with one assignment or mesh dim removed, repeated or shifted, or None."""
    choices = []
    for number, bucket in enumerate(plan.buckets):
        assignments = bucket.assignments
        position = rng.randrange(len(assignments))
        without_it = (*assignments[:position], *assignments[position + 1 :])
        a = assignments[position]
        outside = replace(a, owner=a.owner + bucket.mesh.num_ranks)
        other = replace(a, matrix=a.matrix + len(plan.spec(a).matrices))
        changes: list[dict[str, Any]] = [
            {"assignments": without_it},
            {"assignments": (*assignments, a)},
            {"assignments": (*without_it, outside)},
            {"assignments": (*without_it, other)},
        ]
        strategy = bucket.strategy
        changes.append({"strategy": replace(strategy, hops=strategy.hops + 2)})
        for name in ("unshard_dims", "replica_dims"):
            if dims := getattr(strategy, name):
                changes += [
                    {"strategy": replace(strategy, **{name: dims[1:]})},
                    {"strategy": replace(strategy, **{name: (*dims, dims[0])})},
                ]
        choices += [(number, change) for change in changes]
    if not choices:
        return None
    number, change = rng.choice(choices)
    buckets = list(plan.buckets)
    buckets[number] = replace(buckets[number], **change)
    return replace(plan, buckets=tuple(buckets))


def check_plan(case: Any, seed: int) -> None:
    """Check that the plan is valid, and that it is not valid with one change."""
    specs, options = case
    plan = plan_update(specs, options)
    check(plan)
    if not options.can_distribute:
        assert sum(link_nbytes(plan)) == plan_cost(plan, plan_traffic(plan)).total_nbytes
    for bucket in plan.buckets:
        if not bucket.strategy.is_local:
            for assignment in bucket.assignments:
                assert plan.holders(assignment), "an owner gathers from holders"
    changed = mutated(plan, random.Random(seed))
    if changed is not None:
        with pytest.raises(ValueError, match="not a valid plan"):
            check(changed)
        with pytest.raises(ValueError, match=r"plan|collective|mesh"):
            from_json(to_json(changed))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(random_params(), st.integers(0, 10**6))
def test_plans_are_valid_and_changed_plans_are_not(case, seed):
    check_plan(case, seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=20_000, deadline=None)
@given(random_params(), st.integers(0, 10**6))
def test_many_plans_are_valid_and_changed_plans_are_not(case, seed):
    check_plan(case, seed)
