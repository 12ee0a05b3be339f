"""Describes the flat parameters of FSDP1 as slices of their original shapes."""

from collections.abc import Iterable

from torch import Tensor

from muon_dtensor.errors import RefusalError
from muon_dtensor.runtime.torch_private import flattened_params, is_flat_param, is_flattened


class FlatSlices:
    """Which tensors are slices of flat parameters of FSDP1, and the shapes before flattening."""

    def __init__(
        self,
        shapes: dict[int, tuple[int, ...]],
        starts: dict[int, int | None],
        refused: dict[int, RefusalError],
    ) -> None:
        self._shapes, self._starts, self._refused = shapes, starts, refused

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> "FlatSlices":
        """Of those among the tensors that FSDP1 has flattened."""
        shapes: dict[int, tuple[int, ...]] = {}
        starts: dict[int, int | None] = {}
        refused: dict[int, RefusalError] = {}
        wanted: set[int] = set()
        for tensor in tensors:
            if is_flat_param(tensor):
                refused[id(tensor)] = RefusalError(
                    "It is a flat parameter of FSDP1, which mixes many parameters in one.",
                    "Construct FullyShardedDataParallel with use_orig_params=True.",
                )
            elif is_flattened(tensor):
                wanted.add(id(tensor))
        for original in flattened_params() if wanted else ():
            key = id(original.param)
            starts[key] = original.start
            if key in wanted and original.is_dtensor:
                refused[key] = RefusalError(
                    "It is a DTensor that FSDP1 has flattened.",
                    "Use fully_shard (FSDP2) together with tensor parallelism.",
                )
            elif key in wanted:
                shapes[key] = original.shape
        for index in wanted - shapes.keys() - refused.keys():
            refused[index] = RefusalError(
                "FSDP1 has flattened it, and its flat parameter is not to be found.",
                "Construct the optimizer before gc.freeze(), or use fully_shard (FSDP2).",
            )
        return cls(shapes, starts, refused)

    def shape_of(self, tensor: Tensor) -> tuple[int, ...] | None:
        """The shape of the whole tensor; None for a tensor that is no slice."""
        return self._shapes.get(id(tensor))

    def start_of(self, tensor: Tensor) -> int | None:
        """Where this rank's slice begins in the whole tensor; None if it has none of it."""
        return self._starts.get(id(tensor))

    def refusal_of(self, tensor: Tensor) -> RefusalError | None:
        """Why this tensor cannot be described; None if it can."""
        return self._refused.get(id(tensor))
