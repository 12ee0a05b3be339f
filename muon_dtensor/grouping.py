"""`group_parameters`: sorts a model's parameters into param groups of Muon and AdamW.

Module classes decide first, then names; never shapes alone.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList

from muon_dtensor.errors import GATHERED, GroupOptionError, PlanError, Problem, shortened
from muon_dtensor.optimizer.options import ADAMW_DEFAULTS, DECLARED, RECOGNIZED
from muon_dtensor.optimizer.parameter_names import (
    EMBEDDING_NAME,
    HEAD_NAME,
    HEAD_PART,
    WRAPPING,
)
from muon_dtensor.recognition import GRANULARITIES, recognized_in
from muon_dtensor.runtime.dtensors import placed
from muon_dtensor.runtime.fsdp1 import FlatSlices
from muon_dtensor.runtime.torch_private import gathered_params, warning_level

logger = logging.getLogger("muon_dtensor")

CLASSES = ("matrix", "embedding", "head", "norm", "bias", "other")
"""Classes of parameters, as `weight_decay` of `group_parameters` names them. "other" holds
everything else that is not a matrix: tokens, tables, gains, depthwise convolutions."""

WITHOUT_DECAY = ("norm", "bias", "other")
"""Classes that do not decay unless `weight_decay` names them, as in GPT-2's and nanoGPT's
training."""

NO_MATRIX = re.compile(
    r"(^|_)(tokens?|table|scales?|scale_inv|gamma|log|latents?|prompts?|mask|freqs?|temperature"
    r"|position_bias|codebooks?|queue|null_kv)$"
    r"|^(A_log|weight_g|cls|class_embedding|pos_emb\w*|\w*pos_embed\w*|rel_pos\w*|time_\w+)$"
)
"""Parameters with two or more tensor dims that no layer multiplies as a matrix: class, register and
mask tokens, relative positions, LayerScale, Mamba's A_log, RWKV's decays, codebooks, scales of
quantized weights, weight_norm's g."""

FUSED_NAME = re.compile(
    r"(^|[._])(w?qkv|Wqkv|qkv_proj|qkv_proj_weight|c_attn|query_key_value|linear_qkv"
    r"|in_proj_weight|in_proj_qkvz|in_proj_ba|in_proj|gate_up_proj|gate_up|w13|w1_w3|linear_fc1"
    r"|fc1_gate_up|weight_[ih]h|weight_[ih]h_l\d+\w*)($|[._])"
)
"""Weights that commonly hold several matrices: query, key, value; gate and up; gates of LSTMs."""

BLOCKS = (("qkv|c_attn|query|in_proj_weight", "q, k, v"), ("gate_up|w13|w1_w3|fc1", "gate, up"))
"""Parts of fused names, and the names of their blocks."""

MAX_HEAD_PROJECTIONS = 2
"""A head has at most a hidden projection and the last one. A module with a head's name and more
projections is a model of its own, such as a GAN's `generator`."""

FOLDED_NAME = re.compile(r"(^|\.)\w*experts\w*$")
"""Names of parameters (not modules) that commonly hold all experts of a layer."""

EXPERTS = re.compile(r"expert", re.IGNORECASE)
"""Classes and names of modules whose 3-D parameters are one matrix per expert."""

MANY = (nn.ModuleList, nn.ModuleDict)
"""Containers of heads, which are not heads themselves."""

DATA_PARALLEL = (DataParallel, DistributedDataParallel)
"""Wrappers that store the model as their attribute `module`."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One parameter and its class: `kind` is one of CLASSES, `options` declare its matrices."""

    fqn: str
    param: nn.Parameter
    shape: tuple[int, ...]
    kind: str
    why: str
    options: dict[str, Any] = field(default_factory=dict)
    is_unknown: bool = False

    @property
    def algorithm(self) -> str:
        return "muon" if self.kind == "matrix" else "adamw"


def group_parameters(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | Mapping[str, float] | None = None,
    adamw: Mapping[str, Any] | None = None,
    rules: Sequence[tuple[str, Mapping[str, Any]]] | Mapping[str, Mapping[str, Any]] = (),
    recognize: bool | str = False,
    show: bool = False,
) -> list[dict[str, Any]]:
    """Return the param groups of a model, for `Muon`.

    Muon gets the weights of Linear layers, of convolutions (flattened to one matrix `o (i k...)`,
    one per group of a grouped convolution), of experts `[e, m, n]`, and other parameters with two
    tensor dims. AdamW gets embeddings, output heads (also tied to an embedding), norms, biases,
    vectors, depthwise convolutions, tokens and tables. AdamW also gets parameters with three or
    more tensor dims of unknown modules, and one warning names these. Parameters without
    requires_grad are left out. A warning names weights that look like several matrices in one
    (wqkv, gate_up_proj, ...) unless a rule declares their matrices.

    Args:
        model: plain, or after parallelize_module and fully_shard, or wrapped by FSDP1, DDP or
            torch.compile. The prefixes that wrappers add to names are removed.
        lr: learning rate of the Muon groups; default: the optimizer's.
        weight_decay: of the Muon groups; or of classes of parameters by name, `{"norm": 0.1}`:
            "matrix", "embedding", "head", "norm", "bias", "other". Default: the optimizer's for
            matrices, that of `adamw` for embeddings and heads, 0 for all other classes.
        adamw: options of the AdamW groups (`lr`, `betas`, `eps`, `weight_decay`). Default:
            `options.ADAMW_DEFAULTS`, independent of `lr`.
        rules: (regex, options) pairs, or a dict of them. The first rule whose regex matches part of
            a parameter's name overrides its options, and with `algorithm` its algorithm. Rules
            declare the matrices of fused weights, `(r"wqkv", {"split_sizes": (q, k, v)})`, and the
            rows of weights stored transposed (GPT-2's Conv1D), `(r"c_fc", {"matrix": "i o -> o
            i"})`. Tokens, tables and parameters of unknown modules go to Muon if a rule declares
            their matrices.
        recognize: declare the matrices of known model families, see `recognition.KNOWN`: True or
            "projections" for one matrix per projection (query, key, value, gate, up), also where a
            weight holds several or is stored transposed; "heads" for one matrix per attention head.
            Rules take precedence. Weights of other models stay as they are.
        show: print a table of all parameters with their algorithm and the reason.

    Returns:
        Groups of (name, parameter) pairs with equal options, in model order.

    Raises:
        GroupOptionError: a rule applies to no parameter, or its pattern is not a valid regex;
            `weight_decay` names an unknown class; `recognize` is none of the above.
        PlanError: flat parameters of FSDP1 (use_orig_params=False), or unsharded ones of FSDP2.
    """
    decays = _decays(weight_decay, adamw or {})
    compiled = [(_regex(n, p), p, o) for n, (p, o) in enumerate(_pairs(rules))]
    granularity = _granularity(recognize)
    entries = list(_classify(model, granularity))
    used: set[int] = set()
    groups: dict[str, dict[str, Any]] = {}
    rows, unknown = [], []
    for entry in entries:
        algorithm, why, options = entry.algorithm, entry.why, dict(entry.options)
        for number, (regex, pattern, overrides) in enumerate(compiled):
            if regex.search(entry.fqn):
                used.add(number)
                if overrides.keys() & {*DECLARED, RECOGNIZED}:
                    options = {}
                    if entry.kind == "other" and len(entry.shape) > 1:
                        algorithm = "muon"
                options.update(overrides)
                algorithm = options.pop("algorithm", algorithm)
                why = f"rule {pattern!r}"
                break
        else:
            unknown += [entry] if entry.is_unknown else []
        base: dict[str, Any]
        if algorithm == "adamw":
            options = {k: v for k, v in options.items() if k not in (*DECLARED, RECOGNIZED)}
            base = dict(adamw or {})
            if entry.kind != "matrix":
                base["weight_decay"] = decays[entry.kind]
        else:
            base = {} if lr is None else {"lr": lr}
            if "matrix" in decays:
                base["weight_decay"] = decays["matrix"]
        merged = {**base, **options, "algorithm": algorithm}
        group = groups.setdefault(repr(sorted(merged.items())), {"params": [], **merged})
        group["params"].append((entry.fqn, entry.param))
        rows.append((entry.fqn, str(list(entry.param.shape)), algorithm, why))
    _check_rules([pattern for _, pattern, _ in compiled], used, entries)
    _warn_of_unknown(unknown)
    _warn_of_undeclared(groups.values())
    if show:
        print(table(rows))
    return list(groups.values())


def _granularity(recognize: bool | str) -> str | None:
    """Return one of GRANULARITIES, or None. Raises GroupOptionError."""
    if isinstance(recognize, str) and recognize in GRANULARITIES:
        return recognize
    if not isinstance(recognize, bool):
        raise GroupOptionError(
            f"recognize must be True, False, {' or '.join(map(repr, GRANULARITIES))}, got "
            f"{recognize!r}"
        )
    return GRANULARITIES[0] if recognize else None


def clean_names(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a model with their names, without the prefixes of wrappers."""
    modules = dict(model.named_modules(remove_duplicate=False))
    # FSDP1 overrides named_parameters: inside summon_full_params it omits the wrappers' names.
    for fqn, param in nn.Module.named_parameters(model):
        yield _Use(modules, fqn).fqn, param


def _pairs(
    rules: Sequence[tuple[str, Mapping[str, Any]]] | Mapping[str, Mapping[str, Any]],
) -> list[tuple[str, Mapping[str, Any]]]:
    return list(rules.items()) if isinstance(rules, Mapping) else list(rules)


def _regex(number: int, pattern: str) -> re.Pattern[str]:
    """Return the compiled pattern. Raises GroupOptionError if it is not a valid regex."""
    try:
        return re.compile(pattern)
    except re.error as error:
        glob = "" if "*" not in pattern else " As a regex, a glob's '*' is '.*'."
        raise GroupOptionError(
            f"the pattern of rule {number}, {pattern!r}, is not a valid regular expression: "
            f"{error}.{glob}"
        ) from error


def _decays(
    weight_decay: float | Mapping[str, float] | None, adamw: Mapping[str, Any]
) -> dict[str, float]:
    """Return the weight decay of each class that does not use the optimizer's."""
    adamw_decay = adamw.get("weight_decay", ADAMW_DEFAULTS["weight_decay"])
    decays = {"embedding": adamw_decay, "head": adamw_decay} | dict.fromkeys(WITHOUT_DECAY, 0.0)
    if isinstance(weight_decay, Mapping):
        if unknown := weight_decay.keys() - set(CLASSES):
            raise GroupOptionError(
                f"weight_decay names {sorted(unknown)}; classes of parameters are "
                f"{', '.join(CLASSES)}"
            )
        return decays | dict(weight_decay)
    return decays if weight_decay is None else {**decays, "matrix": weight_decay}


def _warn_of_unknown(entries: Sequence[_Entry]) -> None:
    """Log parameters with three or more tensor dims of unknown modules."""
    if entries:
        logger.log(
            warning_level(entry.param for entry in entries),
            "%d parameters with three or more tensor dims belong to neither a convolution nor a "
            "module of experts, and go to AdamW: %s. If they hold matrices, declare them: "
            "rules=[(r'%s', {'matrix': 'batch rows cols -> batch rows cols'})].",
            len(entries),
            shortened([entry.fqn for entry in entries]),
            re.escape(entries[0].fqn),
        )


def _warn_of_undeclared(groups: Iterable[Mapping[str, Any]]) -> None:
    """Log weights of Muon whose names look fused and whose matrices no rule declares."""
    for group in groups:
        if group["algorithm"] != "muon" or group.get("split_sizes") or group.get("matrix"):
            continue
        for fqn, param in group["params"]:
            if param.ndim == 2 and FOLDED_NAME.search(fqn):
                logger.log(
                    warning_level([param]),
                    "%s looks like experts folded into two tensor dims and is orthogonalized as "
                    "one matrix. If it holds experts, declare them: rules=[(r'%s', {'matrix': "
                    "'(e m) n -> e m n', 'matrix_axes': {'e': number of experts}})].",
                    *(fqn, fqn.rpartition(".")[2]),
                )
            elif name := FUSED_NAME.search(fqn):
                of_experts = param.ndim == 3
                blocks = next(
                    (text for part, text in BLOCKS if re.search(part, name.group(2))),
                    "sizes of its blocks",
                )
                logger.log(
                    warning_level([param]),
                    "%s looks like several matrices in one and is orthogonalized as one%s. If it "
                    "is fused, declare its blocks: rules=[(r'%s', {'split_sizes': (%s)%s})]; "
                    "if it is not, rules=[(r'%s', {'matrix': '%s'})].",
                    fqn,
                    " per expert" if of_experts else "",
                    name.group(2),
                    blocks,
                    ", 'split_dim': 1 or 2" if of_experts else "",
                    name.group(2),
                    "e rows cols -> e rows cols" if of_experts else "rows cols -> rows cols",
                )


def _check_rules(patterns: Sequence[str], used: set[int], entries: Sequence[_Entry]) -> None:
    fqns = [entry.fqn for entry in entries]
    for number, pattern in enumerate(patterns):
        if number in used:
            continue
        if any(re.search(pattern, fqn) for fqn in fqns):
            raise GroupOptionError(
                f"rule {number}, {pattern!r}, applies to no parameter: earlier rules apply to all "
                "that it matches. Put it before them, or remove it."
            )
        raise GroupOptionError(
            f"rule {number}, {pattern!r}, matches no parameter. Names look like "
            f"{', '.join(fqns[:3])}."
        )


def _classify(model: nn.Module, granularity: str | None) -> Iterator[_Entry]:
    """Yield an entry for each parameter. `granularity`: of recognized matrices; None: of none."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[nn.Parameter, list[str]] = {}
    for fqn, param in model.named_parameters(remove_duplicate=False):
        if param.requires_grad:
            names.setdefault(param, []).append(fqn)
    slices = FlatSlices.of(names)
    _refuse(names, slices)
    for param, param_fqns in names.items():
        # A tied parameter goes to AdamW if any of its uses does.
        shape = slices.shape_of(param) or tuple(param.shape)
        uses = [_Use(modules, fqn).entry(param, shape, granularity) for fqn in param_fqns]
        entry = next((use for use in uses if use.kind != "matrix"), uses[0])
        fqns = [use.fqn for use in uses]
        why = entry.why
        if entry.kind != "matrix" and len(fqns) > 1:
            why += f", tied as {', '.join(fqns[1:])}"
        yield _Entry(fqns[0], param, shape, entry.kind, why, entry.options, entry.is_unknown)


def _refuse(names: Mapping[nn.Parameter, Sequence[str]], slices: FlatSlices) -> None:
    """Raise PlanError for parameters that no optimizer of this package can step."""
    gathered = gathered_params()
    problems = []
    for param, fqns in names.items():
        if refusal := slices.refusal_of(param):
            problems.append(Problem(fqns[0], placed(param), refusal.reason, refusal.remedy))
        elif id(param) in gathered:
            problems.append(Problem(fqns[0], placed(param), *GATHERED))
    if problems:
        raise PlanError(problems, num_params=len(names))


class _Use:
    """One occurrence of a parameter in a model: the modules on its path, and its name in the last.

    The path omits the modules that FSDP1, activation checkpointing, torch.compile and DDP add. A
    parametrized weight belongs to the module that it parametrizes.
    """

    def __init__(self, modules: Mapping[str, nn.Module], fqn: str) -> None:
        path, _, name = fqn.rpartition(".")
        parts = path.split(".") if path else []
        own_names = [name]
        self._name = name
        self._is_gain = name == "weight_g"  # torch.nn.utils.weight_norm
        self._model = module = modules[""]
        self._path: list[tuple[str, nn.Module]] = []
        for depth, part in enumerate(parts, start=1):
            outer, module = module, modules[".".join(parts[:depth])]
            if isinstance(module, ParametrizationList):
                self._path.pop()  # `parametrizations`
                own_names = [*parts[depth - 2 :], name]
                if depth == len(parts):  # `original`, or `original0`, `original1`, of that weight
                    is_weight_norm = type(module[0]).__name__ == "_WeightNorm"
                    self._is_gain = is_weight_norm and name == "original0"
                    self._name = part
                    module = self._path[-1][1] if self._path else self._model
                else:  # a parameter of the parametrization itself
                    module = modules[path]
                break
            if part in WRAPPING or (part == "module" and isinstance(outer, DATA_PARALLEL)):
                self._path[-1:] = [(last, module) for last, _ in self._path[-1:]]
            else:
                self._path.append((part, module))
        self._module = module
        self.fqn = ".".join([*(part for part, _ in self._path), *own_names])

    def entry(self, param: nn.Parameter, shape: tuple[int, ...], granularity: str | None) -> _Entry:
        """Return the entry of the parameter by this use. `shape`: that of the full tensor."""
        kind, why, options, is_unknown = self._kind(shape)
        if granularity and (kind == "matrix" or is_unknown):
            path = [self._model, *(module for _, module in self._path)]
            names = [*(part for part, _ in self._path), self._name]
            if recognized := recognized_in(path, names, shape, granularity):
                kind, why, is_unknown = "matrix", recognized.why, False
                options = dict(recognized.options)
                if options:
                    options[RECOGNIZED] = why
        return _Entry(self.fqn, param, shape, kind, why, options, is_unknown)

    def _kind(self, shape: tuple[int, ...]) -> tuple[str, str, dict[str, Any], bool]:
        module = self._module
        classes = [cls.__name__ for cls in type(module).__mro__]
        if any("Embedding" in name for name in classes) or EMBEDDING_NAME.search(self.fqn):
            return "embedding", "embedding", {}, False
        if any(name.endswith("Norm") or re.search(r"Norm\dd", name) for name in classes):
            return "norm", "norm", {}, False
        if self._name == "bias" or self._name.endswith("_bias"):
            return "bias", "bias", {}, False
        if len(shape) < 2:
            return "other", f"{len(shape)}-D", {}, False
        if self._is_gain or any("LayerScale" in name for name in classes):
            return "other", "gain", {}, False
        if self._is_head():
            return "head", "output head", {}, False
        if isinstance(module, nn.Linear):
            return "matrix", "matrix", {}, False
        if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
            return _of_convolution(module, shape)
        if NO_MATRIX.search(self._name):
            return "other", f"not a matrix, by its name '{self._name}'", {}, False
        if len(shape) == 2:
            return "matrix", "matrix", {}, False
        if len(shape) == 3 and (EXPERTS.search(self.fqn) or any(map(EXPERTS.search, classes))):
            return "matrix", "experts", {}, False
        return "other", f"{len(shape)}-D, of an unknown module", {}, True

    def _is_head(self) -> bool:
        """Whether it belongs to a model's last projection, by the names and classes on its path."""
        for depth, (part, module) in enumerate(self._path):
            if part.isdecimal():
                return False
            if HEAD_PART.search(part) or _is_head_class(module):
                inner = self._path[depth + 1 :]
                root = inner[0][1] if inner and isinstance(module, MANY) else module
                if (
                    isinstance(root, nn.Sequential)
                    or _num_projections(root) <= MAX_HEAD_PROJECTIONS
                ):
                    return self._is_last_below(depth)
        if self._path and self._path[-1][0] == "fc" and self._is_last_of_its_parent():
            return True
        return bool(HEAD_NAME.search(".".join(part for part, _ in self._path)))

    def _is_last_of_its_parent(self) -> bool:
        """Whether its module is the last of several with parameters, like a ResNet's `fc`."""
        parent = self._path[-2][1] if len(self._path) > 1 else self._model
        children = [c for c in parent.children() if next(c.parameters(), None) is not None]
        return len(children) > 1 and children[-1] is self._path[-1][1]

    def _is_last_below(self, depth: int) -> bool:
        """Whether no projection follows it in the Sequentials of a head."""
        below = zip(self._path[depth:], self._path[depth + 1 :], strict=False)
        for (_, container), (_, inner) in below:
            if isinstance(container, nn.Sequential):
                children = list(container.children())
                indices = [n for n, child in enumerate(children) if inner in child.modules()]
                later = (m for child in children[indices[0] + 1 :] for m in child.modules())
                if any(isinstance(m, (nn.Linear, *CONVOLUTIONS)) for m in later):
                    return False
        return True


def _num_projections(module: nn.Module) -> int:
    return sum(isinstance(m, (nn.Linear, *CONVOLUTIONS)) for m in module.modules())


def _is_head_class(module: nn.Module | None) -> bool:
    name = "" if module is None else type(module).__name__
    return name.endswith(("Head", "Heads")) and not name.startswith(("Multi", "Attention"))


def _of_convolution(
    module: nn.Module, shape: tuple[int, ...]
) -> tuple[str, str, dict[str, Any], bool]:
    """Return kind, reason, options and False for a convolution's weight.

    The weight is [out, in / groups, k...], or transposed [in, out / groups, k...]. It holds one
    matrix per group, with the kernel flattened into the columns (Jordan 2024,
    https://kellerjordan.github.io/posts/muon/, on convolutional filters).
    """
    groups: int = module.groups  # type: ignore[assignment]
    kernel = " ".join(f"k{index}" for index in range(len(shape) - 2))
    if groups == 1:
        return "matrix", "convolution", {"matrix": f"o i {kernel} -> o (i {kernel})"}, False
    if shape[1] == 1:
        return "other", "depthwise convolution", {}, False
    options = {
        "matrix": f"(g o) i {kernel} -> g o (i {kernel})",
        "matrix_axes": {"g": groups},
    }
    return "matrix", f"convolution in {groups} groups", options, False


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows of text in aligned columns, under a heading."""
    rows = [("parameter", "shape", "algorithm", "why"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
