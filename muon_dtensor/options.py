"""What a param group may say, what it says by default, and which values are out of range.

Plain values only, so that groups pass through checkpoints. Sees no tensor but a learning rate.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from muon_dtensor.errors import GroupOptionError
from muon_dtensor.orthogonalize import ORTHOGONALIZERS
from muon_dtensor.orthogonalize.newton_schulz import EPS, KELLER_JORDAN, NUM_ITERATIONS
from muon_dtensor.patterns import Declaration
from muon_dtensor.update import ADJUST_LR_FNS

ALGORITHMS = ("muon", "adamw")

FORMAT_VERSION = 1
"""Of state dicts. A group carries it, for nothing else passes through every way of saving."""

DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "weight_decay": 0.1,
    "momentum": 0.95,
    "nesterov": True,
    "ns_coefficients": KELLER_JORDAN,
    "eps": EPS,
    "ns_steps": NUM_ITERATIONS,
    "adjust_lr_fn": None,
    "algorithm": "muon",
    "betas": (0.9, 0.999),
    "matrix": None,
    "matrix_axes": None,
    "split_sizes": None,
    "split_dim": 0,
    "orthogonalizer": "newton_schulz",
    "capturable": False,
    "normuon_beta": None,
    "cautious_weight_decay": False,
    "format_version": FORMAT_VERSION,
}
"""Option names of every group, and the constructor's defaults: those of torch.optim.Muon."""

ADAMW_EPS = 1e-8
"""`eps` of an AdamW group that names none: that of torch.optim.AdamW."""

WRITTEN_BY_OTHERS = {"params", "param_names", "initial_lr", "max_lr", "min_lr", "swa_lr"}
"""Keys that torch's Optimizer, schedulers and averaging put into a group."""

HINTS = {"foreach", "fused"}
"""How torch's optimizers are asked to run, which frameworks put into any group; not taken up."""

NOT_OFFERED = ("amsgrad", "maximize", "differentiable")
"""What torch's AdamW may be told in a checkpoint, and we cannot do."""

MOST_ITERATIONS = 99
"""torch.optim.Muon refuses 100 and more."""


def complete(group: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A new group with every option, and without hints to other optimizers.

    An AdamW group that names no `lr` or `weight_decay` takes the constructor's, as any group of a
    torch optimizer does; its `eps` and `betas` default to torch.optim.AdamW's. Raises
    GroupOptionError for unknown options and values out of range.
    """
    group = {name: value for name, value in group.items() if name not in HINTS}
    unknown = group.keys() - DEFAULTS.keys() - WRITTEN_BY_OTHERS
    if unknown:
        name = min(unknown)
        near = difflib.get_close_matches(name, DEFAULTS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise GroupOptionError(
            f"unknown param group option '{name}'.{hint} Options are {', '.join(DEFAULTS)}."
        )
    completed = {**_defaults_of(group.get("algorithm", "muon"), defaults), **group}
    validate(completed)
    return completed


DECLARED = ("matrix", "matrix_axes", "split_sizes", "split_dim")

KEPT = (*DECLARED, "orthogonalizer", "capturable", "normuon_beta", "cautious_weight_decay")
"""What checkpoints of torch's Muon and AdamW cannot say."""


def complete_loaded(group: dict[str, Any], known: Mapping[str, Any]) -> None:
    """Fill in, in place, what a checkpoint does not name.

    `known`: the group that is loaded into. It keeps what checkpoints of torch's Muon and AdamW
    cannot say, such as its algorithm and which matrices it declares. What they say and no group of
    ours holds is left out. Raises GroupOptionError for what cannot be done.
    """
    if asked := [name for name in NOT_OFFERED if group.get(name)]:
        raise GroupOptionError(f"the loaded group has {asked[0]}=True, which Muon's AdamW has not")
    for name in (*HINTS, *NOT_OFFERED, "decoupled_weight_decay"):
        group.pop(name, None)
    algorithm = known.get("algorithm", "muon")
    kept = {name: known[name] for name in KEPT if name in known}
    for name, value in {**_defaults_of(algorithm, DEFAULTS), **kept}.items():
        group.setdefault(name, value)


def _defaults_of(algorithm: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    values = {**DEFAULTS, **defaults, "algorithm": algorithm}
    if algorithm == "adamw":
        values |= {"eps": ADAMW_EPS, "normuon_beta": None, "cautious_weight_decay": False}
    return values


def validate(group: Mapping[str, Any]) -> None:
    """Raise GroupOptionError for a value out of its range; names the option and the range."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise GroupOptionError(f"lr as a tensor must have one element, got {tuple(lr.shape)}")
    for name in ("lr", "weight_decay", "momentum", "eps"):
        value = group[name]
        if not isinstance(value, (int, float, Tensor)) or not value >= 0:
            raise GroupOptionError(f"{name} must be 0 or more, got {value!r}")
    if group["algorithm"] not in ALGORITHMS:
        raise GroupOptionError(
            f"algorithm must be one of {', '.join(ALGORITHMS)}, got {group['algorithm']!r}"
        )
    one_of("adjust_lr_fn", group["adjust_lr_fn"], ADJUST_LR_FNS)
    beta = group["normuon_beta"]
    if beta is not None and not (isinstance(beta, (int, float)) and 0 <= beta < 1):
        raise GroupOptionError(f"normuon_beta must be None or in [0, 1), got {beta!r}")
    if group["algorithm"] == "adamw" and (beta is not None or group["cautious_weight_decay"]):
        raise GroupOptionError("normuon_beta and cautious_weight_decay are for Muon's groups only")
    if type(group["cautious_weight_decay"]) is not bool:
        raise GroupOptionError(
            f"cautious_weight_decay is True or False, got {group['cautious_weight_decay']!r}"
        )
    if group["format_version"] != FORMAT_VERSION:
        raise GroupOptionError(
            f"format_version must be {FORMAT_VERSION}, got {group['format_version']!r}: this "
            "checkpoint was written by another release of muon_dtensor; load it with that one"
        )
    steps = group["ns_steps"]
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= MOST_ITERATIONS:
        raise GroupOptionError(f"ns_steps must be an integer in 0..{MOST_ITERATIONS}, got {steps}")
    if not _are_numbers(group["ns_coefficients"], 3):
        raise GroupOptionError(
            f"ns_coefficients must be three numbers, got {group['ns_coefficients']}"
        )
    if group["orthogonalizer"] not in ORTHOGONALIZERS:
        raise GroupOptionError(
            f"orthogonalizer must be one of {', '.join(ORTHOGONALIZERS)}, got "
            f"{group['orthogonalizer']!r}; a callable is given to the constructor"
        )
    if type(group["capturable"]) is not bool:
        raise GroupOptionError(f"capturable is True or False, got {group['capturable']!r}")
    declaration_of(group)
    betas = group["betas"]
    if not _are_numbers(betas, 2) or not all(0 <= beta < 1 for beta in betas):
        raise GroupOptionError(f"betas must be two numbers in [0, 1), got {betas}")


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise GroupOptionError, which says what is allowed, for anything else."""
    if value not in allowed:
        raise GroupOptionError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value}")


def declaration_of(group: Mapping[str, Any]) -> Declaration:
    """What a group says of its parameters' matrices. Raises GroupOptionError for wrong types."""
    pattern, axes = group["matrix"], group["matrix_axes"]
    sizes, split_dim = group["split_sizes"], group["split_dim"]
    patterns = pattern if isinstance(pattern, (tuple, list)) else (pattern,)
    if any(not isinstance(p, str) and p is not None for p in patterns):
        raise GroupOptionError(
            f"matrix must be an einops pattern, or with split_sizes a tuple of patterns and None, "
            f"got {pattern!r}"
        )
    if axes is not None and not (
        isinstance(axes, Mapping)
        and all(isinstance(n, str) and type(size) is int and size > 0 for n, size in axes.items())
    ):
        raise GroupOptionError(
            f"matrix_axes must map names of axes to lengths above 0, got {axes!r}"
        )
    if sizes is not None and not (
        isinstance(sizes, (tuple, list)) and sizes and all(type(n) is int and n > 0 for n in sizes)
    ):
        raise GroupOptionError(f"split_sizes must be integers above 0, got {sizes!r}")
    if type(split_dim) is not int:
        raise GroupOptionError(f"split_dim must be an integer, got {split_dim!r}")
    if split_dim != 0 and sizes is None:
        raise GroupOptionError(f"split_dim={split_dim} without split_sizes splits nothing")
    said = [p for p in patterns if p is not None]
    if unused := [
        n for n in axes or {} if not any(re.search(rf"\b{re.escape(n)}\b", p) for p in said)
    ]:
        raise GroupOptionError(f"matrix_axes names {unused}, which no pattern in matrix has")
    if isinstance(pattern, (tuple, list)):
        if sizes is None:
            raise GroupOptionError("several patterns in matrix need split_sizes, one block each")
        pattern = tuple(pattern)
    return Declaration(
        pattern,
        tuple(sorted((axes or {}).items())),
        None if sizes is None else tuple(sizes),
        split_dim,
    )


def _are_numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == count
        and all(isinstance(number, (int, float)) for number in value)
    )


def as_text(group: Mapping[str, Any]) -> str:
    """All options of a group as one line, for ranks to compare."""
    parts = []
    for name in sorted(group.keys() - {"params", "param_names", *DECLARED}):
        value: Any = group[name]
        if isinstance(value, Tensor):
            stays = group["capturable"] and value.device.type != "cpu"
            value = "a tensor" if stays else float(value)
        parts.append(f"{name}={value!r}")
    return ", ".join([*parts, str(declaration_of(group))])
