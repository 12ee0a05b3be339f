"""One case: parameters with placements on a mesh, stepped by us and by the oracle.

The oracle is torch.optim.Muon on full tensors, on every rank; its result is cut as torch cuts.
Bodies run on threads or processes.
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
from tests.support.meter import counting, counting_flops, installed

OVERWRITES_MOMENTA = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15)
"""Whether torch.optim.Muon overwrites a bfloat16 momentum without nesterov: up to 2.14."""


@dataclass(frozen=True)
class Case:
    """`params`: (shape, placements) each; 3-D ones are batches of matrices.

    `ours`: options torch has not; unless it says otherwise, matrices are orthogonalized once.
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
    """What one rank saw. `differences`: what was not bitwise the oracle's after some step."""

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
        """One step with these full gradients."""
        for parts, grad in zip(self.matrices, grads, strict=True):
            slices = grad.unbind() if grad.ndim == 3 else [grad]
            for matrix, part in zip(parts, slices, strict=True):
                matrix.grad = part.clone()
        if self.optimizer is not None:
            self.optimizer.step()

    def results(self) -> list[Tensor]:
        """The weights in their stored shapes."""
        return self._stored([[m.detach() for m in parts] for parts in self.matrices])

    def momenta(self) -> list[Tensor]:
        """The momentum of each weight in its stored shape; only after a step."""
        kept = {} if self.optimizer is None else self.optimizer.state
        return self._stored(
            [
                [kept[m]["momentum_buffer"] if m in kept else m.detach() for m in parts]
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
    """The same random tensors on every rank, whatever the other threads draw."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def spread(full: Tensor, mesh: Any, placements: Sequence[Placement]) -> DTensor:
    """A full tensor as a DTensor, without communication."""
    return distribute_tensor(full, mesh, placements, src_data_rank=None)


def mesh_of(shape: tuple[int, ...]) -> Any:
    """A CPU mesh with dims named a, b, c."""
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)]))


def compare_with_oracle(case: Case) -> Outcome:
    """Step a case and report; the body of a rank."""
    mesh = mesh_of(case.mesh_shape)
    shapes = [shape for shape, _ in case.params]
    weights = tensors_like(shapes, 0, case.dtype)
    params = [
        nn.Parameter(spread(weight, mesh, placements))
        for weight, (_, placements) in zip(weights, case.params, strict=True)
    ]
    named = [(f"layer.{i}.weight", param) for i, param in enumerate(params)]
    ours = Muon(named, **case.muon, **{"strategy": "owned", **case.ours})
    oracle = Oracle(weights, **case.muon)
    differences: list[str] = []
    with counting() as count:
        for step in range(case.num_steps):
            grads = tensors_like(shapes, 1 + step, case.dtype)
            for param, grad, (_, placements) in zip(params, grads, case.params, strict=True):
                param.grad = spread(grad, mesh, placements)
            with counting_flops():
                ours.step()
            oracle.step(grads)
            momenta = [ours.state[param] for param in params]
            pairs = {
                "parameter": ([param.detach() for param in params], oracle.results()),
                "momentum": ([kept["momentum_buffer"] for kept in momenta], oracle.momenta()),
            }
            for what, (mine, theirs) in pairs.items():
                for (name, _), found, expected, (_, placements) in zip(
                    named, mine, theirs, case.params, strict=True
                ):
                    shard = spread(expected, mesh, placements).to_local()
                    if not torch.equal(found.to_local(), shard):
                        far = (found.to_local() - shard).abs().max()
                        differences.append(f"{what} of {name} after step {step}: {far}")
            if others := {key for kept in momenta for key in kept} - {"momentum_buffer"}:
                differences.append(f"state that Muon does not keep: {others}")
    cost = ours.plan.cost
    return Outcome(
        differences,
        count.sent_nbytes,
        count.num_matrices,
        cost.sent_nbytes[dist.get_rank()] * case.num_steps,
        count.flops,
        cost.flops[dist.get_rank()] * case.num_steps,
        {bucket.strategy.kind for bucket in ours.plan.buckets},
        cost.bound_nbytes * case.num_steps,
        cost.num_matrices * case.num_steps,
        ours.plan.digest,
    )


def compare_in_process(case: Case) -> Outcome:
    """`compare_with_oracle` in a process of its own, where meters must be installed first."""
    with installed():
        return compare_with_oracle(case)
