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

import json
import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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
from torch.distributed.checkpoint.state_dict_saver import save

from muon_dtensor import CheckpointError, __version__, checkpointable, clone_state

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
    """A checkpoint that was read.

    `rank_notes`: None where the checkpoint was written by another number of ranks. `damaged`: newer
    checkpoints that cannot be read, and why.
    """

    path: Path
    step: int
    state: dict[str, Any]
    notes: dict[str, Any]
    rank_notes: dict[str, Any] | None
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
        self._rank = 0 if self._is_alone else dist.get_rank()
        self._is_writer = self._rank == 0
        self._group = None
        if asynchronous and not self._is_alone:
            self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1) if asynchronous else None
        self._in_progress: Future[None] | None = None

    def save(
        self,
        state: dict[str, Any],
        step: int,
        notes: Mapping[str, Any] | None = None,
        rank_notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Save a state as `step-{step}`; first waits for a save in progress.

        Args:
            state: nested dicts of tensors, DTensors and plain values.
            step: number of completed training steps.
            notes: values for JSON that are read without loading tensors; rank 0's are kept.
            rank_notes: values for JSON of this rank, such as its random number generators.

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
        staged, problem = state, _written(part / f"rank-{self._rank}.json", rank_notes)
        if self._thread is not None and not problem:
            try:
                staged = clone_state(state, torch.device("cpu"))
            except RuntimeError as error:  # out of memory
                problem = _last_line(error)
        problem = self._problem(problem)
        if problem:  # torch's collectives start on all ranks or on none
            raise self._error(problem)
        if self._thread is not None:
            self._in_progress = self._thread.submit(self._write, staged, part, record)
            return
        self._in_progress = Future()
        try:
            self._write(staged, part, record)
            self._in_progress.set_result(None)
        except (Exception, CheckpointException) as error:
            self._in_progress.set_exception(error)
        self.wait()

    def wait(self) -> None:
        """Wait until a save in progress is complete. Raises CheckpointError if it failed."""
        if self._in_progress is None:
            return
        future, self._in_progress = self._in_progress, None
        error = future.exception()
        reason = ""
        if error is not None:  # torch's own message does not say that a disk is full
            free = shutil.disk_usage(self.folder).free
            reason = f"{_last_line(error)}; its disk has {free / 1e6:,.1f} MB free"
        problem = self._problem(reason)
        if problem:
            raise self._error(problem)

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
                state = clone_state(make_state())
                try:
                    with _torch_checkpoint(state):
                        load(state, checkpoint_id=candidate, no_dist=self._is_alone)
                except (Exception, CheckpointException) as error:
                    problem = _last_line(error)
                else:
                    return Restored(
                        candidate,
                        manifest["step"],
                        state,
                        manifest["notes"],
                        self._rank_notes(candidate, manifest),
                        tuple(damaged),
                    )
            damaged.append(f"{candidate.name} cannot be read: {problem}")
            if self._is_writer:
                logger.warning("%s: %s", candidate.parent, damaged[-1])
        if damaged:
            raise CheckpointError(f"no checkpoint in {self.folder}: {'; '.join(damaged)}")
        return None

    def _write(self, state: dict[str, Any], part: Path, record: dict[str, Any]) -> None:
        """Write a state. Rank 0 then writes the manifest, renames the folder, deletes old ones.

        torch's `save` returns on rank 0 after all ranks wrote their files.
        """
        with _torch_checkpoint(state):
            save(state, checkpoint_id=part, process_group=self._group, no_dist=self._is_alone)
        if not self._is_writer:
            return
        files = {path.name: _checksum(path) for path in sorted(part.iterdir())}
        (part / "manifest.json").write_text(json.dumps({**record, "files": files}, indent=1))
        path = part.with_suffix("")
        shutil.rmtree(path, ignore_errors=True)
        os.rename(part, path)
        complete = self.complete()
        later = complete[: complete.index(path)]
        if later:  # this run continued from an earlier step than the newest
            names = ", ".join(old.name for old in later)
            logger.warning("%s: %s of an earlier run replaced by %s", self.folder, names, path.name)
        for old in (*later, *complete[len(later) + self._keep :]):
            shutil.rmtree(old)

    def _rank_notes(self, path: Path, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return this rank's notes; None where another number of ranks wrote the checkpoint."""
        if manifest["world_size"] != (1 if self._is_alone else dist.get_world_size()):
            return None
        notes: dict[str, Any] = json.loads((path / f"rank-{self._rank}.json").read_text())
        return notes

    def _error(self, problem: str) -> CheckpointError:
        """Return the error of a failed save, whose files are deleted."""
        if self._is_writer:
            for part in self.folder.glob("step-*.part"):
                shutil.rmtree(part, ignore_errors=True)
        return CheckpointError(
            f"a checkpoint in {self.folder} could not be written ({problem}); "
            f"the complete checkpoints in this folder are unchanged"
        )

    def _problem(self, reason: str) -> str:
        """Return the first rank's reason that is not empty, with its rank; "" where all are."""
        reasons = [reason]
        if not self._is_alone:
            reasons = [""] * dist.get_world_size()
            dist.all_gather_object(reasons, reason, group=self._group)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text), "")

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


def _written(path: Path, notes: Mapping[str, Any] | None) -> str:
    """Write notes to a file; return "" or why that failed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(notes or {})))
    except OSError as error:
        return str(error)
    return ""


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
