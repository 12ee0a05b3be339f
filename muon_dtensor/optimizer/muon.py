"""Muon as a torch.optim.Optimizer: groups, state, step. Where the floors meet.

Keeps torch's contract; leaves planning, moving and mathematics to those who know them.
"""

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

from muon_dtensor.algorithms.kernels import log_slow_bfloat16
from muon_dtensor.distributed_config.config import DistributedConfig, create_dtensor_config
from muon_dtensor.errors import CheckpointError, GroupOptionError, shortened
from muon_dtensor.optimizer.options import (
    DEFAULTS,
    OPTIONS,
    complete,
    complete_loaded,
    settle_numbers,
    validate,
)
from muon_dtensor.optimizer.parameter_names import is_embedding_or_head
from muon_dtensor.optimizer.planned_step import PlannedStep
from muon_dtensor.optimizer.settings import Settings
from muon_dtensor.optimizer.state import check_loaded, follow_params, keep_wide
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
    declares others. Each is brought together, on one rank unless `plan` says otherwise,
    orthogonalized, and handed back. All ranks of a parameter's mesh must construct the optimizer
    and call `step` alike.

    Args:
        params: tensors, DTensors, (name, tensor) pairs or param groups. Names make errors and
            plans readable: prefer `model.named_parameters()`. Plain tensors are this rank's own,
            unless `distributed_config` says where they are replicated.
        lr: learning rate, a number or a one-element tensor.
        weight_decay: decoupled weight decay, times lr.
        momentum: of the moving average B.
        nesterov: orthogonalize D instead of B.
        ns_coefficients: (a, b, c) of the iteration.
        eps: least Frobenius norm to divide by; see `algorithms.newton_schulz`.
        ns_steps: iterations, 0 to 99.
        adjust_lr_fn: None or "original": s = sqrt(max(1, rows / cols)); "match_rms_adamw":
            s = 0.2 sqrt(max(rows, cols)) (Liu et al. 2025, arXiv:2502.16982). As Dion has them:
            "spectral_norm": s = sqrt(rows / cols), which torch (2.14) calls "spectral_unclamped";
            "rms_norm": as "match_rms_adamw".
        distributed_config: of `create_devicemesh_config` or its kin: how plain tensors lie, and
            how exchanges run; or hand-written functions that move them. DTensors need none.
        ns_dtype: dtype of the iteration and of all that is sent.
        bucket_mb: most MiB of exchange buffers a bucket may hold on a rank. The work space of one
            matrix (where batched, of `bucket_mb` of them) comes on top.
        prefetch_count: buckets in flight while another is orthogonalized; 0 for none. Default:
            that of `distributed_config`, or 1.
        batched: stack equal-shaped matrices of one owner; rounds differently. Default: on a GPU.
        missing_grad: a parameter with a gradient on some ranks only: "raise"
            MissingGradientError on every rank, or count it as "zero" there. Without a gradient
            on any rank, a parameter, its momentum and its decay are left alone, as in torch.
        nonfinite: NaN or Inf in a gradient on some rank: "raise" NonFiniteGradientError on
            every rank, "skip" the step on every rank, or "propagate" it as torch does. On a GPU
            the step is masked on the device, and raises at the next `step` or `state_dict`.
        orthogonalizer: "newton_schulz" by `ns_coefficients`; "polar_express" (Amsel et al. 2025,
            arXiv:2505.16932), better converged and so of another update size; or a callable,
            [*batch, rows, cols] to the same. A group names it, a callable as "custom".
        strategy: how matrices are brought together: "auto", whichever is predicted to be fastest on
            `topology`; or "owned", "owned_staged" for all of them.
        exact: False allows `kernels` that round differently.
        topology: what the machine costs: a preset of `planning.presets` ("gloo-local" by default
            on the CPU, "h100-ib-400" on GPUs), or a file of `muon-dtensor calibrate`.
        momentum_dtype: what the momentum is kept in, bfloat16 or float32; default: the dtype of its
            parameter. The average is taken in the gradient's dtype, and rounded once.
        offload_momentum: keep the momentum in pinned host memory, and bring each bucket's to the
            GPU when its turn comes. Nothing changes where parameters are on the host.
        compile: run the iteration through torch.compile; rounds differently.
        kernels: "torch"; with exact=False "auto" or "symmetric": see `algorithms.kernels`.
        capturable: let a CUDA graph capture the step, after one step outside; an lr that is a
            tensor on the GPU then stays there.
        normuon_beta: divide the rows of each update by the root of their second moments, which
            decay by this (the paper: 0.95); None for Muon. See `algorithms.normuon`.
        cautious_weight_decay: decay only what the update moves towards zero.
        async_gpu_parallelism: False lets ranks orthogonalize one after the other, to debug.
            Default: that of `distributed_config`, or True.
        check_replicas: before the first step, compare a few elements of every parameter between
            its replicas; see `runtime.replicas`.
        metrics_every: measure the first step and every so many, for `metrics`; 0 for none.
        trace: record in `trace` when this rank began and ended each phase of each bucket of the
            plan; hand-written functions leave no trace.

    A param group may name any of the options up to `adjust_lr_fn`, `orthogonalizer`,
    `normuon_beta`, `cautious_weight_decay`, and which matrices its parameters hold: `matrix`,
    `matrix_axes`, `split_sizes`, `split_dim`, see `layout.declarations.Declaration`. With
    `algorithm="adamw"` and `betas`, `eps`, `weight_decay`, `lr` torch's own AdamW steps a group, of
    any shape. One that does not name them has `options.ADAMW_DEFAULTS`, for the ones above are
    Muon's. Its `momentum` is another name of betas[0], which cyclic schedulers write. Unknown
    keys are kept in the group, and ignored by `step`.

    Parameters that do not require gradients, have none and never trained are left out: they are in
    no plan and have no state, until they begin to train.

    Raises:
        GroupOptionError: an option that is out of range.
        ValueError: a generator of parameters that was used up before; `bucket_mb`,
            `prefetch_count`, `strategy` or `topology` is out of range, or a DTensor lives on ranks
            that the mesh of `distributed_config` does not hold.
        AssignmentError: the user's `assign_fn` does not assign each parameter once, to a rank
            that can own it.
        PlanError: parameters that Muon cannot step, all of them told at once.
        PlanMismatchError: from the first `step`, if ranks differ in parameters or options; from
            the constructor, if they hand over different plain tensors under process groups.
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
        compile: bool = False,
        kernels: Literal["torch", "auto", "symmetric"] = "torch",
        capturable: bool = False,
        normuon_beta: float | None = None,
        cautious_weight_decay: bool = False,
        metrics_every: int = 0,
        async_gpu_parallelism: bool | None = None,
        check_replicas: bool = True,
    ) -> None:
        options = {name: value for name, value in locals().items() if name in OPTIONS}
        if isinstance(params, Generator) and getgeneratorstate(params) == GEN_CLOSED:
            raise ValueError(
                "params is a generator that was used up before, so the optimizer would hold no "
                "parameter. Call model.parameters() or model.named_parameters() anew."
            )
        custom = orthogonalizer if callable(orthogonalizer) else None
        options["orthogonalizer"] = orthogonalizer if custom is None else "custom"
        self._settings = Settings.of(options, custom)
        self._given_config = distributed_config or create_dtensor_config()
        said = {"prefetch_count": prefetch_count, "async_gpu_parallelism": async_gpu_parallelism}
        self._in_its_place: dict[str, Any] = {n: v for n, v in said.items() if v is not None}
        self._trace = Trace(this_rank()) if trace else None
        self._plain = PlainTensors(None)
        self._prepared: PlannedStep | None = None
        self._sweeps_twice: dict[frozenset[int], bool] = {}
        self._has_told_of_shards = False
        self._num_steps = 0
        self._metrics: dict[str, float] = {}
        self._beta1s: list[float | None] = []
        defaults = {name: options[name] for name in DEFAULTS if name in options}
        complete({}, defaults)
        groups: Any = params if isinstance(params, Tensor) else list(params) or [{"params": []}]
        super().__init__(groups, defaults)
        self._settle_numbers()
        self._prepare(exchange=True)
        self._warn_of_params(has_config=distributed_config is not None)
        logs = this_rank() == 0 and logger.isEnabledFor(logging.INFO)
        if logs and not self._config.uses_custom_transport:
            logger.info("%s; print(optimizer.plan) says more", self.plan.headline())

    @ordinary_mode()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; its parameters are planned, and compared at the next step.

        Parameters that do not require gradients are planned once they do.

        Under process groups a collective: all their ranks add a group at the same time.

        Raises what the constructor raises, and then adds nothing.
        """
        super().add_param_group(complete(param_group, self.defaults))
        if self._prepared is not None:
            self._settle_numbers()
            try:
                self._prepare(exchange=True)
            except Exception:
                self.param_groups.pop()
                self._prepare()
                raise

    @property
    def plan(self) -> PlanReport:
        """What a step does: `print(optimizer.plan)`.

        Raises RuntimeError under a hand-written DistributedConfig, whose functions nobody can plan.
        """
        if self._config.uses_custom_transport:
            raise RuntimeError("a hand-written DistributedConfig moves matrices without a plan")
        return self._ready.report

    @property
    def _config(self) -> DistributedConfig:
        """The user's as it is now, and what the constructor says in its place."""
        return replace(self._given_config, **self._in_its_place)

    @property
    def _ready(self) -> PlannedStep:
        assert self._prepared is not None, "the constructor prepares"
        return self._prepared

    @property
    def trace(self) -> Trace:
        """What this rank did when. Raises RuntimeError unless the constructor had `trace=True`."""
        if self._trace is None:
            raise RuntimeError("nothing was recorded: construct Muon with trace=True")
        return self._trace

    def _settle_numbers(self) -> None:
        """See `options.settle_numbers`, of all groups."""
        known = [*self._beta1s, *[None] * len(self.param_groups)]
        self._beta1s = [
            settle_numbers(group, beta1)
            for group, beta1 in zip(self.param_groups, known, strict=False)
        ]

    def _warn_of_params(self, *, has_config: bool) -> None:
        """Log what is legal and probably meant otherwise."""
        table = self._ready.table
        named = [entry.name for entry in table.muon]
        if dubious := [name for name in named if is_embedding_or_head(name)]:
            logger.log(
                warning_level(self._all_params()),
                "%d embeddings or output heads, by their names, are stepped by Muon, which is "
                "meant for hidden matrices: %s. group_parameters(model) gives them to AdamW.",
                len(dubious),
                shortened(dubious),
            )
        on_host = any(entry.param.device.type == "cpu" for entry in table.muon)
        if on_host and self._settings.ns_dtype == torch.bfloat16:
            log_slow_bfloat16(warning_level())
        plain = [entry.name for entry in table.muon if not isinstance(entry.param, DTensor)]
        if plain and not has_config and num_ranks() > 1:
            logger.log(
                warning_level(),
                "%d plain tensors on %d ranks: each rank orthogonalizes all of its own (%s). If "
                "they are replicas (DDP), share the work by distributed_config="
                "create_devicemesh_config(mesh); if not, create_dtensor_config() ends this note.",
                len(plain),
                num_ranks(),
                shortened(plain),
            )

    def _prepare(self, *, exchange: bool = False) -> None:
        """Plan anew and make missing state; the next ballots compare the new plan.

        `exchange`: whether all ranks learn of new plain tensors now, also those without any.
        """
        config = self._config
        if self._plain.rule != config.plain_rule:
            if self._prepared is not None:
                raise GroupOptionError(
                    "distributed_config says that plain tensors lie otherwise than it said when "
                    "the optimizer was made: make the optimizer anew"
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
    @torch.inference_mode(mode=False)  # else kept buffers could not be written to outside of it
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient.

        Raises:
            PlanMismatchError, MissingGradientError, NonFiniteGradientError: on every rank of
                the meshes concerned, before anything has changed.
            StepFailedError: it failed halfway, or an earlier one did and nothing was loaded since.
            RuntimeError: ranks could not agree, for one has died or hangs; nothing has changed. Or
                a gradient that cannot be used (sparse, of another shape, dtype or
                mesh), on this rank or on another; a function of the user that returns what it
                should not, on this rank.
        """
        with ordinary_mode():
            self._ready.must_be_finished()
            self._ready.gate.read_past(capturable=all(g["capturable"] for g in self.param_groups))
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with ordinary_mode():
            self._step()
        return loss

    def _step(self) -> None:
        self._settle_numbers()
        fault: Exception | None = None
        if not self._ready.holds(self.param_groups):
            follow_params(self.state, self.param_groups)
            self._prepare(exchange=True)
        elif not self._ready.is_current(self.param_groups, self.state, self._config):
            try:
                for group in self.param_groups:
                    validate(group, reads_tensors=False)
                self._prepare()
            except ValueError as error:
                fault = error
        every, number = self._settings.metrics_every, self._num_steps
        self._num_steps += 1  # however it ends: ranks measure the same steps
        if every and number % every == 0:
            self._metrics = self._ready.measured_step(
                self.state, self._sweeps_twice, number // every, self._trace, fault
            )
        else:
            self._ready.step(self.state, self._sweeps_twice, fault=fault)

    def metrics(self) -> dict[str, float]:
        """Plain numbers of the last step that was measured: the first, and each `metrics_every`th.

        Summed over all shards and ranks of the parameters, each element once, and the same on every
        rank: for param group i `group{i}/lr`, `/effective_lr` (times the scales of its matrices,
        mean over elements), `/grad_norm`, `/momentum_norm`, `/update_norm` (of what was added to
        the parameters, decay included), `/param_norm`, and `/update_rms` per element; `grad_norm`
        of all groups; `orthogonality_residual` of the polar factor of one matrix, another each
        time. Of this rank: `sent_nbytes` as planned, and `seconds/{phase}` by the host's clock.

        No collective; the measured step makes one small reduction more per mesh dim, and holds a
        copy of this rank's shards.

        Raises RuntimeError before the first measured step.
        """
        if not self._metrics:
            raise RuntimeError("no step was measured: construct Muon with metrics_every=1 or more")
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict: `momentum_buffer`, or AdamW's state, per parameter.

        A parameter that never trained has the entry `{}`.

        Warns once of shards that torch's distributed checkpoint would misplace; see
        `check_saveable`.
        """
        self._ready.must_be_finished()
        self._ready.gate.read_past(forget=False)
        self._settle_numbers()
        self._settings.wait_for_momentum()
        if not self._has_told_of_shards and (misplaced := self._ready.table.misplaced()):
            self._has_told_of_shards = True
            logger.log(warning_level(self._all_params()), "%s", misplaced)
        saved = super().state_dict()
        for number in self._ready.table.without_state(self.state):
            saved["state"].setdefault(number, {})  # frozen, not lost
        return saved

    def check_saveable(self) -> None:
        """Raise CheckpointError if `torch.distributed.checkpoint` would misplace shards.

        torch (2.13 to 2.15) says of some shards of tensor dims that two mesh dims cut, and do not
        divide, that they lie elsewhere: a sharded checkpoint of them is refused, or cannot be
        loaded. `checkpointable` lets torch 2.14 save them; before, a full state dict can be saved.
        Ask before a run, on any rank.
        """
        if misplaced := self._ready.table.misplaced():
            raise CheckpointError(misplaced)

    @ordinary_mode()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, for state of this optimizer, torch.optim.Muon or torch.optim.AdamW.

        Declarations of matrices that a checkpoint does not have stay as they are.

        Raises:
            GroupOptionError: an option out of its range.
            PlanError: a declaration of matrices that does not fit.
            CheckpointError: a state dict that is not whole, that another optimizer wrote, or whose
                state is not cut as its parameters are. After each of these nothing has changed.
        """
        groups, state = self.param_groups, self.state
        seen: list[Mapping[str, Any]] = []

        def look(_: Optimizer, loaded: dict[str, Any]) -> None:
            check_loaded(loaded, self.param_groups)
            seen.append(loaded)

        hook = self.register_load_state_dict_pre_hook(look)  # after those of the user
        try:
            super().load_state_dict(state_dict)
            keep_wide(self.state, seen[0], self.param_groups, self._settings.momentum_dtype)
            self._ready.make_state(self.state)
            self._ready.is_unfinished = False
            self._ready.gate.forget_past()
        except Exception:
            self.param_groups, self.state = groups, state
            self._prepare()
            raise
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._ready.must_be_finished()
        self._settle_numbers()
        self._settings.wait_for_momentum()
        mine = {name: self.__dict__[name] for name in _PICKLED}
        layouts = self._plain.of(self._all_params())
        return {**super().__getstate__(), **mine, "_layouts": layouts}

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    @ordinary_mode()
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by pickle and by `load_state_dict`: plan what the groups now say."""
        known = self.__dict__.get("param_groups", [])
        layouts = state.get("_layouts")
        super().__setstate__({key: value for key, value in state.items() if key != "_layouts"})
        for index, group in enumerate(self.param_groups):
            complete_loaded(group, known[index] if index < len(known) else {})
        self.__dict__.setdefault("_sweeps_twice", {})
        self.__dict__.setdefault("_plain", PlainTensors(None))
        self.__dict__.setdefault("_prepared", None)
        self.__dict__.setdefault("_has_told_of_shards", False)
        self.__dict__.setdefault("_num_steps", 0)
        self.__dict__.setdefault("_metrics", {})
        self._beta1s = []
        self._settle_numbers()
        if layouts is not None:  # a copy: what other ranks told of the plain tensors is known
            self._plain = PlainTensors(self._config.plain_rule)
            self._plain.restore(self._all_params(), layouts)
        self._prepare()


_PICKLED = ("_settings", "_trace", "_given_config", "_in_its_place")
