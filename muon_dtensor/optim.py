"""Muon as a torch.optim.Optimizer: groups, state, step. Where the floors meet.

Keeps torch's contract; leaves planning, moving and mathematics to those who know them.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from muon_dtensor.adamw import AdamWLocal, adamw_step
from muon_dtensor.config import DistributedConfig
from muon_dtensor.errors import GroupOptionError, PlanError, Problem
from muon_dtensor.layout import MeshSpec, ParamSpec
from muon_dtensor.options import DEFAULTS, as_text, complete, complete_loaded
from muon_dtensor.planning.ir import Plan, PlanOptions
from muon_dtensor.planning.planner import plan_update, restrict
from muon_dtensor.runtime.agreement import Agreement, Manifest
from muon_dtensor.runtime.describe import Describer, dtype_name, local_part, this_rank
from muon_dtensor.runtime.executor import Executor, LocalParam, MuonOptions
from muon_dtensor.runtime.gradients import GradientGate
from muon_dtensor.runtime.groups import Groups
from muon_dtensor.state import check_loaded, make_state

logger = logging.getLogger("muon_dtensor")

WIRE_DTYPES = (torch.bfloat16, torch.float32)

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Muon(Optimizer):
    r"""Muon whose matrices may be cut over any 1-D, 2-D or 3-D DeviceMesh.

    For the same gradients a step gives bitwise the parameters of `torch.optim.Muon` on one
    process (CPU, defaults), whatever the DTensor placements. With G the gradient, B the momentum
    (Jordan 2024, https://kellerjordan.github.io/posts/muon/):

        B <- momentum B + (1 - momentum) G
        D  = (1 - momentum) G + momentum B   (nesterov), else B
        O  = approximate polar factor of the whole matrix D, by Newton-Schulz
        W <- (1 - lr weight_decay) W - lr s O,   s from adjust_lr_fn

    A 2-D parameter is one matrix, a 3-D parameter `[e, m, n]` is e matrices. Each is brought
    together on one rank, orthogonalized once over the whole mesh, and handed back; `plan` says
    where. All ranks of a parameter's mesh must construct the optimizer and call `step` alike.

    Args:
        params: tensors, DTensors, (name, tensor) pairs or param groups. Names make errors and
            plans readable: prefer `model.named_parameters()`. Plain tensors are this rank's own,
            unless `distributed_config` says where they are replicated.
        lr: learning rate, a number or a one-element tensor.
        weight_decay: decoupled weight decay, times lr.
        momentum: of the moving average B.
        nesterov: orthogonalize D instead of B.
        ns_coefficients: (a, b, c) of the iteration.
        eps: least Frobenius norm to divide by; see `orthogonalize.newton_schulz`.
        ns_steps: iterations, 0 to 99.
        adjust_lr_fn: None or "original": s = sqrt(max(1, rows / cols)); "match_rms_adamw":
            s = 0.2 sqrt(max(rows, cols)) (Liu et al. 2025, arXiv:2502.16982).
        distributed_config: of `create_devicemesh_config` or its kin: where plain tensors are
            replicated, and how exchanges run. DTensors need none.
        ns_dtype: dtype of the iteration and of all that is sent.
        bucket_mb: most MiB of exchange buffers a bucket may hold on a rank. The work space of one
            matrix (of several, where batched) comes on top.
        prefetch_count: buckets in flight while another is orthogonalized; 0 for none. Default:
            that of `distributed_config`, or 1.
        batched: stack equal-shaped matrices of one owner; rounds differently. Default: on a GPU.
        missing_grad: a parameter with a gradient on some ranks only: "raise"
            MissingGradientError on every rank, or count it as "zero" there. Without a gradient
            on any rank, a parameter, its momentum and its decay are left alone, as in torch.
        nonfinite: NaN or Inf in a gradient on some rank: "raise" NonFiniteGradientError on
            every rank, "skip" the step on every rank, or "propagate" it as torch does. On a GPU
            the step is masked on the device, and raises at the next `step` or `state_dict`.

    A param group may name any of the options up to `adjust_lr_fn`, and `algorithm="adamw"` with
    `betas`, `eps`, `weight_decay`, `lr`: torch's own AdamW steps such a group, of any shape. Where
    it names no `lr` or `weight_decay`, it takes the ones above, as any group of an optimizer does.

    Raises:
        GroupOptionError: an option that is unknown or out of range.
        ValueError: `bucket_mb` or `prefetch_count` is out of range, or a DTensor lives on ranks
            that the mesh of `distributed_config` does not hold.
        PlanError: parameters that Muon cannot step, all of them told at once.
        PlanMismatchError: from the first `step`, if ranks differ in parameters or options.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = DEFAULTS["lr"],
        weight_decay: float = DEFAULTS["weight_decay"],
        momentum: float = DEFAULTS["momentum"],
        nesterov: bool = DEFAULTS["nesterov"],
        ns_coefficients: tuple[float, float, float] = DEFAULTS["ns_coefficients"],
        eps: float = DEFAULTS["eps"],
        ns_steps: int = DEFAULTS["ns_steps"],
        adjust_lr_fn: str | None = DEFAULTS["adjust_lr_fn"],
        *,
        distributed_config: DistributedConfig | None = None,
        ns_dtype: torch.dtype = torch.bfloat16,
        bucket_mb: float = 256,
        prefetch_count: int | None = None,
        batched: bool | None = None,
        missing_grad: Literal["raise", "zero"] = "raise",
        nonfinite: Literal["raise", "skip", "propagate"] = "raise",
    ) -> None:
        if ns_dtype not in WIRE_DTYPES:
            raise GroupOptionError(
                f"ns_dtype must be one of {', '.join(map(str, WIRE_DTYPES))}, got {ns_dtype}"
            )
        if missing_grad not in ("raise", "zero"):
            raise GroupOptionError(f"missing_grad must be 'raise' or 'zero', got {missing_grad!r}")
        if nonfinite not in ("raise", "skip", "propagate"):
            raise GroupOptionError(
                f"nonfinite must be 'raise', 'skip' or 'propagate', got {nonfinite!r}"
            )
        self._ns_dtype = ns_dtype
        if not (isinstance(bucket_mb, (int, float)) and 0 < bucket_mb < math.inf):
            raise ValueError(f"bucket_mb must be a number above 0, got {bucket_mb!r}")
        self._bucket_nbytes = max(1, int(bucket_mb * 2**20))
        self._config = distributed_config or DistributedConfig()
        if prefetch_count is not None:
            self._config = replace(self._config, prefetch_count=prefetch_count)
        self._batched = batched
        self._missing_grad = missing_grad
        self._nonfinite = nonfinite
        self._plan: Plan | None = None
        self._sweeps_twice: dict[frozenset[int], bool] = {}
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        complete({}, defaults)
        groups: Any = params if isinstance(params, Tensor) else list(params) or [{"params": []}]
        super().__init__(groups, defaults)
        self._replan()
        if this_rank() == 0:
            logger.info("%s", self.plan)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; its parameters are planned, and compared at the next step.

        Raises what the constructor raises, and then adds nothing.
        """
        super().add_param_group(complete(param_group, self.defaults))
        if self._plan is not None:
            try:
                self._replan()
            except ValueError:
                self.param_groups.pop()
                self._replan()
                raise

    @property
    def plan(self) -> Plan:
        """What a step does: `print(optimizer.plan)`."""
        assert self._plan is not None, "the constructor plans"
        return self._plan

    def _named(self, algorithm: str | None = None) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Name, tensor and group of every parameter, in order; unnamed ones are numbered."""
        number = 0
        for group in self.param_groups:
            names = group.get("param_names")
            for index, param in enumerate(group["params"]):
                name = names[index] if names else f"param.{number}"
                number += 1
                if algorithm in (None, group["algorithm"]):
                    yield name, param, group

    def _replan(self) -> None:
        """Plan anew and make missing state; the next ballots compare the new plan."""
        config = self._config
        describer = Describer(config.plain_mesh)
        if config.mesh is not None:
            self._check_mesh(describer, config.mesh)
        specs: list[ParamSpec] = []
        homes: dict[MeshSpec, torch.device] = {}
        muon = list(self._named("muon"))
        named = list(self._named())
        problems = _same_names([name for name, *_ in named])
        for name, param, group in muon:
            described = describer.param(
                name, param, num_iterations=group["ns_steps"], wire_dtype=self._ns_dtype
            )
            if isinstance(described, Problem):
                problems.append(described)
                continue
            specs.append(described)
            device = local_part(param).device
            home = homes.setdefault(described.layout.mesh, device)
            if home != device:
                problems.append(
                    Problem(
                        name,
                        f"on {device}",
                        f"Other parameters of mesh {described.layout.mesh} are on {home}.",
                        "Move them to one device, or give each device an optimizer of its own.",
                    )
                )
        if problems:
            raise PlanError(problems, num_params=len(named))
        on_gpu = any(param.device.type == "cuda" for _, param, _ in muon)
        options = PlanOptions(
            bucket_nbytes=self._bucket_nbytes,
            prefetch_count=config.prefetch_count,
            batched=on_gpu if self._batched is None else self._batched,
            sequential=not config.async_gpu_parallelism,
        )
        self._plan = plan = plan_update(specs, options)
        for _, param, group in self._named():
            make_state(self.state[param], param, group["algorithm"])
        rank = this_rank()
        manifests = list(self._manifests(plan, describer))
        groups = Groups(describer.device_meshes, rank)
        self._muon = [param for _, param, _ in muon]
        self._agreement = Agreement(manifests, groups, rank)
        shared = (param for _, param, _ in named if describer.home(param).dim_names)
        self._gate = GradientGate(
            {name: param for name, param, _ in named},
            self._agreement,
            device=next((local_part(p).device for p in shared), torch.device("cpu")),
            missing_grad=self._missing_grad,
            nonfinite=self._nonfinite,
        )
        devices = [local_part(param).device for param in self._muon]
        self._executor = Executor(plan, rank, groups, devices)
        self._is_connected = False

    def _check_mesh(self, describer: Describer, mesh: DeviceMesh) -> None:
        """Raise ValueError for parameters that live outside the mesh of the config."""
        whole = describer.mesh(mesh)
        for name, param, _ in self._named():
            home = describer.home(param)
            if not home.rank_set <= whole.rank_set:
                raise ValueError(
                    f"{name} lives on mesh {home} with ranks {min(home.ranks)} to "
                    f"{max(home.ranks)}, which the config's mesh {whole} does not hold. Make the "
                    "config from a mesh that holds all parameters."
                )

    def _manifests(self, plan: Plan, describer: Describer) -> Iterator[Manifest]:
        """What each set of ranks must have in common: its part of the plan, its parameters."""
        members: dict[frozenset[int], list[tuple[str, Tensor, dict[str, Any], MeshSpec]]] = {}
        for name, param, group in self._named():
            mesh = describer.home(param)
            if mesh.dim_names and mesh.holds(this_rank()):
                members.setdefault(mesh.rank_set, []).append((name, param, group, mesh))
        for rank_set, params in members.items():
            digest = restrict(plan, rank_set).digest
            lines = tuple(
                f"{name} {list(param.shape)} {dtype_name(param.dtype)} "
                f"{getattr(param, 'placements', 'replicated')} on {mesh}, {group['algorithm']}"
                for name, param, group, mesh in params
            )
            # Several meshes may hold these ranks; all ranks must pick the same one to vote on.
            voting = min((mesh for *_, mesh in params), key=lambda m: (m.dim_names, m.shape))
            ids = {id(group) for _, _, group, _ in params}
            groups = tuple(i for i, group in enumerate(self.param_groups) if id(group) in ids)
            yield Manifest(voting, digest, lines, tuple(name for name, *_ in params), groups)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient.

        Raises:
            PlanMismatchError, MissingGradientError, NonFiniteGradientError: on every rank of
                the meshes concerned, before anything has changed.
            RuntimeError: a gradient that cannot be used (sparse, of another dtype or mesh), on
                this rank or on another.
        """
        self._gate.read_past()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._agreement.prove_plan(self._gate.device, self._sweeps_twice)
        options = tuple(as_text(group) for group in self.param_groups)
        grads, keep = self._gate.admit(options)
        if keep is False:
            return loss
        if not self._is_connected:
            self._executor.connect()
            self._is_connected = True
        mask = keep if isinstance(keep, Tensor) else None
        self._executor.run(self._local_params(grads), mask)
        self._step_adamw(grads, mask)
        return loss

    def _local_params(self, grads: dict[str, Tensor]) -> dict[int, LocalParam]:
        """This rank's part of every Muon parameter that has a gradient, by index in the plan."""
        found: dict[int, LocalParam] = {}
        options: dict[int, MuonOptions] = {}
        for index, (name, param, group) in enumerate(self._named("muon")):
            if name not in grads:
                continue
            if id(group) not in options:
                options[id(group)] = MuonOptions(
                    lr=group["lr"],
                    decay=float(1 - group["lr"] * group["weight_decay"]),
                    momentum=group["momentum"],
                    nesterov=group["nesterov"],
                    ns_coefficients=tuple(group["ns_coefficients"]),
                    eps=group["eps"],
                    ns_steps=group["ns_steps"],
                    adjust_lr_fn=group["adjust_lr_fn"],
                )
            found[index] = LocalParam(
                local_part(param),
                local_part(grads[name]),
                local_part(self.state[param]["momentum_buffer"]),
                options[id(group)],
            )
        return found

    def _step_adamw(self, grads: dict[str, Tensor], keep: Tensor | None) -> None:
        by_group: dict[int, list[AdamWLocal]] = {}
        for name, param, group in self._named("adamw"):
            if name in grads:
                state = self.state[param]
                leaf = AdamWLocal(
                    local_part(param),
                    local_part(grads[name]),
                    local_part(state["exp_avg"]),
                    local_part(state["exp_avg_sq"]),
                    state["step"],
                )
                by_group.setdefault(id(group), []).append(leaf)
        found_inf = None if keep is None else (~keep).to(torch.float32)
        for group in self.param_groups:
            adamw_step(by_group.get(id(group), []), group, found_inf)

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict: `momentum_buffer`, or AdamW's state, per parameter."""
        self._gate.read_past()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, for state of this optimizer, torch.optim.Muon or torch.optim.AdamW.

        Raises:
            GroupOptionError: an option out of its range.
            ValueError: state whose shape or placements are not those of its parameter. Then
                nothing has changed.
        """
        check_loaded(state_dict, self.param_groups)
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        mine = {name: self.__dict__[name] for name in _PICKLED}
        return {**super().__getstate__(), **mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by pickle and by `load_state_dict`: plan what the groups now say."""
        known = [group["algorithm"] for group in self.__dict__.get("param_groups", [])]
        super().__setstate__(state)
        for index, group in enumerate(self.param_groups):
            complete_loaded(group, known[index] if index < len(known) else "muon")
        self.__dict__.setdefault("_sweeps_twice", {})
        self._replan()


_PICKLED = (
    "_config",
    "_ns_dtype",
    "_bucket_nbytes",
    "_batched",
    "_missing_grad",
    "_nonfinite",
)


def _same_names(names: list[str]) -> list[Problem]:
    """A problem for every name that more than one parameter has."""
    counts = Counter(names)
    return [
        Problem(name, f"{count} parameters", "They have one name.", "Pass names that differ.")
        for name, count in counts.items()
        if count > 1
    ]
