"""Calls of torch.distributed: one function for each collective."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from muon_dtensor.planning.routes import RankCollective
from muon_dtensor.planning.strategies import AllGather
from muon_dtensor.runtime.torch_private import timeout_of

T = TypeVar("T")


def issue(rank_collective: RankCollective, send: Tensor, recv: Tensor, group: ProcessGroup) -> Work:
    """Start a collective between flat buffers; both must stay alive until its `wait()`."""
    if rank_collective.shares_slots:
        return _send_to_several(rank_collective, send, recv, group)
    return all_to_all(send, recv, rank_collective.send.numels, rank_collective.recv.numels, group)


def _send_to_several(
    rank_collective: RankCollective, send: Tensor, recv: Tensor, group: ProcessGroup
) -> Work:
    """Start an exchange in which several ranks are sent the same elements.

    gloo's own collectives would copy them for each rank, or refuse parts of several sizes.
    """
    numels = rank_collective.recv.numels
    outputs = list(torch.split(recv, list(numels)))
    inputs = [send[first:last] for first, last in rank_collective.send.intervals]
    if f"{outputs[0].device.type}:gloo" in dist.get_backend_config(group).split(","):
        return _Messages(outputs, inputs, group)
    work: Work | None
    if not isinstance(rank_collective.collective, AllGather):
        work = dist.all_to_all(outputs, inputs, group=group, async_op=True)
    elif len(set(numels)) == 1:  # the list form would gather into memory of its own, and copy
        work = all_gather_single()(recv, send, group=group, async_op=True)
    else:
        work = dist.all_gather(outputs, send, group=group, async_op=True)
    assert work is not None, "async_op=True returns a Work"
    return work


class _Messages(Work):
    """One message from each rank of a group to each other rank, in flight."""

    def __init__(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], group: ProcessGroup
    ) -> None:
        super().__init__()
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        outputs[rank].copy_(inputs[rank])
        others = [(rank + step) % size for step in range(1, size)]  # to a different rank each
        self._works = [
            dist.irecv(outputs[peer], group=group, group_src=peer, tag=_TAG)
            for peer in others
            if outputs[peer].numel()
        ]
        self._works += [
            dist.isend(inputs[peer], group=group, group_dst=peer, tag=_TAG)
            for peer in others
            if inputs[peer].numel()
        ]

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait for all messages. Raises RuntimeError after `timeout`; 0: that of the group."""
        for work in self._works:
            assert work is not None, "this rank is in the group"
            work.wait(timeout)
        return True


_TAG = 0x6D75
"""Tells these messages from others in the same group."""


def all_to_all(
    send: Tensor,
    recv: Tensor,
    send_numels: Sequence[int],
    recv_numels: Sequence[int],
    group: ProcessGroup,
) -> Work:
    """Start an uneven exchange of flat buffers, with numbers of elements per rank of the group.

    Both buffers must stay alive until its `wait()`.
    """
    work: Work | None = dist.all_to_all_single(
        recv, send, list(recv_numels), list(send_numels), group=group, async_op=True
    )
    assert work is not None, "async_op=True returns a Work"
    return work


class TeamGroup:
    """The members of a team as a process group; see `algorithms.distributed_newton_schulz.Team`."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.index, self.size = dist.get_rank(group), dist.get_world_size(group)

    def exchange(self, send: Tensor, send_rows: Sequence[int], recv_rows: Sequence[int]) -> Tensor:
        """Send rows of `send` to each member, in order, and return the rows received from each."""
        width = send.size(1)
        recv = send.new_empty((sum(recv_rows), width))
        work = all_to_all(
            send.reshape(-1),
            recv.view(-1),
            [width * count for count in send_rows],
            [width * count for count in recv_rows],
            self._group,
        )
        finish(work, timeout_of(self._group))
        return recv


def finish(work: Work | None, timeout: timedelta | None) -> None:
    """Wait for a collective. Raises RuntimeError after `timeout`."""
    assert work is not None, "async_op=True returns a Work"
    if timeout is None:
        work.wait()
    else:
        work.wait(timeout)


def connect_ranks(group: ProcessGroup, device: torch.device) -> None:
    """Exchange one element between all pairs of ranks of a group, and wait."""
    send = torch.zeros(dist.get_world_size(group), device=device)
    work = dist.all_to_all_single(torch.empty_like(send), send, group=group, async_op=True)
    finish(work, timeout_of(group))


def barrier(group: ProcessGroup) -> None:
    """Wait until all ranks of a group call this."""
    dist.barrier(group=group)


def maximum_of_all(values: Tensor, group: ProcessGroup) -> None:
    """Compute the elementwise maximum of a few numbers over a group, in place.

    On the host every rank sends them to every rank: gloo's reduction takes a ring of 2 (n - 1)
    consecutive messages (3.8 against 1.3 ms, measured on 4 ranks that share two cores).
    """
    if values.device.type != "cpu":
        all_reduce_max(values, group)
        return
    copies = values.repeat(dist.get_world_size(group))
    received = torch.empty_like(copies)
    work = dist.all_to_all_single(received, copies, group=group, async_op=True)
    finish(work, timeout_of(group))
    torch.amax(received.view(-1, values.numel()), dim=0, out=values)


def all_reduce_max(values: Tensor, group: ProcessGroup) -> None:
    """Compute the elementwise maximum over a group, in place."""
    work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group, async_op=True)
    finish(work, timeout_of(group))


def all_reduce_sum(values: Tensor, group: ProcessGroup) -> None:
    """Compute the elementwise sum over a group, in place."""
    work = dist.all_reduce(values, op=dist.ReduceOp.SUM, group=group, async_op=True)
    finish(work, timeout_of(group))


def all_gather_parts(gathered: Tensor, part: Tensor, group: ProcessGroup) -> None:
    """Gather the parts of all ranks, concatenated along dim 0; one shape, contiguous."""
    all_gather_single()(gathered, part, group=group)


def all_gather_single() -> Callable[..., Work | None]:
    """Return the all-gather between flat tensors; torch 2.13 has renamed it."""
    gather: Callable[..., Work | None] = (
        getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    )
    return gather


def all_gather_values(value: object, group: ProcessGroup) -> list[object]:
    """Return a picklable value of every rank of a group, in rank order."""
    gathered: list[object] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def gather_from_mesh(value: T, groups: Sequence[ProcessGroup], rank: int) -> dict[int, T]:
    """Return a picklable value of every rank of a mesh, by global rank; `groups`: per mesh dim."""
    gathered: dict[int, T] = {rank: value}
    for group in groups:
        merged: dict[int, T] = {}
        for part in all_gather_values(gathered, group):
            assert isinstance(part, dict)
            merged.update(part)
        gathered = merged
    return dict(sorted(gathered.items()))
