"""`ParameterTable`: names and layouts of an optimizer's parameters, as planner and steps use them.

It raises one error that lists all parameters with problems.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from muon_dtensor.algorithms import WHOLE_MATRICES
from muon_dtensor.algorithms.adamw import AdamWLocal
from muon_dtensor.algorithms.newton_schulz import IterationKernel
from muon_dtensor.algorithms.quantized import QuantizedMomentum
from muon_dtensor.distributed_config.assignment import validate_assignments
from muon_dtensor.distributed_config.config import DistributedConfig
from muon_dtensor.distributed_config.custom_transport import FunctionParam
from muon_dtensor.errors import GATHERED, PlanError, Problem, RefusalError
from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.layout.declarations import Declaration
from muon_dtensor.optimizer.options import declaration_of
from muon_dtensor.optimizer.state import COMPENSATION, MOMENTS, quantized_momentum
from muon_dtensor.planning.plan import ParamSpec, Plan
from muon_dtensor.planning.planner import restrict
from muon_dtensor.planning.serialize import digest
from muon_dtensor.runtime.consistency_codec import Manifest
from muon_dtensor.runtime.dtensors import LayoutCache, misplaced_shards, placed
from muon_dtensor.runtime.hyperparameters import MuonOptions, Orthogonalizer
from muon_dtensor.runtime.local_param import LocalParam
from muon_dtensor.runtime.plain_tensors import PlainTensors
from muon_dtensor.runtime.torch_private import (
    cast,
    dtype_name,
    gathered_params,
    is_offloaded,
    local_part,
    num_ranks,
    this_rank,
)
from muon_dtensor.version import __version__

VERSIONS = f"muon_dtensor {__version__}, torch {torch.__version__}"
"""Ranks compare this text before they compare parameters."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter with its name and its param group (number `group_index`).

    `user_name` is the user's name for it; `name` is unique among all parameters.
    """

    name: str
    user_name: str
    param: Tensor
    group: dict[str, Any]
    group_index: int


class ParameterTable:
    """The parameters of all param groups, in order; unnamed ones are numbered.

    `entries` can train: they require gradients, have one, or have state because they trained
    before. Other parameters, such as the frozen base of an adapter, are in no plan and have no
    state. They may have any shape and dtype.
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
        self.wrong_shards: dict[str, Problem] = {}
        self.layout_cache = LayoutCache(None if plain.rule is None else plain.rule.mesh)

    def specs(
        self,
        wire_dtype: torch.dtype,
        *,
        mesh: DeviceMesh | None,
        shard_momentum: bool,
        exchange: bool,
    ) -> list[ParamSpec]:
        """Return the planner's description of all parameters of Muon.

        Args:
            wire_dtype: dtype of the iteration and of everything that is sent.
            mesh: the mesh that must hold all parameters.
            shard_momentum: see `Muon`.
            exchange: whether all ranks exchange the shapes of new plain tensors now, including
                ranks that have none.

        Raises:
            ValueError: a parameter lives outside the mesh.
            PlanMismatchError: ranks hold different plain tensors.
            PlanError: Muon cannot step some parameters; the message lists all of them.
        """
        if mesh is not None:
            self._check_on_mesh(self.layout_cache.mesh(mesh))
        named_params = [(entry.user_name, entry.param) for entry in self.all_entries]
        self._plain.resolve(named_params, self.layout_cache, exchange=exchange)
        problems = [*self._problems(), *self._find_wrong_shards()]
        refused = {problem.fqn for problem in problems}
        specs: list[ParamSpec] = []
        devices: dict[MeshSpec, torch.device] = {}
        for entry in self.muon:
            if entry.name in refused:
                continue
            try:
                spec = self._param_spec(entry, wire_dtype, shard_momentum=shard_momentum)
            except RefusalError as refusal:
                observed = placed(entry.param)
                problems.append(Problem(entry.name, observed, refusal.reason, refusal.remedy))
                continue
            specs.append(spec)
            device = local_part(entry.param).device
            mesh_device = (
                device if spec.is_offloaded else devices.setdefault(spec.layout.mesh, device)
            )
            if mesh_device != device:
                problems.append(
                    Problem(
                        entry.name,
                        f"on {device}",
                        f"Other parameters of mesh {spec.layout.mesh} are on {mesh_device}.",
                        "Move them to one device, or give each device an optimizer of its own.",
                    )
                )
        if problems:
            raise PlanError(problems, num_params=len(self.entries))
        return specs

    def _param_spec(
        self, entry: Entry, wire_dtype: torch.dtype, *, shard_momentum: bool
    ) -> ParamSpec:
        """Return the planner's description of one parameter of Muon. Raises RefusalError."""
        return self.layout_cache.param(
            entry.name,
            entry.param,
            self.layout(entry),
            declaration_of(entry.group),
            flat_shape=self._plain.flat_shape(entry.param),
            num_iterations=entry.group["ns_steps"],
            wire_dtype=wire_dtype,
            has_moments=entry.group["normuon_beta"] is not None,
            can_distribute=entry.group["orthogonalizer"] not in WHOLE_MATRICES,
            shards_momentum=shard_momentum,
            is_offloaded=self.is_offloaded(entry.param),
        )

    def check_steppable(self) -> None:
        """Raise PlanError for parameters that cannot be stepped in any layout."""
        if problems := self._problems():
            raise PlanError(problems, num_params=len(self.entries))

    def _problems(self) -> list[Problem]:
        """Return the problems of parameters that cannot be stepped in any layout."""
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

    def _find_wrong_shards(self) -> list[Problem]:
        """Return the problems of DTensors whose local shape does not match their placements.

        Only of those on meshes of one rank. The others are added to `wrong_shards`, and all ranks
        raise when they compare their plans, since the shards of other ranks may be correct.
        """
        problems = []
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
                f"Rank {this_rank()} stores {list(stored)}, but a shard with these placements is "
                f"{list(expected or ())}.",
                "Make DTensors by fully_shard, parallelize_module or distribute_tensor, or cut as "
                "torch.chunk cuts before DTensor.from_local. Shards of other sizes can be plain "
                "tensors under create_processgroup_config.",
            )
            if mesh.num_ranks == 1:
                problems.append(problem)
            else:
                self.wrong_shards[entry.name] = problem
        return problems

    def _check_on_mesh(self, config_mesh: MeshSpec) -> None:
        """Raise ValueError for a parameter on ranks outside of the config's mesh."""
        for entry in self.entries:
            mesh = self.layout_cache.effective_mesh(entry.param)
            if not mesh.rank_set <= config_mesh.rank_set:
                raise ValueError(
                    f"{entry.name} lives on mesh {mesh} with ranks {min(mesh.ranks)} to "
                    f"{max(mesh.ranks)}, which the config's mesh {config_mesh} does not hold. Make "
                    "the config from a mesh that holds all parameters."
                )

    def owners(self, config: DistributedConfig, specs: Sequence[ParamSpec]) -> dict[str, int]:
        """Return the owners by the user's own `assign_fn`, by parameter; empty without one.

        Raises AssignmentError for an invalid assignment.
        """
        if not config.names_owners:
            return {}
        rule = self._plain.rule
        tensors = [
            entry.param
            if isinstance(entry.param, DTensor) or rule is None or not rule.nontrivial_cuts
            else torch.empty(
                self._plain.flat_shape(entry.param) or spec.shape,
                dtype=entry.param.dtype,
                device="meta",
            )
            for entry, spec in zip(self.muon, specs, strict=True)
        ]
        return self.assigned_owners(config, tensors)

    def assigned_owners(
        self, config: DistributedConfig, tensors: Sequence[Tensor]
    ) -> dict[str, int]:
        """Call `assign_fn` with one tensor for each parameter of Muon; return owners by name."""
        world_size = config.state.get("world_size") or num_ranks()
        assignments = validate_assignments(
            config.assign_fn(tensors, config.state), tensors, world_size
        )
        return {self.muon[index].name: rank for index, rank in assignments.items()}

    def layout(self, entry: Entry) -> Layout:
        """Return the layout of a parameter. Plain tensors need a call of `specs` before."""
        if isinstance(entry.param, DTensor):
            return self.layout_cache.layout(entry.param)
        return self.layout_cache.shared(self._plain.layout(entry.param))

    def misplaced(self) -> str:
        """Return a message that names shards which torch's checkpoints misplace; empty for none."""
        names = [
            entry.name
            for entry in self.entries
            if isinstance(entry.param, DTensor) and self.layout_cache.is_misplaced(entry.param)
        ]
        return misplaced_shards(names) if names else ""

    def misplaced_state(self, states: Iterable[Mapping[str, Any]]) -> Iterator[DTensor]:
        """Yield the tensors of these states that torch's checkpoints misplace."""
        for state in states:
            for value in state.values():
                if isinstance(value, DTensor) and self.layout_cache.is_misplaced(value):
                    yield value

    def without_state(self, state: Mapping[Tensor, Mapping[str, Any]]) -> list[int]:
        """Return the state-dict numbers of parameters without state, which never trained.

        Slices of FSDP1 are excluded, because FSDP1 gathers the state of all ranks.
        """
        return [
            number
            for number, entry in enumerate(self.all_entries)
            if not state.get(entry.param) and self._plain.flat_shape(entry.param) is None
        ]

    def manifests(self, plan: Plan) -> Iterator[Manifest]:
        """Yield what each set of ranks compares: its part of the plan, and its parameters.

        Frozen parameters are included, so that their ranks are connected and have compared them
        before one is unfrozen.
        """
        members: dict[frozenset[int], list[tuple[Entry, MeshSpec]]] = {}
        for entry in self.all_entries:
            mesh = self.layout_cache.effective_mesh(entry.param)
            if mesh.dim_names and mesh.holds(this_rank()):
                members.setdefault(mesh.rank_set, []).append((entry, mesh))
        for rank_set, pairs in members.items():
            lines = (VERSIONS, *(self._line(entry, mesh) for entry, mesh in pairs))
            # Several meshes may have these ranks. All ranks must use the same one to compare.
            mesh = min((mesh for _, mesh in pairs), key=lambda m: (m.dim_names, m.shape))
            yield Manifest(
                mesh=mesh,
                digest=digest(restrict(plan, rank_set)),
                params=lines,
                fqns=tuple(entry.name for entry, _ in pairs if entry.name in self._active),
                sometimes_empty=frozenset(
                    entry.name
                    for entry, _ in pairs
                    if entry.name in self._active
                    and not isinstance(entry.param, DTensor)
                    and self._plain.is_sometimes_empty(entry.param)
                ),
                groups=tuple(sorted({entry.group_index for entry, _ in pairs})),
            )

    def _line(self, entry: Entry, mesh: MeshSpec) -> str:
        """Return the text of a parameter that ranks compare."""
        param = entry.param
        shape: object = list(param.shape)
        placements = getattr(param, "placements", "replicated")
        if not isinstance(param, DTensor) and self._plain.is_cut(param):
            shape, placements = list(self._plain.flat_shape(param) or ()) or "shards", "cut"
        declared = declaration_of(entry.group)
        if entry.name not in self._active:
            return f"{entry.name} {shape} {dtype_name(param.dtype)} {placements} on {mesh}, frozen"
        problem = self.wrong_shards.get(entry.name)
        stored = f", but stores {list(local_part(param).shape)}" if problem else ""
        return (
            f"{entry.name} {shape} {dtype_name(param.dtype)} {placements} on {mesh}{stored}, "
            f"{entry.group['algorithm']}{'' if declared == Declaration() else f', {declared}'}"
        )

    def muon_params(
        self,
        grads: Mapping[str, Tensor],
        state: Mapping[Tensor, MutableMapping[str, Any]],
        groups: Sequence[Mapping[str, Any]],
        custom: Orthogonalizer | None,
        kernel: IterationKernel,
        *,
        casts_momenta: bool,
        as_shards: bool,
    ) -> dict[int, LocalParam]:
        """Return the parameters of Muon that have a gradient, by index in `muon`.

        Args:
            grads: gradients by name.
            state: of the optimizer, by parameter.
            groups: the options of the step, by param group.
            custom: the orthogonalizer of groups that name "custom".
            kernel: kernel of the iterations.
            casts_momenta: cast momenta in `state` to the dtype of their gradients, as
                torch.optim.Muon stores them.
            as_shards: return this rank's shards as plain tensors, else tensors as they are.
        """
        shard_of = local_part if as_shards else _unchanged
        options: dict[int, MuonOptions] = {}
        params: dict[int, LocalParam] = {}
        for index, entry in enumerate(self.muon):
            number = entry.group_index
            if number not in options:
                options[number] = MuonOptions.of(groups[number], custom, kernel)
            grad = grads.get(entry.name)
            if grad is None:
                continue
            param_state = state[entry.param]
            stored: Tensor | QuantizedMomentum
            if groups[number]["momentum_bits"] is not None:
                stored = quantized_momentum(param_state, entry.param)
            else:
                momentum = param_state["momentum_buffer"]
                if casts_momenta and momentum.dtype != grad.dtype:
                    momentum = param_state["momentum_buffer"] = cast(momentum, grad.dtype)
                stored = shard_of(momentum)
            params[index] = LocalParam(
                shard_of(entry.param),
                shard_of(grad),
                stored,
                options[number],
                None if options[number].normuon_beta is None else shard_of(param_state[MOMENTS]),
                shard_of(param_state[COMPENSATION])
                if options[number].weight_rounding == "compensated"
                else None,
            )
        return params

    def function_params(
        self, params: Mapping[int, LocalParam], owners: Mapping[str, int]
    ) -> list[FunctionParam]:
        """Return those of `muon_params` that have a gradient of their own, with their owners.

        The user's functions move them.
        """
        return [
            FunctionParam(
                entry.name, params[index], owners[entry.name], declaration_of(entry.group)
            )
            for index, entry in enumerate(self.muon)
            if index in params and entry.param.grad is not None
        ]

    def adamw_params(
        self, grads: Mapping[str, Tensor], state: Mapping[Tensor, Mapping[str, Any]]
    ) -> dict[int, list[AdamWLocal]]:
        """Return this rank's shards of AdamW's parameters with a gradient, by param group."""
        by_group: dict[int, list[AdamWLocal]] = {}
        for entry in self.adamw:
            if entry.name in grads:
                param_state = state[entry.param]
                local = AdamWLocal(
                    local_part(entry.param),
                    local_part(grads[entry.name]),
                    local_part(param_state["exp_avg"]),
                    local_part(param_state["exp_avg_sq"]),
                    param_state["step"],
                )
                by_group.setdefault(entry.group_index, []).append(local)
        return by_group

    def is_offloaded(self, param: Tensor) -> bool:
        """Whether a shard is on the host of its mesh's devices, see `ParamSpec`."""
        mesh = self._device_mesh(param)
        shard_device = local_part(param).device
        return mesh is not None and is_offloaded(shard_device, torch.device(mesh.device_type))

    def buffer_device(self, param: Tensor) -> torch.device:
        """Return the device on which a parameter is exchanged and orthogonalized."""
        mesh = self._device_mesh(param)
        if mesh is not None and self.is_offloaded(param):
            return torch.device(mesh.device_type)
        return local_part(param).device

    def _device_mesh(self, param: Tensor) -> DeviceMesh | None:
        return self.layout_cache.device_meshes.get(self.layout_cache.effective_mesh(param))

    @property
    def shared_device(self) -> torch.device:
        """The device on which ranks compare values: `buffer_device` of the first one on a mesh.

        Without one, that of the first parameter; without any, the host. Tensors on the meta device
        have no values: for such parameters it is the device of their mesh.
        """
        params = [e.param for e in self.entries]
        on_meshes = [param for param in params if self.layout_cache.effective_mesh(param).dim_names]
        first = next(iter(on_meshes or params), None)
        if first is not None and not local_part(first).is_meta:
            return self.buffer_device(first)
        return torch.device(first.device_mesh.device_type if isinstance(first, DTensor) else "cpu")


def can_train(param: Tensor, state: Mapping[Tensor, Mapping[str, Any]]) -> bool:
    """Whether a parameter requires a gradient, has one, or trained before it was frozen."""
    return param.requires_grad or param.grad is not None or bool(state.get(param))


def _entries(groups: Sequence[dict[str, Any]]) -> Iterator[Entry]:
    """Yield the parameters of all groups, each with a unique name.

    The n-th parameter of the same name, n > 1, is called `n:name`. Equal names occur if a rank has
    two pipeline chunks.
    """
    number = 0
    counts: Counter[str] = Counter()
    for group_index, group in enumerate(groups):
        names = group.get("param_names")
        for index, param in enumerate(group["params"]):
            user_name = names[index] if names else f"param.{number}"
            counts[user_name] += 1
            count = counts[user_name]
            name = user_name if count == 1 else f"{count}:{user_name}"
            yield Entry(name, user_name, param, group, group_index)
            number += 1


def _shares_memory(tensor: Tensor) -> bool:
    """Whether several elements share memory, as after `expand`."""
    return any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _overlapping(entry: Entry) -> Problem:
    """Return the problem of a parameter that torch cannot update in place."""
    return Problem(
        entry.name,
        placed(entry.param),
        "Several of its elements share memory (it was made by expand), so no step can update it.",
        "Give it memory of its own: nn.Parameter(tensor.clone()).",
    )


def _wrong_dtype(entry: Entry) -> Problem:
    """Return the problem of a parameter whose dtype is not a real floating-point one."""
    return Problem(
        entry.name,
        placed(entry.param),
        f"Muon needs a real floating dtype; this is {dtype_name(entry.param.dtype)}.",
        "Leave it out of the optimizer, or store it in a floating dtype.",
    )


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
