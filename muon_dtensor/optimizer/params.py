"""The parameter table of an optimizer: names, layouts, and what planner and steps need of each.

Collects every problem before it raises one error.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from muon_dtensor.algorithms.adamw import AdamWLocal
from muon_dtensor.algorithms.newton_schulz import IterationKernel
from muon_dtensor.distributed_config.assignment import validate_assignments
from muon_dtensor.distributed_config.config import DistributedConfig
from muon_dtensor.distributed_config.custom_transport import FunctionParam
from muon_dtensor.errors import GATHERED, PlanError, Problem, RefusalError
from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.layout.declarations import Declaration
from muon_dtensor.optimizer.options import declaration_of
from muon_dtensor.optimizer.state import MOMENTS
from muon_dtensor.planning.plan import ParamSpec, Plan
from muon_dtensor.planning.planner import restrict
from muon_dtensor.planning.serialize import digest
from muon_dtensor.runtime.consistency_codec import Manifest
from muon_dtensor.runtime.dtensors import LayoutCache, misplaced_shards, placed
from muon_dtensor.runtime.hyperparameters import MuonOptions, Orthogonalizer
from muon_dtensor.runtime.local_param import LocalParam
from muon_dtensor.runtime.plain_tensors import PlainTensors
from muon_dtensor.runtime.torch_private import (
    dtype_name,
    gathered_params,
    local_part,
    num_ranks,
    this_rank,
)
from muon_dtensor.version import __version__

VERSIONS = f"muon_dtensor {__version__}, torch {torch.__version__}"
"""What ranks must have in common before they compare parameters."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter with its name and its param group (number `group_index`).

    `given_name` is what the user calls it; `name` differs from that of every other parameter.
    """

    name: str
    given_name: str
    param: Tensor
    group: dict[str, Any]
    group_index: int


class ParameterTable:
    """The parameters of all param groups, in order; unnamed ones are numbered.

    `entries` are those that can train: they require gradients, have one, or have state because they
    trained before. All others, such as the frozen base of an adapter, are neither planned nor given
    state, and may have any shape and dtype.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        plain: PlainTensors,
        state: Mapping[Tensor, Mapping[str, Any]],
    ) -> None:
        self.all_entries = tuple(_entries(groups))
        self.entries = tuple(e for e in self.all_entries if can_train(e.param, state))
        self._active = {entry.name for entry in self.entries}
        self.muon = tuple(e for e in self.entries if e.group["algorithm"] == "muon")
        self.adamw = tuple(e for e in self.entries if e.group["algorithm"] == "adamw")
        self._plain = plain
        self.stored_otherwise: dict[str, Problem] = {}
        self.layout_cache = LayoutCache(None if plain.rule is None else plain.rule.mesh)

    def specs(
        self, wire_dtype: torch.dtype, *, whole: DeviceMesh | None, exchange: bool
    ) -> list[ParamSpec]:
        """All parameters of Muon as the planner knows them.

        Args:
            wire_dtype: of the iteration and of all that is sent.
            whole: the mesh that must hold all parameters.
            exchange: whether all ranks learn of new plain tensors now, also those without any.

        Raises:
            ValueError: a parameter lives outside the mesh.
            PlanMismatchError: ranks hold other plain tensors.
            PlanError: parameters that Muon cannot step, all of them told at once.
        """
        if whole is not None:
            self._must_lie_on(self.layout_cache.mesh(whole))
        named = [(entry.given_name, entry.param) for entry in self.all_entries]
        self._plain.learn(named, self.layout_cache, exchange=exchange)
        problems = [*self._problems(), *self._find_stored_otherwise()]
        refused = {problem.fqn for problem in problems}
        specs: list[ParamSpec] = []
        homes: dict[MeshSpec, torch.device] = {}
        for entry in self.muon:
            if entry.name in refused:
                continue
            try:
                spec = self._param_spec(entry, wire_dtype)
            except RefusalError as refusal:
                seen = placed(entry.param)
                problems.append(Problem(entry.name, seen, refusal.reason, refusal.remedy))
                continue
            specs.append(spec)
            device = local_part(entry.param).device
            home = homes.setdefault(spec.layout.mesh, device)
            if home != device:
                problems.append(
                    Problem(
                        entry.name,
                        f"on {device}",
                        f"Other parameters of mesh {spec.layout.mesh} are on {home}.",
                        "Move them to one device, or give each device an optimizer of its own.",
                    )
                )
        if problems:
            raise PlanError(problems, num_params=len(self.entries))
        return specs

    def _param_spec(self, entry: Entry, wire_dtype: torch.dtype) -> ParamSpec:
        """One parameter of Muon as the planner knows it. Raises RefusalError."""
        return self.layout_cache.param(
            entry.name,
            entry.param,
            self.layout(entry),
            declaration_of(entry.group),
            flat_shape=self._plain.flat_shape(entry.param),
            num_iterations=entry.group["ns_steps"],
            wire_dtype=wire_dtype,
            has_moments=entry.group["normuon_beta"] is not None,
        )

    def must_be_real(self) -> None:
        """Raise PlanError for parameters that nobody can step."""
        if problems := self._problems():
            raise PlanError(problems, num_params=len(self.entries))

    def _problems(self) -> list[Problem]:
        """Parameters that nobody can step, whatever their layout."""
        gathered = gathered_params()
        problems = []
        for entry in self.entries:
            if id(entry.param) in gathered:
                problems.append(Problem(entry.name, placed(entry.param), *GATHERED))
            elif _shares_memory(local_part(entry.param)):
                problems.append(_overlapping(entry))
            elif entry.group["algorithm"] == "muon" and not entry.param.is_floating_point():
                problems.append(_wrong_dtype(entry))
        return problems

    def _find_stored_otherwise(self) -> list[Problem]:
        """DTensors whose shard on this rank is not the one that their placements tell.

        Those on a mesh of this rank alone. Of all others `stored_otherwise` says so, and all ranks
        raise when they compare their plans: the shards of other ranks may be as they should.
        """
        alone = []
        for entry in self.entries:
            if not isinstance(entry.param, DTensor):
                continue
            mesh = self.layout_cache.mesh(entry.param.device_mesh)
            stored = tuple(local_part(entry.param).shape)
            expected = self.layout_cache.expected_shape(entry.param)
            if not mesh.holds(this_rank()) or expected in (None, stored):
                continue
            problem = Problem(
                entry.name,
                placed(entry.param),
                f"Rank {this_rank()} stores {list(stored)}, and a shard so placed is "
                f"{list(expected or ())}.",
                "Make DTensors by fully_shard, parallelize_module or distribute_tensor, or cut as "
                "torch.chunk cuts before DTensor.from_local. Shards of other sizes can be plain "
                "tensors under create_processgroup_config.",
            )
            if mesh.num_ranks == 1:
                alone.append(problem)
            else:
                self.stored_otherwise[entry.name] = problem
        return alone

    def _must_lie_on(self, whole: MeshSpec) -> None:
        for entry in self.entries:
            home = self.layout_cache.home(entry.param)
            if not home.rank_set <= whole.rank_set:
                raise ValueError(
                    f"{entry.name} lives on mesh {home} with ranks {min(home.ranks)} to "
                    f"{max(home.ranks)}, which the config's mesh {whole} does not hold. Make the "
                    "config from a mesh that holds all parameters."
                )

    def owners(self, config: DistributedConfig, specs: Sequence[ParamSpec]) -> dict[str, int]:
        """The owners that the user's own `assign_fn` names, by parameter; none without one.

        Raises AssignmentError for an assignment that is none.
        """
        if not config.names_owners:
            return {}
        rule = self._plain.rule
        shown = [
            entry.param
            if isinstance(entry.param, DTensor) or rule is None or not rule.real_cuts
            else torch.empty(
                self._plain.flat_shape(entry.param) or spec.shape,
                dtype=entry.param.dtype,
                device="meta",
            )
            for entry, spec in zip(self.muon, specs, strict=True)
        ]
        return self.assigned(config, shown)

    def assigned(self, config: DistributedConfig, shown: Sequence[Tensor]) -> dict[str, int]:
        """What `assign_fn` makes of these tensors, one for each parameter of Muon, by name."""
        world_size = config.state.get("world_size") or num_ranks()
        assignments = validate_assignments(config.assign_fn(shown, config.state), shown, world_size)
        return {self.muon[index].name: rank for index, rank in assignments.items()}

    def layout(self, entry: Entry) -> Layout:
        """The layout of a parameter; of a plain tensor that which `specs` has learned."""
        if isinstance(entry.param, DTensor):
            return self.layout_cache.layout(entry.param)
        return self.layout_cache.shared(self._plain.layout(entry.param))

    def misplaced(self) -> str:
        """Which shards torch's distributed checkpoint would misplace; empty for none."""
        names = [
            entry.name
            for entry in self.entries
            if isinstance(entry.param, DTensor) and self.layout_cache.is_misplaced(entry.param)
        ]
        return misplaced_shards(names) if names else ""

    def without_state(self, state: Mapping[Tensor, Mapping[str, Any]]) -> list[int]:
        """Numbers, in a state dict, of parameters that hold no state because they never trained.

        But for slices of FSDP1, which gathers what all ranks hold.
        """
        return [
            number
            for number, entry in enumerate(self.all_entries)
            if not state.get(entry.param) and self._plain.flat_shape(entry.param) is None
        ]

    def manifests(self, plan: Plan) -> Iterator[Manifest]:
        """What each set of ranks must have in common: its part of the plan, its parameters.

        Also of frozen ones, whose ranks compare, and find each other, before any is unfrozen.
        """
        members: dict[frozenset[int], list[tuple[Entry, MeshSpec]]] = {}
        for entry in self.all_entries:
            mesh = self.layout_cache.home(entry.param)
            if mesh.dim_names and mesh.holds(this_rank()):
                members.setdefault(mesh.rank_set, []).append((entry, mesh))
        for rank_set, found in members.items():
            lines = (VERSIONS, *(self._line(entry, mesh) for entry, mesh in found))
            # Several meshes may hold these ranks; all ranks must pick the same one to vote on.
            voting = min((mesh for _, mesh in found), key=lambda m: (m.dim_names, m.shape))
            yield Manifest(
                mesh=voting,
                digest=digest(restrict(plan, rank_set)),
                params=lines,
                fqns=tuple(entry.name for entry, _ in found if entry.name in self._active),
                sometimes_empty=frozenset(
                    entry.name
                    for entry, _ in found
                    if entry.name in self._active
                    and not isinstance(entry.param, DTensor)
                    and self._plain.is_sometimes_empty(entry.param)
                ),
                groups=tuple(sorted({entry.group_index for entry, _ in found})),
            )

    def _line(self, entry: Entry, mesh: MeshSpec) -> str:
        param = entry.param
        shape: object = list(param.shape)
        placed = getattr(param, "placements", "replicated")
        if not isinstance(param, DTensor) and self._plain.is_cut(param):
            shape, placed = list(self._plain.flat_shape(param) or ()) or "shards", "cut"
        declared = declaration_of(entry.group)
        if entry.name not in self._active:
            return f"{entry.name} {shape} {dtype_name(param.dtype)} {placed} on {mesh}, frozen"
        problem = self.stored_otherwise.get(entry.name)
        stored = f", but stores {list(local_part(param).shape)}" if problem else ""
        return (
            f"{entry.name} {shape} {dtype_name(param.dtype)} {placed} on {mesh}{stored}, "
            f"{entry.group['algorithm']}{'' if declared == Declaration() else f', {declared}'}"
        )

    def muon_params(
        self,
        grads: Mapping[str, Tensor],
        state: Mapping[Tensor, Mapping[str, Any]],
        groups: Sequence[Mapping[str, Any]],
        custom: Orthogonalizer | None,
        body: IterationKernel,
    ) -> dict[int, LocalParam]:
        """The parameters of Muon that have a gradient, by index among them.

        `groups`: what the param groups say; `custom`: the orthogonalizer of those that name
        "custom"; `body`: of the iterations.
        """
        options: dict[int, MuonOptions] = {}
        found: dict[int, LocalParam] = {}
        for index, entry in enumerate(self.muon):
            if entry.group_index not in options:
                options[entry.group_index] = MuonOptions.of(groups[entry.group_index], custom, body)
            if entry.name in grads:
                kept = state[entry.param]
                found[index] = LocalParam(
                    entry.param,
                    grads[entry.name],
                    kept["momentum_buffer"],
                    options[entry.group_index],
                    kept.get(MOMENTS) if entry.group["normuon_beta"] is not None else None,
                )
        return found

    def function_params(
        self, found: Mapping[int, LocalParam], owners: Mapping[str, int]
    ) -> list[FunctionParam]:
        """Those of `muon_params` that functions of the user move, with their owners."""
        return [
            FunctionParam(entry.name, found[index], owners[entry.name], declaration_of(entry.group))
            for index, entry in enumerate(self.muon)
            if index in found and entry.param.grad is not None
        ]

    def adamw_leaves(
        self, grads: Mapping[str, Tensor], state: Mapping[Tensor, Mapping[str, Any]]
    ) -> dict[int, list[AdamWLocal]]:
        """This rank's part of the parameters of AdamW that have a gradient, by param group."""
        leaves: dict[int, list[AdamWLocal]] = {}
        for entry in self.adamw:
            if entry.name in grads:
                kept = state[entry.param]
                leaf = AdamWLocal(
                    local_part(entry.param),
                    local_part(grads[entry.name]),
                    local_part(kept["exp_avg"]),
                    local_part(kept["exp_avg_sq"]),
                    kept["step"],
                )
                leaves.setdefault(entry.group_index, []).append(leaf)
        return leaves

    @property
    def shared_device(self) -> torch.device:
        """Where the parameters that a mesh holds live, or any; the host if there are none.

        Ballots need values: for parameters on the meta device it is the device of their mesh.
        """
        alone = [e.param for e in self.entries]
        shared = [param for param in alone if self.layout_cache.home(param).dim_names]
        first = next(iter(shared or alone), None)
        if first is not None and not local_part(first).is_meta:
            return local_part(first).device
        return torch.device(first.device_mesh.device_type if isinstance(first, DTensor) else "cpu")


def can_train(param: Tensor, state: Mapping[Tensor, Mapping[str, Any]]) -> bool:
    """Whether a step may change a parameter: now, or as it did before it was frozen."""
    return param.requires_grad or param.grad is not None or bool(state.get(param))


def _entries(groups: Sequence[dict[str, Any]]) -> Iterator[Entry]:
    """The n-th parameter of one name, n > 1, is called `n:name`: two pipeline chunks of a rank."""
    number = 0
    counts: Counter[str] = Counter()
    for group_index, group in enumerate(groups):
        names = group.get("param_names")
        for index, param in enumerate(group["params"]):
            given = names[index] if names else f"param.{number}"
            counts[given] += 1
            name = given if counts[given] == 1 else f"{counts[given]}:{given}"
            yield Entry(name, given, param, group, group_index)
            number += 1


def _shares_memory(tensor: Tensor) -> bool:
    """Whether several elements lie in one place, as `expand` makes them."""
    return any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _overlapping(entry: Entry) -> Problem:
    """What to say of a parameter that torch cannot update in place."""
    return Problem(
        entry.name,
        placed(entry.param),
        "Several of its elements share memory (it was made by expand), so no step can update it.",
        "Give it memory of its own: nn.Parameter(tensor.clone()).",
    )


def _wrong_dtype(entry: Entry) -> Problem:
    """What to say of a parameter that holds no real floating-point numbers."""
    return Problem(
        entry.name,
        placed(entry.param),
        f"Muon needs a real floating dtype; this is {dtype_name(entry.param.dtype)}.",
        "Leave it out of the optimizer, or store it in a floating dtype.",
    )
