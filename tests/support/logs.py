"""Captures log messages of this package on ranks that pytest's caplog does not reach."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def logged(level: int = logging.WARNING) -> Iterator[list[str]]:
    """Yield a list to which messages of at least this level are appended."""
    messages: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("muon_dtensor")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
