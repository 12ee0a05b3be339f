"""A job's optimizer and parallelism as one value, from TOML, YAML or a command line.

Sections and keys are torchtitan's, for people without torchtitan.
"""

import dataclasses
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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
"""torchtitan's keys of `[parallelism]`, and ours."""


@dataclass(frozen=True, kw_only=True)
class AdamWSection:
    """`[optimizer.adamw]`: embeddings, heads, norms and biases."""

    lr: float = ADAMW_DEFAULTS["lr"]
    betas: tuple[float, float] = ADAMW_DEFAULTS["betas"]
    eps: float = ADAMW_DEFAULTS["eps"]
    weight_decay: float = ADAMW_DEFAULTS["weight_decay"]


@dataclass(frozen=True, kw_only=True)
class RuleSection:
    """`[[optimizer.rules]]`: options of the parameters whose names a regex is found in."""

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
    frozen=True,
    kw_only=True,
)


@dataclass(frozen=True, kw_only=True)
class OptimizerSection(_Options):  # type: ignore[misc]  # of OPTIONS
    """`[optimizer]`: the keywords of `Muon`, with its meaning and defaults; dtypes by name.

    `class_weight_decay`: of classes of parameters by name; see `group_parameters`.
    """

    name: Literal["Muon"] = "Muon"
    class_weight_decay: dict[str, float] = field(default_factory=dict)
    adamw: AdamWSection = field(default_factory=AdamWSection)
    rules: tuple[RuleSection, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ParallelismSection:
    """`[parallelism]`: how many ranks each way; -1, for one of them, is what is left.

    torchtitan's keys (`data_parallel_shard_degree`, ...) are taken too. `ep` divides dp_shard x
    cp x tp: experts are cut over as many of those ranks.
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """An optimizer and the meshes of its parameters.

        config = MuonConfig.from_toml("job.toml")
        model = fully_shard(Model(), mesh=config.build_mesh()["dp_shard"])
        optimizer = config.build_optimizer(model)

    Unknown keys and values of another type are a ValueError that names the nearest right key.
    """

    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    parallelism: ParallelismSection = field(default_factory=ParallelismSection)

    @classmethod
    def from_toml(cls, path: str | Path, *, others: Sequence[str] = ()) -> "MuonConfig":
        """Of a TOML file. `others`: sections of it that are somebody else's."""
        import tomllib

        return cls.from_dict(tomllib.loads(Path(path).read_text()), others=others)

    @classmethod
    def from_yaml(cls, path: str | Path, *, others: Sequence[str] = ()) -> "MuonConfig":
        """Of a YAML file, by PyYAML's safe loader, to which 2e-2 is a number. `others`: as above.

        Raises ImportError without PyYAML.
        """
        try:
            import yaml
        except ImportError as error:
            raise ImportError(f"YAML needs PyYAML: {EXTRA}") from error

        class Loader(yaml.SafeLoader):  # type: ignore[misc]
            """YAML 1.1 takes an exponent for a number only behind a decimal point and a sign."""

        Loader.add_implicit_resolver(
            "tag:yaml.org,2002:float",
            re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
            list("-+.0123456789"),
        )
        return cls.from_dict(yaml.load(Path(path).read_text(), Loader) or {}, others=others)

    @classmethod
    def from_cli(
        cls, args: Sequence[str] | None = None, *, default: "MuonConfig | None" = None
    ) -> "MuonConfig":
        """Of a command line, `--optimizer.lr 0.02 --parallelism.tp 2`, by tyro.

        `default`: what it does not name, such as a file's; `args`: default sys.argv. Raises
        ImportError without tyro.
        """
        try:
            import tyro
        except ImportError as error:
            raise ImportError(f"a command line needs tyro: {EXTRA}") from error

        return tyro.cli(cls, args=args, default=default or cls())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, others: Sequence[str] = ()) -> "MuonConfig":
        """Of nested dicts. Raises ValueError, or GroupOptionError for the options of a rule."""
        mine = {name: value for name, value in values.items() if name not in others}
        made: MuonConfig = _section(cls, mine, "")
        return made

    @property
    def sizes(self) -> dict[str, int]:
        """Of the mesh dims of more than one rank, outermost first; one may be -1."""
        given = {name: getattr(self.parallelism, name) for name in TITAN_DIMS}
        return {name: size for name, size in given.items() if size != 1}

    def build_mesh(self, device_type: str | None = None) -> DeviceMesh:
        """The mesh of dense parameters: pp, dp_replicate, dp_shard, cp, tp, where above 1.

        A collective of all ranks. `device_type`: default that of the default process group. Raises
        ValueError unless the sizes make the world size.
        """
        sizes: dict[str, Any] = self.sizes or {"dp_shard": 1}
        mesh = create_devicemesh_config(device_type=device_type, **sizes).mesh
        assert mesh is not None, "it was made of sizes"
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

        Parameters that are no DTensors are taken to be replicated over all of the mesh but pp; with
        one rank, or none but pipeline stages, they are each rank's own. `mesh`: what `build_mesh`
        has returned; default: another like it. `distributed_config`: in place of all that.
        """
        section = self.optimizer
        groups = group_parameters(
            model,
            lr=section.lr,
            weight_decay={"matrix": section.weight_decay, **section.class_weight_decay},
            adamw=dataclasses.asdict(section.adamw),
            rules=[(rule.pattern, rule.options) for rule in section.rules],
        )
        options = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
        for name in ("name", "adamw", "rules", "class_weight_decay"):
            del options[name]
        for name in ("ns_dtype", "momentum_dtype"):
            options[name] = options[name] and getattr(torch, options[name])
        config = distributed_config
        if config is None and dist.is_initialized() and any(name != "pp" for name in self.sizes):
            config = create_devicemesh_config(mesh or self.build_mesh())
        return Muon(groups, distributed_config=config, **options)


def _section(cls: Any, values: object, where: str) -> Any:
    """A dataclass of this class from a mapping; `where` it stands, for messages."""
    if not isinstance(values, Mapping):
        raise ValueError(f"[{where}] is a section with keys, got {values!r}")
    if cls is RuleSection:
        return _rule(values, where)
    hints = get_type_hints(cls)
    if cls is ParallelismSection:
        values = _with_short_names(values)
    for name in values:
        if name not in hints:
            hint = did_you_mean(name, hints) or f" Keys are {', '.join(hints)}."
            raise ValueError(f"unknown key '{f'{where}.' * bool(where)}{name}'.{hint}")
    return cls(**{n: _value(hints[n], v, f"{where}.{n}".strip(".")) for n, v in values.items()})


def _with_short_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """torchtitan's keys of `[parallelism]` by ours. Raises ValueError for a size given twice."""
    short: dict[str, Any] = {}
    for name, value in values.items():
        known = TITAN_DEGREES.get(name, name)
        if known in short:
            raise ValueError(f"parallelism.{known} is given twice, by two names")
        short[known] = value
    return short


def _rule(values: Mapping[str, Any], where: str) -> RuleSection:
    """A pattern and, flat beside it, options of a param group."""
    options = {**values.get("options", {}), **values}
    options.pop("options", None)
    pattern = options.pop("pattern", None)
    if not isinstance(pattern, str):
        raise ValueError(f"{where} needs a pattern, a regex of names; got {pattern!r}")
    options = {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}
    complete(options, {}, is_ours=True)
    return RuleSection(pattern=pattern, options=options)


def _value(kind: Any, value: Any, where: str) -> Any:
    """A value of this type, from what TOML and YAML make of it. Raises ValueError."""
    origin, args = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _section(kind, value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _value(next(arg for arg in args if arg is not type(None)), value, where)
    if origin is Literal:
        if value in args:
            return value
        hint = did_you_mean(value, map(str, args))
        raise ValueError(f"{where} is one of {', '.join(map(str, args))}, got {value!r}.{hint}")
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is a table of numbers by name, got {value!r}")
        return {name: _value(args[1], number, f"{where}.{name}") for name, number in value.items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (... not in args and len(value) != len(args)):
            raise ValueError(f"{where} is a list of {len(args)}, got {value!r}")
        kinds = [args[0]] * len(value) if ... in args else args
        return tuple(
            _value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        )
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} is of type {kind.__name__}, got {value!r}")
    return value
