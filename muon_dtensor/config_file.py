"""A job's optimizer and parallelism as one value, from TOML, YAML or a command line.

Sections and keys are torchtitan's, for people without torchtitan.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from muon_dtensor.distributed_config.config import (
    TITAN_DIMS,
    DistributedConfig,
    create_devicemesh_config,
)
from muon_dtensor.grouping import group_parameters
from muon_dtensor.optimizer.muon import Muon
from muon_dtensor.optimizer.options import ADAMW_DEFAULTS, OPTIONS, Option, complete, did_you_mean
from muon_dtensor.runtime.torch_private import dtype_name

EXTRA = "pip install 'muon_dtensor[cli]'"

TITAN_DEGREES = {
    "data_parallel_replicate_degree": "dp_replicate",
    "data_parallel_shard_degree": "dp_shard",
    "context_parallel_degree": "cp",
    "tensor_parallel_degree": "tp",
    "pipeline_parallel_degree": "pp",
    "expert_parallel_degree": "ep",
}
"""torchtitan's keys of `[parallelism]`, by ours."""


class Section:
    """A section of a config file."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # pydantic's name for it


@dataclass(frozen=True, kw_only=True)
class AdamWSection(Section):
    """`[optimizer.adamw]`: embeddings, heads, norms and biases."""

    lr: float = ADAMW_DEFAULTS["lr"]
    betas: tuple[float, float] = ADAMW_DEFAULTS["betas"]
    eps: float = ADAMW_DEFAULTS["eps"]
    weight_decay: float = ADAMW_DEFAULTS["weight_decay"]


@dataclass(frozen=True, kw_only=True)
class RuleSection(Section):
    """`[[optimizer.rules]]`: options of the parameters whose names match a regex."""

    pattern: str
    options: dict[str, Any] = field(default_factory=dict)


def _in_files(option: Option) -> tuple[str, Any, Any]:
    """Name, type and default of an option as config files spell them: dtypes by name."""
    default = option.default
    return (
        option.name,
        option.type,
        dtype_name(default) if isinstance(default, torch.dtype) else default,
    )


_Options: Any = dataclasses.make_dataclass(
    "_Options",
    [
        _in_files(option)
        for option in OPTIONS.values()
        if option.in_constructor and option.type is not None
    ],
    bases=(Section,),
    frozen=True,
    kw_only=True,
)


@dataclass(frozen=True, kw_only=True)
class OptimizerSection(_Options):  # type: ignore[misc]  # of OPTIONS
    """`[optimizer]`: the keywords of `Muon`, with its meaning and defaults; dtypes by name.

    `class_weight_decay`: weight decay per class of parameters, and `recognize`: declare the
    matrices of known model families; see `group_parameters`.
    """

    name: Literal["Muon"] = "Muon"
    class_weight_decay: dict[str, float] = field(default_factory=dict)
    adamw: AdamWSection = field(default_factory=AdamWSection)
    rules: tuple[RuleSection, ...] = ()
    recognize: bool | Literal["projections", "heads"] = False


@dataclass(frozen=True, kw_only=True)
class ParallelismSection(Section):
    """`[parallelism]`: the size of each mesh dim; one may be -1: all remaining ranks.

    torchtitan's keys (`data_parallel_shard_degree`, ...) are accepted too. `ep` divides
    dp_shard x cp x tp: experts are cut over that many of those ranks.
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1


@dataclass(frozen=True, kw_only=True)
class MuonConfig(Section):
    """An optimizer and the meshes of its parameters.

        config = MuonConfig.from_toml("job.toml")
        model = fully_shard(Model(), mesh=config.build_mesh()["dp_shard"])
        optimizer = config.build_optimizer(model)

    Reading a file or a dict needs pydantic (extra `cli`). Unknown keys and values of a wrong type
    raise a ValueError that names the nearest right key.
    """

    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    parallelism: ParallelismSection = field(default_factory=ParallelismSection)

    @classmethod
    def from_toml(cls, path: str | Path, *, others: Sequence[str] = ()) -> Self:
        """From a TOML file. `others`: its sections that other programs read."""
        import tomllib

        return cls.from_dict(tomllib.loads(Path(path).read_text()), others=others)

    @classmethod
    def from_yaml(cls, path: str | Path, *, others: Sequence[str] = ()) -> Self:
        """From a YAML file, by PyYAML's safe loader; 2e-2 is read as a number. `others`: as above.

        Raises ImportError without PyYAML.
        """
        return cls.from_dict(parse_yaml(Path(path).read_text()) or {}, others=others)

    @classmethod
    def from_cli(cls, args: Sequence[str] | None = None, *, default: Self | None = None) -> Self:
        """From a command line, `--optimizer.lr 0.02 --parallelism.tp 2`, by tyro.

        `default`: values of options that the command line does not name, such as those of a file.
        `args`: default sys.argv. Raises ImportError without tyro.
        """
        try:
            import tyro
        except ImportError as error:
            raise ImportError(f"a command line needs tyro: {EXTRA}") from error

        return tyro.cli(cls, args=args, default=default or cls())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, others: Sequence[str] = ()) -> Self:
        """From nested dicts, checked by pydantic.

        Raises:
            ValueError: unknown keys and values of a wrong type, all of them, one per line.
            GroupOptionError: wrong options of a rule.
            ImportError: pydantic is not installed.
        """
        try:
            import pydantic
        except ImportError as error:
            raise ImportError(f"config files need pydantic: {EXTRA}") from error

        if not isinstance(values, Mapping):
            raise ValueError(f"a config file has sections with keys, got {values!r}")
        sections = {name: value for name, value in values.items() if name not in others}
        if isinstance(parallelism := sections.get("parallelism"), Mapping):
            sections["parallelism"] = _with_short_names(parallelism)
        optimizer = sections.get("optimizer")
        if isinstance(optimizer, Mapping) and isinstance(optimizer.get("rules"), (list, tuple)):
            rules = [_flat_rule(rule) for rule in optimizer["rules"]]
            sections["optimizer"] = {**optimizer, "rules": rules}
        try:  # strict, but as JSON: a list for a tuple, an integer for a float
            config = pydantic.TypeAdapter(cls).validate_json(
                json.dumps(sections, default=str), strict=True
            )
        except pydantic.ValidationError as error:
            lines = [_message(e, cls()) for e in error.errors()]
            raise ValueError("\n".join(lines)) from None
        for rule in config.optimizer.rules:
            complete(rule.options, {}, strict=True)
        return config

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the mesh dims of more than one rank, outermost first; one may be -1."""
        sizes = {name: getattr(self.parallelism, name) for name in TITAN_DIMS}
        return {name: size for name, size in sizes.items() if size != 1}

    def build_mesh(self, device_type: str | None = None) -> DeviceMesh:
        """The mesh of dense parameters: pp, dp_replicate, dp_shard, cp, tp, where above 1.

        A collective of all ranks. `device_type`: default that of the default process group. Raises
        ValueError unless the sizes make the world size.
        """
        sizes: dict[str, Any] = self.sizes or {"dp_shard": 1}
        mesh = create_devicemesh_config(device_type=device_type, **sizes).mesh
        assert mesh is not None, "a config of sizes has a mesh"
        return mesh

    def build_expert_mesh(self, device_type: str | None = None) -> DeviceMesh:
        """The mesh of experts on the same ranks: pp, dp_replicate, efsdp, ep, as in torchtitan.

        Raises ValueError where ep does not divide dp_shard x cp x tp.
        """
        mesh = self.build_mesh(device_type)
        names = mesh.mesh_dim_names or ()
        sizes = {name: mesh.shape[index] for index, name in enumerate(names)}
        outer = {name: sizes[name] for name in ("pp", "dp_replicate") if name in sizes}
        inner = mesh.size()
        for size in outer.values():
            inner //= size
        ep = self.parallelism.ep
        if inner % ep:
            raise ValueError(f"ep={ep} does not divide the {inner} ranks of dp_shard, cp and tp")
        dims: dict[str, int] = outer | {"efsdp": inner // ep, "ep": ep}
        return init_device_mesh(mesh.device_type, tuple(dims.values()), mesh_dim_names=tuple(dims))

    def build_optimizer(
        self,
        model: nn.Module,
        mesh: DeviceMesh | None = None,
        *,
        distributed_config: DistributedConfig | None = None,
    ) -> Muon:
        """The optimizer of a model, sharded or not; under DDP its replicas share the work.

        Plain tensors are replicated over all mesh dims but pp; with one rank, or with pipeline
        stages alone, they belong to one rank each.

        Args:
            model: any module.
            mesh: the result of `build_mesh`; default: a new one like it.
            distributed_config: replaces the config made from `mesh`.
        """
        section = self.optimizer
        groups = group_parameters(
            model,
            lr=section.lr,
            weight_decay={"matrix": section.weight_decay, **section.class_weight_decay},
            adamw=dataclasses.asdict(section.adamw),
            rules=[(rule.pattern, _with_tuples(rule.options)) for rule in section.rules],
            recognize=section.recognize,
        )
        options = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
        for name in ("name", "adamw", "rules", "recognize", "class_weight_decay"):
            del options[name]
        for name in ("ns_dtype", "momentum_dtype"):
            options[name] = options[name] and getattr(torch, options[name])
        config = distributed_config
        if config is None and dist.is_initialized() and any(name != "pp" for name in self.sizes):
            config = create_devicemesh_config(mesh or self.build_mesh())
        return Muon(groups, distributed_config=config, **options)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text, by PyYAML's safe loader; 2e-2 is a number.

    Raises ImportError without PyYAML, ValueError for a text that is not YAML.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"YAML needs PyYAML: {EXTRA}") from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """YAML 1.1 reads an exponent as a number only with a decimal point and a sign."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error


def _with_tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a rule as param groups hold them."""
    return {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}


def _flat_rule(rule: object) -> object:
    """A rule as `RuleSection`, whose options stand beside its pattern in a file."""
    if not isinstance(rule, Mapping) or not isinstance(rule.get("options", {}), Mapping):
        return rule
    options = {name: value for name, value in rule.items() if name not in ("pattern", "options")}
    pattern = {"pattern": rule["pattern"]} if "pattern" in rule else {}
    return {**pattern, "options": {**rule.get("options", {}), **options}}


def _with_short_names(parallelism: Mapping[str, Any]) -> dict[str, Any]:
    """torchtitan's keys of `[parallelism]` by ours. Raises ValueError for a size given twice."""
    sizes: dict[str, Any] = {}
    for key, size in parallelism.items():
        name = TITAN_DEGREES.get(key, key)
        if name in sizes:
            raise ValueError(f"parallelism.{name} is given twice, by two names")
        sizes[name] = size
    return sizes


def _message(error: Mapping[str, Any], config: MuonConfig) -> str:
    """One line for one of pydantic's errors: which key, what is wrong, what was read."""
    where = ".".join(map(str, error["loc"]))
    match error["type"]:
        case "unexpected_keyword_argument":
            *sections, key = error["loc"]
            keys = _keys(config, sections)
            hint = did_you_mean(key, keys) or f" Keys are {', '.join(keys)}."
            return f"unknown key '{where}'.{hint}"
        case "dataclass_type":
            return f"[{where}] is a section with keys, got {error['input']!r}"
    hint = ""
    if error["type"] == "literal_error":
        hint = did_you_mean(error["input"], re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    return f"{where}: {error['msg']}, got {error['input']!r}.{hint}"


def _keys(config: MuonConfig, sections: Sequence[str | int]) -> list[str]:
    """Names of the keys of a section, by its path."""
    section: Any = config
    for name in sections:
        section = RuleSection if name == "rules" else getattr(section, str(name), section)
    return [key.name for key in dataclasses.fields(section)]
