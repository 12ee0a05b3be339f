"""Inner products of the islands' updates, exact, so that they do not depend on how these are cut.

Note [Exact sums]
    Sums of floating-point numbers depend on their order, and so on the layout of the shards. Here
    each update is rounded to integers of 26 bits relative to its largest element, in two limbs of
    13 bits. Products of limbs, and sums of up to 2^20 of them, are integers below 2^53, which
    float64 holds exactly; they are added up in int64. With one update per island the error of a
    distance is about 2^-26 of the largest element, per element and with random sign.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from muon_dtensor.islands.rules import INFINITY, Matrix

LIMB_BITS = 13
CHUNK = 1 << 18
"""Elements that are multiplied in one call: 2 n CHUNK numbers of 8 bytes."""


def largest_element(tensor: Tensor) -> Tensor:
    """Return the largest absolute value, float64; infinity if any value is not finite."""
    if not tensor.numel():
        return torch.zeros((), dtype=torch.float64, device=tensor.device)
    return tensor.abs().amax().double().nan_to_num(nan=INFINITY, posinf=INFINITY)


def limb_products(tensors: Sequence[Tensor], largest: Sequence[float]) -> Tensor:
    """Return sums of products of limbs of one tensor of each island, int64 [3, n, n].

    [0] of high limbs, [1] of a high and a low limb in both orders, [2] of low limbs; see Note
    [Exact sums]. They are added up over tensors and shards, and converted by `gram_of`.

    Args:
        tensors: this rank's shard of one tensor, of each island.
        largest: `largest_element` over all tensors and shards of each island; 0 for updates that
            are not finite, which count as zero.
    """
    n = len(tensors)
    sums = torch.zeros(3, n, n, dtype=torch.int64, device=tensors[0].device)
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), CHUNK):
        limbs = []
        for values, scale in zip(flat, largest, strict=True):
            chunk = values[start : start + CHUNK].double()
            unit = scale / 2.0 ** (2 * LIMB_BITS)
            integers = (chunk / unit).round() if scale else torch.zeros_like(chunk)
            high = (integers / 2**LIMB_BITS).round()
            limbs.append((high, integers - high * 2**LIMB_BITS))
        high, low = (torch.stack(part) for part in zip(*limbs, strict=True))
        crossed = high @ low.T
        products = torch.stack([high @ high.T, crossed + crossed.T, low @ low.T])
        sums += products.to(torch.int64)
    return sums


def gram_of(sums: Tensor, largest: Sequence[float]) -> Matrix:
    """Return the Gram matrix from the total of `limb_products`."""
    high, crossed, low = sums.tolist()
    unit = 2.0 ** (-4 * LIMB_BITS)
    return [
        [
            ((high[i][j] << 2 * LIMB_BITS) + (crossed[i][j] << LIMB_BITS) + low[i][j])
            * (unit * largest[i])
            * largest[j]
            for j in range(len(largest))
        ]
        for i in range(len(largest))
    ]
