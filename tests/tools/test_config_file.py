"""MuonConfig: TOML, YAML and command lines, and what is wrong in them."""

import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from muon_dtensor import GroupOptionError, Muon, MuonConfig
from muon_dtensor import config_file as job_config
from muon_dtensor.config_file import OptimizerSection
from tests.support.options import OTHER_VALUES
from tests.support.pool import run_processes
from tests.support.threads import run_threads

TOML = """
[optimizer]
name = "Muon"
lr = 0.03
nesterov = false
adjust_lr_fn = "match_rms_adamw"
momentum_dtype = "bfloat16"
nonfinite = "skip"
metrics_every = 2
recognize = "heads"

[optimizer.adamw]
lr = 1e-3
betas = [0.8, 0.99]

[[optimizer.rules]]
pattern = "qkv"
split_sizes = [8, 4, 4]

[parallelism]
dp_replicate = 2
dp_shard = -1
tp = 1
"""

YAML = """
optimizer:
  name: Muon
  lr: 0.03
  nesterov: false
  adjust_lr_fn: match_rms_adamw
  momentum_dtype: bfloat16
  nonfinite: skip
  metrics_every: 2
  recognize: heads
  adamw: {lr: 1.0e-3, betas: [0.8, 0.99]}
  rules:
    - {pattern: qkv, split_sizes: [8, 4, 4]}
parallelism: {dp_replicate: 2, dp_shard: -1, tp: 1}
"""


@pytest.fixture
def written(tmp_path) -> Any:
    def write(text: str, name: str = "job.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.qkv = nn.Linear(4, 16, bias=True)
        self.up = nn.Linear(4, 8, bias=False)


def test_toml_and_yaml_say_the_same(written):
    config = MuonConfig.from_toml(written(TOML))
    assert config == MuonConfig.from_yaml(written(YAML, "job.yaml"))
    assert config.optimizer.lr == 0.03
    assert config.optimizer.adamw.betas == (0.8, 0.99)
    assert config.sizes == {"dp_replicate": 2, "dp_shard": -1}
    assert MuonConfig.from_yaml(written("", "empty.yaml")) == MuonConfig()


def test_a_command_line_goes_over_a_file(written):
    config = MuonConfig.from_toml(written(TOML))
    args = ["--optimizer.lr", "0.5", "--parallelism.tp", "2", "--optimizer.adamw.eps", "1e-5"]
    seen = MuonConfig.from_cli(args, default=config)
    assert (seen.optimizer.lr, seen.parallelism.tp, seen.optimizer.adamw.eps) == (0.5, 2, 1e-5)
    assert seen.optimizer.adamw.betas == (0.8, 0.99)
    assert seen.optimizer.rules == config.optimizer.rules
    assert MuonConfig.from_cli([]) == MuonConfig()
    with pytest.raises(SystemExit):
        MuonConfig.from_cli(["--optimizer.learning-rate", "1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optimiser]\nlr = 1", r"unknown key 'optimiser'. Did you mean 'optimizer'\?"),
        ("[optimizer]\nweight_decy = 1", "'optimizer.weight_decy'. Did you mean 'weight_decay'"),
        ("[parallelism]\ndp_shards = 1", "'parallelism.dp_shards'. Did you mean 'dp_shard'"),
        ("[parallelism]\nzzz = 1", "Keys are dp_replicate, dp_shard, cp, tp, pp, ep"),
        ("[optimizer]\nlearning_rate = 1", "'optimizer.learning_rate'. Did you mean 'lr'"),
        ("[optimizer]\nwd = 1", "'optimizer.wd'. Did you mean 'weight_decay'"),
        (
            "[optimizer]\nclass_weight_decay = 1",
            "class_weight_decay: Input should be an object, got 1",
        ),
        ("[optimizer.adamw]\nbeta = 1", "'optimizer.adamw.beta'. Did you mean 'betas'"),
        ("[optimizer]\nlr = 'fast'", "optimizer.lr: Input should be a valid number, got 'fast'"),
        ("[optimizer]\nlr = true", "optimizer.lr: Input should be a valid number, got True"),
        ("[optimizer]\nns_steps = 5.5", "ns_steps: Input should be a valid integer, got 5.5"),
        ("[optimizer]\nnesterov = 1", "nesterov: Input should be a valid boolean, got 1"),
        ("[optimizer]\nnonfinite = 'skp'", "got 'skp'. Did you mean 'skip'"),
        (
            "[optimizer]\nns_coefficients = [1.0, 2.0]",
            r"ns_coefficients.2: Field required, got \[1.0, 2.0\]",
        ),
        (
            "[optimizer.adamw]\nbetas = ['a', 0.5]",
            "optimizer.adamw.betas.0: Input should be a valid number",
        ),
        ("optimizer = 3", r"\[optimizer\] is a section with keys, got 3"),
        ("[[optimizer.rules]]\nlr = 0.1", "optimizer.rules.0.pattern: Field required"),
        ("[optimizer]\nname = 'AdamW'", "optimizer.name: Input should be 'Muon', got 'AdamW'"),
    ],
)
def test_what_is_wrong_is_named(written, text, message):
    with pytest.raises(ValueError, match=message):
        MuonConfig.from_toml(written(text))


def test_all_wrong_keys_are_named_at_once(written):
    text = "[optimizer]\nlr = 'fast'\nweight_decy = 1\n[parallelism]\ntp = 1.5"
    with pytest.raises(ValueError, match="weight_decy") as raised:
        MuonConfig.from_toml(written(text))
    assert len(str(raised.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", r"a config file has sections with keys, got \[1\]"),
        ("optimizer: {rules: 3}", "optimizer.rules: Input should be .*, got 3"),
        ("optimizer: {rules: [3]}", r"\[optimizer.rules.0\] is a section with keys, got 3"),
        ("optimizer: {rules: [{pattern: x, options: 3}]}", "options: Input should be an object"),
        ("optimizer: {lr: 2020-01-01}", "optimizer.lr: Input should be a valid number"),
        ("optimizer: {1: 2}", "unknown key 'optimizer.1'"),
    ],
)
def test_odd_values_of_yaml_are_named(written, text, message):
    with pytest.raises(ValueError, match=message):
        MuonConfig.from_yaml(written(text, "job.yaml"))


def test_rules_are_checked_when_they_are_read(written):
    rule = "[[optimizer.rules]]\npattern = 'x'\nsplit_size = [1]"
    with pytest.raises(GroupOptionError, match=r"'split_size'\. Did you mean 'split_sizes'"):
        MuonConfig.from_toml(written(rule))


@pytest.mark.parametrize("number", ["2e-2", "2E-2", "+2e-2", ".2e-1", "2.e-2", "2.0e-02", "0.02"])
def test_numbers_in_yaml_are_numbers(written, number):
    """YAML 1.1 takes 2e-2 for text, which PyYAML reads."""
    text = f"""
optimizer:
  lr: {number}
  rules: [{{pattern: up, lr: {number}}}]
  adamw: {{betas: [{number}, 0.9]}}
"""
    config = MuonConfig.from_yaml(written(text, "job.yaml"))
    assert config.optimizer.lr == 0.02
    assert config.optimizer.rules[0].options == {"lr": 0.02}
    assert config.optimizer.adamw.betas == (0.02, 0.9)
    text = "optimizer: {topology: 3e9f1c}\nwandb: {id: 1e5-2}"
    named = MuonConfig.from_yaml(written(text, "job.yaml"), others=["wandb"])
    assert named.optimizer.topology == "3e9f1c", "a name that begins as a number does"


def test_torchtitan_s_names_of_degrees(written):
    text = """
[parallelism]
data_parallel_replicate_degree = 2
data_parallel_shard_degree = -1
tensor_parallel_degree = 4
pipeline_parallel_degree = 1
context_parallel_degree = 1
expert_parallel_degree = 2
"""
    found = MuonConfig.from_toml(written(text)).parallelism
    assert (found.dp_replicate, found.dp_shard, found.tp, found.ep) == (2, -1, 4, 2)
    with pytest.raises(ValueError, match=r"parallelism\.tp is given twice, by two names"):
        MuonConfig.from_toml(written(text + "tp = 2"))


@pytest.mark.parametrize(
    ("module", "read"), [("yaml", "from_yaml"), ("tyro", "from_cli"), ("pydantic", "from_yaml")]
)
def test_a_missing_extra_is_named(written, monkeypatch, module, read):
    monkeypatch.setitem(sys.modules, module, None)
    argument: Any = written("", "job.yaml") if read == "from_yaml" else []
    with pytest.raises(ImportError, match=r"pip install 'muon_dtensor\[cli\]'"):
        getattr(MuonConfig, read)(argument)


def test_sections_of_others(written):
    text = TOML + "\n[training]\nsteps = 5\n"
    with pytest.raises(ValueError, match="unknown key 'training'"):
        MuonConfig.from_toml(written(text))
    assert MuonConfig.from_toml(written(text), others=("training",)).optimizer.lr == 0.03


def test_an_optimizer_on_one_process(written):
    optimizer = MuonConfig.from_toml(written(TOML)).build_optimizer(Net())
    assert isinstance(optimizer, Muon)
    by_name = {n: g for g in optimizer.param_groups for n in g["param_names"]}
    assert by_name["qkv.weight"]["split_sizes"] == (8, 4, 4)
    assert (by_name["up.weight"]["lr"], by_name["up.weight"]["nesterov"]) == (0.03, False)
    assert by_name["embed.weight"]["betas"] == (0.8, 0.99)
    weight = by_name["up.weight"]["params"][0]
    assert optimizer.state[weight]["momentum_buffer"].dtype == torch.bfloat16


def hsdp() -> tuple[str, str, bool]:
    config = MuonConfig.from_dict({"parallelism": {"dp_replicate": 2, "dp_shard": -1}})
    mesh = config.build_mesh()
    model = Net()
    fully_shard(model, mesh=mesh)
    sharded = config.build_optimizer(model, mesh)
    plain = config.build_optimizer(Net())
    return str(sharded.plan), str(plain.plan), mesh.mesh_dim_names == ("dp_replicate", "dp_shard")


def test_meshes_and_optimizers_on_four_ranks():
    for sharded, plain, named in run_processes(4, hsdp):
        assert named
        assert "mesh (dp_replicate=2, dp_shard=2)" in sharded
        assert "rows over dp_shard=2, replicated over dp_replicate=2" in sharded
        assert "replicated over dp_replicate=2 x dp_shard=2" in plain


def experts(sizes: dict[str, int]) -> tuple[Any, Any, bool]:
    config = MuonConfig.from_dict({"parallelism": sizes})
    mesh = config.build_expert_mesh()
    weight = distribute_tensor(torch.ones(8, 4, 4), mesh["ep"], [Shard(0)], src_data_rank=None)
    model = nn.Module()
    model.experts = nn.Parameter(weight)
    model.up = nn.Linear(4, 4, bias=False)
    nn.init.ones_(model.up.weight)  # replicas hold equal values
    optimizer = config.build_optimizer(model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    finite = all(
        (p.to_local() if isinstance(p, DTensor) else p).isfinite().all() for p in model.parameters()
    )
    return mesh.mesh_dim_names, tuple(mesh.shape), bool(finite)


@pytest.mark.parametrize(
    ("sizes", "names", "shape"),
    [
        ({"dp_shard": 4, "tp": 2, "ep": 4}, ("efsdp", "ep"), (2, 4)),
        ({"dp_replicate": 2, "dp_shard": 4, "ep": 2}, ("dp_replicate", "efsdp", "ep"), (2, 2, 2)),
        ({"pp": 2, "dp_shard": 4, "ep": 2}, ("pp", "efsdp", "ep"), (2, 2, 2)),
    ],
    ids=str,
)
def test_experts_have_a_mesh_of_their_own(sizes, names, shape):
    for found in run_threads(8, experts, sizes):
        assert found == (names, shape, True)


def refused(sizes: dict[str, int]) -> str:
    config = MuonConfig.from_dict({"parallelism": sizes})
    try:
        config.build_expert_mesh("cpu")
    except ValueError as error:
        return str(error)
    return ""


def test_sizes_that_do_not_fit():
    for text in run_threads(4, refused, {"dp_shard": 4, "ep": 3}):
        assert "ep=3 does not divide the 4 ranks" in text
    for text in run_threads(4, refused, {"dp_shard": 3}):
        assert "the product of dp_shard=3 does not match the world size of 4" in text


def one_rank() -> bool:
    mesh = MuonConfig().build_mesh("cpu")
    assert math.prod(mesh.shape) == dist.get_world_size() == 1
    return MuonConfig().build_optimizer(Net()).plan is not None


def test_one_rank():
    assert run_threads(1, one_rank) == [True]


OTHER: dict[str, Any] = {
    **{name: value for name, value in OTHER_VALUES.items() if name not in ("lr", "weight_decay")},
    "ns_dtype": "float32",
    "bucket_mb": 3.0,
    "prefetch_count": 2,
    "batched": True,
    "missing_grad": "zero",
    "nonfinite": "skip",
    "strategy": "owned",
    "exact": False,
    "topology": "h100-ib-400",
    "momentum_dtype": "bfloat16",
    "offload_momentum": True,
    "shard_momentum": True,
    "compile": True,
    "kernels": "auto",
    "metrics_every": 3,
    "trace": True,
    "async_gpu_parallelism": False,
    "check_replicas": False,
    "deferred_checks": True,
}
"""Another value of each key of `[optimizer]` that is a keyword of Muon's."""


def handed_over(values: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The param groups and keywords that Muon gets of these values of `[optimizer]`."""
    seen: list[Any] = []

    def noted(groups: Any, **options: Any) -> Muon:
        seen.extend((groups, options))
        return Muon(groups)

    with mock.patch.object(job_config, "Muon", noted):
        MuonConfig.from_dict({"optimizer": values}).build_optimizer(Net())
    groups, options = seen
    return groups, options


@pytest.mark.parametrize("name", OTHER)
def test_every_key_reaches_the_optimizer(name):
    _, options = handed_over({name: OTHER[name]})
    value = str(options[name]).removeprefix("torch.") if "dtype" in name else options[name]
    assert value == OTHER[name] != getattr(OptimizerSection(), name)


def test_every_key_is_listed_above():
    elsewhere = {"name", "lr", "weight_decay", "class_weight_decay", "adamw", "rules", "recognize"}
    assert {field.name for field in fields(OptimizerSection)} == OTHER.keys() | elsewhere


def test_known_families_are_recognized():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    config = MuonConfig.from_dict({"optimizer": {"recognize": "heads"}})
    assert config.build_optimizer(model).plan.cost.num_matrices == 6 + 1


def test_keys_of_groups_reach_them():
    adamw = {"lr": 0.5, "betas": [0.7, 0.8], "eps": 1e-4, "weight_decay": 0.6}
    values = {
        "lr": 0.3,
        "weight_decay": 0.4,
        "class_weight_decay": {"norm": 0.2, "bias": 0.9},
        "adamw": adamw,
        "rules": [{"pattern": "up", "momentum": 0.1}],
    }
    groups, _ = handed_over(values)
    by_name = {name: group for group in groups for name, _ in group["params"]}
    assert by_name["qkv.weight"]["lr"] == 0.3
    assert by_name["qkv.weight"]["weight_decay"] == 0.4
    assert by_name["up.weight"]["momentum"] == 0.1
    assert by_name["qkv.bias"]["weight_decay"] == 0.9
    embed = by_name["embed.weight"]
    assert {name: embed[name] for name in adamw} == {**adamw, "betas": (0.7, 0.8)}
