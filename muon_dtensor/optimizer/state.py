"""The state of a parameter between steps, and checks of loaded state."""

import logging
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from muon_dtensor.algorithms.adamw import step_tensor
from muon_dtensor.errors import CheckpointError
from muon_dtensor.layout import Layout
from muon_dtensor.optimizer.options import DECLARED, complete_loaded, declares_otherwise, validate
from muon_dtensor.runtime.dtensors import placed
from muon_dtensor.runtime.normuon_state import zeros_beside
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

MOMENTS = "row_second_moment"
"""NorMuon's: one number per row of every matrix."""


def make_state(
    state: dict[str, Any],
    param: Tensor,
    algorithm: str,
    momentum_dtype: torch.dtype | None = None,
    *,
    offload_momentum: bool = False,
    moments: Layout | None = None,
) -> None:
    """Fill in what is missing of a parameter's state; made at once, so all ranks hold its keys.

    Muon keeps `momentum_buffer`, AdamW `step`, `exp_avg` and `exp_avg_sq`: tensors of the
    parameter's shape, dtype and placements (the momentum has the gradients' dtype, if `grad_dtype`
    of the parameter names another one); NorMuon also `row_second_moment`, in float32, laid out as
    `moments`. A momentum of another dtype, or one to be kept on the host, is brought there;
    torch's `load_state_dict` gives it back as the parameter is. Raises CheckpointError for moments
    that lie otherwise.
    """
    if algorithm == "muon":
        if "momentum_buffer" not in state:
            dtype = momentum_dtype or grad_dtype_of(param) or param.dtype
            state["momentum_buffer"] = zeros_like(param, dtype)
        if momentum_dtype is not None:
            state["momentum_buffer"] = cast(state["momentum_buffer"], momentum_dtype)
        if offload_momentum:
            state["momentum_buffer"] = on_host(state["momentum_buffer"])
        if moments is not None:
            zeros = zeros_beside(param, moments, this_rank())
            kept = state.setdefault(MOMENTS, zeros)
            if not _is_placed_as(kept, zeros):
                raise CheckpointError(
                    f"the row moments of a parameter {placed(param)} are {placed(kept)}; they must "
                    f"be {placed(zeros)}. Load with torch.distributed.checkpoint, which reshards."
                )
    elif "exp_avg" not in state:
        state["step"] = step_tensor(param)
        state["exp_avg"] = zeros_like(param)
        state["exp_avg_sq"] = zeros_like(param)


def drop_stale(state: MutableMapping[str, Any], group: Mapping[str, Any]) -> None:
    """Drop what another algorithm, or NorMuon, kept before the group of a parameter changed."""
    for key in _KNOWN - _keys_of(group):
        state.pop(key, None)


def grad_dtype_of(param: Tensor) -> torch.dtype | None:
    """The dtype that gradients of a parameter have; None where it may be any, or torch is old."""
    return getattr(param, "grad_dtype", None) if param.is_leaf else None


def follow_grad_dtypes(grads: Iterable[tuple[MutableMapping[str, Any], Tensor]]) -> None:
    """Bring momenta to the dtype of their gradients, in which torch.optim.Muon keeps them.

    `grads`: the state of parameters of Muon, and their gradients.
    """
    for kept, grad in grads:
        if kept["momentum_buffer"].dtype != grad.dtype:
            kept["momentum_buffer"] = cast(kept["momentum_buffer"], grad.dtype)


def check_loaded(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise for a state dict that does not fit these param groups, before anything is loaded.

    State dicts of torch's Muon and AdamW may lack state, as those make it in their first step. Ours
    may lack that of frozen parameters, of those that were frozen when it was saved (theirs is there
    and empty), of those that this rank holds nothing of (FSDP1's), and by names that of any:
    torch's set_optimizer_state_dict leaves out the state of frozen parameters, and with
    strict=False of those that the checkpoint does not know. All of these start afresh.

    Raises:
        GroupOptionError: an option out of its range.
        CheckpointError: no state dict of an optimizer; other groups; state that is missing, that
            another optimizer wrote, or that is not cut as its parameter is.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise CheckpointError(
            f"a state dict of an optimizer has 'state' and 'param_groups', this one {[*state_dict]}"
        )
    saved_groups = state_dict["param_groups"]
    sizes, saved_sizes = ([len(g["params"]) for g in many] for many in (groups, saved_groups))
    if sizes != saved_sizes:
        raise CheckpointError(
            f"the state dict has param groups of {saved_sizes} parameters, the optimizer of "
            f"{sizes}. Make the groups as they were when it was saved, or load by name: "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict."
        )
    absent: list[str] = []
    for group, saved in zip(groups, saved_groups, strict=True):
        loaded = dict(saved)
        complete_loaded(loaded, group)
        if declares_otherwise(saved, group):
            logger.log(
                warning_level(group["params"]),
                "the matrices that the checkpoint declares (%s) differ from those of the optimizer "
                "(%s). The optimizer's are used; to use the others, declare them before loading.",
                *({name: of[name] for name in DECLARED} for of in (saved, group)),
            )
        validate(loaded)
        names = group.get("param_names") or [f"parameter {n}" for n in saved["params"]]
        needed = _keys_of(loaded)
        for name, param, number in zip(names, group["params"], saved["params"], strict=True):
            kept = state_dict["state"].get(number, {})
            # what is there and empty was frozen when it was saved
            may_be_absent = isinstance(number, str) or number in state_dict["state"]
            if not kept and may_be_absent and param.requires_grad:
                absent.append(name)
            may_be_absent |= not param.requires_grad or not param.numel()
            lacking = needed - kept.keys() if kept or not may_be_absent else set()
            if "format_version" in saved and lacking:
                raise CheckpointError(
                    f"the checkpoint is not whole: it has no {' and no '.join(sorted(lacking))} of "
                    f"{name}. Nothing was loaded; take an earlier checkpoint."
                )
            if unknown := kept.keys() - needed:
                hint = " muon_dtensor.integrations.dion converts Dion's." * ("momentum" in unknown)
                raise CheckpointError(
                    f"the checkpoint has {', '.join(sorted(unknown))} of {name}, which "
                    f"{loaded['algorithm']} does not know: another optimizer wrote it.{hint}"
                )
            for key in kept.keys() & CUT_AS_THEIR_PARAMETER:
                if not _is_placed_as(kept[key], param):
                    raise CheckpointError(
                        f"'{key}' of {name} is {placed(kept[key])}, the parameter {placed(param)}. "
                        "Load with torch.distributed.checkpoint, which reshards."
                    )
    if absent:
        logger.log(
            warning_level(param for group in groups for param in group["params"]),
            "the checkpoint has no optimizer state for %d parameters; theirs starts at zero: %s",
            len(absent),
            ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else ""),
        )


def keep_wide(
    state: Mapping[Tensor, dict[str, Any]],
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    momentum_dtype: torch.dtype | None,
) -> None:
    """Bring back what torch's `load_state_dict` has rounded to the dtype of a parameter.

    Args:
        state: of the optimizer, by parameter.
        state_dict: what was loaded.
        groups: of the optimizer.
        momentum_dtype: what the momentum is kept in; None for the gradients' dtype.

    Values made in inference mode are copied, for a step could not update them; AdamW's step counts
    become tensors, as torch's own AdamW makes them.
    """
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        for param, number in zip(group["params"], saved["params"], strict=True):
            kept = state_dict["state"].get(number, {})
            wide = momentum_dtype or grad_dtype_of(param)
            if wide is None and param.is_leaf and hasattr(param, "grad_dtype"):  # it may be any
                wide = getattr(kept.get("momentum_buffer"), "dtype", None)
            for key, dtype in (("momentum_buffer", wide), (MOMENTS, torch.float32)):
                if key in kept and dtype not in (None, param.dtype):
                    state[param][key] = cast(kept[key], dtype, local_part(param).device)
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


def follow_params(
    state: MutableMapping[Tensor, dict[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Let go of the state of parameters that somebody has replaced, and move what has moved.

    Accelerate replaces them when it shards a model; `model.to(device)` moves them. Before the first
    step nothing is lost. Raises RuntimeError where a momentum would be. State made on the meta
    device has no values: it is left for `make_state` to make anew.
    """
    now = {param for group in groups for param in group["params"]}
    for param, kept in state.items():
        state[param] = {key: v for key, v in kept.items() if not local_part(v).is_meta}
    gone = [param for param in state if param not in now]
    if any(local_part(v).any() for param in gone for v in state[param].values() if v.ndim):
        raise RuntimeError(
            "parameters were replaced after the optimizer had stepped, and their momentum does not "
            "fit the new ones. Take optimizer.state_dict() before, shard or move the model, make "
            "the optimizer anew, and load."
        )
    for param in gone:
        del state[param]
    for param, kept in state.items():
        for key, value in kept.items():
            kept[key] = cast(value, value.dtype, local_part(param).device)


_KNOWN = {"momentum_buffer", "step", "exp_avg", "exp_avg_sq", MOMENTS}

CUT_AS_THEIR_PARAMETER = {"momentum_buffer", "exp_avg", "exp_avg_sq"}


def _keys_of(group: Mapping[str, Any]) -> set[str]:
    """What a group keeps of each parameter."""
    if group["algorithm"] == "adamw":
        return {"step", "exp_avg", "exp_avg_sq"}
    return {"momentum_buffer"} | ({MOMENTS} if group["normuon_beta"] is not None else set())


def _is_placed_as(value: Tensor, param: Tensor) -> bool:
    """Whether a state tensor is cut exactly as another."""
    same = value.shape == param.shape
    for name in ("placements", "device_mesh"):
        same = same and getattr(value, name, None) == getattr(param, name, None)
    return same
