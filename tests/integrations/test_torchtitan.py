"""Muon in torchtitan 0.3's optimizers container, scheduler and checkpoints, on four gloo ranks."""

import json
import os
import re
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from tests.support.deadlines import run_program
from tests.support.pool import run_processes

pytestmark = [pytest.mark.integrations]

GOLDEN = Path(__file__).parent.parent / "golden" / "torchtitan_keys.txt"


@pytest.fixture(scope="module")
def titan():
    from tests.integrations import titan

    return titan


@pytest.fixture(scope="module")
def reports(titan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("titan")
    return run_processes(4, titan.container_scheduler_and_checkpoint, folder)


def test_one_optimizer_holds_every_parameter(titan, reports):
    names = sorted(name for name, _ in titan.Titan().named_parameters())
    for report in reports:
        assert report.param_names == names
        assert (report.num_optimizers, report.num_schedulers) == (1, 1)
        muon = {name for name, algorithm in report.algorithms.items() if algorithm == "muon"}
        assert muon == {
            f"layers.{i}.{name}.weight"
            for i in range(2)
            for name in ("attention.wqkv", "attention.wo", "w1")
        }


def test_one_scheduler_sets_all_learning_rates(reports):
    for report in reports:
        assert report.lr_metrics == ["lr/Muon/0", "lr/Muon/1", "lr/Muon/2"]
        assert report.lrs[1] == pytest.approx(3e-3 / 0.02 * report.lrs[0])


def test_checkpoint_keys_are_stable(reports):
    text = "\n".join([*reports[0].keys, *reports[0].group_keys]) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "keys of checkpoints are frozen: old checkpoints must load"
    assert all(report.keys == reports[0].keys for report in reports)


def test_a_checkpoint_resumes_bitwise(reports):
    assert all(report.resumed for report in reports)


def test_metrics_are_available(reports):
    assert all(report.has_metrics for report in reports)


def test_a_sharded_step_equals_the_step_of_one_process(titan):
    assert all(run_processes(4, titan.equals_one_process))


def test_declared_matrices_cause_no_warning(titan, caplog):
    titan.pipeline_stage(False)
    assert not [r for r in caplog.records if "looks like several matrices" in r.getMessage()]
    titan.muon_optimizers().build(model_parts=[titan.Titan()])
    assert [r for r in caplog.records if "looks like several matrices" in r.getMessage()]


def test_pipeline_stages_without_some_kinds_of_parameters(titan):
    names = titan.pipeline_stage(False)
    assert "lm_head.weight" in names
    assert not any("tok_embeddings" in name for name in names)
    assert titan.pipeline_stage(True) == ["tok_embeddings.weight"]


def test_torchtitan_s_adamw_can_be_used_beside_muon(titan):
    (first, adamw_names), (second, muon_names) = titan.other_optimizers()
    assert (first, adamw_names) == ("AdamW", ["tok_embeddings.weight"])
    assert second == "Muon"
    assert "tok_embeddings.weight" not in muon_names


def test_an_override_replaces_the_optimizer_of_a_recipe(titan):
    name, muon, adamw = titan.overridden()
    assert name == "MuonOptimizersContainer.Config"
    assert (muon["lr"], adamw["lr"], adamw["weight_decay"]) == (0.07, 5e-4, 0.3)


def test_the_mixin_composes_with_torchft(titan):
    num_steps, moved, keys = titan.with_torchft()
    assert (num_steps, moved) == (1, True)
    assert all(key.startswith("param_groups.") for key in keys)


def test_torchtitan_s_trainer_trains_on_cpus(tmp_path):
    """Five steps of torchtitan's smallest Llama under FSDP and TP, by `--override.imports`."""
    script = Path(__file__).parent / "titan_trainer.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "4", str(script), str(tmp_path)]
    done = run_program(command, 200, env={"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["container"], report["optimizer"]) == ("MuonOptimizersContainer", "Muon")
    assert len(report["losses"]) == 5
    assert report["losses"][-1] < report["losses"][0] - 1
    assert "mesh (fsdp=2, tp=2): 312 matrices" in report["plan"]
    assert "rows over tp=2 then fsdp=2" in report["plan"]


def test_the_block_of_the_documentation_declares_heads(titan):
    text = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "titan" in b]
    scope = {"config": SimpleNamespace()}
    exec(block, scope)
    model = nn.Sequential(OrderedDict(wqkv=nn.Linear(64, 3 * 128, bias=False)))
    (optimizer,) = scope["config"].optimizer.build(model_parts=[model])
    (spec,) = optimizer.plan.params
    assert [(matrix.rows, matrix.cols) for matrix in spec.matrices] == [(128, 64)] * 3
