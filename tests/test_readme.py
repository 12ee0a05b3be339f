"""What the README's table says of each call is what the plan prints; its Python is Python."""

import re
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
from tests.requirements.models import TinyTransformer
from tests.support.pool import run_processes

README = (Path(__file__).parents[1] / "README.md").read_text()


def rows() -> list[tuple[str, str, list[str]]]:
    """Setup, code of the config, and what the plan says, of the table of setups."""
    table = README[README.index("| setup |") :].split("\n\n")[0]
    found = []
    for line in table.splitlines()[2:]:
        setup, call, says = (cell.strip() for cell in line.strip("|").split("|"))
        code = re.findall(r"`([^`]+)`", call)[0]
        found.append((setup, code, re.findall(r"`([^`]+)`", says)))
    return found


def printed(setup: str, code: str) -> str:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    group = dist.group.WORLD
    model: nn.Module = TinyTransformer(64)
    named: Any = None
    if "FSDP2" in setup:
        fully_shard(model, mesh=mesh)
    elif "FSDP1" in setup:
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif "_pg" in code:
        tensor_dim = int("tp_pg" in code)
        named = [
            (name, nn.Parameter(p.detach().chunk(4, tensor_dim)[dist.get_rank()].clone()))
            for name, p in model.named_parameters()
        ]
    code = code.replace("...", f"pp_stage_id={dist.get_rank()}, pp_num_stages=4")
    scope = {"mesh": mesh, "group": group, **vars(muon_dtensor)}
    scope |= {name: getattr(muon_dtensor, name) for name in muon_dtensor.__all__}
    config = eval(code, scope)
    return str(Muon(named or model.named_parameters(), distributed_config=config).plan)


@pytest.mark.parametrize(("setup", "code", "says"), rows()[:-1], ids=[r[0] for r in rows()[:-1]])
def test_the_table_of_setups_says_what_plans_say(setup, code, says):
    assert says
    for plan in run_processes(4, printed, setup, code):
        for words in says:
            assert words in plan


def test_the_python_in_the_readme_parses():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        compile(block.replace("(...)", "()"), "README.md", "exec")
