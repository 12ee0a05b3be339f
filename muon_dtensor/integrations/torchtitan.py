"""Muon inside torchtitan (0.3): its optimizers container, a config in one line, an override.

    config.optimizer = muon_optimizers(lr=0.02, adamw={"lr": 3e-4})

or, for any of its recipes, without an edit:

    --override.imports muon_dtensor.integrations.torchtitan.use_muon
"""

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.config import override

from muon_dtensor.errors import GroupOptionError
from muon_dtensor.grouping import group_parameters
from muon_dtensor.optimizer.muon import Muon
from muon_dtensor.optimizer.options import ADAMW_DEFAULTS, DEFAULTS
from muon_dtensor.runtime.torch_private import warning_level

logger = logging.getLogger("muon_dtensor")

NAME = "Muon"
"""`optimizer_name` of a `ParamGroupConfig` that this package steps."""

ADAMW_PATTERN = r"(^|\.)(tok_embeddings|embed\w*|lm_head|output|head)\.|norm|(^|\.|_)bias$"
"""Embeddings, output heads, norms and biases, by the names that torchtitan's models give them."""


class MuonMixin:
    """Teaches an OptimizersContainer of torchtitan, or of its torchft, the optimizer "Muon".

    Put it before the container: `class C(MuonMixin, TorchFTOptimizersContainer)`, with a nested
    `Config` derived from that container's.
    """

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        if name == NAME:
            return Muon
        factory: Callable[..., Optimizer] = OptimizersContainer._resolve_optimizer_factory(name)
        return factory

    @staticmethod
    def _build_param_groups(
        model: nn.Module,
        param_group_configs: list[ParamGroupConfig],
        impl_kwargs: dict[str, Any],
    ) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[str]]]:
        """torchtitan's groups, with what is no matrix given to AdamW.

        A pattern that takes no parameter of this model part is left out with a warning: a pipeline
        stage may have no embedding. What no pattern sends to AdamW and is an embedding, a norm, a
        bias or less than a matrix goes to the first AdamW group of "Muon".
        """
        here = _taking(param_group_configs, [name for name, _ in _trainable(model)])
        groups, patterns = OptimizersContainer._build_param_groups(model, here, impl_kwargs)
        if NAME in groups:
            groups[NAME], patterns[NAME] = _sorted_out(
                model, groups[NAME], patterns[NAME], param_group_configs
            )
        return groups, patterns


class MuonOptimizersContainer(MuonMixin, OptimizersContainer):
    """torchtitan's container, in which a `ParamGroupConfig` may name the optimizer "Muon".

    Its `optimizer_kwargs` are options of a param group of `muon_dtensor.Muon`; what is said once
    for the optimizer goes into `optimizer_factory_kwargs_by_name["Muon"]`. All groups of "Muon" of
    a model part are one optimizer, so there is one scheduler, and one entry in its checkpoints.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """torchtitan's, whose `build` makes this container."""


def muon_optimizers(
    lr: float = DEFAULTS["lr"],
    *,
    adamw: Mapping[str, Any] | None = None,
    splits: Mapping[str, Mapping[str, Any]] | None = None,
    param_groups: Sequence[ParamGroupConfig] = (),
    weight_decay: float = DEFAULTS["weight_decay"],
    adjust_lr_fn: str | None = "match_rms_adamw",
    **options: Any,
) -> MuonOptimizersContainer.Config:
    """The optimizer config of a torchtitan recipe: hidden matrices to Muon, the rest to AdamW.

    Args:
        lr: of the Muon groups.
        adamw: `lr`, `betas`, `eps`, `weight_decay` of the AdamW group; default:
            `options.ADAMW_DEFAULTS`.
        splits: which matrices a weight holds, by regex of its name: `{"wqkv": {"matrix":
            "(head dim) model -> head dim model", "matrix_axes": {"dim": 128}}}` for torchtitan's
            fused attention. Any option of a group may be said here.
        param_groups: torchtitan's own, before all others; they may name other optimizers.
        weight_decay: of the Muon groups.
        adjust_lr_fn: of the Muon groups; by default updates are as large as AdamW's (Liu et al.
            2025, arXiv:2502.16982).
        **options: of the Muon groups (`momentum`, `nesterov`, `orthogonalizer`, ...) or of the
            optimizer (`nonfinite`, `bucket_mb`, `metrics_every`, ...).

    Raises:
        GroupOptionError: from `build`, for options that are unknown or out of range.
    """
    of_groups = {name: value for name, value in options.items() if name in DEFAULTS}
    of_all = {name: value for name, value in options.items() if name not in DEFAULTS}
    muon = {"lr": lr, "weight_decay": weight_decay, "adjust_lr_fn": adjust_lr_fn, **of_groups}
    groups = list(param_groups)
    for pattern, declared in (splits or {}).items():
        groups.append(_group(pattern, {**muon, **declared}))
    adamw_options = {**ADAMW_DEFAULTS, **(adamw or {}), "algorithm": "adamw"}
    groups.append(_group(ADAMW_PATTERN, adamw_options))
    groups.append(_group(".*", muon))
    return MuonOptimizersContainer.Config(
        param_groups=groups,
        implementation="for-loop",
        optimizer_factory_kwargs_by_name={NAME: of_all} if of_all else {},
    )


@override(target=OptimizersContainer.Config, description="hidden matrices to muon_dtensor.Muon")
def use_muon(config: OptimizersContainer.Config, **options: Any) -> MuonOptimizersContainer.Config:
    """Any recipe's optimizer with Muon for its hidden matrices.

    Its catch-all AdamW group keeps its options, for what is no matrix. `options`: those of
    `muon_optimizers`, after `=` as JSON:
    `--override.imports 'muon_dtensor.integrations.torchtitan.use_muon={"lr": 0.02}'`.

    Raises:
        GroupOptionError: the recipe has no AdamW group to take over.
    """
    known = [group for group in config.param_groups if group.optimizer_name == "AdamW"]
    if not known:
        raise GroupOptionError("use_muon takes over a recipe's AdamW group, and this one has none")
    hints = ("fused", "foreach")
    adamw = {k: v for k, v in known[-1].optimizer_kwargs.items() if k not in hints}
    return muon_optimizers(**{"adamw": {**adamw, **options.pop("adamw", {})}, **options})


def _group(pattern: str, options: dict[str, Any]) -> ParamGroupConfig:
    return ParamGroupConfig(pattern=pattern, optimizer_name=NAME, optimizer_kwargs=options)


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def _taking(configs: Sequence[ParamGroupConfig], names: Sequence[str]) -> list[ParamGroupConfig]:
    """Those of the configs that get a parameter, where the first match wins."""
    taken: set[str] = set()
    found = []
    for config in configs:
        mine = {name for name in names if name not in taken and re.search(config.pattern, name)}
        if mine:
            found.append(config)
        else:
            logger.log(
                warning_level(),
                "no parameter of this model part is left for the pattern %r of param_groups",
                config.pattern,
            )
        taken |= mine
    return found


def _sorted_out(
    model: nn.Module,
    groups: Sequence[dict[str, Any]],
    patterns: Sequence[str],
    configs: Sequence[ParamGroupConfig],
) -> tuple[list[dict[str, Any]], list[str]]:
    """The groups of Muon with all that is no matrix in an AdamW group; and their patterns."""
    declared = [
        ("^(" + "|".join(map(re.escape, group["param_names"])) + ")$", {"matrix": "as declared"})
        for group in groups
        if group.get("matrix") or group.get("split_sizes")
    ]
    no_matrix = {
        id(param)
        for group in group_parameters(model, rules=declared)  # warns of what is undeclared
        if group["algorithm"] == "adamw"
        for _, param in group["params"]
    }
    moved: dict[str, list[Any]] = defaultdict(list)
    kept: list[tuple[dict[str, Any], str]] = []
    for group, pattern in zip(groups, patterns, strict=True):
        is_muon = group.get("algorithm", "muon") == "muon"
        declares = group.get("matrix") or group.get("split_sizes")
        pairs = list(zip(group["params"], group["param_names"], strict=True))
        away = [pair for pair in pairs if is_muon and not declares and id(pair[0]) in no_matrix]
        stays = [pair for pair in pairs if not any(pair is other for other in away)]
        for param, name in away:
            moved["params"].append(param)
            moved["param_names"].append(name)
        if stays:
            params, names = zip(*stays, strict=True)
            kept.append(({**group, "params": [*params], "param_names": [*names]}, pattern))
    if moved:
        adamw = next((g for g, _ in kept if g.get("algorithm") == "adamw"), None)
        if adamw is None:
            said = [c for c in configs if c.optimizer_kwargs.get("algorithm") == "adamw"]
            options = cast(dict[str, Any], said[0].optimizer_kwargs if said else ADAMW_DEFAULTS)
            adamw = {"params": [], "param_names": [], **options, "algorithm": "adamw"}
            kept.append((adamw, "no matrices"))
        adamw["params"] += moved["params"]
        adamw["param_names"] += moved["param_names"]
    return [group for group, _ in kept], [pattern for _, pattern in kept]
