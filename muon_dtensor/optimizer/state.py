"""The state of a parameter between steps, and checks of loaded state."""

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from muon_dtensor.algorithms.adamw import step_tensor
from muon_dtensor.algorithms.quantized import (
    BLOCK,
    QuantizedMomentum,
    code_dtype,
    num_blocks,
    num_codes,
)
from muon_dtensor.errors import CheckpointError, GroupOptionError
from muon_dtensor.layout import Layout
from muon_dtensor.optimizer.options import DECLARED, complete_loaded, declarations_differ, validate
from muon_dtensor.planning.normuon_state import moment_layout
from muon_dtensor.planning.plan import ParamSpec
from muon_dtensor.runtime.dtensors import describe_mesh, from_shard, placed, placements_of
from muon_dtensor.runtime.normuon_state import zeros_with_layout
from muon_dtensor.runtime.packing import box_of, view_box
from muon_dtensor.runtime.torch_private import (
    cast,
    local_part,
    on_host,
    this_rank,
    warning_level,
    with_shard,
    zeros_like,
)

logger = logging.getLogger("muon_dtensor")

COMPENSATION = "weight_compensation"
"""Key of what was rounded away from a weight in bfloat16; see `algorithms.rounding`."""

CODES, SCALES = "momentum_codes", "momentum_scales"
"""Keys of a momentum in 8 or 4 bits; see `algorithms.quantized`."""

MOMENTS = "row_second_moment"
"""Key of NorMuon's row second moments: one number per row of every matrix."""


def make_state(
    state: dict[str, Any],
    param: Tensor,
    algorithm: str,
    momentum_dtype: torch.dtype | None = None,
    *,
    offload_momentum: bool = False,
    momentum_bits: int | None = None,
    keeps_compensation: bool = False,
    spec: ParamSpec | None = None,
    mesh: DeviceMesh | None = None,
    buffer_device: torch.device | None = None,
) -> None:
    """Add the missing state of a parameter, before its first step, so that all ranks save its keys.

    Muon keeps `momentum_buffer`, AdamW `step`, `exp_avg` and `exp_avg_sq`: tensors of the
    parameter's shape, dtype and placements (the momentum has the gradients' dtype, if `grad_dtype`
    of the parameter names another one). If `spec` cuts the momentum further it is a DTensor on
    `mesh`, and one that is placed like the parameter is cut. NorMuon also keeps
    `row_second_moment`, in float32, with the layout of `spec`, on the device that orthogonalizes:
    `buffer_device`, if the parameter is offloaded. With `keeps_compensation` there is
    `weight_compensation`, of the parameter's shape, dtype and placements. With `momentum_bits`
    there are `momentum_codes` and `momentum_scales` instead of `momentum_buffer`. A momentum is
    cast to `momentum_dtype`, and moved to the host if `offload_momentum`; torch's `load_state_dict`
    restores it with the parameter's dtype and device.

    Raises CheckpointError if loaded row moments have another layout.
    """
    if algorithm == "muon" and momentum_bits is not None:
        _make_quantized(state, param, momentum_bits, spec)
    elif algorithm == "muon":
        if CODES in state:
            state["momentum_buffer"] = _dense(state, param)
        if "momentum_buffer" not in state:
            dtype = momentum_dtype or grad_dtype_of(param) or param.dtype
            state["momentum_buffer"] = zeros_like(param, dtype)
        if spec is not None and spec.gathered_dims and mesh is not None:
            state["momentum_buffer"] = _cut_further(state["momentum_buffer"], spec, mesh)
        if momentum_dtype is not None:
            state["momentum_buffer"] = cast(state["momentum_buffer"], momentum_dtype)
        if offload_momentum:
            state["momentum_buffer"] = on_host(state["momentum_buffer"])
    if algorithm == "muon":
        if keeps_compensation and COMPENSATION not in state:
            state[COMPENSATION] = zeros_like(param)
        if spec is not None and spec.moment_cuts is not None:
            zeros = zeros_with_layout(param, moment_layout(spec), this_rank(), buffer_device)
            row_moments = state.setdefault(MOMENTS, zeros)
            if not _is_placed_as(row_moments, zeros):
                raise CheckpointError(
                    f"the row moments of a parameter {placed(param)} are {placed(row_moments)}; "
                    f"they must be {placed(zeros)}. Load with torch.distributed.checkpoint, which "
                    "reshards."
                )
            state[MOMENTS] = cast(row_moments, row_moments.dtype, local_part(zeros).device)
    elif "exp_avg" not in state:
        state["step"] = step_tensor(param)
        state["exp_avg"] = zeros_like(param)
        state["exp_avg_sq"] = zeros_like(param)


def quantized_momentum(state: Mapping[str, Any], param: Tensor) -> QuantizedMomentum:
    """Return this rank's part of the momentum of a parameter, from its state."""
    codes, scales = (local_part(state[key]) for key in (CODES, SCALES))
    bits = 8 if codes.dtype == torch.int8 else 4
    return QuantizedMomentum(codes, scales, bits, local_part(param).size(-1))


def _make_quantized(
    state: dict[str, Any], param: Tensor, bits: int, spec: ParamSpec | None
) -> None:
    """Add codes and scales, of zeros or of the momentum in the state, which is dropped."""
    momentum = state.pop("momentum_buffer", None)
    if CODES in state and state[CODES].is_floating_point():  # by torch's load_state_dict
        state[CODES] = cast(state[CODES], code_dtype(bits))
        state[SCALES] = cast(state[SCALES], torch.float32)
    if CODES in state and state[CODES].dtype != code_dtype(bits):
        momentum = _dense(state, param)
        del state[CODES], state[SCALES]
    if spec is not None:
        _check_blocks(spec, bits)
    shard = local_part(param).detach()
    for key, dtype, count in (
        (CODES, code_dtype(bits), partial(num_codes, bits=bits)),
        (SCALES, torch.float32, num_blocks),
    ):
        shape = (*shard.shape[:-1], count(shard.size(-1)))
        zeros = torch.zeros(shape, dtype=dtype, device=shard.device)
        if isinstance(param, DTensor):
            global_shape = (*param.shape[:-1], count(param.size(-1)))
            zeros = from_shard(zeros, param.device_mesh, param.placements, global_shape)
        if not _is_placed_as(state.setdefault(key, zeros), zeros):
            raise CheckpointError(
                f"{key} of a parameter {placed(param)} is {placed(state[key])}; it must be "
                f"{placed(zeros)}. Load with torch.distributed.checkpoint, which reshards."
            )
    if momentum is not None:
        quantized_momentum(state, param).store(local_part(momentum))


def _dense(state: MutableMapping[str, Any], param: Tensor) -> Tensor:
    """Return the momentum of codes and scales, in the dtype of the parameter."""
    decoded = quantized_momentum(state, param).decoded()
    return with_shard(param, decoded.to(param.dtype))


def _check_blocks(spec: ParamSpec, bits: int) -> None:
    """Raise GroupOptionError unless shards begin at blocks, and codes and scales likewise."""
    layout = spec.layout
    is_flat = len(layout.shape) < 2
    for step in (BLOCK, 1 if bits == 8 else 2):  # elements per scale, and per byte of codes
        size = -(-layout.shape[-1] // step)
        reduced = replace(layout, shape=(*layout.shape[:-1], size), bounds=None)
        for position in range(layout.mesh.num_ranks):
            region, of_codes = layout.region(position), reduced.region(position)
            starts, ends = region.start[-1], region.stop[-1]
            if (
                is_flat
                or layout.bounds is not None
                or (starts < ends and starts % BLOCK)
                or (of_codes.start[-1] != -(-starts // step))
                or (of_codes.stop[-1] != -(-ends // step))
            ):
                raise GroupOptionError(
                    f"momentum_bits={bits} needs shards that begin at blocks of {BLOCK} elements "
                    f"of the last tensor dim, but {spec.fqn} {list(layout.shape)} is cut at "
                    f"{starts}. Use momentum_dtype=torch.bfloat16 for it"
                )


def _cut_further(momentum: Tensor, spec: ParamSpec, mesh: DeviceMesh) -> Tensor:
    """Return this rank's part of a momentum that is placed like its parameter; others as it is."""
    if _has_layout(momentum, spec.momentum_layout):
        return momentum
    position = spec.layout.mesh.position_of(this_rank())
    part = spec.momentum_layout.region(position)
    shard = view_box(local_part(momentum), box_of(part, spec.layout.region(position)))
    layout = spec.momentum_layout
    return from_shard(shard.clone(), mesh, placements_of(layout), layout.shape)


def drop_stale(state: MutableMapping[str, Any], group: Mapping[str, Any]) -> None:
    """Drop state of the algorithm, or of NorMuon, that the group of a parameter used before."""
    for key in _ALL_KEYS - _keys_of(group):
        state.pop(key, None)


def grad_dtype_of(param: Tensor) -> torch.dtype | None:
    """Return the dtype of a parameter's gradients; None if it may be any, or torch is older."""
    return getattr(param, "grad_dtype", None) if param.is_leaf else None


def check_loaded(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    specs: Mapping[Tensor, ParamSpec],
) -> None:
    """Raise if a state dict does not fit these param groups, before anything is loaded.

    State dicts of torch's Muon and AdamW may lack state, since those optimizers make it in their
    first step. State dicts of this package may lack the state of frozen parameters, of parameters
    that were frozen when it was saved (their entry is empty), and of parameters of which this rank
    holds no element (FSDP1's). State dicts with names as keys may lack the state of any parameter:
    torch's set_optimizer_state_dict omits frozen parameters, and with strict=False those that the
    checkpoint does not have. Missing state starts at zero.

    Raises:
        GroupOptionError: an option is out of range.
        CheckpointError: it is not a state dict of an optimizer, or has other groups; state is
            missing, was written by another optimizer, or is not cut like its parameter.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise CheckpointError(
            "a state dict of an optimizer has the keys 'state' and 'param_groups', this one has "
            f"{[*state_dict]}"
        )
    saved_groups = state_dict["param_groups"]
    sizes, saved_sizes = (
        [len(g["params"]) for g in all_groups] for all_groups in (groups, saved_groups)
    )
    if sizes != saved_sizes:
        raise CheckpointError(
            f"the state dict has param groups of {saved_sizes} parameters, the optimizer of "
            f"{sizes}. Construct the optimizer with the groups that were saved, or load by name: "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict."
        )
    absent: list[str] = []
    for group, saved in zip(groups, saved_groups, strict=True):
        loaded = dict(saved)
        complete_loaded(loaded, group)
        if declarations_differ(saved, group):
            logger.log(
                warning_level(group["params"]),
                "the checkpoint declares other matrices (%s) than the optimizer (%s). The "
                "optimizer's are used; to use the checkpoint's, declare them before loading.",
                *({name: options[name] for name in DECLARED} for options in (saved, group)),
            )
        validate(loaded)
        names = group.get("param_names") or [f"parameter {n}" for n in saved["params"]]
        needed = _keys_of(loaded)
        for name, param, number in zip(names, group["params"], saved["params"], strict=True):
            saved_state = state_dict["state"].get(number, {})
            # An empty entry belongs to a parameter that was frozen when it was saved.
            may_be_absent = isinstance(number, str) or number in state_dict["state"]
            if not saved_state and may_be_absent and param.requires_grad:
                absent.append(name)
            may_be_absent |= not param.requires_grad or not param.numel()
            missing = needed - saved_state.keys() if saved_state or not may_be_absent else set()
            if "format_version" in saved and missing:
                raise CheckpointError(
                    f"the checkpoint is incomplete: it has no {' and no '.join(sorted(missing))} "
                    f"of {name}. Nothing was loaded; use an earlier checkpoint."
                )
            if unknown := saved_state.keys() - needed:
                hint = " muon_dtensor.integrations.dion converts Dion's." * ("momentum" in unknown)
                raise CheckpointError(
                    f"the checkpoint has {', '.join(sorted(unknown))} of {name}, which "
                    f"{loaded['algorithm']} does not use: another optimizer wrote it.{hint}"
                )
            for key in saved_state.keys() & SHARDED_LIKE_PARAM:
                is_cut_momentum = (
                    key == "momentum_buffer"
                    and param in specs
                    and _has_layout(saved_state[key], specs[param].momentum_layout)
                )
                if not is_cut_momentum and not _is_placed_as(saved_state[key], param):
                    raise CheckpointError(
                        f"'{key}' of {name} is {placed(saved_state[key])}, the parameter "
                        f"{placed(param)}. Load with torch.distributed.checkpoint, which reshards."
                    )
    if absent:
        logger.log(
            warning_level(param for group in groups for param in group["params"]),
            "the checkpoint has no optimizer state for %d parameters; it starts at zero: %s",
            len(absent),
            ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else ""),
        )


def restore_wide_state(
    state: Mapping[Tensor, dict[str, Any]],
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    momentum_dtype: torch.dtype | None,
) -> None:
    """Restore state that torch's `load_state_dict` has rounded to the dtype of a parameter.

    Args:
        state: of the optimizer, by parameter.
        state_dict: the loaded state dict.
        groups: of the optimizer.
        momentum_dtype: dtype of the stored momentum; None for the gradients' dtype.

    Tensors made in inference mode are cloned, because a step could not update them. AdamW's step
    counts become tensors, as in torch's own AdamW.
    """
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        for param, number in zip(group["params"], saved["params"], strict=True):
            saved_state = state_dict["state"].get(number, {})
            wide = momentum_dtype or grad_dtype_of(param)
            if wide is None and param.is_leaf and hasattr(param, "grad_dtype"):  # any dtype
                wide = getattr(saved_state.get("momentum_buffer"), "dtype", None)
            codes = getattr(saved_state.get(CODES), "dtype", None)
            for key, dtype in (
                ("momentum_buffer", wide),
                (MOMENTS, torch.float32),
                (CODES, codes),
                (SCALES, torch.float32),
            ):
                if key in saved_state and dtype not in (None, param.dtype):
                    state[param][key] = cast(saved_state[key], dtype, local_part(param).device)
            loaded = state.get(param, {})
            for key, value in loaded.items():
                if isinstance(value, Tensor) and local_part(value).is_inference():
                    loaded[key] = with_shard(value, local_part(value).clone())
            if "step" in loaded and not _is_step_tensor(loaded["step"], param):
                loaded["step"] = step_tensor(param).fill_(float(loaded["step"]))


def _is_step_tensor(step: object, param: Tensor) -> bool:
    return (
        isinstance(step, Tensor)
        and (step.ndim, step.dtype) == (0, torch.float32)
        and step.device == param.device
    )


def move_state_to_params(
    state: MutableMapping[Tensor, dict[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Drop the state of replaced parameters, and move state to the devices of its parameters.

    Accelerate replaces parameters when it shards a model; `model.to(device)` moves them. State on
    the meta device has no values: it is dropped, and `make_state` makes it again. Raises
    RuntimeError if a momentum other than zero would be dropped.
    """
    params = {param for group in groups for param in group["params"]}
    for param, param_state in state.items():
        state[param] = {key: v for key, v in param_state.items() if not local_part(v).is_meta}
    replaced = [param for param in state if param not in params]
    if any(local_part(v).any() for param in replaced for v in state[param].values() if v.ndim):
        raise RuntimeError(
            "parameters were replaced after the optimizer had stepped, and their momentum does not "
            "fit the new ones. Call optimizer.state_dict() first, shard or move the model, "
            "construct a new optimizer, and load the state dict."
        )
    for param in replaced:
        del state[param]
    for param, param_state in state.items():
        for key, value in param_state.items():
            param_state[key] = cast(value, value.dtype, local_part(param).device)


_ALL_KEYS = {
    *("momentum_buffer", "step", "exp_avg", "exp_avg_sq"),
    *(MOMENTS, COMPENSATION, CODES, SCALES),
}

SHARDED_LIKE_PARAM = {"momentum_buffer", "exp_avg", "exp_avg_sq", COMPENSATION}
"""Keys whose tensors have the shape and placements of their parameter."""


def _keys_of(group: Mapping[str, Any]) -> set[str]:
    """Return the keys of the state of a group's parameters."""
    if group["algorithm"] == "adamw":
        return {"step", "exp_avg", "exp_avg_sq"}
    keys = {"momentum_buffer"} if group["momentum_bits"] is None else {CODES, SCALES}
    if group["normuon_beta"] is not None:
        keys.add(MOMENTS)
    if group["weight_rounding"] == "compensated":
        keys.add(COMPENSATION)
    return keys


def _has_layout(value: Tensor, layout: Layout) -> bool:
    """Whether a state tensor is a DTensor of this layout."""
    if not isinstance(value, DTensor) or value.shape != layout.shape:
        return False
    mesh = describe_mesh(value.device_mesh)
    return mesh == layout.mesh and value.placements == placements_of(layout)


def _is_placed_as(value: Tensor, param: Tensor) -> bool:
    """Whether a state tensor has the shape, placements and mesh of another tensor."""
    same = value.shape == param.shape
    for name in ("placements", "device_mesh"):
        same = same and getattr(value, name, None) == getattr(param, name, None)
    return same
