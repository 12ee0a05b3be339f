"""What the optimizer keeps of a parameter between steps, and which saved state fits it.

Knows tensors and their placements. Does not step, and does not plan.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from muon_dtensor.adamw import step_tensor
from muon_dtensor.errors import CheckpointError
from muon_dtensor.layout import Layout
from muon_dtensor.options import complete_loaded, validate
from muon_dtensor.runtime.describe import local_part, on_host, placed, this_rank
from muon_dtensor.runtime.row_moments import zeros_beside

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
    parameter's shape, dtype and placements; NorMuon also `row_second_moment`, in float32, laid out
    as `moments`. A momentum of another dtype, or one to be kept on the host, is brought there;
    torch's `load_state_dict` gives it back as the parameter is. Raises CheckpointError for moments
    that lie otherwise.
    """
    if algorithm == "muon":
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param, requires_grad=False)
        if momentum_dtype is not None:
            state["momentum_buffer"] = state["momentum_buffer"].to(momentum_dtype)
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
        state["exp_avg"] = torch.zeros_like(param, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(param, requires_grad=False)


def check_loaded(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise for a state dict that does not fit these param groups, before anything is loaded.

    State dicts of torch's Muon and AdamW may lack state, as those make it in their first step; ours
    never do.

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
    for group, saved in zip(groups, saved_groups, strict=True):
        loaded = dict(saved)
        complete_loaded(loaded, group)
        validate(loaded)
        names = group.get("param_names") or [f"parameter {n}" for n in saved["params"]]
        needed = _keys_of(loaded)
        for name, param, number in zip(names, group["params"], saved["params"], strict=True):
            kept = state_dict["state"].get(number, {})
            if "format_version" in saved and (lacking := needed - kept.keys()):
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
            for key in kept.keys() & _CUT_AS_THEIR_PARAMETER:
                if not _is_placed_as(kept[key], param):
                    raise CheckpointError(
                        f"'{key}' of {name} is {placed(kept[key])}, the parameter {placed(param)}. "
                        "Load with torch.distributed.checkpoint, which reshards."
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
        momentum_dtype: what the momentum is kept in; None for the parameter's dtype.
    """
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        for param, number in zip(group["params"], saved["params"], strict=True):
            kept = state_dict["state"].get(number, {})
            for key, dtype in (("momentum_buffer", momentum_dtype), (MOMENTS, torch.float32)):
                if key in kept and dtype not in (None, param.dtype):
                    state[param][key] = kept[key].to(device=local_part(param).device, dtype=dtype)


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
            kept[key] = value.to(local_part(param).device)


_CUT_AS_THEIR_PARAMETER = {"momentum_buffer", "exp_avg", "exp_avg_sq"}


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
