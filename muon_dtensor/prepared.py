"""What an optimizer makes ready before it steps, and makes anew when its param groups change.

Brings parameters, plan, agreement and executor together, and carries a step out. Keeps no state of
parameters, and no value of a param group.
"""

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor

from muon_dtensor.adamw import adamw_step
from muon_dtensor.census import Census
from muon_dtensor.config import DistributedConfig
from muon_dtensor.errors import GroupOptionError, StepFailedError
from muon_dtensor.metrics import Measurement, State
from muon_dtensor.options import as_text
from muon_dtensor.planning.moments import moment_layout
from muon_dtensor.planning.planner import plan_update
from muon_dtensor.runtime.agreement import Agreement
from muon_dtensor.runtime.by_functions import ByFunctions
from muon_dtensor.runtime.describe import local_part, this_rank
from muon_dtensor.runtime.executor import Executor
from muon_dtensor.runtime.gradients import GradientGate
from muon_dtensor.runtime.groups import Groups
from muon_dtensor.runtime.plain import PlainTensors
from muon_dtensor.runtime.trace import Trace
from muon_dtensor.settings import Settings
from muon_dtensor.state import make_state

logger = logging.getLogger("muon_dtensor")
META = torch.device("meta")


class Prepared:
    """A plan of these param groups, and who agrees on it and walks it."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        plain: PlainTensors,
        config: DistributedConfig,
        settings: Settings,
        *,
        trace: Trace | None,
        before: "Prepared | None",
        exchange: bool,
    ) -> None:
        """Raises what the constructor of `Muon` raises about parameters.

        Args:
            groups: param groups with every option.
            plain: what is known of plain tensors, under the rule of the config.
            config: how plain tensors lie, and how exchanges run.
            settings: the other options of the constructor.
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
            if group["normuon_beta"] is not None and config.is_by_hand:
                raise GroupOptionError("normuon_beta needs a plan; yours is a hand-written config")
        self.census = census = Census(groups, plain)
        if config.is_by_hand:
            census.must_be_real()
            specs = []
            self._owners = self._assigned_by_hand(before)
        else:
            specs = census.specs(settings.ns_dtype, whole=config.mesh, exchange=exchange)
            self._owners = census.owners(config, specs)
        on_gpu = any(entry.param.device.type == "cuda" for entry in census.muon)
        options = settings.plan_options(
            on_gpu=on_gpu,
            prefetch_count=config.prefetch_count,
            sequential=not config.async_gpu_parallelism,
        )
        self.plan = plan_update(specs, options, self._owners)
        rank = this_rank()
        self._process_groups = process_groups = Groups(census.describer.device_meshes, rank)
        self.agreement = Agreement(list(census.manifests(self.plan)), process_groups, rank)
        self.gate = GradientGate(
            {entry.name: entry.param for entry in census.entries},
            self.agreement,
            device=census.shared_device,
            missing_grad=settings.missing_grad,
            nonfinite=settings.nonfinite,
        )
        if before is not None:
            self.gate.follow(before.gate)
        self._params = [entry.param for entry in census.entries]
        self._devices = [local_part(param).device for param in self._params]
        devices = [local_part(entry.param).device for entry in census.muon]
        self.executor = Executor(self.plan, rank, process_groups, devices, trace)
        self._is_connected = False
        self._has_told = False
        self.is_unfinished: bool = before is not None and before.is_unfinished

    def _assigned_by_hand(self, before: "Prepared | None") -> dict[str, int]:
        """Owners by the user's `assign_fn`."""
        params = [entry.param for entry in self.census.muon]
        known = [entry.param for entry in before.census.muon] if before else None
        if before and known and len(known) == len(params) and all(map(is_, known, params)):
            return before._owners
        return self.census.assigned(self._config, params)

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

    def make_state(self, state: MutableMapping[Tensor, dict[str, Any]]) -> None:
        """What is missing of it, or kept in another dtype or place than wanted."""
        settings = self._settings
        specs = {spec.fqn: spec for spec in self.plan.params}
        for entry in self.census.entries:
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
    ) -> dict[str, float]:
        """`step`, and its metrics; `number`, `trace`: see `Measurement`."""
        measurement = Measurement(self.plan, self.census, number, trace)
        with self.executor.watched(measurement.trace, measurement.look):
            self.step(state, sweeps_twice, is_measured=True)
        return measurement.finish(self._groups, state, self._process_groups)

    def step(
        self,
        state: State,
        sweeps_twice: dict[frozenset[int], bool],
        *,
        is_measured: bool = False,
    ) -> None:
        """One step of every parameter that has a gradient.

        `sweeps_twice`: see `Agreement.prove_plan`. Raises what `Muon.step` raises.
        """
        self.agreement.prove_plan(self.gate.device, sweeps_twice)
        options = tuple(as_text(group) for group in self._groups)
        grads, keep = self.gate.admit(options, is_measured=is_measured)
        if keep is False:
            return
        if not grads and self.census.entries and not self._has_told:
            self._has_told = True
            logger.warning(
                "no parameter of this optimizer has a gradient, so nothing is stepped. If the "
                "model was sharded (fully_shard) after the optimizer was made, make that last."
            )
        if not self._is_connected:
            self.executor.connect()
            self._is_connected = True
        self.is_unfinished = not self._config.is_by_hand  # such functions see to that themselves
        self._step_all(grads, state, keep if isinstance(keep, Tensor) else None)
        self.is_unfinished = False

    def _step_all(self, grads: dict[str, Tensor], state: State, mask: Tensor | None) -> None:
        config, settings = self._config, self._settings
        found = self.census.muon_params(grads, state, settings.custom, settings.body())
        if not config.is_by_hand:
            local = {index: param.on_this_rank() for index, param in found.items()}
            self.executor.run(local, mask, partial(self._step_adamw, grads, state, mask))
            return
        moved = self.census.function_params(found, self._owners)
        rank = config.state.get("rank", this_rank())
        by_functions = ByFunctions(
            config.gather_fn, config.redistribute_fn, config.state, rank, settings.ns_dtype
        )
        detect_misuse = mask is None and settings.nonfinite != "propagate"
        by_functions.run(moved, mask, detect_misuse=detect_misuse)
        self._step_adamw(grads, state, mask)

    def _step_adamw(self, grads: dict[str, Tensor], state: State, keep: Tensor | None) -> None:
        leaves = self.census.adamw_leaves(grads, state)
        found_inf = None if keep is None else (~keep).to(torch.float32)
        for index, group in enumerate(self._groups):
            adamw_step(leaves.get(index, []), group, found_inf)
