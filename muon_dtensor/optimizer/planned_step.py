"""A plan of the param groups, with the checks and the executor that carry it out.

It is made again when param groups change. State of parameters lives in the optimizer.
"""

import logging
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from muon_dtensor.algorithms.adamw import adamw_step
from muon_dtensor.distributed_config.config import DistributedConfig
from muon_dtensor.distributed_config.custom_transport import CustomTransport
from muon_dtensor.errors import (
    GroupOptionError,
    PlanError,
    PlanMismatchError,
    StepFailedError,
    shortened,
)
from muon_dtensor.optimizer.metrics import Measurement, State
from muon_dtensor.optimizer.options import as_text, planned_options, validate
from muon_dtensor.optimizer.params import ParameterTable, can_train
from muon_dtensor.optimizer.settings import Settings
from muon_dtensor.optimizer.state import drop_stale, follow_grad_dtypes, make_state
from muon_dtensor.planning.check import check
from muon_dtensor.planning.normuon_state import moment_layout
from muon_dtensor.planning.report import plan_report
from muon_dtensor.runtime.consistency import Agreement
from muon_dtensor.runtime.executor import Executor
from muon_dtensor.runtime.gradients import GradientGate
from muon_dtensor.runtime.hyperparameters import check_orthogonalizer
from muon_dtensor.runtime.plain_tensors import PlainTensors
from muon_dtensor.runtime.process_groups import Groups
from muon_dtensor.runtime.replicas import differing_replicas
from muon_dtensor.runtime.torch_private import (
    are_in_modules,
    fsdp2_params,
    local_part,
    this_rank,
    warning_level,
)
from muon_dtensor.runtime.trace import Trace

logger = logging.getLogger("muon_dtensor")
META = torch.device("meta")


class PlannedStep:
    """A plan of these param groups, and who agrees on it and walks it."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        plain: PlainTensors,
        config: DistributedConfig,
        settings: Settings,
        state: State,
        *,
        trace: Trace | None,
        before: "PlannedStep | None",
        exchange: bool,
    ) -> None:
        """Raises what the constructor of `Muon` raises about parameters.

        Args:
            groups: param groups with every option.
            plain: what is known of plain tensors, under the rule of the config.
            config: how plain tensors lie, and how exchanges run.
            settings: the other options of the constructor.
            state: of the optimizer; a parameter that has some can train.
            trace: what records the phases.
            before: what was prepared for the groups as they were; a user's `assign_fn` is asked
                once for the same parameters.
            exchange: whether all ranks learn of new plain tensors now, also those without any.
        """
        self._groups, self._config, self._settings = groups, config, settings
        for group in groups:
            if group["orthogonalizer"] == "custom" and settings.custom is None:
                raise GroupOptionError(
                    "a param group has orthogonalizer='custom': give it to the constructor, "
                    "Muon(..., orthogonalizer=function)"
                )
            if group["normuon_beta"] is not None and config.uses_custom_transport:
                raise GroupOptionError("normuon_beta needs a plan; yours is a hand-written config")
        for name in ("offload_momentum", "metrics_every"):
            if config.uses_custom_transport and getattr(settings, name):
                raise GroupOptionError(f"{name} needs a plan; yours is a hand-written config")
        self.table = table = ParameterTable(groups, plain, state)
        self._check_orthogonalizer()
        if config.uses_custom_transport:
            table.must_be_real()
            specs = []
            self._owners = self._assigned_by_hand(before)
        else:
            specs = table.specs(settings.ns_dtype, whole=config.mesh, exchange=exchange)
            self._owners = table.owners(config, specs)
        on_gpu = any(entry.param.device.type == "cuda" for entry in table.muon)
        options = settings.plan_options(
            on_gpu=on_gpu,
            prefetch_count=config.prefetch_count,
            sequential=not config.async_gpu_parallelism,
        )
        self.report = plan_report(specs, options, self._owners)
        self.plan = self.report.plan
        check(self.plan)
        self._tell_of_owners(before)
        rank = this_rank()
        self._process_groups = process_groups = Groups(table.layout_cache.device_meshes, rank)
        self.agreement = Agreement(list(table.manifests(self.plan)), process_groups, rank)
        self.gate = GradientGate(
            {entry.name: entry.param for entry in table.entries},
            self.agreement,
            device=table.shared_device,
            missing_grad=settings.missing_grad,
            nonfinite=settings.nonfinite,
            of_own_dtype=[entry.name for entry in table.adamw],
        )
        if before is not None:
            self.gate.follow(before.gate)
        self._params = [entry.param for entry in table.all_entries]
        self._frozen = [e.param for e in table.all_entries if not can_train(e.param, state)]
        self._planned = [planned_options(group) for group in groups]
        self._planned_config = (config.planned, config.plain_rule)
        self._texts: tuple[str, ...] = ()
        self._valid = [dict(group) for group in groups]
        self._read: Sequence[Mapping[str, Any]] = groups
        self._devices = [local_part(param).device for param in self._params]
        devices = [local_part(entry.param).device for entry in table.muon]
        self.executor = Executor(self.plan, rank, process_groups, devices, trace)
        self._is_connected = False
        self._has_told = False
        skips_replicas = config.uses_custom_transport or not settings.check_replicas
        self.has_compared_replicas: bool = (
            skips_replicas if before is None else before.has_compared_replicas
        )
        # what all ranks hold while this is not yet compared: it was made for the groups before
        self._agreed: PlannedStep | None = None
        self._is_agreed: bool = False
        if before is not None:
            self._agreed = before if before._is_agreed else before._agreed
        self.is_unfinished: bool = before is not None and before.is_unfinished

    def _assigned_by_hand(self, before: "PlannedStep | None") -> dict[str, int]:
        """Owners by the user's `assign_fn`."""
        params = [entry.param for entry in self.table.muon]
        known = [entry.param for entry in before.table.muon] if before else None
        if before and known and len(known) == len(params) and all(map(is_, known, params)):
            return before._owners
        return self.table.assigned(self._config, params)

    def must_be_finished(self) -> None:
        """Raise StepFailedError where a step has failed, and nothing was loaded since."""
        if self.is_unfinished:
            raise StepFailedError(
                "An earlier step failed halfway: some parameters and momenta may be updated and "
                "others not. Load the last checkpoint into model and optimizer; if a rank has "
                "died, start all of them again."
            )

    def holds(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these groups hold the parameters it was made for, where they were then.

        On the meta device there is nothing to prepare for: the gradient gate tells of those.
        """
        now = [param for group in groups for param in group["params"]]
        devices = (local_part(param).device for param in now)
        return (
            len(now) == len(self._params)
            and all(map(is_, now, self._params))
            and all(d in (then, META) for d, then in zip(devices, self._devices, strict=True))
        )

    def is_current(
        self, groups: Sequence[Mapping[str, Any]], state: State, config: DistributedConfig
    ) -> bool:
        """Whether groups and config say what they did, and all that can train was planned and has
        state (which `optimizer.state.clear()` takes away).
        """
        return (
            self._planned == [planned_options(group) for group in groups]
            and self._planned_config == (config.planned, config.plain_rule)
            and not any(can_train(param, {}) for param in self._frozen)
            and all(state.get(entry.param) for entry in self.table.entries)
        )

    def make_state(self, state: MutableMapping[Tensor, dict[str, Any]]) -> None:
        """What is missing of it, or kept in another dtype or place than wanted."""
        settings = self._settings
        specs = {spec.fqn: spec for spec in self.plan.params}
        for entry in self.table.entries:
            spec = specs.get(entry.name)
            moments = spec and spec.moment_cuts is not None and moment_layout(spec)
            make_state(
                state[entry.param],
                entry.param,
                entry.group["algorithm"],
                settings.momentum_dtype,
                offload_momentum=settings.offload_momentum,
                moments=moments or None,
            )

    def measured_step(
        self,
        state: State,
        sweeps_twice: dict[frozenset[int], bool],
        number: int,
        trace: Trace | None,
        fault: Exception | None,
    ) -> dict[str, float]:
        """`step`, and its metrics; `number`, `trace`: see `Measurement`, `fault`: see `step`."""
        measurement = Measurement(self.report, self.table, number, trace)
        with self.executor.observed(measurement.trace, measurement.look):
            grads = self.step(state, sweeps_twice, is_measured=True, fault=fault)
        self._settings.wait_for_momentum()
        return measurement.finish(self._read, grads, state, self._process_groups)

    def step(
        self,
        state: State,
        sweeps_twice: dict[frozenset[int], bool],
        *,
        is_measured: bool = False,
        fault: Exception | None = None,
    ) -> dict[str, Tensor]:
        """One step of every parameter that has a gradient; the gradients it used, by name.

        Args:
            state: of the optimizer, by parameter.
            sweeps_twice: see `Agreement.prove_plan`.
            is_measured: whether `measured_step` calls.
            fault: why this rank cannot step; it is raised here, once all other ranks know.

        Raises what `Muon.step` raises.
        """
        stored_otherwise = list(self.table.stored_otherwise.values())
        try:
            self.agreement.prove_plan(self.gate.device, sweeps_twice)
            if stored_otherwise:  # on every rank, for the lines that ranks compare say so
                raise PlanMismatchError(
                    "Local shards on some ranks do not match their DTensor placements."
                )
        except PlanMismatchError as error:
            if not stored_otherwise:
                raise
            raise PlanError(stored_otherwise, num_params=len(self._params)) from error
        texts = tuple(as_text(group) for group in self._groups)
        fault = fault or self._wrong_options(texts)
        if not self.has_compared_replicas:
            self.has_compared_replicas = True  # by all ranks, however their step ends
            differ = self._differing_replicas()
            fault = fault or differ
        grads, keep = self.gate.admit(texts, is_measured=is_measured, fault=fault)
        planned, self._read = self, self._groups
        if isinstance(keep, Tensor) and self._agreed is not None and self.gate.found_fault():
            # other ranks hold the plan of before: their exchanges are met, and change nothing
            planned, self._read = self._agreed, self._agreed._valid
        else:
            self._agree(state)
            if fault is not None:  # a masked step goes on with the options that were last right
                self._read = self._valid
        if keep is False:
            return grads
        if not grads and self.table.entries:
            self._tell_of_no_gradient()
        planned._connect()
        self.is_unfinished = not self._config.uses_custom_transport
        planned._step_all(grads, state, self._read, keep if isinstance(keep, Tensor) else None)
        self.is_unfinished = False
        return grads

    def _agree(self, state: State) -> None:
        """All ranks hold this plan: that of before, and state that only it needs, can go."""
        if not self._is_agreed:
            self._agreed, self._is_agreed = None, True
            for entry in self.table.entries:
                drop_stale(state[entry.param], entry.group)

    def _connect(self) -> None:
        """Connect all ranks of the plan, before its first step."""
        if not self._is_connected:
            self.executor.connect()
            self._is_connected = True

    def _tell_of_owners(self, before: "PlannedStep | None") -> None:
        """Log which parameters the user's `assign_fn` gives to ranks that cannot own all of them.

        `before`: what was prepared before; it has told of the same owners.
        """
        if self._config.uses_custom_transport or (
            before is not None and before._owners == self._owners
        ):
            return
        stay = [
            name
            for name, rank in self._owners.items()
            if set(self.plan.owners.get(name, ())) - {rank}
        ]
        if stay:
            logger.log(
                warning_level(),
                "assign_fn names other ranks for %d parameters than those which orthogonalize all "
                "of them: matrices that lie whole on one rank stay there (%s)",
                *(len(stay), shortened(stay)),
            )

    def _check_orthogonalizer(self) -> None:
        """Try the user's orthogonalizer where it will run. Raises GroupOptionError."""
        settings = self._settings
        if settings.custom is None:
            return
        of_custom = [e for e in self.table.muon if e.group["orthogonalizer"] == "custom"]
        for device in sorted({local_part(e.param).device for e in of_custom} - {META}, key=str):
            check_orthogonalizer(settings.custom, settings.ns_dtype, device)

    def _wrong_options(self, texts: tuple[str, ...]) -> Exception | None:
        """What is wrong with a group that was changed since the last step. `texts`: of all."""
        if texts == self._texts:
            return None
        try:
            for group in self._groups:
                validate(group, reads_tensors=False)
        except GroupOptionError as error:
            return error
        self._texts, self._valid = texts, [dict(group) for group in self._groups]
        return None

    def _differing_replicas(self) -> Exception | None:
        """What to say of parameters whose replicas hold different values."""
        shards = [
            (entry.name, self.table.layout(entry), local_part(entry.param).detach())
            for entry in self.table.entries
            if not local_part(entry.param).is_meta
        ]
        names = differing_replicas(shards, self._process_groups, this_rank())
        if not names:
            return None
        return PlanMismatchError(
            f"Replicas of {len(names)} parameters hold different values, as rank {this_rank()} and "
            f"its replicas see: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}. Nothing "
            "was changed. Seed all ranks alike, load one checkpoint, or broadcast the parameters; "
            "Muon(..., check_replicas=False) leaves this check out."
        )

    def _tell_of_no_gradient(self) -> None:
        """Raise RuntimeError if `fully_shard` came after the optimizer; else log it once."""
        mine = {id(entry.param) for entry in self.table.all_entries}
        shapes = Counter(p.shape for p in fsdp2_params() if id(p.sharded) not in mine)
        plain = Counter(tuple(entry.param.shape) for entry in self.table.entries)
        is_plain = not any(isinstance(entry.param, DTensor) for entry in self.table.entries)
        if is_plain and plain <= shapes and not are_in_modules(self._params):
            raise RuntimeError(
                "no parameter of this optimizer has a gradient, and fully_shard has replaced "
                "parameters of their shapes by sharded ones: the optimizer was made before "
                "fully_shard, and would never train. Make it after."
            )
        if not self._has_told:
            self._has_told = True
            logger.log(
                warning_level(self._params),
                "no parameter of this optimizer has a gradient, so nothing is stepped. If the "
                "model was sharded after the optimizer was made, make the optimizer last.",
            )

    def _step_all(
        self,
        grads: dict[str, Tensor],
        state: State,
        groups: Sequence[Mapping[str, Any]],
        mask: Tensor | None,
    ) -> None:
        config, settings = self._config, self._settings
        if settings.momentum_dtype is None:
            muon = [entry for entry in self.table.muon if entry.name in grads]
            follow_grad_dtypes([(state[e.param], grads[e.name]) for e in muon])
        found = self.table.muon_params(grads, state, groups, settings.custom, settings.body())
        if not config.uses_custom_transport:
            local = {index: param.on_this_rank() for index, param in found.items()}
            self.executor.run(local, mask, partial(self._step_adamw, grads, state, groups, mask))
            return
        moved = self.table.function_params(found, self._owners)
        rank = config.state.get("rank", this_rank())
        by_functions = CustomTransport(
            config.gather_fn, config.redistribute_fn, config.state, rank, settings.ns_dtype
        )
        detect_misuse = mask is None and settings.nonfinite != "propagate"
        by_functions.run(moved, mask, detect_misuse=detect_misuse)
        self._step_adamw(grads, state, groups, mask)

    def _step_adamw(
        self,
        grads: dict[str, Tensor],
        state: State,
        groups: Sequence[Mapping[str, Any]],
        keep: Tensor | None,
    ) -> None:
        leaves = self.table.adamw_leaves(grads, state)
        found_inf = None if keep is None else (~keep).to(torch.float32)
        for index, group in enumerate(groups):
            adamw_step(leaves.get(index, []), group, found_inf)
