"""The options of `Muon` and of its param groups: names, defaults, allowed values, checks.

Values in groups are plain Python values, so that checkpoints can hold them.

Note [Momentum of AdamW]
    torch's OneCycleLR and CyclicLR write `betas` into every group if the optimizer's defaults have
    `betas`, and otherwise `momentum`. Muon's defaults have `momentum`. In an AdamW group `momentum`
    is therefore an alias of betas[0]. The one that was written since the last step is copied to the
    other. Checkpoints hold both, equal.
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

from muon_dtensor.algorithms import ORTHOGONALIZERS, PRESETS
from muon_dtensor.algorithms.kernels import KERNELS
from muon_dtensor.algorithms.newton_schulz import EPS, KELLER_JORDAN, NUM_ITERATIONS
from muon_dtensor.algorithms.quantized import BITS
from muon_dtensor.algorithms.rounding import ROUNDINGS
from muon_dtensor.algorithms.update import ADJUST_LR_FNS
from muon_dtensor.errors import GroupOptionError
from muon_dtensor.layout.declarations import Declaration
from muon_dtensor.planning.plan import STRATEGIES
from muon_dtensor.runtime.torch_private import warning_level

logger = logging.getLogger("muon_dtensor")

ALGORITHMS = ("muon", "adamw")

MAX_ITERATIONS = 99
"""torch.optim.Muon raises for 100 or more."""

FORMAT_VERSION = 1
"""Version of state dicts. It is stored in param groups, which every way of saving preserves."""

Check = Callable[[str, Any], None]
"""(name, value): raises GroupOptionError, with name and range, if the value is out of range."""


def one_of(*allowed: object) -> Check:
    """Return a check for one of some values."""

    def check(name: str, value: object) -> None:
        if value not in allowed:
            expected = ", ".join(map(str, allowed))
            raise GroupOptionError(f"{name} must be one of {expected}, got {value}")

    return check


def boolean(name: str, value: object) -> None:
    """Check for True or False."""
    if type(value) is not bool:
        raise GroupOptionError(f"{name} must be True or False, got {value!r}")


def checked_elsewhere(name: str, value: object) -> None:
    """Accept any value. It is checked together with other options, or by the planner."""


def numbers(count: int) -> Check:
    """Return a check for a tuple or list of `count` numbers."""

    def check(name: str, value: object) -> None:
        if not _are_numbers(value, count):
            word = {2: "two", 3: "three"}[count]
            raise GroupOptionError(f"{name} must be {word} numbers, got {value}")

    return check


def _normuon_beta(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, (int, float)) and 0 <= value < 1):
        raise GroupOptionError(f"{name} must be None or in [0, 1), got {value!r}")


def _ns_steps(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_ITERATIONS:
        raise GroupOptionError(f"{name} must be an integer in 0..{MAX_ITERATIONS}, got {value}")


def _orthogonalizer(name: str, value: Any) -> None:
    if value not in ORTHOGONALIZERS:
        raise GroupOptionError(
            f"{name} must be one of {', '.join(ORTHOGONALIZERS)}, got {value!r}. Pass a callable "
            "to the constructor"
        )


def _format_version(name: str, value: Any) -> None:
    if value != FORMAT_VERSION:
        raise GroupOptionError(
            f"{name} must be {FORMAT_VERSION}, got {value!r}: another release of muon_dtensor "
            "wrote this checkpoint; load it with that release"
        )


def _betas(name: str, value: Any) -> None:
    if not _are_numbers(value, 2) or not all(0 <= beta < 1 for beta in value):
        raise GroupOptionError(f"{name} must be two numbers in [0, 1), got {value}")


def _bucket_mb(name: str, value: Any) -> None:
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise GroupOptionError(f"{name} must be a number above 0, got {value!r}")


def _count_of_steps(name: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value < 2**32:
        raise GroupOptionError(f"{name} must be an integer in 0..2^32 - 1, got {value!r}")


def _metrics_every(name: str, value: Any) -> None:
    if type(value) is not int or value < 0:
        raise GroupOptionError(f"{name} must be a number of steps, 0 or more, got {value!r}")


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    `type`: the type of its value in config files and on command lines; None if they cannot set it.
    `check`: raises GroupOptionError for a value out of range. `in_groups`: a param group can have a
    value of its own. `in_constructor`: it is a keyword of `Muon`, whose docstring describes it.
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
        # Options of torch.optim.Muon, with its defaults. validate() checks the range of numbers.
        _group("lr", 1e-3, float, checked_elsewhere),
        _group("weight_decay", 0.1, float, checked_elsewhere),
        _group("momentum", 0.95, float, checked_elsewhere),
        _group("nesterov", True, bool, boolean),
        _group("ns_coefficients", KELLER_JORDAN, tuple[float, float, float], numbers(3)),
        _group("eps", EPS, float, checked_elsewhere),
        _group("ns_steps", NUM_ITERATIONS, int, _ns_steps),
        _group(
            "adjust_lr_fn",
            None,
            Literal[*filter(None, ADJUST_LR_FNS)] | None,
            one_of(*ADJUST_LR_FNS),
        ),
        # Options of param groups only.
        _group("algorithm", "muon", None, one_of(*ALGORITHMS), in_constructor=False),
        _group("betas", (0.9, 0.95), None, _betas, in_constructor=False),
        _group("matrix", None, None, checked_elsewhere, in_constructor=False),
        _group("matrix_axes", None, None, checked_elsewhere, in_constructor=False),
        _group("split_sizes", None, None, checked_elsewhere, in_constructor=False),
        _group("split_dim", 0, None, checked_elsewhere, in_constructor=False),
        _group("format_version", FORMAT_VERSION, None, _format_version, in_constructor=False),
        # Options of the constructor and of param groups.
        _group(
            "orthogonalizer",
            "newton_schulz",
            Literal["newton_schulz", *PRESETS],
            _orthogonalizer,
        ),
        _group("capturable", False, bool, boolean),
        _group("normuon_beta", None, float | None, _normuon_beta),
        _group("cautious_weight_decay", False, bool, boolean),
        _group("momentum_bits", None, Literal[8, 4] | None, one_of(*BITS)),
        _group("weight_rounding", "nearest", Literal[*ROUNDINGS], one_of(*ROUNDINGS)),
        _group("rounding_seed", 0, int, _count_of_steps),
        _group("rounding_step", 0, None, _count_of_steps, in_constructor=False),
        # Options of the constructor only.
        Option("ns_dtype", torch.bfloat16, DType, one_of(*_BFLOAT16_OR_FLOAT32)),
        Option("bucket_mb", 256, float, _bucket_mb),
        Option("prefetch_count", None, int | None, checked_elsewhere),
        Option("batched", None, bool | None, checked_elsewhere),
        Option("missing_grad", "raise", Literal["raise", "zero"], one_of("raise", "zero")),
        Option(
            "nonfinite",
            "raise",
            Literal["raise", "skip", "propagate"],
            one_of("raise", "skip", "propagate"),
        ),
        Option("strategy", "auto", Literal[STRATEGIES], checked_elsewhere),
        Option("exact", True, bool, checked_elsewhere),
        Option("topology", None, str | None, checked_elsewhere),
        Option("momentum_dtype", None, DType | None, one_of(None, *_BFLOAT16_OR_FLOAT32)),
        Option("offload_momentum", False, bool, boolean),
        Option("shard_momentum", False, bool, boolean),
        Option("compile", False, bool, boolean),
        Option("kernels", "torch", Literal[KERNELS], checked_elsewhere),
        Option("metrics_every", 0, int, _metrics_every),
        Option("trace", False, bool, checked_elsewhere),
        Option("async_gpu_parallelism", None, bool | None, checked_elsewhere),
        Option("check_replicas", True, bool, boolean),
        Option("deferred_checks", None, bool | None, one_of(None, True, False)),
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
"""Defaults of AdamW groups, independent of the constructor's arguments.

The constructor's `lr`, `weight_decay` and `eps` are Muon's, whose learning rates do not suit AdamW.
The values are GPT-3's (Brown et al. 2020, arXiv:2005.14165): betas, eps and decay of its appendix
B, the learning rate of its model of 350 million parameters (table 2.1).
"""

TORCH_KEYS = {
    *("params", "param_names", "initial_lr", "max_lr", "min_lr", "swa_lr", "base_lr"),
    *("base_momentum", "max_momentum"),
}
"""Keys that torch's Optimizer, schedulers and averaging write into a group."""

ALIASES = {
    "learning_rate": "lr",
    "learning-rate": "lr",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "mu": "momentum",
    "beta": "momentum",
    "num_iterations": "ns_steps",
    "epsilon": "eps",
}
"""Names of options in other packages, with ours; for suggestions in messages."""

MISSPELLING_CUTOFF = 0.82
"""Least difflib ratio at which an unknown key counts as a misspelled option: `weight_decy` and
`momentun` do, `max_momentum` and `lr_scale` do not."""

IMPLEMENTATION_FLAGS = {"foreach", "fused"}
"""Flags of torch's optimizers that frameworks write into any group. They are removed."""

UNSUPPORTED_FLAGS = ("amsgrad", "maximize", "differentiable")
"""Flags of torch's AdamW in checkpoints. A group that sets one of them is rejected."""


def complete(
    group: Mapping[str, Any], defaults: Mapping[str, Any], *, strict: bool = False
) -> dict[str, Any]:
    """Return a new group with every option and without `IMPLEMENTATION_FLAGS`.

    The defaults of an AdamW group are `ADAMW_DEFAULTS`. Unknown keys are kept, as torch keeps them.
    A warning names those that look like a misspelled option.

    Args:
        group: the options that the user sets.
        defaults: of the constructor.
        strict: whether unknown keys raise, as in a config file of this package.

    Raises:
        GroupOptionError: a value is out of range; or with `strict` a key is unknown.
    """
    group = {
        name: plain_number(value)
        for name, value in group.items()
        if name not in IMPLEMENTATION_FLAGS
    }
    for name in sorted(group.keys() - DEFAULTS.keys() - TORCH_KEYS):
        if strict:
            hint = did_you_mean(name, DEFAULTS) or f" Options are {', '.join(DEFAULTS)}."
            raise GroupOptionError(f"unknown param group option '{name}'.{hint}")
        if hint := did_you_mean(name, DEFAULTS, cutoff=MISSPELLING_CUTOFF):
            logger.log(
                warning_level(),
                "'%s' in a param group is not an option and has no effect.%s",
                *(name, hint),
            )
    completed = {**_defaults_of(group.get("algorithm", "muon"), defaults), **group}
    if completed["algorithm"] == "adamw":
        _alias_beta1(completed, group)
    validate(completed)
    return completed


def did_you_mean(name: object, names: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return a suggestion of the most similar of some names; empty if none is similar."""
    candidates = list(names)
    matches = difflib.get_close_matches(str(name), candidates, n=1, cutoff=cutoff)
    suggestion = matches[0] if matches else ALIASES.get(str(name), "")
    return f" Did you mean '{suggestion}'?" if suggestion in candidates else ""


def plain_number(value: Any) -> Any:
    """Return a number, e.g. of numpy, as int or float; any other value unchanged."""
    if isinstance(value, (bool, int, float, Tensor)):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _alias_beta1(completed: dict[str, Any], group: Mapping[str, Any]) -> None:
    """Make momentum and betas[0] equal, see Note [Momentum of AdamW].

    `group`: the options that the user sets. Raises GroupOptionError if it has both, and they
    differ.
    """
    if "momentum" not in group:
        betas = completed["betas"]
        completed["momentum"] = betas[0] if isinstance(betas, (tuple, list)) and betas else None
    elif "betas" not in group:
        completed["betas"] = (group["momentum"], ADAMW_DEFAULTS["betas"][1])
    elif group["momentum"] != group["betas"][0]:
        raise GroupOptionError(
            f"an AdamW group has momentum={group['momentum']!r} and betas={group['betas']!r}; its "
            "momentum is betas[0]. Set only one of the two."
        )


def normalize_numbers(group: MutableMapping[str, Any], last_beta1: float | None) -> float | None:
    """Convert a group's numbers to int or float, and restore deleted options.

    Makes momentum and betas[0] equal, see Note [Momentum of AdamW]. Returns the group's beta1; None
    for Muon. `last_beta1`: the previous result for this group.
    """
    for name, value in _defaults_of(group.get("algorithm", "muon"), DEFAULTS).items():
        group.setdefault(name, value)
    for name in ("lr", "weight_decay", "momentum", "eps"):
        group[name] = plain_number(group[name])
    if group["algorithm"] != "adamw" or not _are_numbers(group["betas"], 2):
        return None
    beta1, momentum = group["betas"][0], group["momentum"]
    if beta1 == last_beta1 and momentum != last_beta1:
        group["betas"] = (momentum, *group["betas"][1:])
    else:
        group["momentum"] = beta1
    new: float = group["betas"][0]
    return new


DECLARED = ("matrix", "matrix_axes", "split_sizes", "split_dim")
"""Options that declare matrices."""

RECOGNIZED = "recognized"
"""Key of a group: what `group_parameters` recognized in its parameters. Text for the plan."""

TORCH_OPTIONS = (
    *("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps"),
    *("adjust_lr_fn", "betas"),
)
"""Options of torch's Muon or AdamW, which their checkpoints hold."""

OWN_OPTIONS = tuple(
    name for name in DEFAULTS if name not in (*TORCH_OPTIONS, "algorithm", "format_version")
)
"""Options that loading a checkpoint of torch's Muon or AdamW does not change."""


def complete_loaded(group: dict[str, Any], live: Mapping[str, Any]) -> None:
    """Add, in place, the options that a loaded group lacks.

    `live`: the group of the optimizer before loading. Options that checkpoints of torch's Muon and
    AdamW do not have, such as the algorithm, are taken from it. Names of parameters and
    declarations of matrices are always taken from it. torch's flags that no group of this package
    has are removed. Raises GroupOptionError for an unsupported flag.
    """
    if unsupported := [name for name in UNSUPPORTED_FLAGS if group.get(name)]:
        raise GroupOptionError(
            f"the loaded group has {unsupported[0]}=True, which Muon's AdamW does not support"
        )
    for name in (*IMPLEMENTATION_FLAGS, *UNSUPPORTED_FLAGS, "decoupled_weight_decay"):
        group.pop(name, None)
    algorithm = live.get("algorithm", "muon")
    own_options = {name: live[name] for name in OWN_OPTIONS if name in live}
    for name, value in {**_defaults_of(algorithm, DEFAULTS), **own_options}.items():
        group.setdefault(name, value)
    if live:
        group.pop(RECOGNIZED, None)
        of_live = (*DECLARED, RECOGNIZED, "param_names")
        group.update({name: live[name] for name in of_live if name in live})
    if group["algorithm"] == "adamw" and group["betas"]:
        group["momentum"] = group["betas"][0]


OF_MUON_ONLY = ("normuon_beta", "cautious_weight_decay", "weight_rounding", "momentum_bits")
"""Options that a group of AdamW cannot have."""


def _defaults_of(algorithm: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    values = {**DEFAULTS, **defaults, "algorithm": algorithm}
    if algorithm == "adamw":
        values |= {**ADAMW_DEFAULTS, **{name: DEFAULTS[name] for name in OF_MUON_ONLY}}
    return values


def validate(group: Mapping[str, Any], *, reads_tensors: bool = True) -> None:
    """Raise GroupOptionError, with name and range, if an option is out of range.

    `reads_tensors`: whether to check the values of tensors, which may wait for a device.
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
    if group["algorithm"] == "adamw" and any(group[n] != DEFAULTS[n] for n in OF_MUON_ONLY):
        raise GroupOptionError(f"{', '.join(OF_MUON_ONLY)} are for Muon's groups only")
    if group["capturable"] and group["weight_rounding"] == "stochastic":
        raise GroupOptionError(
            "weight_rounding='stochastic' counts steps on the host, which a CUDA graph repeats: "
            "use 'compensated' with capturable=True"
        )
    declaration_of(group)


def declaration_of(group: Mapping[str, Any]) -> Declaration:
    """Return a group's declaration of matrices. Raises GroupOptionError for wrong types."""
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
    if type(split_dim) not in (int, str):
        raise GroupOptionError(
            f"split_dim must be a tensor dim or the name of an axis of matrix, got {split_dim!r}"
        )
    if split_dim != 0 and sizes is None:
        raise GroupOptionError(f"split_dim={split_dim!r} has no effect without split_sizes")
    if isinstance(split_dim, str) and None in patterns:
        raise GroupOptionError(
            f"split_dim={split_dim!r} names an axis, so each block needs a pattern in matrix"
        )
    texts = [p for p in patterns if p is not None]
    if unused := [
        n for n in axes or {} if not any(re.search(rf"\b{re.escape(n)}\b", p) for p in texts)
    ]:
        raise GroupOptionError(f"matrix_axes names {unused}, which no pattern in matrix has")
    if isinstance(pattern, (tuple, list)):
        if sizes is None:
            raise GroupOptionError(
                "several patterns in matrix need split_sizes, one block for each pattern"
            )
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
"""Options that a step reads. Ranks compare these."""


def declarations_differ(saved: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether a saved group has options that declare matrices, and the live ones differ."""
    if not saved.keys() >= set(DECLARED):
        return False
    return declaration_of(saved) != declaration_of(group)


def planned_options(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the options of a group that its plan depends on. If they change, so does the plan."""
    names = ("algorithm", "orthogonalizer", *DECLARED)
    state = (group["normuon_beta"] is None, group["weight_rounding"], group["momentum_bits"])
    return (*(copy(group[name]) for name in names), *state)


def as_text(group: Mapping[str, Any]) -> str:
    """Return the options that a step reads from a group as one line, for ranks to compare."""
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
    except GroupOptionError as error:  # ranks compare texts first, and raise afterwards
        declared = str(error)
    return ", ".join([*parts, declared])
