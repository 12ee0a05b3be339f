"""The Python of docs/ runs."""

import contextlib
import io
import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


def test_the_example_of_one_rank_s_step_runs():
    (block,) = blocks("architecture.md")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(block, {})
    printed = out.getvalue()
    assert printed.startswith("U0\n    Fill(buffer=0)\n    Send(")
    assert printed.endswith("[3072, 3072, 3072, 3072]\n")


def test_the_files_of_the_glossary_exist():
    text = (DOCS / "architecture.md").read_text()
    paths = re.findall(r"`((?:layout|planning|algorithms|runtime|optimizer)/\w+\.py)`", text)
    assert len(set(paths)) > 20
    for path in paths:
        assert (DOCS.parent / "muon_dtensor" / path).is_file(), path
