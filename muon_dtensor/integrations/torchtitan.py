"""Muon in torchtitan 0.3: an optimizers container, its config, and a config override.

    config.optimizer = muon_optimizers(lr=0.02, adamw={"lr": 3e-4})

or, for any torchtitan recipe, without editing it:

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
from muon_dtensor.optimizer.options import ADAMW_DEFAULTS, DECLARED, DEFAULTS, RECOGNIZED
from muon_dtensor.runtime.torch_private import warning_level

logger = logging.getLogger("muon_dtensor")

NAME = "Muon"
"""`optimizer_name` of a `ParamGroupConfig` for `muon_dtensor.Muon`."""

ADAMW_PATTERN = r"(^|\.)(tok_embeddings|embed\w*|lm_head|output|head)\.|norm|(^|\.|_)bias$"
"""Names of embeddings, output heads, norms and biases in torchtitan's models."""


class MuonMixin:
    """Adds the optimizer "Muon" to an OptimizersContainer of torchtitan or of its torchft.

    List it before the container: `class C(MuonMixin, TorchFTOptimizersContainer)`, with a nested
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
        """Return torchtitan's groups, with parameters that are not matrices moved to AdamW.

        A pattern without a parameter in this model part is skipped with a warning, since a
        pipeline stage may have no embedding. Embeddings, norms, biases and parameters with fewer
        than two dims in a Muon group move to the first AdamW group of "Muon".
        """
        names = [name for name, _ in _trainable(model)]
        configs = _matching_configs(param_group_configs, names)
        groups, patterns = OptimizersContainer._build_param_groups(model, configs, impl_kwargs)
        if NAME in groups:
            groups[NAME], patterns[NAME] = _recognized(model, groups[NAME], patterns[NAME])
            groups[NAME], patterns[NAME] = _move_to_adamw(
                model, groups[NAME], patterns[NAME], param_group_configs
            )
        return groups, patterns


class MuonOptimizersContainer(MuonMixin, OptimizersContainer):
    """torchtitan's container with the optimizer "Muon" for a `ParamGroupConfig`.

    `optimizer_kwargs` of such a config are options of a param group of `muon_dtensor.Muon`. Options
    of the optimizer go into `optimizer_factory_kwargs_by_name["Muon"]`. All "Muon" groups of a
    model part form one optimizer, with one scheduler and one entry in checkpoints.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """torchtitan's config; `build` returns this container."""


def muon_optimizers(
    lr: float = DEFAULTS["lr"],
    *,
    adamw: Mapping[str, Any] | None = None,
    splits: Mapping[str, Mapping[str, Any]] | None = None,
    param_groups: Sequence[ParamGroupConfig] = (),
    recognize: bool | str = False,
    weight_decay: float = DEFAULTS["weight_decay"],
    adjust_lr_fn: str | None = "match_rms_adamw",
    **options: Any,
) -> MuonOptimizersContainer.Config:
    """Return an optimizer config: Muon for hidden matrices, AdamW for all other parameters.

    Args:
        lr: learning rate of the Muon groups.
        adamw: `lr`, `betas`, `eps`, `weight_decay` of the AdamW group; default:
            `options.ADAMW_DEFAULTS`.
        splits: declarations of the matrices in a weight, by regex of its name: `{"wqkv": {"matrix":
            "(head dim) model -> head dim model", "matrix_axes": {"dim": 128}}}` for torchtitan's
            fused attention. Other options of a param group are allowed too.
        param_groups: torchtitan's configs that take precedence; they may name other optimizers.
        recognize: declare the matrices of torchtitan's models, see `group_parameters`; `splits`
            take precedence.
        weight_decay: weight decay of the Muon groups.
        adjust_lr_fn: learning-rate scale of the Muon groups; by default updates have the RMS of
            AdamW's (Liu et al. 2025, arXiv:2502.16982).
        **options: options of the Muon groups (`momentum`, `nesterov`, `orthogonalizer`, ...) or of
            the optimizer (`nonfinite`, `bucket_mb`, `metrics_every`, ...).

    Raises:
        GroupOptionError: from `build`, for options that are unknown or out of range.
    """
    group_options = {name: value for name, value in options.items() if name in DEFAULTS}
    factory_options = {name: value for name, value in options.items() if name not in DEFAULTS}
    muon = {"lr": lr, "weight_decay": weight_decay, "adjust_lr_fn": adjust_lr_fn, **group_options}
    if recognize:
        muon["recognize"] = recognize
    groups = list(param_groups)
    for pattern, declared in (splits or {}).items():
        groups.append(_group(pattern, {**muon, **declared}))
    adamw_options = {**ADAMW_DEFAULTS, **(adamw or {}), "algorithm": "adamw"}
    groups.append(_group(ADAMW_PATTERN, adamw_options))
    groups.append(_group(".*", muon))
    return MuonOptimizersContainer.Config(
        param_groups=groups,
        implementation="for-loop",
        optimizer_factory_kwargs_by_name={NAME: factory_options} if factory_options else {},
    )


@override(target=OptimizersContainer.Config, description="hidden matrices to muon_dtensor.Muon")
def use_muon(config: OptimizersContainer.Config, **options: Any) -> MuonOptimizersContainer.Config:
    """Replace a recipe's optimizer config by one with Muon for hidden matrices.

    The options of the recipe's last AdamW group apply to all other parameters. `options`: those of
    `muon_optimizers`, after `=` as JSON:
    `--override.imports 'muon_dtensor.integrations.torchtitan.use_muon={"lr": 0.02}'`.

    Raises:
        GroupOptionError: the recipe has no AdamW group.
    """
    adamw_groups = [group for group in config.param_groups if group.optimizer_name == "AdamW"]
    if not adamw_groups:
        raise GroupOptionError(
            "use_muon uses the options of the recipe's AdamW group, but this recipe has none"
        )
    hints = ("fused", "foreach")
    adamw = {k: v for k, v in adamw_groups[-1].optimizer_kwargs.items() if k not in hints}
    return muon_optimizers(**{"adamw": {**adamw, **options.pop("adamw", {})}, **options})


def _group(pattern: str, options: dict[str, Any]) -> ParamGroupConfig:
    return ParamGroupConfig(pattern=pattern, optimizer_name=NAME, optimizer_kwargs=options)


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def _matching_configs(
    configs: Sequence[ParamGroupConfig], names: Sequence[str]
) -> list[ParamGroupConfig]:
    """Return the configs that match a parameter. A parameter belongs to its first match."""
    assigned: set[str] = set()
    matching = []
    for config in configs:
        matches = {n for n in names if n not in assigned and re.search(config.pattern, n)}
        if matches:
            matching.append(config)
        else:
            logger.log(
                warning_level(),
                "the pattern %r of param_groups matches no remaining parameter of this model part",
                config.pattern,
            )
        assigned |= matches
    return matching


def _recognized(
    model: nn.Module, groups: Sequence[dict[str, Any]], patterns: Sequence[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Split groups with the option `recognize` by the matrices that are recognized."""
    new_groups: list[tuple[dict[str, Any], str]] = []
    for group, pattern in zip(groups, patterns, strict=True):
        recognize = group.pop("recognize", False)
        if not recognize or group.get("matrix") or group.get("split_sizes"):
            new_groups.append((group, pattern))
            continue
        options_of = {
            id(param): {k: v for k, v in known.items() if k in (*DECLARED, RECOGNIZED)}
            for known in group_parameters(model, recognize=recognize)
            for _, param in known["params"]
        }
        by_options: dict[str, dict[str, Any]] = {}
        for param, name in zip(group["params"], group["param_names"], strict=True):
            options = options_of.get(id(param), {})
            split = by_options.setdefault(
                repr(options), {**group, **options, "params": [], "param_names": []}
            )
            split["params"].append(param)
            split["param_names"].append(name)
        new_groups += [(split, pattern) for split in by_options.values()]
    return [group for group, _ in new_groups], [pattern for _, pattern in new_groups]


def _move_to_adamw(
    model: nn.Module,
    groups: Sequence[dict[str, Any]],
    patterns: Sequence[str],
    configs: Sequence[ParamGroupConfig],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Move parameters that are not matrices to an AdamW group. Returns groups and patterns."""
    declared = [
        ("^(" + "|".join(map(re.escape, group["param_names"])) + ")$", {"matrix": "as declared"})
        for group in groups
        if group.get("matrix") or group.get("split_sizes")
    ]
    adamw_ids = {
        id(param)
        for group in group_parameters(model, rules=declared)  # warns about undeclared matrices
        if group["algorithm"] == "adamw"
        for _, param in group["params"]
    }
    moved: dict[str, list[Any]] = defaultdict(list)
    new_groups: list[tuple[dict[str, Any], str]] = []
    for group, pattern in zip(groups, patterns, strict=True):
        is_muon = group.get("algorithm", "muon") == "muon"
        is_declared = group.get("matrix") or group.get("split_sizes")
        pairs = list(zip(group["params"], group["param_names"], strict=True))
        leaving = [p for p in pairs if is_muon and not is_declared and id(p[0]) in adamw_ids]
        staying = [pair for pair in pairs if not any(pair is other for other in leaving)]
        for param, name in leaving:
            moved["params"].append(param)
            moved["param_names"].append(name)
        if staying:
            params, names = zip(*staying, strict=True)
            new_groups.append(({**group, "params": [*params], "param_names": [*names]}, pattern))
    if moved:
        adamw = next((g for g, _ in new_groups if g.get("algorithm") == "adamw"), None)
        if adamw is None:
            adamw_configs = [c for c in configs if c.optimizer_kwargs.get("algorithm") == "adamw"]
            options = cast(
                dict[str, Any],
                adamw_configs[0].optimizer_kwargs if adamw_configs else ADAMW_DEFAULTS,
            )
            adamw = {"params": [], "param_names": [], **options, "algorithm": "adamw"}
            new_groups.append((adamw, "no matrices"))
        adamw["params"] += moved["params"]
        adamw["param_names"] += moved["param_names"]
    return [group for group, _ in new_groups], [pattern for _, pattern in new_groups]
