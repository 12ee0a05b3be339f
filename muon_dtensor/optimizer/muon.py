"""`Muon`, a torch.optim.Optimizer: param groups, state, step, checkpoints."""

import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import replace
from inspect import GEN_CLOSED, getgeneratorstate
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from muon_dtensor.algorithms import PRESETS
from muon_dtensor.algorithms.kernels import log_slow_bfloat16
from muon_dtensor.distributed_config.config import DistributedConfig, create_dtensor_config
from muon_dtensor.distributed_config.full_tensor import pass_offsets
from muon_dtensor.errors import CheckpointError, GroupOptionError, shortened
from muon_dtensor.optimizer.options import (
    DEFAULTS,
    OPTIONS,
    complete,
    complete_loaded,
    normalize_numbers,
    validate,
)
from muon_dtensor.optimizer.parameter_names import is_embedding_or_head
from muon_dtensor.optimizer.planned_step import PlannedStep
from muon_dtensor.optimizer.settings import Settings
from muon_dtensor.optimizer.state import check_loaded, move_state_to_params, restore_wide_state
from muon_dtensor.planning.report import PlanReport
from muon_dtensor.planning.topology import Topology
from muon_dtensor.runtime.hyperparameters import Orthogonalizer
from muon_dtensor.runtime.plain_tensors import PlainTensors
from muon_dtensor.runtime.torch_private import (
    num_ranks,
    ordinary_mode,
    this_rank,
    uncompiled,
    warning_level,
)
from muon_dtensor.runtime.trace import Trace

logger = logging.getLogger("muon_dtensor")

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Muon(Optimizer):
    r"""Muon whose matrices may be cut over any 1-D, 2-D or 3-D DeviceMesh.

    For the same gradients a step gives bitwise the parameters of `torch.optim.Muon` on one
    process (CPU, defaults), whatever the DTensor placements. With G the gradient, B the momentum
    (Jordan 2024, https://kellerjordan.github.io/posts/muon/):

        B <- momentum B + (1 - momentum) G
        D  = (1 - momentum) G + momentum B   (nesterov), else B
        O  = approximate polar factor of the whole matrix D, by `orthogonalizer`
        W <- (1 - lr weight_decay) W - lr s O,   s from adjust_lr_fn

    A bfloat16 or float16 parameter that is not stored row-major (channels_last, transposed) may
    differ from torch by one rounding; see `algorithms.update`, Note [Where torch rounds].

    A 2-D parameter is one matrix, a 3-D parameter `[e, m, n]` is e matrices, unless its group
    declares others. The shards of each matrix are sent to one rank (see `plan`), orthogonalized
    there, and sent back. All ranks of a parameter's mesh must construct the optimizer with equal
    options and call `step` together.

    Args:
        params: tensors, DTensors, (name, tensor) pairs or param groups. Names make errors and
            plans readable: prefer `model.named_parameters()`. Plain tensors are this rank's own,
            unless `distributed_config` describes how they are replicated or cut.
        lr: learning rate, a number or a one-element tensor.
        weight_decay: decoupled weight decay, times lr.
        momentum: of the moving average B.
        nesterov: orthogonalize D instead of B.
        ns_coefficients: (a, b, c) of the iteration.
        eps: least Frobenius norm to divide by; see `algorithms.newton_schulz`.
        ns_steps: iterations, 0 to 99.
        adjust_lr_fn: None or "original": s = sqrt(max(1, rows / cols)); "match_rms_adamw":
            s = 0.2 sqrt(max(rows, cols)) (Liu et al. 2025, arXiv:2502.16982). As in Dion:
            "spectral_norm": s = sqrt(rows / cols), which torch (2.14) calls "spectral_unclamped";
            "rms_norm": same as "match_rms_adamw".
        distributed_config: the result of `create_devicemesh_config` or another factory. It
            describes how plain tensors are replicated or cut, and how exchanges run; or it holds
            the user's own functions that move tensors. DTensors do not need it.
        ns_dtype: dtype of the iteration and of everything that is sent.
        bucket_mb: upper limit in MiB of a bucket's exchange buffers on a rank. The work space of
            one matrix (if batched, of `bucket_mb` MiB of matrices) comes on top.
        prefetch_count: buckets in flight while another is orthogonalized; may be 0. Default:
            that of `distributed_config`, or 1.
        batched: stack equal-shaped matrices of one owner; rounds differently. Default: on a GPU.
        missing_grad: what to do if a parameter has a gradient on some ranks only: "raise"
            MissingGradientError on every rank, or use "zero" where it is missing. If no rank has a
            gradient, the parameter and its momentum do not change, as in torch.
        nonfinite: what to do about NaN or Inf in a gradient on some rank: "raise"
            NonFiniteGradientError on every rank, "skip" the step on every rank, or "propagate" it
            as torch does. On a GPU the step is masked on the device, and the next `step` or
            `state_dict` raises.
        orthogonalizer: "newton_schulz" with `ns_coefficients`; "polar_express", "deepseek_v4",
            "cubic", "cans" or "turbo_muon", see `algorithms.presets`, which give updates of another
            size; or a callable from [*batch, rows, cols] to the same shape. In a param group a
            callable is called "custom". A warning names those that are not safe for every matrix.
        strategy: how the shards of a matrix are collected: "auto" selects the strategy with the
            least predicted time on `topology`; "owned", "owned_staged" or, with exact=False,
            "distributed" sets it for all matrices that it is legal for.
        exact: False allows `kernels` that round differently, and that several ranks orthogonalize
            one matrix together where this is predicted to be 1.3 times as fast.
        topology: costs of the machine: a preset of `planning.presets` (default: "gloo-local" on
            the CPU, "h100-ib-400" on GPUs), or a file written by `muon-dtensor calibrate`.
        momentum_dtype: dtype of the stored momentum, bfloat16 or float32; default: the dtype of its
            parameter. The average is computed in the gradient's dtype, and rounded once.
        offload_momentum: store the momentum in pinned host memory, and copy each bucket's to the
            GPU when the bucket is processed. No effect for parameters on the host.
        shard_momentum: cut the momentum over the ranks that replicate its parameter, as ZeRO-1 does
            (Rajbhandari et al. 2020, arXiv:1910.02054, section 5.1). Each rank stores and updates
            its part, as a DTensor. The step stays bitwise; it sends more bytes, see the plan.
        compile: run the iteration through torch.compile; rounds differently.
        kernels: "torch"; with exact=False "auto" or "symmetric": see `algorithms.kernels`.
        capturable: let a CUDA graph capture the step, after one step outside of it. An lr that is a
            tensor on the GPU then stays there.
        normuon_beta: divide the rows of each update by the root of their second moments, with this
            decay rate (the paper: 0.95); None for Muon. See `algorithms.normuon`.
        cautious_weight_decay: decay only elements that the update moves towards zero.
        momentum_bits: store the momentum in 8 or 4 bits per element, and a float32 for every 64
            elements, as `momentum_codes` and `momentum_scales` in the state; see
            `algorithms.quantized`. Shards must begin at blocks of 64 elements of the last tensor
            dim.
        weight_rounding: how a bfloat16 weight is rounded after its update: "nearest" as in torch,
            where most small updates round away; "stochastic", with the same random bits on every
            layout; or "compensated": what was rounded away is kept as `weight_compensation` in the
            state, in bfloat16. See `algorithms.rounding`.
        rounding_seed: of stochastic rounding.
        async_gpu_parallelism: False makes ranks orthogonalize one after the other, for debugging.
            Default: that of `distributed_config`, or True.
        check_replicas: before the first step, compare a few elements of every parameter between
            its replicas; see `runtime.replicas`.
        deferred_checks: False checks a step before it changes anything, and waits for the device.
            True masks a step with a fault, without waiting; the next `step` or `state_dict` raises
            the error. The first step always waits, and `missing_grad="zero"` does. Default: True
            on accelerators, False on the host.
        metrics_every: measure the first step and then every `metrics_every`-th, for `metrics`; 0
            disables it.
        trace: record in `trace` when this rank began and ended each phase of each bucket of the
            plan. The user's own functions are not traced.

    A param group can set any of the options up to `adjust_lr_fn`, `orthogonalizer`,
    `normuon_beta`, `cautious_weight_decay`, `momentum_bits`, `weight_rounding`, `rounding_seed`,
    and declare the matrices in its parameters: `matrix`, `matrix_axes`, `split_sizes`, `split_dim`,
    see `layout.declarations.Declaration`. With
    `algorithm="adamw"` and `betas`, `eps`, `weight_decay`, `lr`, torch's own AdamW steps the group;
    its parameters may have any shape. The defaults of an AdamW group are `options.ADAMW_DEFAULTS`,
    since the arguments above are Muon's. Its `momentum` is an alias of betas[0], which cyclic
    schedulers write. Unknown keys are kept in the group, and `step` ignores them.

    Parameters that do not require gradients, have no gradient and never trained are left out: they
    are in no plan and have no state until they begin to train.

    Raises:
        GroupOptionError: an option is out of range.
        ValueError: `params` is an exhausted generator; `bucket_mb`, `prefetch_count`, `strategy` or
            `topology` is out of range; or a DTensor lives on ranks outside of the mesh of
            `distributed_config`.
        AssignmentError: the user's `assign_fn` does not assign each parameter once, to a rank
            that can own it.
        PlanError: Muon cannot step some parameters; the message lists all of them.
        PlanMismatchError: from the first `step`, if ranks differ in parameters or options; from
            the constructor, if ranks pass different plain tensors under process groups.
    """

    @ordinary_mode()
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
        trace: bool = False,
        orthogonalizer: str | Orthogonalizer = "newton_schulz",
        strategy: str = "auto",
        exact: bool = True,
        topology: str | Path | Topology | None = None,
        momentum_dtype: torch.dtype | None = None,
        offload_momentum: bool = False,
        shard_momentum: bool = False,
        compile: bool = False,
        kernels: Literal["torch", "auto", "symmetric"] = "torch",
        capturable: bool = False,
        normuon_beta: float | None = None,
        cautious_weight_decay: bool = False,
        momentum_bits: Literal[8, 4] | None = None,
        weight_rounding: str = "nearest",
        rounding_seed: int = 0,
        metrics_every: int = 0,
        async_gpu_parallelism: bool | None = None,
        check_replicas: bool = True,
        deferred_checks: bool | None = None,
    ) -> None:
        options = {name: value for name, value in locals().items() if name in OPTIONS}
        if isinstance(params, Generator) and getgeneratorstate(params) == GEN_CLOSED:
            raise ValueError(
                "params is an exhausted generator, so the optimizer would hold no parameters. Call "
                "model.parameters() or model.named_parameters() again."
            )
        custom = orthogonalizer if callable(orthogonalizer) else None
        options["orthogonalizer"] = orthogonalizer if custom is None else "custom"
        self._settings = Settings.of(options, custom)
        self._user_config = distributed_config or create_dtensor_config()
        overrides = {
            "prefetch_count": prefetch_count,
            "async_gpu_parallelism": async_gpu_parallelism,
        }
        self._config_overrides: dict[str, Any] = {
            name: value for name, value in overrides.items() if value is not None
        }
        self._trace = Trace(this_rank()) if trace else None
        self._plain = PlainTensors(None)
        self._prepared: PlannedStep | None = None
        self._needs_second_sweep: dict[frozenset[int], bool] = {}
        self._has_warned_of_shards = False
        self._num_steps = 0
        self._metrics: dict[str, float] = {}
        self._beta1s: list[float | None] = []
        defaults = {name: options[name] for name in DEFAULTS if name in options}
        complete({}, defaults)
        groups: Any = params if isinstance(params, Tensor) else list(params) or [{"params": []}]
        super().__init__(groups, defaults)
        self._normalize_numbers()
        self._prepare(exchange=True)
        self._warn_of_params(has_config=distributed_config is not None)
        logs = this_rank() == 0 and logger.isEnabledFor(logging.INFO)
        if logs and not self._config.uses_custom_transport:
            logger.info("%s; print(optimizer.plan) shows all of it", self.plan.headline())

    @ordinary_mode()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, and plan its parameters. Ranks compare it at the next step.

        Parameters that do not require gradients are planned once they do.

        Under process groups this is a collective: all their ranks must add a group at the same
        time.

        Raises what the constructor raises. The group is then not added.
        """
        super().add_param_group(complete(param_group, self.defaults))
        if self._prepared is not None:
            self._normalize_numbers()
            try:
                self._prepare(exchange=True)
            except Exception:
                self.param_groups.pop()
                self._prepare()
                raise

    @property
    def plan(self) -> PlanReport:
        """The plan of a step: `print(optimizer.plan)`.

        Raises RuntimeError if the user's own functions of `DistributedConfig` move the tensors.
        """
        if self._config.uses_custom_transport:
            raise RuntimeError(
                "there is no plan: the functions of a hand-written DistributedConfig move matrices"
            )
        return self._planned_step.report

    @property
    def _config(self) -> DistributedConfig:
        """The user's config as it is now, with the constructor's arguments in place of its own."""
        return replace(self._user_config, **self._config_overrides)

    @property
    def _planned_step(self) -> PlannedStep:
        assert self._prepared is not None, "the constructor calls _prepare"
        return self._prepared

    @property
    def trace(self) -> Trace:
        """The times of this rank's phases. Raises RuntimeError without `trace=True`."""
        if self._trace is None:
            raise RuntimeError("nothing was recorded: construct Muon with trace=True")
        return self._trace

    def _normalize_numbers(self) -> None:
        """Apply `options.normalize_numbers` to all groups."""
        last_beta1s = [*self._beta1s, *[None] * len(self.param_groups)]
        self._beta1s = [
            normalize_numbers(group, beta1)
            for group, beta1 in zip(self.param_groups, last_beta1s, strict=False)
        ]

    def _warn_of_params(self, *, has_config: bool) -> None:
        """Log parameters that are legal but probably not intended for Muon as they are."""
        table = self._planned_step.table
        names = [entry.name for entry in table.muon]
        if dubious := [name for name in names if is_embedding_or_head(name)]:
            logger.log(
                warning_level(self._all_params()),
                "Muon steps %d parameters that are embeddings or output heads by their names, but "
                "Muon is meant for hidden matrices: %s. group_parameters(model) gives them to "
                "AdamW.",
                len(dubious),
                shortened(dubious),
            )
        for name in sorted({entry.group["orthogonalizer"] for entry in table.muon} & {*PRESETS}):
            if warning := PRESETS[name].warning:
                logger.log(warning_level(), "orthogonalizer=%r: %s", name, warning)
        on_host = any(table.buffer_device(entry.param).type == "cpu" for entry in table.muon)
        if on_host and self._settings.ns_dtype == torch.bfloat16:
            log_slow_bfloat16(warning_level())
        plain = [entry.name for entry in table.muon if not isinstance(entry.param, DTensor)]
        if plain and not has_config and num_ranks() > 1:
            logger.log(
                warning_level(),
                "%d plain tensors on %d ranks: each rank orthogonalizes all of its own (%s). If "
                "they are replicas (DDP), share the work by distributed_config="
                "create_devicemesh_config(mesh). If not, create_dtensor_config() disables this "
                "warning.",
                len(plain),
                num_ranks(),
                shortened(plain),
            )

    def _prepare(self, *, exchange: bool = False) -> None:
        """Make a new plan and missing state. Ranks compare the new plan at the next step.

        `exchange`: whether all ranks exchange the shapes of new plain tensors now.
        """
        config = self._config
        if self._plain.rule != config.plain_rule:
            if self._prepared is not None:
                raise GroupOptionError(
                    "distributed_config now describes another layout of plain tensors than when "
                    "the optimizer was constructed: construct a new optimizer"
                )
            self._plain = PlainTensors(config.plain_rule)
        self._prepared = PlannedStep(
            self.param_groups,
            self._plain,
            config,
            self._settings,
            self.state,
            trace=self._trace,
            before=self._prepared,
            exchange=exchange,
        )
        self._prepared.make_state(self.state)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @uncompiled
    @torch.inference_mode(mode=False)  # reused buffers made in it could not be written outside
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient.

        Raises:
            PlanMismatchError, MissingGradientError, NonFiniteGradientError: on every rank of
                the meshes concerned, before anything has changed.
            StepFailedError: this step failed halfway, or an earlier one did and no checkpoint was
                loaded since.
            RuntimeError: ranks could not compare their state because one died or hangs; nothing has
                changed. Or a gradient cannot be used (sparse, of another shape, dtype or mesh), on
                this rank or on another. Or a function of the user returned a wrong value, on this
                rank.
        """
        with ordinary_mode():
            self._planned_step.check_finished()
            self._planned_step.gradient_check.raise_deferred(
                capturable=all(g["capturable"] for g in self.param_groups)
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with ordinary_mode():
            self._step()
        return loss

    def _step(self) -> None:
        self._normalize_numbers()
        fault: Exception | None = None
        if not self._planned_step.matches_params(self.param_groups):
            move_state_to_params(self.state, self.param_groups)
            self._prepare(exchange=True)
        elif not self._planned_step.is_current(self.param_groups, self.state, self._config):
            try:
                for group in self.param_groups:
                    validate(group, reads_tensors=False)
                self._prepare()
            except ValueError as error:
                fault = error
        every, number = self._settings.metrics_every, self._num_steps
        self._num_steps += 1  # also if the step raises, so that ranks measure the same steps
        if every and number % every == 0:
            self._metrics = self._planned_step.measured_step(
                self.state, self._needs_second_sweep, number // every, self._trace, fault
            )
        else:
            self._planned_step.step(self.state, self._needs_second_sweep, fault=fault)
        for group in self.param_groups:
            if group["weight_rounding"] == "stochastic":
                group["rounding_step"] += 1

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the last measured step: the first, or a `metrics_every`-th one.

        The values are summed over all shards, each element once, and equal on every rank. For param
        group i: `group{i}/lr`, `/effective_lr` (times the scales of its matrices, mean over
        elements), `/grad_norm`, `/momentum_norm`, `/update_norm` (of the change of the parameters,
        decay included), `/param_norm`, and `/update_rms` per element. `grad_norm` is that of all
        groups. `orthogonality_residual` is that of the polar factor of one matrix, another one in
        each measured step. Of this rank alone: `sent_nbytes` as planned, and `seconds/{phase}` by
        the host's clock.

        No collective. The measured step adds one small reduction per mesh dim, and holds a copy of
        this rank's shards.

        Raises RuntimeError before the first measured step.
        """
        if not self._metrics:
            raise RuntimeError("no step was measured: construct Muon with metrics_every=1 or more")
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict: `momentum_buffer`, or AdamW's state, per parameter.

        A parameter that never trained has the entry `{}`.

        Uneven shards that torch's distributed checkpoints would misplace pass their true offsets to
        `dcp.save` and `dcp.load`. For weights of such shards a warning is logged once; see
        `check_saveable`.
        """
        self._planned_step.check_finished()
        self._planned_step.gradient_check.raise_deferred(forget=False)
        self._normalize_numbers()
        self._settings.wait_for_momentum()
        if not self._has_warned_of_shards and (misplaced := self._planned_step.table.misplaced()):
            self._has_warned_of_shards = True
            logger.log(warning_level(self._all_params()), "%s", misplaced)
        saved = super().state_dict()
        for tensor in self._planned_step.table.misplaced_state(saved["state"].values()):
            pass_offsets(tensor)
        for number in self._planned_step.table.without_state(self.state):
            saved["state"].setdefault(number, {})  # marks it as frozen rather than missing
        return saved

    def check_saveable(self) -> None:
        """Raise CheckpointError if `torch.distributed.checkpoint` would misplace weights.

        If two mesh dims cut a tensor dim that they do not divide, torch (2.13 to 2.15) computes
        wrong offsets for some shards: it raises while saving them, or cannot load them.
        `checkpointable` saves the model's. Call this before a run, on any rank.
        """
        if misplaced := self._planned_step.table.misplaced():
            raise CheckpointError(misplaced)

    @ordinary_mode()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state of this optimizer, torch.optim.Muon or torch.optim.AdamW.

        Declarations of matrices that a checkpoint does not have stay as they are.

        Raises:
            GroupOptionError: an option is out of range.
            PlanError: a declaration of matrices does not fit.
            CheckpointError: the state dict is incomplete, another optimizer wrote it, or its state
                is not cut like its parameters. After each of these errors nothing has changed.
        """
        groups, state = self.param_groups, self.state
        loaded_dicts: list[Mapping[str, Any]] = []

        def check(_: Optimizer, loaded: dict[str, Any]) -> None:
            check_loaded(loaded, self.param_groups, self._planned_step.specs)
            loaded_dicts.append(loaded)

        hook = self.register_load_state_dict_pre_hook(check)  # runs after the user's hooks
        try:
            super().load_state_dict(state_dict)
            restore_wide_state(
                self.state, loaded_dicts[0], self.param_groups, self._settings.momentum_dtype
            )
            self._planned_step.make_state(self.state)
            self._planned_step.is_unfinished = False
            self._planned_step.gradient_check.drop_deferred()
        except Exception:
            self.param_groups, self.state = groups, state
            self._prepare()
            raise
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._planned_step.check_finished()
        self._normalize_numbers()
        self._settings.wait_for_momentum()
        attributes = {name: self.__dict__[name] for name in _PICKLED}
        layouts = self._plain.of(self._all_params())
        return {**super().__getstate__(), **attributes, "_layouts": layouts}

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    @ordinary_mode()
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the state and make a plan of its groups. Called by pickle and `load_state_dict`."""
        live_groups = self.__dict__.get("param_groups", [])
        layouts = state.get("_layouts")
        super().__setstate__({key: value for key, value in state.items() if key != "_layouts"})
        for index, group in enumerate(self.param_groups):
            complete_loaded(group, live_groups[index] if index < len(live_groups) else {})
        self.__dict__.setdefault("_needs_second_sweep", {})
        self.__dict__.setdefault("_plain", PlainTensors(None))
        self.__dict__.setdefault("_prepared", None)
        self.__dict__.setdefault("_has_warned_of_shards", False)
        self.__dict__.setdefault("_num_steps", 0)
        self.__dict__.setdefault("_metrics", {})
        self._beta1s = []
        self._normalize_numbers()
        if layouts is not None:  # a copy: it takes over the known layouts of plain tensors
            self._plain = PlainTensors(self._config.plain_rule)
            self._plain.restore(self._all_params(), layouts)
        self._prepare()


_PICKLED = ("_settings", "_trace", "_user_config", "_config_overrides")
