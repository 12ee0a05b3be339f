"""Islands that come and go: membership by torchft's Manager (extra `torchft`).

torchft's Lighthouse knows which islands are alive, and forms a quorum for each round. An island
that dies, hangs or loses its link is left out of later rounds. When it returns it loads the state
of another island, and its own late work still counts, see `DiLoCo`.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed import Work
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    AllgatherOptions,
    AllToAllOptions,
)


class TorchFT:
    """Islands under a torchft Manager, for `DiLoCo`.

        pg = torchft.ProcessGroupGloo(timeout=timedelta(seconds=30))
        manager = torchft.Manager(pg=pg, load_state_dict=None, state_dict=None,
                                  min_replica_size=1, use_async_quorum=False, ...)
        outer = DiLoCo(optimizer, TorchFT(manager, pg, islands=4), sync_every=30)

    A round with fewer than `min_islands` islands changes nothing; they go on alone until others
    come back. Otherwise an island that restarts while the others are away would begin a run of its
    own.

    Args:
        manager: a `torchft.Manager` with `use_async_quorum=False`: an island that was away then
            loads the state of another before it takes part.
        process_group: the process group of the manager: `allgather` and `alltoall_base` are used.
        islands: the number of islands of the run.
        min_islands: fewest islands of a round; None: more than half.
        timeout: of one exchange; None: that of the process group.

    Raises ValueError if numbers are out of range, or the manager forms its quorums asynchronously.
    """

    is_elastic = True

    def __init__(
        self,
        manager: Any,
        process_group: Any,
        islands: int,
        *,
        min_islands: int | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        least = islands // 2 + 1 if min_islands is None else min_islands
        if islands < 1 or not 1 <= least <= islands:
            raise ValueError(
                f"islands must be 1 or more, min_islands 1 to it, got {islands} and {min_islands}"
            )
        if getattr(manager, "_use_async_quorum", False):
            raise ValueError(
                "construct torchft.Manager(use_async_quorum=False): with an asynchronous quorum an "
                "island that was away would exchange values before it has loaded the others'"
            )
        self._manager, self._group = manager, process_group
        self.min_islands, self._timeout = least, timeout
        self.size, self.index = 1, 0

    def begin(self) -> None:
        """Form the quorum of a round. The registered functions may be called."""
        self._manager.start_quorum()
        index = self._manager.participating_rank()
        self.size = max(1, self._manager.num_participants())
        self.index = 0 if index is None else index

    def commit(self, problem: str) -> bool:
        """Return whether the ranks of this island all have a result, from enough islands."""
        if not problem and self.size < self.min_islands:
            problem = f"{self.size} islands are alive, and a round needs {self.min_islands}"
        if problem:
            self._manager.report_error(RuntimeError(problem))
        return bool(self._manager.should_commit())

    def gather(self, received: list[Tensor], sent: Tensor) -> Work:
        """Start an all-gather of tensors of equal size."""
        work: Work = self._group.allgather([received], [sent], AllgatherOptions())
        return work

    def exchange(self, received: Tensor, sent: Tensor) -> Work:
        """Start an all-to-all of equal parts."""
        work: Work = self._group.alltoall_base(received, sent, [], [], AllToAllOptions())
        return work

    def wait(self, work: Work) -> None:
        """Wait for a collective. Raises RuntimeError if an island does not answer."""
        if self._timeout is None:
            work.wait()
        else:
            work.wait(self._timeout)
        if error := self._group.errored():
            raise RuntimeError(str(error))

    def register(self, load: Callable[[Any], None], save: Callable[[], Any]) -> None:
        """Let the manager send the outer state to islands that were away."""
        self._manager.register_state_dict_fn("muon_dtensor.outer", load, save)
