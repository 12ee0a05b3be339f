"""Layout of the package: folders import only folders below them, and imports have no cycles."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "muon_dtensor"
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))

LEVELS = (
    ("errors", "version"),
    ("layout",),
    ("planning", "algorithms"),
    ("runtime",),
    ("distributed_config",),
    ("optimizer",),
    ("clipping", "config_file", "grouping", "islands", "qk_clip", "recognition"),
    ("integrations",),
    ("train",),
    ("cli",),
    ("__init__",),
)
"""A folder or module imports only its own folder and rows above its own. Public tools (the row of
`clipping`) may import each other."""

MAY_IMPORT_PUBLIC_NAMES = ("integrations", "cli", "train")
"""Folders that import public names from `muon_dtensor` itself, as users do."""

STDLIB_ONLY = ("errors", "layout", "planning")
USE_TORCH_DISTRIBUTED = (
    *("runtime", "distributed_config", "config_file", "cli", "integrations", "islands", "train"),
)
ONLY_TYPES = (
    *("torch.distributed", "torch.distributed.device_mesh", "torch.distributed.tensor"),
    "torch.distributed.checkpoint.state_dict",
)
PRIVATE_NAMES = (
    *("_StridedShard", "_is_flat_param", "_fsdp_flattened", "._spec", "._local_", "._profiler"),
    *("_disable_dynamo", "_get_default_group", "_get_default_store", "_module_state_mapping"),
)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module
            yield node.module
            if node.module.startswith("muon_dtensor"):  # a module may be imported from its folder
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


NAMES = {module_name(path) for path in MODULES}


def own_imports(path: Path) -> set[str]:
    """Return the modules of the package that a module imports."""
    inner = {
        name.removeprefix("muon_dtensor.") if name != "muon_dtensor" else "__init__"
        for name in imports(path)
        if name == "muon_dtensor" or name.startswith("muon_dtensor.")
    }
    return inner & NAMES


def folder_of(name: str) -> str:
    return name.split(".")[0]


def level_of(name: str) -> int:
    (level,) = (i for i, folders in enumerate(LEVELS) if folder_of(name) in folders)
    return level


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_down(path):
    module = module_name(path)
    for name in own_imports(path):
        if name == "__init__":
            assert folder_of(module) in MAY_IMPORT_PUBLIC_NAMES, f"{path} imports public names"
            continue
        is_same_folder = folder_of(name) == folder_of(module)
        are_tools = {folder_of(name), folder_of(module)} <= set(LEVELS[6])
        assert level_of(name) < level_of(module) or is_same_folder or are_tools, (
            f"{path} imports {name}"
        )


PUBLIC_MODULES = {"__init__", "config_file", "integrations.torchtitan", "islands"}
"""Documented modules: `train` could be a package of its own that depends on this one."""


@pytest.mark.parametrize(
    "path", [p for p in MODULES if folder_of(module_name(p)) == "train"], ids=str
)
def test_training_runs_import_only_public_names(path):
    others = {name for name in own_imports(path) if folder_of(name) != "train"}
    assert others <= PUBLIC_MODULES, path
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("muon_dtensor"):
            assert not any(
                alias.name.startswith("_") for alias in node.names if alias.name != "__version__"
            )


def test_imports_have_no_cycles():
    graph = {module_name(path): own_imports(path) - {"__init__"} for path in MODULES}
    folders = {name for name in NAMES if any(other.startswith(f"{name}.") for other in NAMES)}
    for name, targets in graph.items():
        if name not in folders:  # a folder's __init__ imports the names that it exports
            graph[name] = {
                t for t in targets if t not in folders or folder_of(t) != folder_of(name)
            }
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    "path", [p for p in MODULES if folder_of(module_name(p)) in STDLIB_ONLY], ids=str
)
def test_planning_imports_only_the_standard_library(path):
    for name in imports(path):
        assert name.split(".")[0] in {*sys.stdlib_module_names, "muon_dtensor"}, name


def reaches_distributed(source: str) -> bool:
    """Whether the source uses the attribute `torch.distributed`, which imports do not show."""
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == "distributed"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
        for node in ast.walk(ast.parse(source))
    )


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_torch_distributed_is_used_in_few_folders(path):
    text = (ROOT / path).read_text()
    if folder_of(module_name(path)) in USE_TORCH_DISTRIBUTED:
        return
    for name in imports(path):
        if name.startswith("torch.distributed"):
            assert name in ONLY_TYPES, f"{path} imports {name}"
            assert "dist." not in text, f"{path} calls torch.distributed"
    assert not reaches_distributed(text), f"{path} calls torch.distributed"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name != "torch_private.py"], ids=str)
def test_private_names_of_torch_are_in_one_file(path):
    text = (ROOT / path).read_text()
    for name in PRIVATE_NAMES:
        assert name not in text, f"{path} reads torch's private {name}"


def test_a_planted_call_is_detected():
    assert reaches_distributed("import torch\ntorch.distributed.barrier()")
    assert not reaches_distributed('import torch\n"""torch.distributed"""\ntorch.ones(1)')


def test_a_planted_import_is_detected(monkeypatch):
    monkeypatch.setattr("tests.test_package_layout.own_imports", lambda path: {"runtime.executor"})
    with pytest.raises(AssertionError, match=r"planning.cost\.py imports runtime\.executor"):
        test_imports_point_down(Path("planning/cost.py"))
    with pytest.raises(pytest.fail.Exception, match="a cycle"):
        test_imports_have_no_cycles()
