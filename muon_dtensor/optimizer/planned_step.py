"""`PlannedStep`: the plan of the param groups, the checks between ranks, and the executor.

A new one is made when param groups change. The optimizer holds the state of parameters.
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
from muon_dtensor.optimizer.options import DEFAULTS, RECOGNIZED, as_text, planned_options, validate
from muon_dtensor.optimizer.params import ParameterTable, can_train
from muon_dtensor.optimizer.settings import Settings
from muon_dtensor.optimizer.state import drop_stale, make_state
from muon_dtensor.planning.check import check
from muon_dtensor.planning.report import plan_report
from muon_dtensor.runtime.consistency import Agreement
from muon_dtensor.runtime.dtensors import placed
from muon_dtensor.runtime.executor import Executor
from muon_dtensor.runtime.gradients import GradientCheck
from muon_dtensor.runtime.hyperparameters import check_orthogonalizer
from muon_dtensor.runtime.plain_tensors import PlainTensors
from muon_dtensor.runtime.process_groups import Groups
from muon_dtensor.runtime.replicas import differing_replicas
from muon_dtensor.runtime.torch_private import (
    are_in_modules,
    dtype_name,
    fsdp2_params,
    is_accelerator,
    local_part,
    this_rank,
    warning_level,
)
from muon_dtensor.runtime.trace import Trace

logger = logging.getLogger("muon_dtensor")
META = torch.device("meta")


class PlannedStep:
    """The plan of some param groups, its comparison between ranks, and its executor."""

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
            plain: the layouts of plain tensors, by the rule of the config.
            config: layouts of plain tensors, and how exchanges run.
            settings: the other options of the constructor.
            state: of the optimizer. A parameter with state can train.
            trace: records the phases.
            before: the planned step of the groups before they changed. A user's `assign_fn` is
                called once for the same parameters.
            exchange: whether all ranks exchange the shapes of new plain tensors now, including
                ranks that have none.
        """
        self._groups, self._config, self._settings = groups, config, settings
        for group in groups:
            if group["orthogonalizer"] == "custom" and settings.custom is None:
                raise GroupOptionError(
                    "a param group has orthogonalizer='custom': pass the function to the "
                    "constructor, Muon(..., orthogonalizer=function)"
                )
            for name in ("normuon_beta", "weight_rounding", "momentum_bits"):
                if group[name] != DEFAULTS[name] and config.uses_custom_transport:
                    raise GroupOptionError(
                        f"{name} needs a plan, but your distributed_config is hand-written"
                    )
            if group["momentum_bits"] is not None:
                for name in ("offload_momentum", "shard_momentum", "momentum_dtype"):
                    if getattr(settings, name):
                        raise GroupOptionError(f"momentum_bits and {name} exclude each other")
            if group["weight_rounding"] != "nearest":
                _check_is_bfloat16(group)
        for name in ("offload_momentum", "shard_momentum", "metrics_every"):
            if config.uses_custom_transport and getattr(settings, name):
                raise GroupOptionError(
                    f"{name} needs a plan, but your distributed_config is hand-written"
                )
        self.table = table = ParameterTable(groups, plain, state)
        self._check_orthogonalizer()
        if config.uses_custom_transport:
            table.check_steppable()
            specs = []
            self._owners = self._custom_transport_owners(before)
        else:
            specs = table.specs(
                settings.ns_dtype,
                mesh=config.mesh,
                shard_momentum=settings.shard_momentum,
                exchange=exchange,
            )
            self._owners = table.owners(config, specs)
        buffer_devices = [table.buffer_device(entry.param) for entry in table.muon]
        on_gpu = any(map(is_accelerator, buffer_devices))
        options = settings.plan_options(
            on_gpu=on_gpu,
            prefetch_count=config.prefetch_count,
            sequential=not config.async_gpu_parallelism,
        )
        adamw_numels = [local_part(entry.param).numel() for entry in table.adamw]
        recognized = {
            entry.name: str(entry.group[RECOGNIZED])
            for entry in table.muon
            if entry.group.get(RECOGNIZED)
        }
        self.report = plan_report(specs, options, self._owners, adamw_numels, recognized)
        self.plan = self.report.plan
        check(self.plan)
        params = [entry.param for entry in table.muon] if specs else []
        self.specs = dict(zip(params, specs, strict=True))
        self._warn_of_owners(before)
        rank = this_rank()
        self._process_groups = process_groups = Groups(table.layout_cache.device_meshes, rank)
        self.agreement = Agreement(list(table.manifests(self.plan)), process_groups, rank)
        self.gradient_check = GradientCheck(
            {entry.name: entry.param for entry in table.entries},
            self.agreement,
            device=table.shared_device,
            missing_grad=settings.missing_grad,
            nonfinite=settings.nonfinite,
            deferred_checks=settings.deferred_checks,
            same_dtype_params=[entry.name for entry in table.adamw],
        )
        if before is not None:
            self.gradient_check.copy_deferred(before.gradient_check)
        self._params = [entry.param for entry in table.all_entries]
        self._frozen = [e.param for e in table.all_entries if not can_train(e.param, state)]
        self._planned = [planned_options(group) for group in groups]
        self._planned_config = (config.planned, config.plain_rule)
        self._texts: tuple[str, ...] = ()
        self._valid = [dict(group) for group in groups]
        self._read: Sequence[Mapping[str, Any]] = groups
        self._devices = [local_part(param).device for param in self._params]
        devices = [local_part(entry.param).device for entry in table.muon]
        self.executor = Executor(self.plan, rank, process_groups, devices, buffer_devices, trace)
        self._is_connected = False
        self._has_warned = False
        skips_replicas = config.uses_custom_transport or not settings.check_replicas
        self.has_compared_replicas: bool = (
            skips_replicas if before is None else before.has_compared_replicas
        )
        # The last planned step on which all ranks agree, until they have compared this one.
        self._agreed: PlannedStep | None = None
        self._is_agreed: bool = False
        if before is not None:
            self._agreed = before if before._is_agreed else before._agreed
        self.is_unfinished: bool = before is not None and before.is_unfinished

    def _custom_transport_owners(self, before: "PlannedStep | None") -> dict[str, int]:
        """Return the owners by `assign_fn`; for the same parameters, those of `before`."""
        params = [entry.param for entry in self.table.muon]
        previous = [entry.param for entry in before.table.muon] if before else None
        if before and previous and len(previous) == len(params) and all(map(is_, previous, params)):
            return before._owners
        return self.table.assigned_owners(self._config, params)

    def check_finished(self) -> None:
        """Raise StepFailedError if a step has failed and no checkpoint was loaded since."""
        if self.is_unfinished:
            raise StepFailedError(
                "An earlier step failed halfway: some parameters and momenta may be updated and "
                "others not. Load the last checkpoint into model and optimizer. If a rank has "
                "died, restart all ranks."
            )

    def matches_params(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these groups hold the planned parameters, on the same devices.

        Parameters that moved to the meta device match; the check of gradients raises for them.
        """
        params = [param for group in groups for param in group["params"]]
        devices = (local_part(param).device for param in params)
        return (
            len(params) == len(self._params)
            and all(map(is_, params, self._params))
            and all(
                device in (planned, META)
                for device, planned in zip(devices, self._devices, strict=True)
            )
        )

    def is_current(
        self, groups: Sequence[Mapping[str, Any]], state: State, config: DistributedConfig
    ) -> bool:
        """Whether options and config are unchanged, and all trainable parameters have state.

        `optimizer.state.clear()` removes state. A parameter that was frozen may now be trainable.
        """
        return (
            self._planned == [planned_options(group) for group in groups]
            and self._planned_config == (config.planned, config.plain_rule)
            and not any(can_train(param, {}) for param in self._frozen)
            and all(state.get(entry.param) for entry in self.table.entries)
        )

    def make_state(self, state: MutableMapping[Tensor, dict[str, Any]]) -> None:
        """Add missing state, and convert state in another dtype or on another device."""
        settings = self._settings
        for entry in self.table.entries:
            spec = self.specs.get(entry.param)
            meshes = self.table.layout_cache.device_meshes
            make_state(
                state[entry.param],
                entry.param,
                entry.group["algorithm"],
                settings.momentum_dtype,
                offload_momentum=settings.offload_momentum,
                momentum_bits=entry.group["momentum_bits"],
                keeps_compensation=entry.group["weight_rounding"] == "compensated",
                spec=spec,
                mesh=None if spec is None else meshes.get(spec.layout.mesh),
                buffer_device=self.table.buffer_device(entry.param),
            )

    def measured_step(
        self,
        state: State,
        needs_second_sweep: dict[frozenset[int], bool],
        number: int,
        trace: Trace | None,
        fault: Exception | None,
    ) -> dict[str, float]:
        """Step, and return the metrics. `number`, `trace`: see `Measurement`; `fault`: `step`."""
        measurement = Measurement(self.report, self.table, self.specs, number, trace)
        with self.executor.observed(measurement.trace, measurement.observe):
            grads = self.step(state, needs_second_sweep, is_measured=True, fault=fault)
        self._settings.wait_for_momentum()
        return measurement.finish(self._read, grads, state, self._process_groups)

    def step(
        self,
        state: State,
        needs_second_sweep: dict[frozenset[int], bool],
        *,
        is_measured: bool = False,
        fault: Exception | None = None,
    ) -> dict[str, Tensor]:
        """Step every parameter that has a gradient, and return these gradients by name.

        Args:
            state: of the optimizer, by parameter.
            needs_second_sweep: see `Agreement.compare_plans`.
            is_measured: whether `measured_step` calls.
            fault: why this rank cannot step. It is raised after all ranks have compared.

        Raises what `Muon.step` raises.
        """
        wrong_shards = list(self.table.wrong_shards.values())
        try:
            self.agreement.compare_plans(self.gradient_check.device, needs_second_sweep)
            if wrong_shards:  # raised on every rank, since the compared lines contain it
                raise PlanMismatchError(
                    "Local shards on some ranks do not match their DTensor placements."
                )
        except PlanMismatchError as error:
            if not wrong_shards:
                raise
            raise PlanError(wrong_shards, num_params=len(self._params)) from error
        texts = tuple(as_text(group) for group in self._groups)
        fault = fault or self._wrong_options(texts)
        if not self.has_compared_replicas:
            self.has_compared_replicas = True  # on all ranks, also if the step raises
            mismatch = self._replica_mismatch()
            fault = fault or mismatch
        grads, keep = self.gradient_check.check(texts, is_measured=is_measured, fault=fault)
        planned, self._read = self, self._groups
        if (
            isinstance(keep, Tensor)
            and self._agreed is not None
            and self.gradient_check.has_deferred_fault()
        ):
            # Other ranks hold the last agreed plan. Run its exchanges too; they change nothing.
            planned, self._read = self._agreed, self._agreed._valid
        else:
            self._agree(state)
            if fault is not None:  # a masked step runs with the last valid options
                self._read = self._valid
        if keep is False:
            return grads
        if not grads and self.table.entries:
            self._report_no_gradients()
        planned._connect()
        self.is_unfinished = not self._config.uses_custom_transport
        planned._step_all(grads, state, self._read, keep if isinstance(keep, Tensor) else None)
        self.is_unfinished = False
        return grads

    def _agree(self, state: State) -> None:
        """Drop the last agreed plan and its state: all ranks now hold this plan."""
        if not self._is_agreed:
            self._agreed, self._is_agreed = None, True
            for entry in self.table.entries:
                drop_stale(state[entry.param], entry.group)

    def _connect(self) -> None:
        """Connect the ranks of the plan before its first step."""
        if not self._is_connected:
            self.executor.connect()
            self._is_connected = True

    def _warn_of_owners(self, before: "PlannedStep | None") -> None:
        """Log parameters that `assign_fn` assigns to ranks that cannot own all their matrices.

        `before`: the previous planned step, which has logged the same owners.
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
                "assign_fn names ranks for %d parameters that do not orthogonalize all of their "
                "matrices: a matrix that lies on one rank stays there (%s)",
                *(len(stay), shortened(stay)),
            )

    def _check_orthogonalizer(self) -> None:
        """Call the user's orthogonalizer once on each of its devices. Raises GroupOptionError."""
        settings = self._settings
        if settings.custom is None:
            return
        of_custom = [e for e in self.table.muon if e.group["orthogonalizer"] == "custom"]
        devices = {self.table.buffer_device(entry.param) for entry in of_custom}
        for device in sorted(devices - {META}, key=str):
            check_orthogonalizer(settings.custom, settings.ns_dtype, device)

    def _wrong_options(self, texts: tuple[str, ...]) -> Exception | None:
        """Return the error of a group that changed since the last step. `texts`: of all groups."""
        if texts == self._texts:
            return None
        try:
            for group in self._groups:
                validate(group, reads_tensors=False)
        except GroupOptionError as error:
            return error
        self._texts, self._valid = texts, [dict(group) for group in self._groups]
        return None

    def _replica_mismatch(self) -> Exception | None:
        """Return the error of parameters whose replicas hold different values; None without any."""
        shards = [
            (entry.name, self.table.layout(entry), local_part(entry.param).detach())
            for entry in self.table.entries
            if not local_part(entry.param).is_meta
        ]
        names = differing_replicas(shards, self._process_groups, this_rank())
        if not names:
            return None
        return PlanMismatchError(
            f"Replicas of {len(names)} parameters hold different values on rank {this_rank()} and "
            f"its replicas: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}. Nothing was "
            "changed. Use one seed on all ranks, load one checkpoint, or broadcast the parameters. "
            "Muon(..., check_replicas=False) disables this check."
        )

    def _report_no_gradients(self) -> None:
        """Raise RuntimeError if `fully_shard` was called after the optimizer was made, or log once.

        Called if no parameter has a gradient.
        """
        param_ids = {id(entry.param) for entry in self.table.all_entries}
        shapes = Counter(p.shape for p in fsdp2_params() if id(p.sharded) not in param_ids)
        plain = Counter(tuple(entry.param.shape) for entry in self.table.entries)
        is_plain = not any(isinstance(entry.param, DTensor) for entry in self.table.entries)
        if is_plain and plain <= shapes and not are_in_modules(self._params):
            raise RuntimeError(
                "no parameter of this optimizer has a gradient, and fully_shard has replaced "
                "parameters of their shapes by sharded ones: the optimizer was made before "
                "fully_shard, and would never train. Make it after fully_shard."
            )
        if not self._has_warned:
            self._has_warned = True
            logger.log(
                warning_level(self._params),
                "no parameter of this optimizer has a gradient, so nothing is stepped. If the "
                "model was sharded after the optimizer was made, make the optimizer after that.",
            )

    def _step_all(
        self,
        grads: dict[str, Tensor],
        state: State,
        groups: Sequence[Mapping[str, Any]],
        mask: Tensor | None,
    ) -> None:
        config, settings = self._config, self._settings
        params = self.table.muon_params(
            grads,
            state,
            groups,
            settings.custom,
            settings.kernel(),
            casts_momenta=settings.momentum_dtype is None,
            as_shards=not config.uses_custom_transport,
        )
        if not config.uses_custom_transport:
            self.executor.run(params, mask, partial(self._step_adamw, grads, state, groups, mask))
            return
        function_params = self.table.function_params(params, self._owners)
        rank = config.state.get("rank", this_rank())
        transport = CustomTransport(
            config.gather_fn, config.redistribute_fn, config.state, rank, settings.ns_dtype
        )
        detect_misuse = mask is None and settings.nonfinite != "propagate"
        transport.run(function_params, mask, detect_misuse=detect_misuse)
        self._step_adamw(grads, state, groups, mask)

    def _step_adamw(
        self,
        grads: dict[str, Tensor],
        state: State,
        groups: Sequence[Mapping[str, Any]],
        keep: Tensor | None,
    ) -> None:
        by_group = self.table.adamw_params(grads, state)
        found_inf = None if keep is None else (~keep).to(torch.float32)
        for index, group in enumerate(groups):
            adamw_step(by_group.get(index, []), group, found_inf)


def _check_is_bfloat16(group: Mapping[str, Any]) -> None:
    """Raise GroupOptionError for a parameter whose `weight_rounding` would have no effect."""
    rounding = group["weight_rounding"]
    for param in group["params"]:
        if param.dtype != torch.bfloat16:
            raise GroupOptionError(
                f"weight_rounding={rounding!r} is for bfloat16 weights, but a group with it has a "
                f"parameter {placed(param)} in {dtype_name(param.dtype)}. Use "
                "weight_rounding='nearest' for it"
            )
