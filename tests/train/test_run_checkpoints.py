"""Checkpoints of a training run: gloo processes, real files, damaged ones."""

import copy
import json
import logging
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from muon_dtensor import CheckpointError, Muon, group_parameters
from muon_dtensor.train.checkpoints import Checkpoints, apply_training_state, training_state
from tests.support.pool import run_processes

MESHES: dict[str, tuple[int, int, int]] = {
    "fsdp": (1, 4, 1),
    "hsdp": (2, 2, 1),
    "fsdp_tp": (1, 2, 2),
    "tp": (1, 1, 4),
}


def setup(
    sizes: tuple[int, int, int] | None, dtype: torch.dtype = torch.bfloat16
) -> tuple[nn.Module, Muon]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.LayerNorm(16))
    if sizes is not None:
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replica", "shard", "tp"))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        model = parallelize_module(model, mesh["tp"], plan)
        model = fully_shard(model, mesh=mesh["replica", "shard"])
    return model, Muon(group_parameters(model), lr=0.1, ns_dtype=dtype)


def steps(model: nn.Module, optimizer: Muon, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> list[Tensor]:
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]


def save_and_go_on(
    folder: str,
    sizes: tuple[int, int, int],
    asynchronous: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> Any:
    model, optimizer = setup(sizes, dtype)
    checkpoints = Checkpoints(folder, asynchronous=asynchronous)
    for step in (1, 2, 3):
        steps(model, optimizer, step - 1, step)
        checkpoints.save(training_state(model, optimizer), step, {"data": [step, "x"]})
    saved = values(model)
    steps(model, optimizer, 3, 6)  # while the last one is written
    checkpoints.wait()
    return saved, values(model)


def resume(
    folder: str, sizes: tuple[int, int, int] | None, dtype: torch.dtype = torch.bfloat16
) -> Any:
    model, optimizer = setup(sizes, dtype)
    restored = Checkpoints(folder).load(lambda: training_state(model, optimizer))
    assert restored is not None
    apply_training_state(model, optimizer, restored.state)
    loaded = values(model)
    steps(model, optimizer, restored.step, 6)
    return loaded, values(model), (restored.path.name, restored.notes)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("layout", MESHES)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    layout: str, asynchronous: bool, tmp_path: Path
) -> None:
    sizes = MESHES[layout]
    expected = run_processes(4, save_and_go_on, str(tmp_path), sizes, asynchronous)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-3"]
    resumed = run_processes(4, resume, str(tmp_path), sizes)
    for (loaded, last, notes), (saved, reference) in zip(resumed, expected, strict=True):
        assert notes == ("step-3", {"data": [3, "x"]})
        assert all(map(torch.equal, loaded, saved))
        assert all(map(torch.equal, last, reference))


def test_a_checkpoint_loads_on_other_meshes_and_on_one_process(tmp_path: Path) -> None:
    arguments = (str(tmp_path), MESHES["fsdp_tp"], True, torch.float32)
    saved, reference = run_processes(4, save_and_go_on, *arguments)[0]
    others = [run_processes(4, resume, str(tmp_path), MESHES["hsdp"], torch.float32)[0]]
    others.append(resume(str(tmp_path), None, torch.float32))
    for loaded, last, _ in others:
        assert all(map(torch.equal, loaded, saved))
        # gradients are summed in another order, which an iteration in bfloat16 would magnify
        for tensor, expected in zip(last, reference, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-3)


def flip_a_byte(path: Path) -> None:
    file = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def remove_a_file(path: Path) -> None:
    next(path.glob("*.distcp")).unlink()


def empty_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("")


@pytest.mark.parametrize("damage", [flip_a_byte, remove_a_file, empty_the_manifest])
def test_a_damaged_checkpoint_is_named_and_the_one_before_loads(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = setup(None)
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        steps(model, optimizer, step - 1, step)
        checkpoints.save(training_state(model, optimizer), step)
    expected = values(model)
    damage(tmp_path / "step-2")
    with caplog.at_level(logging.WARNING):
        restored = checkpoints.load(lambda: training_state(model, optimizer))
    assert restored is not None
    assert restored.path.name == "step-1"
    (message,) = restored.damaged
    assert message.startswith("step-2 cannot be read: ")
    assert message in caplog.text
    assert all(map(torch.equal, values(model), expected))  # the live model is unchanged
    with pytest.raises(CheckpointError, match="step-2 cannot be read: "):
        checkpoints.load(lambda: training_state(model, optimizer), tmp_path / "step-2")


def test_a_folder_without_checkpoints_gives_none_and_parts_are_ignored(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "new")
    (tmp_path / "new" / "step-7.part").mkdir()
    assert checkpoints.load(dict) is None


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"x": torch.ones(3)}, 1)
    manifest = tmp_path / "step-1" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 99}))
    with pytest.raises(CheckpointError, match="format version 99"):
        checkpoints.load(lambda: {"x": torch.zeros(3)})


def test_frozen_parameters_can_be_left_out(tmp_path: Path) -> None:
    model, optimizer = setup(None)
    frozen = nn.Linear(16, 16).requires_grad_(False)
    model = nn.Sequential(frozen, model)
    checkpoints = Checkpoints(tmp_path)
    state = training_state(model, optimizer, trainable_only=True)
    assert not [name for name in state["model"] if name.startswith("0.")]
    checkpoints.save(state, 1)
    expected, weight = values(model), frozen.weight.detach().clone()
    steps(model, optimizer, 0, 2)
    restored = checkpoints.load(lambda: training_state(model, optimizer, trainable_only=True))
    assert restored is not None
    apply_training_state(model, optimizer, restored.state)
    assert all(map(torch.equal, values(model), expected))
    assert torch.equal(frozen.weight, weight)


def test_notes_that_json_cannot_hold_fail_the_save(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        Checkpoints(tmp_path).save({"x": torch.ones(3)}, 1, {"tensor": torch.ones(2)})
    assert Checkpoints(tmp_path).complete() == []


def test_keep_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be 1 or more, got 0"):
        Checkpoints(tmp_path, keep=0)


def save_on_a_folder_that_fails(folder: str, asynchronous: bool) -> str:
    model, optimizer = setup(MESHES["fsdp"])
    checkpoints = Checkpoints(folder, asynchronous=asynchronous)
    checkpoints.save(training_state(model, optimizer), 1)
    checkpoints.wait()
    if dist.get_rank() == 0:  # a file where the next checkpoint is written
        (Path(folder) / "step-2.part").write_text("")
    dist.barrier()
    try:
        checkpoints.save(training_state(model, optimizer), 2)
        checkpoints.wait()
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_save_raises_on_every_rank_and_keeps_the_older(
    asynchronous: bool, tmp_path: Path
) -> None:
    messages = run_processes(4, save_on_a_folder_that_fails, str(tmp_path), asynchronous)
    assert all("could not be written (rank " in message for message in messages)
    assert (tmp_path / "step-1" / "manifest.json").exists()


def save_offset_shards(folder: str) -> tuple[bool, list[Tensor], dict[str, Any] | None]:
    """Save DTensors whose shard does not begin its storage, change them, and load them."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    rank = dist.get_rank()
    values = torch.arange(12.0) + 100 * rank
    tensor = DTensor.from_local(values[4:], mesh, (Shard(0),))
    try:
        copy.deepcopy(tensor)
        is_copied_by_torch = True
    except RuntimeError:
        is_copied_by_torch = False
    checkpoints = Checkpoints(folder, asynchronous=True)
    state = {"x": tensor, "nested": [{"plain": torch.ones(2)}], "step": 3}
    checkpoints.save(state, 1, rank_notes={"rank": rank})
    values.zero_()  # while it is written
    checkpoints.wait()
    restored = checkpoints.load(lambda: state)
    assert restored is not None
    assert restored.state["step"] == 3
    loaded = [restored.state["x"].to_local(), tensor.to_local()]
    return is_copied_by_torch, loaded, restored.rank_notes


def test_shards_that_do_not_begin_their_storage_are_saved(tmp_path):
    """As transformers makes them; torch's own copies raise (torch 2.13)."""
    for rank, results in enumerate(run_processes(2, save_offset_shards, str(tmp_path))):
        _, (loaded, live), notes = results
        assert torch.equal(loaded, torch.arange(4.0, 12.0) + 100 * rank)
        assert not live.any()
        assert notes == {"rank": rank}


def load_elsewhere(folder: str) -> Any:
    restored = Checkpoints(folder).load(lambda: {"w": torch.zeros(2)})
    assert restored is not None
    return restored.rank_notes, restored.notes


def test_notes_of_a_rank_are_those_of_runs_of_as_many_ranks(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"w": torch.ones(2)}, 1, {"all": 1}, {"mine": 2})
    restored = checkpoints.load(lambda: {"w": torch.zeros(2)})
    assert (restored.rank_notes, restored.notes) == ({"mine": 2}, {"all": 1})
    for result in run_processes(2, load_elsewhere, str(tmp_path)):
        assert result == (None, {"all": 1})


def save_where_one_rank_cannot(folder: str) -> tuple[str, list[str]]:
    checkpoints = Checkpoints(folder, asynchronous=True)
    checkpoints.save({"w": torch.ones(2)}, 1)
    checkpoints.wait()
    write = Path.write_text

    def write_or_fail(path: Path, text: str) -> int:
        if path.name == "rank-1.json":
            raise OSError("no space on this node")
        return write(path, text)

    with mock.patch.object(Path, "write_text", write_or_fail), pytest.raises(CheckpointError) as e:
        checkpoints.save({"w": torch.ones(2)}, 2)
    checkpoints.save({"w": torch.ones(2)}, 3)  # the next one works
    checkpoints.wait()
    return str(e.value), [path.name for path in checkpoints.complete()]


def test_a_rank_that_cannot_write_ends_the_save_on_all_ranks(tmp_path):
    for message, complete in run_processes(2, save_where_one_rank_cannot, str(tmp_path)):
        assert "rank 1: no space on this node" in message
        assert complete == ["step-3", "step-1"]


def test_a_run_that_goes_back_replaces_later_checkpoints(tmp_path, caplog):
    """Otherwise the checkpoints of the abandoned steps would be resumed, and new ones deleted."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (2, 4, 6):
        checkpoints.save({"w": torch.full((2,), float(step))}, step)
    assert [path.name for path in checkpoints.complete()] == ["step-6", "step-4"]
    with caplog.at_level(logging.WARNING):
        checkpoints.save({"w": torch.full((2,), 5.0)}, 5)
    assert [path.name for path in checkpoints.complete()] == ["step-5", "step-4"]
    assert "step-6 of an earlier run replaced by step-5" in caplog.text
    restored = checkpoints.load(lambda: {"w": torch.zeros(2)})
    assert restored.state["w"].tolist() == [5, 5]
