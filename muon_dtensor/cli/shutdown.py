"""Destroys the default process group at the end of a rank: a workaround for gloo."""

import time

import torch.distributed as dist


def destroy_process_group() -> None:
    """Destroy the default process group after gloo has released its tensors.

    A thread of gloo releases the last tensors shortly after they have arrived, and needs Python's
    GIL for that. If Python is already shutting down, the process aborts (torch 2.13).
    """
    time.sleep(0.1)
    dist.destroy_process_group()
