"""Every code block of docs/ runs, and what it shows is what is printed."""

import ast
import contextlib
import io
import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as torch_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import muon_dtensor
from muon_dtensor import Muon, MuonConfig, group_parameters
from muon_dtensor.cli.main import main
from muon_dtensor.config_file import parse_yaml
from muon_dtensor.planning.presets import PRESETS
from muon_dtensor.train.job import TrainConfig
from tests.requirements.models import TinyTransformer
from tests.support.pool import run_processes

DOCS = Path(__file__).parents[1] / "docs"

Scope = dict[str, Any]


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text()
    fenced = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in fenced]


def public_names() -> Scope:
    return {name: getattr(muon_dtensor, name) for name in muon_dtensor.__all__}


class Model(nn.Module):
    """Embedding, matrix, norm and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.up = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.up(self.embed(tokens))))


class Fused(nn.Module):
    """The modules that the rules of parameters.md name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.router = nn.Linear(8, 4, bias=False)
        self.wqkv = nn.Linear(8, 4096 + 2 * 1024, bias=False)
        self.wo = nn.Linear(64, 8, bias=False)
        self.conv = nn.Conv2d(3, 5, 2)


def give_gradients(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.ones_like(param)


def one_process() -> Scope:
    model = Model()
    return {"model": model, "torch": torch, "params": list(model.up.parameters())[:1]}


def coming_from_adamw() -> Scope:
    """A model that AdamW has stepped, and its state by names."""
    scope = one_process()
    optimizer = torch.optim.AdamW(scope["model"].named_parameters())
    give_gradients(scope["model"])
    optimizer.step()
    return {**scope, "adamw_state_dict": optimizer.state_dict()}


def with_a_loop() -> Scope:
    scope = one_process()

    def train(optimizer: Muon) -> None:
        for _ in range(2):
            give_gradients(scope["model"])
            optimizer.step()

    return {**scope, "train": train}


def with_fused_weights() -> Scope:
    return {"model": Fused()}


def on_a_group() -> Scope:
    """Plain shards of rows on every rank of the default group, or replicas."""
    return {**public_names(), "model": TinyTransformer(16), "group": dist.group.WORLD}


def under_fsdp1() -> Scope:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(
        TinyTransformer(16), use_orig_params=True, device_id=torch.device("cpu")
    )
    return {"model": model, "group": dist.group.WORLD}


def with_checkpoints() -> Scope:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp_shard",))
    model = fully_shard(Model(), mesh=mesh)
    optimizer = Muon(group_parameters(model))
    give_gradients(model)
    optimizer.step()
    return {
        **{name: getattr(torch_state_dict, name) for name in torch_state_dict.__all__},
        **public_names(),
        "dcp": dcp,
        "model": model,
        "optimizer": optimizer,
        "path": "saved",
    }


def with_other_state() -> Scope:
    """The state of a pair of torch's optimizers, and a checkpoint of it at the path shown."""
    scope = with_checkpoints()
    model, optimizer = scope["model"], scope["optimizer"]
    by_name = dict(model.named_parameters())
    names = [name for name in by_name if name == "up.weight"]
    muon = torch.optim.Muon([(n, by_name[n]) for n in names])
    adamw = torch.optim.AdamW([(n, p) for n, p in by_name.items() if n not in names])
    give_gradients(model)
    muon.step()
    adamw.step()
    state = torch_state_dict.get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id="checkpoints/1000")
    return {
        "optimizer": optimizer,
        "path": "saved",
        "muon_state": torch_state_dict.get_optimizer_state_dict(model, muon),
        "adamw_state": torch_state_dict.get_optimizer_state_dict(model, adamw),
    }


def on_islands() -> Scope:
    return {"model": Model(), "fully_shard": fully_shard}


PAGES: dict[str, tuple[int, list[Callable[[], Scope] | None]]] = {
    "install.md": (1, [dict]),
    "from_adamw.md": (1, [coming_from_adamw, None, None, None, None]),
    "setups.md": (4, [on_a_group, on_a_group, under_fsdp1, on_a_group]),
    "parameters.md": (1, [with_fused_weights, None, None]),
    "plans.md": (1, [dict] * 3),
    "debugging.md": (1, [with_a_loop, with_a_loop]),
    "integrations.md": (4, [with_checkpoints, with_other_state]),
    "islands.md": (4, [on_islands, None]),
    "architecture.md": (1, [dict]),
}
"""Per page the number of ranks, and the scope of each block; None: that of the block before."""

INTEGRATIONS = ("muon_dtensor.integrations.torchtitan",)
"""Blocks that import these are run by tests/integrations/test_torchtitan.py."""


def python_of(page: str) -> list[str]:
    return [
        code for code in blocks(page, "python") if not any(name in code for name in INTEGRATIONS)
    ]


def printed_by(page: str, folder: str) -> list[str]:
    """What each block prints on this rank."""
    out: list[str] = []
    scope: Scope = {}
    _, scopes = PAGES[page]
    with contextlib.chdir(folder):
        for code, make in zip(python_of(page), scopes, strict=True):
            scope = scope if make is None else make()
            stream = io.StringIO()
            with contextlib.redirect_stdout(stream):
                exec(compile(code, page, "exec"), scope)
            out.append(stream.getvalue())
    return out


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page, tmp_path):
    num_ranks, _ = PAGES[page]
    out = run_processes(num_ranks, printed_by, page, str(tmp_path))[0]
    for text in blocks(page, "text"):
        if text.startswith(("mesh (", "layers.")):
            assert text in "".join(out), "".join(out)


def test_the_rules_of_parameters_declare_matrices():
    scope = with_fused_weights()
    exec(python_of("parameters.md")[0], scope)
    counts = {spec.fqn: len(spec.matrices) for spec in scope["optimizer"].plan.params}
    assert counts == {"wqkv.weight": 3, "wo.weight": 32, "conv.weight": 1}


def test_every_page_is_above():
    pages = {path.name for path in DOCS.glob("*.md") if blocks(path.name, "python")}
    assert pages == PAGES.keys()


def test_python_that_other_tests_run_is_python():
    for page in PAGES:
        for code in blocks(page, "python"):
            ast.parse(code)


def test_toml_is_a_config():
    (text,) = blocks("integrations.md", "toml")
    config = MuonConfig.from_dict(tomllib.loads(text))
    assert config.sizes == {"dp_replicate": 2, "dp_shard": -1, "tp": 2}


@pytest.mark.parametrize("text", blocks("train.md", "yaml"))
def test_yaml_of_training_runs_is_a_config(text):
    assert TrainConfig.from_dict(parse_yaml(text)).data.train == "alpaca.jsonl"


ELSEWHERE = {
    ("git", "clone"): "people who install",
    ("pip", "install"): "tests/test_readme.py and .ci/run",
    ("pip", "wheel"): "tests/test_readme.py",
    ("muon-dtensor", "make-sample-data"): "tests/train/test_faults_of_runs.py",
    ("muon-dtensor", "train"): "tests/train",
    ("muon-dtensor", "validate"): "tests/cli/test_validate.py",
    ("muon-dtensor", "calibrate"): "tests/cli/test_calibrate.py",
    ("muon-dtensor", "version"): "tests/cli/test_cli.py",
}
"""Commands of docs/ by their first words, and where they are run."""


def commands() -> list[str]:
    lines = []
    for page in sorted(path.name for path in DOCS.glob("*.md")):
        for block in blocks(page, "sh"):
            joined = block.replace("\\\n", " ")
            lines += [line for line in joined.splitlines() if line.strip()]
    return lines


@pytest.mark.parametrize("command", commands())
def test_a_command_runs_or_names_its_test(command, tmp_path, monkeypatch, capsys):
    words = shlex.split(command, comments=True)
    if tuple(words[:2]) in ELSEWHERE:
        return
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text(PRESETS["gloo-local"].to_json())
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None), capsys.readouterr().err
    assert capsys.readouterr().out


def test_the_comparison_of_plans_md_is_what_is_printed(monkeypatch, capsys):
    (shown,) = [text for text in blocks("plans.md", "text") if "1d-owner" in text]
    arguments = ["--model", "llama3-70b", "--mesh", "dp_replicate=4,dp_shard=16,tp=8"]
    arguments += ["--compare", "naive,1d-owner,ours"]
    monkeypatch.setattr(sys, "argv", ["muon-dtensor", "plan", *arguments])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr().out
    for line in shown.splitlines():
        assert line.strip() in printed


def test_links_lead_somewhere():
    """Between pages, to headings, and to files of the repository."""
    for path in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            file, _, heading = target.partition("#")
            if file.startswith("http"):
                continue
            linked = path if not file else (path.parent / file).resolve()
            assert linked.exists(), f"{path.name}: {target}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
                assert heading in anchors, f"{path.name}: {target}"


def test_the_example_of_one_rank_s_step_runs():
    (out,) = run_processes(1, printed_by, "architecture.md", str(DOCS))[0]
    assert out.startswith("U0\n    Fill(buffer=0)\n    Send(")
    assert out.endswith("[3072, 3072, 3072, 3072]\n")


def test_the_files_of_the_glossary_exist():
    text = (DOCS / "architecture.md").read_text()
    paths = re.findall(r"`((?:layout|planning|algorithms|runtime|optimizer)/\w+\.py)`", text)
    assert len(set(paths)) > 20
    for path in paths:
        assert (DOCS.parent / "muon_dtensor" / path).is_file(), path
