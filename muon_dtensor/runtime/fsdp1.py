"""Describes the flat parameters of FSDP1 as slices of their original shapes."""

from collections.abc import Iterable

from torch import Tensor

from muon_dtensor.errors import RefusalError
from muon_dtensor.runtime.torch_private import flattened_params, is_flat_param, is_flattened


class FlatSlices:
    """Slices of FSDP1's flat parameters, with their shapes before flattening."""

    def __init__(
        self,
        shapes: dict[int, tuple[int, ...]],
        starts: dict[int, int | None],
        refused: dict[int, RefusalError],
    ) -> None:
        self._shapes, self._starts, self._refused = shapes, starts, refused

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> "FlatSlices":
        """Find the tensors that FSDP1 has flattened."""
        shapes: dict[int, tuple[int, ...]] = {}
        starts: dict[int, int | None] = {}
        refused: dict[int, RefusalError] = {}
        flattened: set[int] = set()
        for tensor in tensors:
            if is_flat_param(tensor):
                refused[id(tensor)] = RefusalError(
                    "It is a flat parameter of FSDP1, which concatenates many parameters.",
                    "Construct FullyShardedDataParallel with use_orig_params=True.",
                )
            elif is_flattened(tensor):
                flattened.add(id(tensor))
        for original in flattened_params() if flattened else ():
            key = id(original.param)
            starts[key] = original.start
            if key in flattened and original.is_dtensor:
                refused[key] = RefusalError(
                    "It is a DTensor that FSDP1 has flattened.",
                    "Use fully_shard (FSDP2) together with tensor parallelism.",
                )
            elif key in flattened:
                shapes[key] = original.shape
        for index in flattened - shapes.keys() - refused.keys():
            refused[index] = RefusalError(
                "FSDP1 has flattened it, and its flat parameter was not found.",
                "Construct the optimizer before gc.freeze(), or use fully_shard (FSDP2).",
            )
        return cls(shapes, starts, refused)

    def shape_of(self, tensor: Tensor) -> tuple[int, ...] | None:
        """Return the shape of the full tensor; None if this is not a slice."""
        return self._shapes.get(id(tensor))

    def start_of(self, tensor: Tensor) -> int | None:
        """Return the offset of this rank's slice in the full tensor; None without a slice."""
        return self._starts.get(id(tensor))

    def refusal_of(self, tensor: Tensor) -> RefusalError | None:
        """Return why this tensor has no layout; None if it has one."""
        return self._refused.get(id(tensor))
