"""A number imports only lower numbers, and siblings on floor 1 don't know each other."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "muon_dtensor"
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))

MAY_REACH = {
    "version": (),
    "errors": (),
    "layout": (),
    "shards": ("errors", "layout"),
    "matrices": ("errors", "layout"),
    "patterns": ("errors", "layout", "matrices"),
    "planning": ("errors", "layout", "matrices", "planning"),
    "orthogonalize": ("errors", "orthogonalize"),
    "update": (),
    "adamw": (),
    "runtime": (
        *("errors", "layout", "matrices", "patterns", "shards", "planning", "orthogonalize"),
        "update",
        "runtime",
    ),
    "options": ("errors", "orthogonalize", "patterns", "runtime", "update"),
    "grouping": ("errors", "options", "runtime"),
    "assignment": ("errors",),
    "by_hand": ("assignment", "errors", "layout", "shards", "runtime"),
    "config": ("assignment", "by_hand", "runtime"),
    "group_configs": ("assignment", "by_hand", "config", "runtime"),
    "census": (
        *("errors", "layout", "matrices", "options", "patterns", "planning", "runtime"),
        *("adamw", "assignment", "config", "orthogonalize", "state", "version"),
    ),
    "settings": ("errors", "options", "orthogonalize", "planning", "runtime"),
    "state": ("adamw", "errors", "layout", "options", "runtime"),
    "metrics": ("census", "layout", "orthogonalize", "planning", "runtime", "update"),
    "prepared": (
        *("adamw", "census", "config", "errors", "metrics", "options", "planning", "runtime"),
        *("settings", "state"),
    ),
    "optim": (
        *("errors", "layout", "planning", "runtime", "options", "prepared"),
        *("config", "grouping", "matrices", "orthogonalize", "settings", "state"),
    ),
    "job_config": ("config", "grouping", "optim", "options", "orthogonalize"),
    "qk_clip": ("runtime",),
    "clipping": ("layout", "runtime"),
    "full_state": ("errors", "optim", "runtime", "state"),
    "integrations": ("",),
    "cli": ("",),
    "__init__": ("",),
}

RUNTIME_MAY_PLAN_WITH = (
    *(
        "planning.buffer_placement",
        "planning.plan",
        "planning.normuon_state",
        "planning.routes",
        "planning.schedule",
    ),
)
ONLY_IN_DESCRIBE = (
    "_StridedShard",
    "_is_flat_param",
    "_fsdp_flattened",
    "._spec",
    "._local_",
    "._profiler",
    "_disable_dynamo",
    "_get_default_group",
)
HOMES = ("runtime", "config", "job_config", "cli", "integrations")
ONLY_TYPES = (
    *("torch.distributed", "torch.distributed.device_mesh", "torch.distributed.tensor"),
    "torch.distributed.checkpoint.state_dict",
)
STDLIB_ONLY = ("errors", "layout", "matrices", "patterns", "shards", "planning")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def own_imports(path: Path) -> Iterator[str]:
    for name in imports(path):
        if name == "muon_dtensor" or name.startswith("muon_dtensor."):
            yield name.removeprefix("muon_dtensor").removeprefix(".")


def reaches_distributed(source: str) -> bool:
    """Whether it goes to torch.distributed through the name `torch`, which no import tells."""
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == "distributed"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
        for node in ast.walk(ast.parse(source))
    )


def floor_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_down(path):
    for name in own_imports(path):
        assert name.split(".")[0].startswith(MAY_REACH[floor_of(path)]), f"{path} imports {name}"
        if floor_of(path) == "runtime" and name.startswith("planning"):
            assert name in RUNTIME_MAY_PLAN_WITH, f"{path} imports {name}"


@pytest.mark.parametrize("path", [p for p in MODULES if floor_of(p) in STDLIB_ONLY], ids=str)
def test_planning_is_stdlib_only(path):
    for name in imports(path):
        assert name.split(".")[0] in {*sys.stdlib_module_names, "muon_dtensor"}, name


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_torch_distributed_has_one_home(path):
    text = (ROOT / path).read_text()
    for name in imports(path):
        if name.startswith("torch.distributed") and floor_of(path) not in HOMES:
            assert name in ONLY_TYPES, f"{path} imports {name}"
            assert "dist." not in text, f"{path} calls torch.distributed"
    if floor_of(path) not in HOMES:
        assert not reaches_distributed(text), f"{path} calls torch.distributed"
    if path.parts != ("runtime", "describe.py"):
        for name in ONLY_IN_DESCRIBE:
            assert name not in text, f"{path} reads torch's private {name}"


def test_a_planted_call_is_caught():
    assert reaches_distributed("import torch\ntorch.distributed.barrier()")
    assert not reaches_distributed('import torch\n"""torch.distributed"""\ntorch.ones(1)')


def test_a_planted_import_is_caught(monkeypatch):
    monkeypatch.setattr("tests.test_floors.own_imports", lambda path: iter(["planning.cost"]))
    with pytest.raises(AssertionError, match=r"runtime.executor\.py imports planning\.cost"):
        test_imports_point_down(Path("runtime/executor.py"))
