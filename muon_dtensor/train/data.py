"""Rows of training files as datasets of TRL: Alpaca, ShareGPT, messages and plain text."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from muon_dtensor.train.job import DataSection

logger = logging.getLogger(__name__)

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Role of a message by the `from` of ShareGPT files."""

MESSAGE_ROLES = {name: name for name in ("system", "user", "assistant", "tool")}
LISTED_BAD_ROWS = 5
"""Bad rows that an error names."""


class BadRowError(ValueError):
    """A row of a data file cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class Row:
    """A row of a file: its place for messages, and its JSON value or line of text."""

    where: str
    value: Any


@dataclass(frozen=True)
class Split:
    """Training rows for the Trainer, and test rows."""

    train: Dataset | IterableDataset
    test: Dataset | None
    num_skipped: int
    """Bad rows that were left out; of a stream without test rows they are not counted."""


def load_data(section: DataSection, *, seed: int = 0, island: tuple[int, int] = (0, 1)) -> Split:
    """Return the rows of `data.train` and `data.test`.

    Each row is {"prompt", "completion"} (alpaca), {"messages"} (sharegpt, messages) or {"text"}.
    Of a stream the training rows are read later, each pass from the first row.

    Args:
        section: of the config.
        seed: of the order of streamed rows.
        island: index and count of the islands, each of which gets every count-th training row.

    Raises:
        BadRowError: bad rows, with `on_bad_row="raise"`; of a stream, when the row is reached.
        ValueError: a file has no rows, or a suffix that is not read.
        OSError: a file cannot be read.
    """
    paths, share = _training_files(section)
    bad: list[str] = []
    train_rows: list[dict[str, Any]] = []
    test_rows: list[dict[str, Any]] = []
    if share or not section.streaming:
        for is_test, example in _examples(paths, section, share, bad):
            if is_test:
                test_rows.append(example)
            elif not section.streaming:
                train_rows.append(example)
    if isinstance(section.test, str):
        _check_file(section.test)
        test_rows = [example for _, example in _examples([section.test], section, 0.0, bad)]
    _raise_or_log(bad, section)
    test = None
    if section.test is not None:
        place = section.test if not share else f"a share of {share} of {', '.join(paths)}"
        test = _dataset(test_rows, f"data.test, {place},")
    if not section.streaming:
        index, count = island
        return Split(_dataset(train_rows[index::count], ", ".join(paths)), test, len(bad))
    train = IterableDataset.from_generator(
        _stream,
        gen_kwargs={"paths": tuple(paths), "section": section, "share": share, "island": island},
    )
    if section.shuffle_buffer > 1:
        train = train.shuffle(seed=seed, buffer_size=section.shuffle_buffer)
    if next(iter(train), None) is None:
        raise ValueError(f"{', '.join(paths)} has no rows")
    return Split(train, test, len(bad))


def check_data(section: DataSection) -> dict[str, int]:
    """Return the number of training rows, test rows and bad rows of the files.

    Raises the errors of `load_data`, but for a stream too the bad rows of all files.
    """
    paths, share = _training_files(section)
    bad: list[str] = []
    counts = {False: 0, True: 0}
    for is_test, _ in _examples(paths, section, share, bad):
        counts[is_test] += 1
    if isinstance(section.test, str):
        _check_file(section.test)
        counts[True] = sum(1 for _ in _examples([section.test], section, 0.0, bad))
    _raise_or_log(bad, section)
    if not counts[False]:
        raise ValueError(f"{', '.join(paths)} has no rows to train on")
    return {"train": counts[False], "test": counts[True], "bad": len(bad)}


def is_test_row(index: int, share: float) -> bool:
    """Return whether row `index` is one of the evenly spaced test rows; at least row 0 is not."""
    return math.floor((index + 1) * share) > math.floor(index * share)


def _training_files(section: DataSection) -> tuple[list[str], float]:
    """Return the files of `data.train`, and the share of their rows that are test rows."""
    paths = [section.train] if isinstance(section.train, str) else list(section.train)
    for path in paths:
        _check_file(path)
    return paths, section.test if isinstance(section.test, float) else 0.0


def _dataset(rows: list[dict[str, Any]], name: str) -> Dataset:
    if not rows:
        raise ValueError(f"{name} has no rows")
    return Dataset.from_list(rows)


def _stream(
    paths: Sequence[str], section: DataSection, share: float, island: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    """Yield an island's training rows; a bad row raises when it is reached, or is left out."""
    bad: list[str] = []
    number = 0
    for is_test, example in _examples(paths, section, share, bad):
        if bad and section.on_bad_row == "raise":
            break
        bad.clear()
        if is_test:
            continue
        if number % island[1] == island[0]:
            yield example
        number += 1
    if bad and section.on_bad_row == "raise":
        raise BadRowError(_summary(bad[:1], "found"))


def _examples(
    paths: Sequence[str], section: DataSection, share: float, bad: list[str]
) -> Iterator[tuple[bool, dict[str, Any]]]:
    """Yield whether a row is a test row, and its example; append messages of bad rows to `bad`."""
    index = 0
    for path in paths:
        for row in _rows(path, section.format):
            is_test = is_test_row(index, share)
            index += 1
            try:
                yield is_test, _example(row, section.format)
            except BadRowError as error:
                bad.append(str(error))


def _raise_or_log(bad: Sequence[str], section: DataSection) -> None:
    if bad and section.on_bad_row == "raise":
        raise BadRowError(f"{_summary(bad, 'found')}; data.on_bad_row: skip leaves them out")
    if bad:
        logger.warning("%s", _summary(bad, "skipped"))


def _summary(bad: Sequence[str], verb: str) -> str:
    more = f" and {len(bad) - LISTED_BAD_ROWS} more" if len(bad) > LISTED_BAD_ROWS else ""
    rows = "1 bad row" if len(bad) == 1 else f"{len(bad)} bad rows"
    return f"{rows} {verb}: {'; '.join(bad[:LISTED_BAD_ROWS])}{more}"


def _check_file(path: str) -> None:
    """Raise OSError or ValueError for a file that cannot be read."""
    if Path(path).suffix not in (".jsonl", ".json", ".txt"):
        raise ValueError(
            f"{path}: data files are .jsonl (a JSON object per line), .json (a list of objects) or "
            ".txt (a text per line)"
        )
    with Path(path).open("rb"):
        return


def _rows(path: str, format: str) -> Iterator[Row]:
    """Yield the rows of a file; a row that is not JSON has an exception as its value."""
    suffix = Path(path).suffix
    if suffix == ".txt" and format != "text":
        raise ValueError(f"{path}: data.format {format} needs .jsonl or .json files")
    if suffix == ".json":
        try:
            rows = json.loads(Path(path).read_text())
        except ValueError as error:
            raise BadRowError(f"{path}: not JSON: {error}") from error
        if not isinstance(rows, list):
            raise BadRowError(f"{path}: expected a list of rows, got {type(rows).__name__}")
        for number, value in enumerate(rows, 1):
            yield Row(f"{path}, row {number}", value)
        return
    with Path(path).open(encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                line.encode()
                value = {"text": line.rstrip("\n")} if suffix == ".txt" else json.loads(line)
            except ValueError as error:
                value = error
            yield Row(where, value)


def _example(row: Row, format: str) -> dict[str, Any]:
    """Return a row as an example of TRL. Raises BadRowError."""
    value = row.value
    if isinstance(value, UnicodeEncodeError):
        raise BadRowError(f"{row.where}: not UTF-8")
    if isinstance(value, ValueError):
        raise BadRowError(f"{row.where}: not JSON: {value}")
    if not isinstance(value, dict):
        raise BadRowError(f"{row.where}: expected an object, got {type(value).__name__}")
    match format:
        case "alpaca":
            question = _text(row, value, "instruction")
            context = _text(row, value, "input", optional=True)
            answer = _text(row, value, "output")
            if context:
                question = f"{question}\n\n{context}"
            return {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
            }
        case "sharegpt":
            return {"messages": _messages(row, value, "conversations", "from", "value")}
        case "messages":
            return {"messages": _messages(row, value, "messages", "role", "content")}
    return {"text": _text(row, value, "text")}


def _text(row: Row, value: dict[str, Any], key: str, *, optional: bool = False) -> str:
    text = value.get(key, "" if optional else None)
    if text is None and optional:
        return ""
    if not isinstance(text, str):
        problem = "is missing" if key not in value else f"is {type(text).__name__}, not a text"
        raise BadRowError(f"{row.where}: '{key}' {problem}")
    if not text.strip() and not optional:
        raise BadRowError(f"{row.where}: '{key}' is empty")
    return text


def _messages(
    row: Row, value: dict[str, Any], key: str, role_key: str, text_key: str
) -> list[dict[str, str]]:
    """Return the messages of a conversation that has an answer."""
    turns = value.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"{row.where}: '{key}' is not a list of messages")
    messages = []
    for number, turn in enumerate(turns, 1):
        where = Row(f"{row.where}, message {number}", turn)
        if not isinstance(turn, dict):
            raise BadRowError(f"{where.where}: expected an object, got {type(turn).__name__}")
        name = turn.get(role_key)
        roles = SHAREGPT_ROLES if key == "conversations" else MESSAGE_ROLES
        role = roles.get(name) if isinstance(name, str) else None
        if role is None:
            raise BadRowError(
                f"{where.where}: '{role_key}' is {name!r}, expected one of {', '.join(roles)}"
            )
        messages.append({"role": role, "content": _text(where, turn, text_key)})
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRowError(f"{row.where}: no message of the assistant")
    return messages
