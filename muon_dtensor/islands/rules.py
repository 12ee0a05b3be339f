"""Rules that combine the updates of several islands into one: mix, then merge.

A rule mixes n updates into rows, with coefficients from the n x n Gram matrix of the updates, and
merges the rows element by element. On sharded updates only the Gram matrix needs a sum over shards,
see `islands.gram`; all else is local.

`f` is the number of islands that may send arbitrary values. An island whose update is not finite
counts as infinitely far from all others.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Matrix = list[list[float]]
"""Rows of numbers: a Gram matrix, distances, or coefficients."""

INFINITY = float("inf")

Row = list[float] | None
"""Coefficients of one mixed row; None for a row of an island that is infinitely far away."""


@dataclass(frozen=True)
class Rule(ABC):
    """A rule. `needs_gram`: whether its coefficients depend on the Gram matrix."""

    needs_gram: ClassVar[bool] = False

    @property
    def f(self) -> int:
        """The number of islands that may send arbitrary values."""
        return 0

    @property
    @abstractmethod
    def text(self) -> str:
        """The rule as text."""

    @property
    def min_islands(self) -> int:
        """The fewest islands, above one, for which the rule is defined."""
        return 1

    @property
    def guaranteed_islands(self) -> int:
        """The fewest islands for which the result is proven to be near the honest updates."""
        return self.min_islands

    def check(self, n: int) -> None:
        """Raise ValueError if the rule is not defined for n islands. One island is always valid."""
        if n > 1 and n < self.min_islands:
            raise ValueError(
                f"{self.text} needs at least {self.min_islands} islands for f={self.f}, and there "
                f"are {n}: use a smaller f, or more islands"
            )

    def warning(self, n: int) -> str:
        """Return why the rule has no guarantee for n islands; an empty string if it has one."""
        if n == 1 or n >= self.guaranteed_islands:
            return ""
        return (
            f"{self.text} has a guarantee from {self.guaranteed_islands} islands on, and there are "
            f"{n}"
        )

    def max_infinite(self, n: int) -> int:
        """Return how many of n updates may be not finite."""
        return self.f

    @abstractmethod
    def coefficients(
        self, gram: Matrix, weights: Sequence[float], finite: Sequence[bool]
    ) -> list[Row]:
        """Return the coefficients of the mixed rows.

        Args:
            gram: inner products of the updates, [n, n]; those of updates that are not finite are
                not read.
            weights: of the islands, above 0. Rules that average several islands use them.
            finite: whether each update is finite.
        """

    def merge(self, rows: Sequence[Tensor]) -> Tensor:
        """Return one tensor from mixed rows of the same shape, element by element."""
        (row,) = rows
        return row


def combine(
    rule: Rule,
    updates: Sequence[Sequence[Tensor]],
    *,
    gram: Matrix | None = None,
    weights: Sequence[float] | None = None,
    finite: Sequence[bool] | None = None,
) -> list[Tensor]:
    """Return the combined update: per tensor one tensor of the same shape.

    Every element is computed by the same operations in the order of the islands, so the result does
    not depend on how the tensors are cut.

    Args:
        rule: the rule. It is not checked whether it is defined for this number of islands.
        updates: of each island, tensors of equal shapes and dtypes (float32 or float64).
        gram: their inner products, [n, n], if the rule needs them.
        weights: of the islands, above 0; None: equal.
        finite: whether each update is finite; None: all are.

    Raises ValueError if more updates are not finite than the rule tolerates.
    """
    n = len(updates)
    finite = [True] * n if finite is None else list(finite)
    if n == 1 and finite[0]:
        return list(updates[0])
    num_infinite = finite.count(False)
    if num_infinite > rule.max_infinite(n) or num_infinite == n:
        raise ValueError(
            f"the updates of {num_infinite} of {n} islands are not finite, and {rule.text} "
            f"tolerates {rule.max_infinite(n)}"
        )
    weights = [1.0] * n if weights is None else weights
    rows = rule.coefficients(gram or [], weights, finite)
    return [
        rule.merge([_mixed(row, tensors) for row in rows]) for tensors in zip(*updates, strict=True)
    ]


def _mixed(row: Row, tensors: Sequence[Tensor]) -> Tensor:
    """Return the linear combination of tensors; infinity for no coefficients."""
    if row is None:
        return torch.full_like(tensors[0], INFINITY)
    terms = [(c, tensor) for c, tensor in zip(row, tensors, strict=True) if c]
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]
    total = torch.zeros_like(tensors[0])
    for c, tensor in terms:
        total += tensor * c  # two roundings on every processor: no fused multiply-add
    return total


def _identity(finite: Sequence[bool]) -> list[Row]:
    n = len(finite)
    return [
        [float(i == j) for j in range(n)] if is_finite else None
        for i, is_finite in enumerate(finite)
    ]


def _average(indices: Sequence[int], weights: Sequence[float]) -> list[float]:
    """Return the coefficients of the weighted average of some islands."""
    total = sum(weights[i] for i in indices)
    return [w / total if i in indices else 0.0 for i, w in enumerate(weights)]


def _distances(gram: Matrix, finite: Sequence[bool]) -> Matrix:
    """Return squared distances; those to an island that is not finite are infinite."""
    n = len(finite)
    return [
        [
            max(0.0, gram[i][i] + gram[j][j] - 2 * gram[i][j])
            if finite[i] and finite[j]
            else INFINITY
            for j in range(n)
        ]
        for i in range(n)
    ]


def _mean(rows: Sequence[Tensor]) -> Tensor:
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total / len(rows)


@dataclass(frozen=True)
class Mean(Rule):
    """The weighted average. One wrong update can move it anywhere."""

    @property
    def text(self) -> str:
        return "mean"

    def max_infinite(self, n: int) -> int:
        return n - 1

    def coefficients(
        self, gram: Matrix, weights: Sequence[float], finite: Sequence[bool]
    ) -> list[Row]:
        return [_average([i for i, is_finite in enumerate(finite) if is_finite], weights)]


@dataclass(frozen=True)
class Median(Rule):
    """The median of each element (Yin, Chen, Kannan & Bartlett 2018, arXiv:1803.01498, def. 1)."""

    @property
    def text(self) -> str:
        return "median"

    def max_infinite(self, n: int) -> int:
        return (n - 1) // 2

    def coefficients(
        self, gram: Matrix, weights: Sequence[float], finite: Sequence[bool]
    ) -> list[Row]:
        return _identity(finite)

    def merge(self, rows: Sequence[Tensor]) -> Tensor:
        return _median(torch.stack(list(rows)).sort(dim=0).values)


def _median(ascending: Tensor) -> Tensor:
    """Return the median along dim 0 of sorted rows; of two middle rows the average."""
    n = len(ascending)
    return _mean([ascending[(n - 1) // 2], ascending[n // 2]]) if n % 2 == 0 else ascending[n // 2]


@dataclass(frozen=True, init=False)
class _Tolerant(Rule):
    """A rule with a bound on the number of islands that send arbitrary values."""

    tolerated: int = 0

    def __init__(self, f: int) -> None:
        if type(f) is not int or f < 0:
            raise ValueError(f"f must be an integer of at least 0, got {f!r}")
        object.__setattr__(self, "tolerated", f)

    @property
    def f(self) -> int:
        return self.tolerated


@dataclass(frozen=True, init=False)
class TrimmedMean(_Tolerant):
    """The mean of each element without the f largest and f smallest (as `Median`, def. 2)."""

    @property
    def text(self) -> str:
        return f"trimmed mean (f={self.f})"

    @property
    def min_islands(self) -> int:
        return 2 * self.f + 1

    def coefficients(
        self, gram: Matrix, weights: Sequence[float], finite: Sequence[bool]
    ) -> list[Row]:
        return _identity(finite)

    def merge(self, rows: Sequence[Tensor]) -> Tensor:
        ascending = torch.stack(list(rows)).sort(dim=0).values
        return _mean(ascending[self.f : len(rows) - self.f].unbind())


def _krum_scores(distances: Matrix, candidates: Sequence[int], f: int) -> list[tuple[float, int]]:
    """Return (score, island): the sum of squared distances to the n - f - 2 nearest others."""
    num_nearest = max(1, len(candidates) - f - 2)
    scores = []
    for i in candidates:
        others = sorted(distances[i][j] for j in candidates if j != i)
        scores.append((sum(others[:num_nearest]), i))
    return scores


@dataclass(frozen=True, init=False)
class Krum(_Tolerant):
    """The update with the smallest sum of distances to its nearest n - f - 2 others.

    Blanchard, El Mhamdi, Guerraoui & Stainer 2017, arXiv:1703.02757, section 4. It uses the work of
    one island only.
    """

    needs_gram: ClassVar[bool] = True

    @property
    def text(self) -> str:
        return f"Krum (f={self.f})"

    @property
    def min_islands(self) -> int:
        return 2 * self.f + 3

    def coefficients(
        self, gram: Matrix, weights: Sequence[float], finite: Sequence[bool]
    ) -> list[Row]:
        n = len(finite)
        _, chosen = min(_krum_scores(_distances(gram, finite), range(n), self.f))
        return [[float(i == chosen) for i in range(n)]]


@dataclass(frozen=True, init=False)
class MultiKrum(Krum):
    """The average of the n - f - 2 updates with the smallest scores of Krum (as `Krum`)."""

    @property
    def text(self) -> str:
        return f"Multi-Krum (f={self.f})"

    def coefficients(
        self, gram: Matrix, weights: Sequence[float], finite: Sequence[bool]
    ) -> list[Row]:
        n = len(finite)
        scores = sorted(_krum_scores(_distances(gram, finite), range(n), self.f))
        chosen = [i for _, i in scores[: max(1, n - self.f - 2)] if finite[i]]
        return [_average(chosen, weights)]


@dataclass(frozen=True, init=False)
class Bulyan(_Tolerant):
    """Krum chooses n - 2 f updates one by one; of each element the n - 4 f values nearest to their
    median are averaged (El Mhamdi, Guerraoui & Rouault 2018, arXiv:1802.07927, section 4).
    """

    needs_gram: ClassVar[bool] = True

    @property
    def text(self) -> str:
        return f"Bulyan (f={self.f})"

    @property
    def min_islands(self) -> int:
        return 4 * self.f + 1

    @property
    def guaranteed_islands(self) -> int:
        return 4 * self.f + 3

    def coefficients(
        self, gram: Matrix, weights: Sequence[float], finite: Sequence[bool]
    ) -> list[Row]:
        distances = _distances(gram, finite)
        candidates = list(range(len(finite)))
        identity = _identity(finite)
        rows: list[Row] = []
        for _ in range(len(finite) - 2 * self.f):
            _, chosen = min(_krum_scores(distances, candidates, self.f))
            candidates.remove(chosen)
            rows.append(identity[chosen])
        return rows

    def merge(self, rows: Sequence[Tensor]) -> Tensor:
        ascending = torch.stack(list(rows)).sort(dim=0).values
        offsets = (ascending - _median(ascending)).abs()
        nearest = offsets.sort(dim=0, stable=True).indices[: len(rows) - 2 * self.f]
        return _mean(ascending.gather(0, nearest).unbind())


NUM_WEISZFELD, SMOOTHING = 200, 1e-6
"""Steps of Weiszfeld's iteration, and the smallest distance relative to the median one."""


@dataclass(frozen=True)
class GeometricMedian(Rule):
    """The point with the smallest sum of distances to all updates, by smoothed Weiszfeld steps.

    Pillutla, Kakade & Harchaoui 2022, arXiv:1912.13445, algorithm 2. It tolerates fewer than half
    of the islands, without a number f. The iteration runs on coefficients. It starts at the update
    with the smallest sum of distances, so that a huge one does not cost precision.
    """

    needs_gram: ClassVar[bool] = True

    @property
    def text(self) -> str:
        return "geometric median"

    def max_infinite(self, n: int) -> int:
        return (n - 1) // 2

    def coefficients(
        self, gram: Matrix, weights: Sequence[float], finite: Sequence[bool]
    ) -> list[Row]:
        indices = [i for i, is_finite in enumerate(finite) if is_finite]
        squares = _distances(gram, finite)
        start = min(indices, key=lambda i: sum(weights[j] * squares[i][j] ** 0.5 for j in indices))
        row = [float(i == start) for i in range(len(finite))]
        offsets = sorted(squares[start][j] ** 0.5 for j in indices)
        smallest = SMOOTHING * offsets[len(offsets) // 2]
        if smallest == 0:  # half of the updates are equal
            return [row]
        for _ in range(NUM_WEISZFELD):
            products = {i: sum(row[j] * gram[i][j] for j in indices) for i in indices}
            square = sum(row[i] * products[i] for i in indices)
            inverse = [0.0] * len(finite)
            for i in indices:
                distance = max(0.0, gram[i][i] - 2 * products[i] + square) ** 0.5
                inverse[i] = weights[i] / max(distance, smallest)
            row = _average(indices, inverse)
        return [row]


@dataclass(frozen=True, init=False)
class NearestNeighbourMixing(_Tolerant):
    """Replace each update by the average of its n - f nearest ones, then apply another rule.

    Allouah, Farhadkhani, Guerraoui, Gupta, Pinot & Stephan 2023, arXiv:2302.01772, algorithm 2. It
    repairs rules whose result is poor where honest islands have different data, or where wrong
    updates hide among honest ones.
    """

    needs_gram: ClassVar[bool] = True
    then: Rule = TrimmedMean(0)

    def __init__(self, f: int, then: Rule | None = None) -> None:
        super().__init__(f)
        object.__setattr__(self, "then", TrimmedMean(f) if then is None else then)
        if self.then.f not in (0, f):
            raise ValueError(f"the rule after the mixing has f={self.then.f}, the mixing f={f}")

    @property
    def text(self) -> str:
        return f"nearest-neighbour mixing (f={self.f}), then {self.then.text}"

    @property
    def min_islands(self) -> int:
        return max(2 * self.f + 1, self.then.min_islands)

    @property
    def guaranteed_islands(self) -> int:
        return max(self.min_islands, self.then.guaranteed_islands)

    def coefficients(
        self, gram: Matrix, weights: Sequence[float], finite: Sequence[bool]
    ) -> list[Row]:
        n = len(finite)
        distances = _distances(gram, finite)
        mixing: Matrix = []
        for i in range(n):
            nearest = sorted((distances[i][j], j != i, j) for j in range(n) if finite[j])
            chosen = [j for _, _, j in nearest[: n - self.f]]
            mixing.append(_average(chosen, [1.0] * n) if finite[i] else [0.0] * n)
        finite_gram = [
            [gram[j][k] if finite[j] and finite[k] else 0.0 for k in range(n)] for j in range(n)
        ]
        mixed_gram = _product(_product(mixing, finite_gram), _transposed(mixing))
        return [
            None if row is None else _product([row], mixing)[0]
            for row in self.then.coefficients(mixed_gram, weights, finite)
        ]

    def merge(self, rows: Sequence[Tensor]) -> Tensor:
        return self.then.merge(rows)


def _product(a: Matrix, b: Matrix) -> Matrix:
    columns = _transposed(b)
    return [[sum(x * y for x, y in zip(row, col, strict=True)) for col in columns] for row in a]


def _transposed(a: Matrix) -> Matrix:
    return [list(column) for column in zip(*a, strict=True)]


def rule_of(rule: str | Rule) -> Rule:
    """Return a rule by its name: "mean", "median" or "geometric_median"; rules with f are objects.

    Raises ValueError for another name.
    """
    if isinstance(rule, Rule):
        return rule
    named: dict[str, Rule] = {
        "mean": Mean(),
        "median": Median(),
        "geometric_median": GeometricMedian(),
    }
    if rule not in named:
        raise ValueError(
            f"reduce must be a rule or one of {', '.join(named)}, got {rule!r}; rules with "
            "an f are objects: TrimmedMean(f=1), Krum(f=1), Bulyan(f=1)"
        )
    return named[rule]
