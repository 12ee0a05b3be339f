"""Records the times of the phases on this rank, for Chrome's tracing tools."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from muon_dtensor.planning.plan import Phase


@dataclass(frozen=True, slots=True)
class Span:
    """One phase of one bucket on one rank; seconds since the epoch, by the host's clock.

    On a GPU these are the times at which the host issued the work.
    """

    step: int
    rank: int
    bucket: int
    phase: Phase
    start: float
    stop: float


class Trace:
    """Spans in the order of their ends, one per phase."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.spans: list[Span] = []
        self.step = 0

    @contextmanager
    def span(self, bucket: int, phase: Phase) -> Iterator[None]:
        """Record the duration of the context."""
        start = time.time()
        try:
            yield
        finally:
            self.spans.append(Span(self.step, self.rank, bucket, phase, start, time.time()))

    def clear(self) -> None:
        """Remove all spans."""
        self.spans.clear()

    def to_chrome(self) -> str:
        """Return JSON in the Trace Event Format: complete events in microseconds, pid = rank.

        Open it in chrome://tracing or ui.perfetto.dev; files of several ranks can be loaded
        together. Format: "Trace Event Format", Google, 2016, section "Complete Events".
        """
        events = [
            {
                "name": f"{span.phase.name.lower()} {span.bucket}",
                "cat": span.phase.name.lower(),
                "ph": "X",
                "ts": span.start * 1e6,
                "dur": (span.stop - span.start) * 1e6,
                "pid": span.rank,
                "tid": 0,
                "args": {"bucket": span.bucket, "step": span.step},
            }
            for span in self.spans
        ]
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})

    def save(self, path: str | Path) -> None:
        """Write `to_chrome` to a file."""
        Path(path).write_text(self.to_chrome())
