"""Checkpoints of a training run: complete or absent, the last few kept, checked before they load.

    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(training_state(model, optimizer), step)
    restored = checkpoints.load(lambda: training_state(model, optimizer))
    if restored is not None:
        apply_training_state(model, optimizer, restored.state)

A checkpoint is a folder `step-N` of torch.distributed.checkpoint with a `manifest.json`. It is
written as `step-N.part` and renamed when all ranks have written, so that a folder without that
suffix is complete.
"""

import copy
import json
import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from muon_dtensor import CheckpointError, __version__, checkpointable

FORMAT_VERSION = 1
"""Of manifests; raised when an older reader could misread a newer checkpoint."""

BLOCK_NBYTES = 1 << 20
"""Bytes per read of a file whose checksum is computed."""

logger = logging.getLogger(__name__)


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, trainable_only: bool = False
) -> dict[str, Any]:
    """Return the tensors of a model and its optimizer, by name; this rank's shards.

    `trainable_only` leaves out frozen parameters (adapters).
    """
    options = StateDictOptions(ignore_frozen_params=trainable_only)
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def apply_training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Set model and optimizer to the result of `training_state`. A collective of all ranks.

    Parameters that the state does not have (frozen ones) are unchanged.
    """
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optimizer"])


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint that was read. `damaged`: newer checkpoints that cannot be read, and why."""

    path: Path
    step: int
    state: dict[str, Any]
    notes: dict[str, Any]
    damaged: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one run in a folder that all ranks reach.

    `save`, `load` and `wait` are collectives of all ranks; without a process group there is one
    rank.

    Args:
        folder: created if it does not exist.
        keep: number of checkpoints kept; older ones are deleted after a newer one is complete.
        asynchronous: write in a thread, on a process group of its own, while training goes on.
            `save` then copies the state to host memory and returns.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, asynchronous: bool = False) -> None:
        if keep < 1:
            raise ValueError(f"keep must be 1 or more, got {keep}")
        self.folder, self._keep = Path(folder), keep
        self.folder.mkdir(parents=True, exist_ok=True)
        self._is_alone = not dist.is_initialized()
        self._is_writer = self._is_alone or dist.get_rank() == 0
        self._group = None
        if asynchronous and not self._is_alone:
            self._group = dist.new_group(backend="gloo")
        self._in_progress: Future[Any] | None = None

    def save(
        self, state: dict[str, Any], step: int, notes: Mapping[str, Any] | None = None
    ) -> None:
        """Save a state as `step-{step}`; first waits for a save in progress.

        Args:
            state: nested dicts of tensors, DTensors and plain values.
            step: number of completed training steps.
            notes: values for JSON that are read without loading tensors; rank 0's are kept.

        Raises CheckpointError on every rank where this save, or the one in progress, failed. Older
        checkpoints are unchanged then.
        """
        self.wait()
        part = self.folder / f"step-{step}.part"
        if self._is_writer:
            shutil.rmtree(part, ignore_errors=True)
        self._barrier()
        record = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "world_size": 1 if self._is_alone else dist.get_world_size(),
            "versions": {"muon_dtensor": __version__, "torch": torch.__version__},
            "notes": dict(notes or {}),
        }
        written: Future[Any] = Future()
        try:
            with _torch_checkpoint(state):
                if self._group is not None:
                    result = async_save(state, checkpoint_id=part, process_group=self._group)
                    assert isinstance(result, Future)
                    written = result
                else:
                    written.set_result(save(state, checkpoint_id=part, no_dist=self._is_alone))
        except (Exception, CheckpointException) as error:
            written.set_exception(error)
        self._in_progress = _then(written, lambda: self._complete(part, record))
        if self._group is None:
            self.wait()

    def wait(self) -> None:
        """Wait until a save in progress is complete. Raises CheckpointError if it failed."""
        if self._in_progress is None:
            return
        future, self._in_progress = self._in_progress, None
        error = future.exception()
        reason = "" if error is None else _last_line(error)
        reasons = [reason]
        if not self._is_alone:
            reasons = [""] * dist.get_world_size()
            dist.all_gather_object(reasons, reason, group=self._group)
        failed = {rank: text for rank, text in enumerate(reasons) if text}
        if failed:
            rank, text = min(failed.items())
            raise CheckpointError(
                f"a checkpoint in {self.folder} could not be written (rank {rank}: {text}); "
                f"the complete checkpoints in this folder are unchanged"
            )

    def complete(self) -> list[Path]:
        """Return the complete checkpoints, newest first. No collective."""
        paths = [path for path in self.folder.glob("step-*") if path.name[5:].isdecimal()]
        return sorted(paths, key=lambda path: -int(path.name[5:]))

    def load(
        self, make_state: Callable[[], dict[str, Any]], path: str | Path | None = None
    ) -> Restored | None:
        """Read a checkpoint into a copy of a state; the live tensors do not change.

        Tensors may be laid out in another way than those that were saved.

        Args:
            make_state: returns a state with the keys, shapes and layouts to be read.
            path: a checkpoint. Default: the newest in the folder, or the one before if that is
                damaged (a warning names what is wrong), and so on.

        Returns:
            None where the folder has no checkpoint.

        Raises:
            CheckpointError: `path` is damaged, all checkpoints are, or one was written by a newer
                version of this format.
        """
        self.wait()
        candidates = [Path(path)] if path is not None else self.complete()
        candidates = self._from_writer(candidates)
        damaged: list[str] = []
        for candidate in candidates:
            manifest, problem = self._from_writer(
                _checked_manifest(candidate) if self._is_writer else None
            )
            if manifest is not None and manifest["format_version"] > FORMAT_VERSION:
                raise CheckpointError(
                    f"{candidate} has format version {manifest['format_version']}, this version of "
                    f"muon_dtensor reads {FORMAT_VERSION}: update muon_dtensor"
                )
            if manifest is not None:
                state = copy.deepcopy(make_state())
                try:
                    with _torch_checkpoint(state):
                        load(state, checkpoint_id=candidate, no_dist=self._is_alone)
                except (Exception, CheckpointException) as error:
                    problem = _last_line(error)
                else:
                    step, notes = manifest["step"], manifest["notes"]
                    return Restored(candidate, step, state, notes, tuple(damaged))
            damaged.append(f"{candidate.name} cannot be read: {problem}")
            if self._is_writer:
                logger.warning("%s: %s", candidate.parent, damaged[-1])
        if damaged:
            raise CheckpointError(f"no checkpoint in {self.folder}: {'; '.join(damaged)}")
        return None

    def _complete(self, part: Path, record: dict[str, Any]) -> None:
        """Write the manifest, rename the folder and delete old ones; on rank 0.

        Runs when torch's coordinator has written its metadata, after all ranks wrote their files.
        """
        if not self._is_writer:
            return
        files = {path.name: _checksum(path) for path in sorted(part.iterdir())}
        (part / "manifest.json").write_text(json.dumps({**record, "files": files}, indent=1))
        path = part.with_suffix("")
        shutil.rmtree(path, ignore_errors=True)
        os.rename(part, path)
        for old in self.complete()[self._keep :]:
            shutil.rmtree(old)

    def _barrier(self) -> None:
        if not self._is_alone:
            dist.barrier(group=self._group)

    def _from_writer(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self._is_alone:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]


@contextmanager
def _torch_checkpoint(state: dict[str, Any]) -> Iterator[None]:
    """A context for torch's `save` and `load`: right positions, no advice about one process."""
    with warnings.catch_warnings(), checkpointable(state):
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _then(future: "Future[Any]", action: Callable[[], None]) -> "Future[None]":
    """Return the future of an action that runs after another future, if that did not fail."""
    result: Future[None] = Future()

    def run(done: "Future[Any]") -> None:
        error = done.exception()
        if error is None:
            try:
                action()
            except Exception as problem:  # a future without a result makes `wait` hang
                error = problem
        if error is None:
            result.set_result(None)
        else:
            result.set_exception(error)

    future.add_done_callback(run)
    return result


def _checksum(path: Path) -> list[int]:
    """Return the size in bytes and the CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_NBYTES):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]


def _checked_manifest(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return a checkpoint's manifest, or None and what is wrong with its files.

    torch does not notice a changed byte within a tensor, so all files are read.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format_version"] > FORMAT_VERSION:
            return manifest, ""
        for name, expected in manifest["files"].items():
            if _checksum(path / name) != expected:
                return None, f"{name} was changed after it was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{type(error).__name__}: {error}"
    return manifest, ""


def _last_line(error: BaseException) -> str:
    """Return the last line of an error; torch puts a stack of every rank before it."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
