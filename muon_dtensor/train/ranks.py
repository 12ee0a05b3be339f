"""The ranks of a training run: their start, and what rank 0 does for all."""

import os
import warnings
from collections.abc import Callable

import datasets
import torch
import torch.distributed as dist
import transformers
from torch import Tensor


class RunFailedError(RuntimeError):
    """A run ended without what was asked for: the message says what is missing, and what is not."""


def start_processes() -> None:
    """Initialize torch.distributed under torchrun: nccl with GPUs, else gloo.

    Progress bars of the libraries are switched off.
    """
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")  # FSDP2, of embeddings
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if "RANK" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


def is_rank_0() -> bool:
    """Return whether this is rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_rank_0(write: Callable[[], None]) -> None:
    """Call a function on rank 0 that writes files; the others wait. A collective of all ranks.

    Raises RunFailedError on every rank where it failed.
    """
    problem = ""
    if is_rank_0():
        try:
            write()
        except Exception as error:  # safetensors has its own errors
            problem = f"{type(error).__name__}: {error}"
    if dist.is_initialized():
        message = [problem]
        dist.broadcast_object_list(message, src=0)
        (problem,) = message
    if problem:
        raise RunFailedError(f"rank 0 could not write a file: {problem}")


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_ranks(value: Tensor) -> float:
    """Return the mean of a number over all ranks. A collective of all ranks."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return float(value)


def print_on_rank_0(text: str) -> None:
    """Print a line, on rank 0."""
    if is_rank_0():
        print(text, flush=True)
