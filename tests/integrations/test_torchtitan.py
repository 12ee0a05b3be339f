"""torchtitan 0.3's own optimizer container, scheduler and checkpoint code, on four gloo ranks."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.deadlines import run_program
from tests.support.pool import run_processes

pytestmark = [pytest.mark.integrations]

GOLDEN = Path(__file__).parent.parent / "golden" / "torchtitan_keys.txt"


@pytest.fixture(scope="module")
def titan():
    from tests.integrations import titan

    return titan


@pytest.fixture(scope="module")
def seen(titan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("titan")
    return run_processes(4, titan.container_scheduler_and_checkpoint, folder)


def test_every_parameter_is_claimed_by_one_optimizer(titan, seen):
    names = sorted(name for name, _ in titan.Titan().named_parameters())
    for rank in seen:
        assert rank.claimed == names
        assert (rank.num_optimizers, rank.num_schedulers) == (1, 1)
        muon = {name for name, algorithm in rank.algorithms.items() if algorithm == "muon"}
        assert muon == {
            f"layers.{i}.{name}.weight"
            for i in range(2)
            for name in ("attention.wqkv", "attention.wo", "w1")
        }


def test_one_scheduler_moves_all_learning_rates(seen):
    for rank in seen:
        assert rank.lr_metrics == ["lr/Muon/0", "lr/Muon/1", "lr/Muon/2"]
        assert rank.lrs[1] == pytest.approx(3e-3 / 0.02 * rank.lrs[0])


def test_checkpoint_keys_are_stable(seen):
    text = "\n".join([*seen[0].keys, *seen[0].group_keys]) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "keys of checkpoints are frozen: old ones must load"
    assert all(rank.keys == seen[0].keys for rank in seen)


def test_a_checkpoint_resumes_bitwise(seen):
    assert all(rank.resumed for rank in seen)


def test_metrics_are_there(seen):
    assert all(rank.has_metrics for rank in seen)


def test_a_sharded_step_is_that_of_one_process(titan):
    assert all(run_processes(4, titan.equals_one_process))


def test_what_is_declared_is_not_warned_of(titan, caplog):
    titan.pipeline_stage(False)
    assert not [r for r in caplog.records if "looks like several matrices" in r.getMessage()]
    titan.muon_optimizers().build(model_parts=[titan.Titan()])
    assert [r for r in caplog.records if "looks like several matrices" in r.getMessage()]


def test_pipeline_stages_without_some_kinds_of_parameters(titan):
    without = titan.pipeline_stage(False)
    assert "lm_head.weight" in without
    assert not any("tok_embeddings" in name for name in without)
    assert titan.pipeline_stage(True) == ["tok_embeddings.weight"]


def test_torchtitan_s_own_optimizers_stand_beside(titan):
    (first, mine), (second, theirs) = titan.other_optimizers()
    assert (first, mine) == ("AdamW", ["tok_embeddings.weight"])
    assert second == "Muon"
    assert "tok_embeddings.weight" not in theirs


def test_an_override_swaps_the_optimizer_of_a_recipe(titan):
    name, muon, adamw = titan.overridden()
    assert name == "MuonOptimizersContainer.Config"
    assert (muon["lr"], adamw["lr"], adamw["weight_decay"]) == (0.07, 5e-4, 0.3)


def test_the_mixin_composes_with_torchft(titan):
    num_steps, moved, keys = titan.with_torchft()
    assert (num_steps, moved) == (1, True)
    assert all(key.startswith("param_groups.") for key in keys)


def test_the_whole_trainer_trains_on_cpus(tmp_path):
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
