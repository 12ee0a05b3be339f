"""Which parameter of a model belongs to which algorithm.

Module classes and names decide, never shapes alone. Builds param groups; plans nothing.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from muon_dtensor.errors import GroupOptionError
from muon_dtensor.runtime.describe import FlatSlices

logger = logging.getLogger("muon_dtensor")

EMBEDDING_NAME = re.compile(
    r"(^|[._])(embed|embeds|embedding|embeddings|wte|wpe|vocab)($|[._])", re.IGNORECASE
)
HEAD_NAME = re.compile(
    r"(^|[._])(head|heads|output|classifier|score|unembed|unembedding|logits|proj_out)$",
    re.IGNORECASE,
)
"""Names of a model's last projection. Only outside numbered layers: a layer's own `output` or
`head` is a hidden matrix."""


FUSED_NAME = re.compile(
    r"(^|[._])(wqkv|qkv|qkv_proj|c_attn|in_proj_weight|query_key_value)($|[._])"
)
"""Weights that commonly hold the query, key and value matrices of attention in one."""

FOLDED_NAME = re.compile(r"(^|\.)\w*experts\w*$")
"""Parameters (not modules) that commonly hold all experts of a layer."""

WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""What FSDP1, activation checkpointing and torch.compile put into the names of what they wrap."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One parameter and where it goes."""

    fqn: str
    param: nn.Parameter
    algorithm: str
    why: str


def group_parameters(
    model: nn.Module,
    *,
    lr: float | None = None,
    adamw: Mapping[str, Any] | None = None,
    rules: Sequence[tuple[str, Mapping[str, Any]]] = (),
    show: bool = False,
) -> list[dict[str, Any]]:
    """Param groups of a whole model, for `Muon`.

    Embeddings, output heads (also tied to an embedding), norms, biases and all with fewer than
    two dims go to AdamW, the rest to Muon. Parameters without requires_grad are left out. Weights
    whose names say that they are fused (wqkv, c_attn, ...) are told in a warning unless a rule
    declares their matrices.

    Args:
        model: plain, or after parallelize_module and fully_shard, or wrapped by FSDP1, DDP or
            torch.compile; what wrappers put into names is left out.
        lr: learning rate of the Muon groups; default: the optimizer's.
        adamw: options of the AdamW groups (`lr`, `betas`, `eps`, `weight_decay`).
        rules: (regex, options) pairs; the first whose regex is found in a parameter's name
            overrides its options, and with `algorithm` its algorithm. So fused weights declare
            their matrices, `(r"wqkv", {"split_sizes": (q, k, v)})`, and weights stored transposed
            (GPT-2's Conv1D) their rows, `(r"c_fc", {"matrix": "i o -> o i"})`.
        show: print a table of all parameters, where they go and why.

    Returns:
        Groups of (name, parameter) pairs with equal options, in model order.

    Raises:
        GroupOptionError: a rule that no parameter takes.
    """
    entries = list(_classify(model))
    used: set[int] = set()
    groups: dict[str, dict[str, Any]] = {}
    rows = []
    for entry in entries:
        algorithm, why, options = entry.algorithm, entry.why, {}
        for number, (pattern, overrides) in enumerate(rules):
            if re.search(pattern, entry.fqn):
                used.add(number)
                options = dict(overrides)
                algorithm = options.pop("algorithm", algorithm)
                why = f"rule {pattern!r}"
                break
        base: dict[str, Any] = {} if lr is None else {"lr": lr}
        if algorithm == "adamw":
            base.update(adamw or {})
        merged = {**base, **options, "algorithm": algorithm}
        group = groups.setdefault(repr(sorted(merged.items())), {"params": [], **merged})
        group["params"].append((entry.fqn, entry.param))
        rows.append((entry.fqn, str(list(entry.param.shape)), algorithm, why))
    _check_rules(rules, used, [entry.fqn for entry in entries])
    _tell_of_undeclared(groups.values())
    if show:
        print(table(rows))
    return list(groups.values())


def _tell_of_undeclared(groups: Iterable[Mapping[str, Any]]) -> None:
    """Log a warning for weights of Muon that look fused, and that no rule has split."""
    for group in groups:
        if group["algorithm"] != "muon" or group.get("split_sizes") or group.get("matrix"):
            continue
        for fqn, param in group["params"]:
            if param.ndim == 2 and FOLDED_NAME.search(fqn):
                logger.warning(
                    "%s looks like experts folded into two tensor dims and is orthogonalized as "
                    "one matrix. If it is, say so: rules=[(r'%s', {'matrix': '(e m) n -> e m n', "
                    "'matrix_axes': {'e': number of experts}})].",
                    *(fqn, fqn.rpartition(".")[2]),
                )
            elif name := FUSED_NAME.search(fqn):
                logger.warning(
                    "%s looks like several matrices in one and is orthogonalized as one. If it is "
                    "fused, say so: rules=[(r'%s', {'split_sizes': (q, k, v)})]; if it is not, "
                    "rules=[(r'%s', {'matrix': 'rows cols -> rows cols'})].",
                    *(fqn, name.group(2), name.group(2)),
                )


def _check_rules(
    rules: Sequence[tuple[str, Mapping[str, Any]]], used: set[int], fqns: Sequence[str]
) -> None:
    for number, (pattern, _) in enumerate(rules):
        if number in used:
            continue
        if any(re.search(pattern, fqn) for fqn in fqns):
            raise GroupOptionError(
                f"rule {number}, {pattern!r}, takes no parameter: earlier rules take all that it "
                "matches. Put it before them, or leave it out."
            )
        raise GroupOptionError(
            f"rule {number}, {pattern!r}, matches no parameter. Names look like "
            f"{', '.join(fqns[:3])}."
        )


def _classify(model: nn.Module) -> Iterator[_Entry]:
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[nn.Parameter, list[str]] = {}
    for fqn, param in model.named_parameters(remove_duplicate=False):
        if param.requires_grad:
            names.setdefault(param, []).append(fqn)
    slices = FlatSlices.of(names)
    for param, found in names.items():
        # A tied parameter goes where the most particular of its uses sends it.
        ndim = len(slices.shape_of(param) or param.shape)
        reasons = [_reason_for_adamw(modules[fqn.rpartition(".")[0]], fqn, ndim) for fqn in found]
        fqns = [WRAPPERS.sub("", fqn) for fqn in found]
        why = next((reason for reason in reasons if reason), "")
        if why and len(fqns) > 1:
            why += f", tied as {', '.join(fqns[1:])}"
        yield _Entry(fqns[0], param, "adamw" if why else "muon", why or "matrix")


def _reason_for_adamw(module: nn.Module, fqn: str, ndim: int) -> str:
    """Why a parameter of this module is not for Muon; empty if it is."""
    path, _, name = WRAPPERS.sub("", fqn).rpartition(".")
    classes = [cls.__name__ for cls in type(module).__mro__]
    in_layers = any(part.isdecimal() for part in path.split("."))
    if any("Embedding" in cls for cls in classes) or EMBEDDING_NAME.search(fqn):
        return "embedding"
    if any(cls.endswith("Norm") or "Norm1d" in cls or "Norm2d" in cls for cls in classes):
        return "norm"
    if not in_layers and HEAD_NAME.search(path):
        return "output head"
    if name == "bias" or name.endswith("_bias"):
        return "bias"
    return f"{ndim}-D" if ndim < 2 else ""


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of text in aligned columns, under a heading."""
    rows = [("parameter", "shape", "algorithm", "why"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
