"""The options of `Muon`: names, defaults, allowed values; and what param groups make of them.

Values in groups are plain, so that they pass through checkpoints.

Note [Momentum of AdamW]
    torch's OneCycleLR and CyclicLR write `momentum` into every group of an optimizer that has that
    option, and `betas` into those of one that has betas instead. In an AdamW group `momentum` is
    therefore another name of betas[0]: whichever of the two was written since the last step wins,
    and the other one follows. Checkpoints hold both, equal.
"""

import difflib
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from copy import copy
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from muon_dtensor.algorithms import ORTHOGONALIZERS
from muon_dtensor.algorithms.kernels import KERNELS
from muon_dtensor.algorithms.newton_schulz import EPS, KELLER_JORDAN, NUM_ITERATIONS
from muon_dtensor.algorithms.update import ADJUST_LR_FNS
from muon_dtensor.errors import GroupOptionError
from muon_dtensor.layout.declarations import Declaration
from muon_dtensor.planning.plan import STRATEGIES
from muon_dtensor.runtime.torch_private import warning_level

logger = logging.getLogger("muon_dtensor")

ALGORITHMS = ("muon", "adamw")

MOST_ITERATIONS = 99
"""torch.optim.Muon refuses 100 and more."""

FORMAT_VERSION = 1
"""Of state dicts. A group carries it, for nothing else passes through every way of saving."""

Check = Callable[[str, Any], None]
"""Raises GroupOptionError, which names the option and its range, for a value out of it."""


def one_of(*allowed: object) -> Check:
    """One of some values."""

    def check(name: str, value: object) -> None:
        if value not in allowed:
            expected = ", ".join(map(str, allowed))
            raise GroupOptionError(f"{name} must be one of {expected}, got {value}")

    return check


def boolean(name: str, value: object) -> None:
    """True or False."""
    if type(value) is not bool:
        raise GroupOptionError(f"{name} is True or False, got {value!r}")


def anything(name: str, value: object) -> None:
    """Checked elsewhere: together with other options, or by the planner."""


def numbers(count: int) -> Check:
    """A tuple or list of so many numbers."""

    def check(name: str, value: object) -> None:
        if not _are_numbers(value, count):
            word = {2: "two", 3: "three"}[count]
            raise GroupOptionError(f"{name} must be {word} numbers, got {value}")

    return check


def _normuon_beta(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, (int, float)) and 0 <= value < 1):
        raise GroupOptionError(f"{name} must be None or in [0, 1), got {value!r}")


def _ns_steps(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_ITERATIONS:
        raise GroupOptionError(f"{name} must be an integer in 0..{MOST_ITERATIONS}, got {value}")


def _orthogonalizer(name: str, value: Any) -> None:
    if value not in ORTHOGONALIZERS:
        raise GroupOptionError(
            f"{name} must be one of {', '.join(ORTHOGONALIZERS)}, got {value!r}; a callable is "
            "given to the constructor"
        )


def _format_version(name: str, value: Any) -> None:
    if value != FORMAT_VERSION:
        raise GroupOptionError(
            f"{name} must be {FORMAT_VERSION}, got {value!r}: this checkpoint was written by "
            "another release of muon_dtensor; load it with that one"
        )


def _betas(name: str, value: Any) -> None:
    if not _are_numbers(value, 2) or not all(0 <= beta < 1 for beta in value):
        raise GroupOptionError(f"{name} must be two numbers in [0, 1), got {value}")


def _bucket_mb(name: str, value: Any) -> None:
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise GroupOptionError(f"{name} must be a number above 0, got {value!r}")


def _metrics_every(name: str, value: Any) -> None:
    if type(value) is not int or value < 0:
        raise GroupOptionError(f"{name} is a number of steps, got {value!r}")


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    `type`: as config files and command lines spell its value; None where they cannot. `check`:
    raises GroupOptionError for a value out of range. `in_groups`: a param group can have a value of
    its own. `in_constructor`: it is a keyword of `Muon`, which documents it.
    """

    name: str
    default: Any
    type: Any
    check: Check
    in_groups: bool = False
    in_constructor: bool = True


def _group(name: str, default: Any, type: Any, check: Check, **where: bool) -> Option:
    return Option(name, default, type, check, in_groups=True, **where)


DType = Literal["bfloat16", "float32"]
_BFLOAT16_OR_FLOAT32 = (torch.bfloat16, torch.float32)

OPTIONS: dict[str, Option] = {
    option.name: option
    for option in (
        # those of torch.optim.Muon, with its defaults; validate() checks the range of numbers
        _group("lr", 1e-3, float, anything),
        _group("weight_decay", 0.1, float, anything),
        _group("momentum", 0.95, float, anything),
        _group("nesterov", True, bool, boolean),
        _group("ns_coefficients", KELLER_JORDAN, tuple[float, float, float], numbers(3)),
        _group("eps", EPS, float, anything),
        _group("ns_steps", NUM_ITERATIONS, int, _ns_steps),
        _group(
            "adjust_lr_fn",
            None,
            Literal[*filter(None, ADJUST_LR_FNS)] | None,
            one_of(*ADJUST_LR_FNS),
        ),
        # of param groups alone
        _group("algorithm", "muon", None, one_of(*ALGORITHMS), in_constructor=False),
        _group("betas", (0.9, 0.95), None, _betas, in_constructor=False),
        _group("matrix", None, None, anything, in_constructor=False),
        _group("matrix_axes", None, None, anything, in_constructor=False),
        _group("split_sizes", None, None, anything, in_constructor=False),
        _group("split_dim", 0, None, anything, in_constructor=False),
        _group("format_version", FORMAT_VERSION, None, _format_version, in_constructor=False),
        # of both
        _group(
            "orthogonalizer",
            "newton_schulz",
            Literal["newton_schulz", "polar_express"],
            _orthogonalizer,
        ),
        _group("capturable", False, bool, boolean),
        _group("normuon_beta", None, float | None, _normuon_beta),
        _group("cautious_weight_decay", False, bool, boolean),
        # of the optimizer as a whole
        Option("ns_dtype", torch.bfloat16, DType, one_of(*_BFLOAT16_OR_FLOAT32)),
        Option("bucket_mb", 256, float, _bucket_mb),
        Option("prefetch_count", None, int | None, anything),
        Option("batched", None, bool | None, anything),
        Option("missing_grad", "raise", Literal["raise", "zero"], one_of("raise", "zero")),
        Option(
            "nonfinite",
            "raise",
            Literal["raise", "skip", "propagate"],
            one_of("raise", "skip", "propagate"),
        ),
        Option("strategy", "auto", Literal[STRATEGIES], anything),
        Option("exact", True, bool, anything),
        Option("topology", None, str | None, anything),
        Option("momentum_dtype", None, DType | None, one_of(None, *_BFLOAT16_OR_FLOAT32)),
        Option("offload_momentum", False, bool, boolean),
        Option("compile", False, bool, boolean),
        Option("kernels", "torch", Literal[KERNELS], anything),
        Option("metrics_every", 0, int, _metrics_every),
        Option("trace", False, bool, anything),
        Option("async_gpu_parallelism", None, bool | None, anything),
        Option("check_replicas", True, bool, boolean),
    )
}
"""All options by name."""

DEFAULTS: dict[str, Any] = {o.name: o.default for o in OPTIONS.values() if o.in_groups}
"""Options of every param group, with the constructor's defaults."""

ADAMW_DEFAULTS: dict[str, Any] = {
    "lr": 3e-4,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.1,
}
"""What an AdamW group holds that does not name them, however the optimizer is made.

The constructor's `lr`, `weight_decay` and `eps` are Muon's, whose learning rates are no AdamW's.
The values are GPT-3's (Brown et al. 2020, arXiv:2005.14165): betas, eps and decay of its appendix
B, the learning rate of its model of 350 million parameters (table 2.1).
"""

WRITTEN_BY_OTHERS = {
    *("params", "param_names", "initial_lr", "max_lr", "min_lr", "swa_lr", "base_lr"),
    *("base_momentum", "max_momentum"),
}
"""Keys that torch's Optimizer, schedulers and averaging put into a group."""

ALSO_KNOWN_AS = {
    "learning_rate": "lr",
    "learning-rate": "lr",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "mu": "momentum",
    "beta": "momentum",
    "num_iterations": "ns_steps",
    "epsilon": "eps",
}
"""Names of options in other packages, for hints."""

NEAR = 0.82
"""How like an option's name a foreign key is, by difflib, to be taken for a spelling of it:
`weight_decy` and `momentun` are, `max_momentum` and `lr_scale` are not."""

HINTS = {"foreach", "fused"}
"""How torch's optimizers are asked to run, which frameworks put into any group; not taken up."""

NOT_OFFERED = ("amsgrad", "maximize", "differentiable")
"""What torch's AdamW may be told in a checkpoint, and we cannot do."""


def complete(
    group: Mapping[str, Any], defaults: Mapping[str, Any], *, is_ours: bool = False
) -> dict[str, Any]:
    """A new group with every option, and without hints to other optimizers.

    An AdamW group that does not name them holds `ADAMW_DEFAULTS`. Keys that are no option are
    carried, as torch carries them; those that look like a misspelled option are logged.

    Args:
        group: what the user says.
        defaults: of the constructor.
        is_ours: whether a key that is no option is a mistake: in a config file of this package.

    Raises:
        GroupOptionError: values out of range; with `is_ours` keys that are no option.
    """
    group = {name: plain_number(value) for name, value in group.items() if name not in HINTS}
    for name in sorted(group.keys() - DEFAULTS.keys() - WRITTEN_BY_OTHERS):
        if is_ours:
            hint = did_you_mean(name, DEFAULTS) or f" Options are {', '.join(DEFAULTS)}."
            raise GroupOptionError(f"unknown param group option '{name}'.{hint}")
        if hint := did_you_mean(name, DEFAULTS, cutoff=NEAR):
            logger.log(
                warning_level(),
                "'%s' in a param group is no option, and is carried without effect.%s",
                *(name, hint),
            )
    completed = {**_defaults_of(group.get("algorithm", "muon"), defaults), **group}
    if completed["algorithm"] == "adamw":
        _name_beta1(completed, group)
    validate(completed)
    return completed


def did_you_mean(name: object, names: Iterable[str], *, cutoff: float = 0.6) -> str:
    """A hint at the one of some names that was probably meant; empty if none was."""
    known = list(names)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=cutoff)
    meant = near[0] if near else ALSO_KNOWN_AS.get(str(name), "")
    return f" Did you mean '{meant}'?" if meant in known else ""


def plain_number(value: Any) -> Any:
    """A number of numpy or the like as Python's own; any other value as it is."""
    if isinstance(value, (bool, int, float, Tensor)):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _name_beta1(completed: dict[str, Any], said: Mapping[str, Any]) -> None:
    """See Note [Momentum of AdamW]. Raises GroupOptionError for two different values."""
    if "momentum" not in said:
        betas = completed["betas"]
        completed["momentum"] = betas[0] if isinstance(betas, (tuple, list)) and betas else None
    elif "betas" not in said:
        completed["betas"] = (said["momentum"], ADAMW_DEFAULTS["betas"][1])
    elif said["momentum"] != said["betas"][0]:
        raise GroupOptionError(
            f"an AdamW group has momentum={said['momentum']!r} and betas={said['betas']!r}; its "
            "momentum is betas[0]. Name one of the two."
        )


def settle_numbers(group: MutableMapping[str, Any], known: float | None) -> float | None:
    """Make numbers Python's own, restore options that were deleted, and see to Note [Momentum of
    AdamW]. Returns the group's beta1; None for Muon.

    `known`: what this returned last.
    """
    for name, value in _defaults_of(group.get("algorithm", "muon"), DEFAULTS).items():
        group.setdefault(name, value)
    for name in ("lr", "weight_decay", "momentum", "eps"):
        group[name] = plain_number(group[name])
    if group["algorithm"] != "adamw" or not _are_numbers(group["betas"], 2):
        return None
    beta1, momentum = group["betas"][0], group["momentum"]
    if beta1 == known and momentum != known:
        group["betas"] = (momentum, *group["betas"][1:])
    else:
        group["momentum"] = beta1
    new: float = group["betas"][0]
    return new


DECLARED = ("matrix", "matrix_axes", "split_sizes", "split_dim")

OF_TORCH = (
    *("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps"),
    *("adjust_lr_fn", "betas"),
)
"""Options that torch's Muon or AdamW has, and so its checkpoints."""

KEPT = tuple(name for name in DEFAULTS if name not in (*OF_TORCH, "algorithm", "format_version"))
"""Options that a group keeps when a checkpoint of torch's Muon or AdamW is loaded."""


def complete_loaded(group: dict[str, Any], known: Mapping[str, Any]) -> None:
    """Fill in, in place, what a checkpoint does not name.

    `known`: the group that is loaded into. It keeps what checkpoints of torch's Muon and AdamW
    cannot say, such as its algorithm, and its own names of parameters and declarations of matrices,
    whatever the checkpoint says of those. What they say and no group of ours holds is left out.
    Raises GroupOptionError for what cannot be done.
    """
    if asked := [name for name in NOT_OFFERED if group.get(name)]:
        raise GroupOptionError(f"the loaded group has {asked[0]}=True, which Muon's AdamW has not")
    for name in (*HINTS, *NOT_OFFERED, "decoupled_weight_decay"):
        group.pop(name, None)
    algorithm = known.get("algorithm", "muon")
    kept = {name: known[name] for name in KEPT if name in known}
    for name, value in {**_defaults_of(algorithm, DEFAULTS), **kept}.items():
        group.setdefault(name, value)
    if known:
        group.update({name: known[name] for name in (*DECLARED, "param_names") if name in known})
    if group["algorithm"] == "adamw" and group["betas"]:
        group["momentum"] = group["betas"][0]


def _defaults_of(algorithm: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    values = {**DEFAULTS, **defaults, "algorithm": algorithm}
    if algorithm == "adamw":
        values |= {**ADAMW_DEFAULTS, "normuon_beta": None, "cautious_weight_decay": False}
    return values


def validate(group: Mapping[str, Any], *, reads_tensors: bool = True) -> None:
    """Raise GroupOptionError for a value out of its range; names the option and the range.

    `reads_tensors`: whether to look at the value of a tensor, which may wait for a device.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise GroupOptionError(f"lr as a tensor must have one element, got {tuple(lr.shape)}")
    for name in ("lr", "weight_decay", "momentum", "eps"):
        value = plain_number(group[name])
        if not isinstance(value, (int, float, Tensor)):
            raise GroupOptionError(
                f"{name} must be a number, got {value!r}, a {type(value).__name__}"
            )
        is_read = reads_tensors or not isinstance(value, Tensor)
        if is_read and not value >= 0:
            raise GroupOptionError(f"{name} must be 0 or more, got {value!r}")
    for name in DEFAULTS:
        OPTIONS[name].check(name, group[name])
    beta = group["normuon_beta"]
    if group["algorithm"] == "adamw" and (beta is not None or group["cautious_weight_decay"]):
        raise GroupOptionError("normuon_beta and cautious_weight_decay are for Muon's groups only")
    declaration_of(group)


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
        and all(isinstance(number, Real) for number in value)
    )


READ_BY_ADAMW = ("algorithm", "lr", "betas", "eps", "weight_decay", "capturable")

READ_BY_MUON = tuple(
    name for name in DEFAULTS if name not in (*DECLARED, "betas", "format_version")
)
"""Options that a step reads; ranks compare these."""


def declares_otherwise(saved: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether a saved group declares matrices, or none, and the live one others."""
    if not saved.keys() >= set(DECLARED):
        return False
    return declaration_of(saved) != declaration_of(group)


def planned_options(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a plan depends on, as it is now; another value needs another plan."""
    names = ("algorithm", "orthogonalizer", *DECLARED)
    return (*(copy(group[name]) for name in names), group["normuon_beta"] is None)


def as_text(group: Mapping[str, Any]) -> str:
    """What a step reads of a group as one line, for ranks to compare."""
    parts = []
    for name in sorted(READ_BY_ADAMW if group["algorithm"] == "adamw" else READ_BY_MUON):
        value: Any = group[name]
        if isinstance(value, list):
            value = tuple(value)
        if isinstance(value, Tensor) and value.numel() == 1:
            stays = group["capturable"] and value.device.type != "cpu"
            value = "a tensor" if stays else float(value)
        parts.append(f"{name}={value!r}")
    try:
        declared = str(declaration_of(group))
    except GroupOptionError as error:  # ranks compare first, and raise after
        declared = str(error)
    return ", ".join([*parts, declared])
