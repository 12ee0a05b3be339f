"""Compares steps of our Muon on sharded parameters with an oracle.

The oracle is torch.optim.Muon on full tensors, on every rank; torch shards its results. Bodies run
on threads or processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

from muon_dtensor import Muon
from muon_dtensor.distributed_config.full_tensor import cut_like
from tests.support.meter import counting, counting_flops, installed

OVERWRITES_MOMENTA = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15)
"""Whether torch.optim.Muon overwrites a bfloat16 momentum without nesterov: up to 2.14."""


@dataclass(frozen=True)
class Case:
    """Sharded parameters on a mesh, and options of the optimizers.

    `params`: (shape, placements) of each parameter; 3-D parameters are batches of matrices.
    `muon`: options of both optimizers. `ours`: options of our Muon only; `strategy` is "owned" by
    default, so that each matrix is orthogonalized by one rank.
    """

    mesh_shape: tuple[int, ...]
    params: tuple[tuple[tuple[int, ...], tuple[Placement, ...]], ...]
    muon: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    num_steps: int = 3

    @property
    def num_ranks(self) -> int:
        return torch.Size(self.mesh_shape).numel()


@dataclass(frozen=True)
class Outcome:
    """Results of one rank. `differences`: tensors that were not bitwise those of the oracle."""

    differences: list[str]
    sent_nbytes: int
    num_matrices: int
    planned_sent_nbytes: int
    flops: int
    planned_flops: int
    strategies: set[str]
    bound_nbytes: int
    model_matrices: int
    digest: str


class Oracle:
    """torch.optim.Muon on separately stored full matrices."""

    def __init__(self, weights: Sequence[Tensor], **options: Any) -> None:
        self.weights = [w.clone() for w in weights]
        self.matrices = [
            [nn.Parameter(m.clone()) for m in (w.unbind() if w.ndim == 3 else [w])]
            for w in self.weights
        ]
        flat = [m for parts in self.matrices for m in parts if m.numel()]
        self.optimizer = torch.optim.Muon(flat, **options) if flat else None

    def step(self, grads: Sequence[Tensor]) -> None:
        """Do one step with these full gradients."""
        for parts, grad in zip(self.matrices, grads, strict=True):
            slices = grad.unbind() if grad.ndim == 3 else [grad]
            for matrix, part in zip(parts, slices, strict=True):
                matrix.grad = part.clone()
        if self.optimizer is not None:
            self.optimizer.step()

    def results(self) -> list[Tensor]:
        """Return the weights in their stored shapes."""
        return self._stored([[m.detach() for m in parts] for parts in self.matrices])

    def momenta(self) -> list[Tensor]:
        """Return the momentum of each weight in its stored shape. Call it after a step."""
        state = {} if self.optimizer is None else self.optimizer.state
        return self._stored(
            [
                [state[m]["momentum_buffer"] if m in state else m.detach() for m in parts]
                for parts in self.matrices
            ]
        )

    def _stored(self, values: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        return [
            (torch.stack(list(parts)) if parts else weight) if weight.ndim == 3 else parts[0]
            for weight, parts in zip(self.weights, values, strict=True)
        ]


def tensors_like(
    shapes: Sequence[tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return random tensors, equal on every rank: they use a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def spread(full: Tensor, mesh: Any, placements: Sequence[Placement]) -> DTensor:
    """Return a full tensor as a DTensor, without communication."""
    return distribute_tensor(full, mesh, placements, src_data_rank=None)


def mesh_of(shape: tuple[int, ...]) -> Any:
    """Return a CPU mesh with dims named a, b, c."""
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)]))


def compare_with_oracle(case: Case) -> Outcome:
    """Step our Muon and the oracle on this rank, and compare them."""
    mesh = mesh_of(case.mesh_shape)
    shapes = [shape for shape, _ in case.params]
    weights = tensors_like(shapes, 0, case.dtype)
    params = [
        nn.Parameter(spread(weight, mesh, placements))
        for weight, (_, placements) in zip(weights, case.params, strict=True)
    ]
    named_params = [(f"layer.{i}.weight", param) for i, param in enumerate(params)]
    optimizer = Muon(named_params, **case.muon, **{"strategy": "owned", **case.ours})
    oracle = Oracle(weights, **case.muon)
    differences: list[str] = []
    with counting() as count:
        for step in range(case.num_steps):
            grads = tensors_like(shapes, 1 + step, case.dtype)
            for param, grad, (_, placements) in zip(params, grads, case.params, strict=True):
                param.grad = spread(grad, mesh, placements)
            with counting_flops():
                optimizer.step()
            oracle.step(grads)
            states = [optimizer.state[param] for param in params]
            pairs = {
                "parameter": ([param.detach() for param in params], oracle.results()),
                "momentum": ([state["momentum_buffer"] for state in states], oracle.momenta()),
            }
            for kind, (sharded, full) in pairs.items():
                for (name, _), value, expected, (_, placements) in zip(
                    named_params, sharded, full, case.params, strict=True
                ):
                    shard = spread(expected, mesh, placements).to_local()
                    if value.placements != placements:  # a momentum that is cut further
                        shard = cut_like(expected, value).to_local()
                    if not torch.equal(value.to_local(), shard):
                        distance = (value.to_local() - shard).abs().max()
                        differences.append(f"{kind} of {name} after step {step}: {distance}")
            if unexpected_keys := {key for state in states for key in state} - {"momentum_buffer"}:
                differences.append(f"unexpected keys in the state: {unexpected_keys}")
    cost = optimizer.plan.cost
    return Outcome(
        differences,
        count.sent_nbytes,
        count.num_matrices,
        cost.sent_nbytes[dist.get_rank()] * case.num_steps,
        count.flops,
        cost.flops[dist.get_rank()] * case.num_steps,
        {bucket.strategy.kind for bucket in optimizer.plan.buckets},
        cost.bound_nbytes * case.num_steps,
        cost.num_matrices * case.num_steps,
        optimizer.plan.digest,
    )


def compare_in_process(case: Case) -> Outcome:
    """Run `compare_with_oracle` in a process of a pool, where meters must be installed first."""
    with installed():
        return compare_with_oracle(case)
