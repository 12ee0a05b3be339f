"""The README's Python code runs, and its table of setups agrees with printed plans."""

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import muon_dtensor
from muon_dtensor import Muon
from muon_dtensor.cli.demo_worker import load_script
from tests.requirements.models import TinyTransformer
from tests.support.deadlines import run_program
from tests.support.pool import run_processes
from tests.support.torchrun import EXAMPLES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def rows() -> list[tuple[str, str, list[str]]]:
    """Return (setup, code of the config, texts in the plan) for each row of the table of setups."""
    table = README[README.index("| setup |") :].split("\n\n")[0]
    result = []
    for line in table.splitlines()[2:]:
        setup, call, texts = (cell.strip() for cell in line.strip("|").split("|"))
        code = re.findall(r"`([^`]+)`", call)[0]
        result.append((setup, code, re.findall(r"`([^`]+)`", texts)))
    return result


def printed_plan(setup: str, code: str) -> str:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    group = dist.group.WORLD
    model: nn.Module = TinyTransformer(64)
    shards: Any = None
    if "FSDP2" in setup:
        fully_shard(model, mesh=mesh)
    elif "FSDP1" in setup:
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif "_pg" in code:
        tensor_dim = int("tp_pg" in code)
        shards = [
            (name, nn.Parameter(p.detach().chunk(4, tensor_dim)[dist.get_rank()].clone()))
            for name, p in model.named_parameters()
        ]
    code = code.replace("...", f"pp_stage_id={dist.get_rank()}, pp_num_stages=4")
    scope = {"mesh": mesh, "group": group, **vars(muon_dtensor)}
    scope |= {name: getattr(muon_dtensor, name) for name in muon_dtensor.__all__}
    config = eval(code, scope)
    return str(Muon(shards or model.named_parameters(), distributed_config=config).plan)


@pytest.mark.parametrize(("setup", "code", "texts"), rows()[:-1], ids=[r[0] for r in rows()[:-1]])
def test_the_table_of_setups_agrees_with_printed_plans(setup, code, texts):
    assert texts
    for plan in run_processes(4, printed_plan, setup, code):
        for text in texts:
            assert text in plan


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def pip(*arguments: str) -> None:
    run = run_program([sys.executable, "-m", "pip", *arguments], 120)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.fixture(scope="module")
def installed_wheel(tmp_path_factory) -> Path:
    """A folder in which a wheel of this package is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    (wheel,) = folder.glob("muon_dtensor-*-py3-none-any.whl")
    pip("install", "--no-deps", "--target", str(folder / "site"), str(wheel))
    return folder / "site"


@pytest.mark.P1
def test_the_example_runs_beside_an_installed_wheel(installed_wheel, tmp_path):
    """Copied into an empty folder, as a user would."""
    program = "import muon_dtensor\nprint(muon_dtensor.__file__)\n" + BLOCKS[0]
    (tmp_path / "example.py").write_text(program)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")
    command = [sys.executable, *torchrun, "example.py"]
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(installed_wheel)}
    run = run_program(command, 120, env=env, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert str(installed_wheel / "muon_dtensor" / "__init__.py") in run.stdout
    assert "mesh (dp_shard=4): 2 matrices" in run.stdout


@pytest.mark.P1
def test_a_wheel_holds_types_and_examples(installed_wheel):
    assert (installed_wheel / "muon_dtensor" / "py.typed").is_file()
    examples = installed_wheel / "share" / "muon_dtensor" / "examples"
    assert {path.name for path in examples.glob("*.py")} == {p.name for p in EXAMPLES.glob("*.py")}


def quick_start_output() -> str:
    """Return the output of the quick start with examples/train_gpt.py's model, on 2 x 2 ranks."""
    script = load_script(str(EXAMPLES / "train_gpt.py"))
    config = script.Config()
    model = script.make_model(config, script.make_mesh(config, "cpu"))
    scope = {"fully_shard": lambda sharded: sharded, "parallelize_module": lambda _: model}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(BLOCKS[1], scope)
    return out.getvalue()


def test_the_quick_start_prints_the_plan_in_the_readme():
    expected = README.split("```text\n")[1].split("```")[0].splitlines()
    output = run_processes(4, quick_start_output)[0]
    printed = [" ".join(line.split()) for line in output.splitlines()]
    assert len(expected) > 5
    for line in expected:
        assert " ".join(line.split()) in printed


def test_every_block_is_run_here():
    assert len(BLOCKS) == 2
