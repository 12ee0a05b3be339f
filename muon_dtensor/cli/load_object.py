"""Loads the function that a flag names as `pkg.mod:fn`."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def named(path: str) -> Callable[..., Any]:
    """The function that `pkg.mod:fn` names; modules of the working folder are found too.

    Raises ValueError if there is none.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever a module of the user does when imported
        raise ValueError(f"{path!r} names no function as pkg.mod:fn: {error!r}") from error
    if not callable(found):
        raise ValueError(f"{path!r} is no function")
    function: Callable[..., Any] = found
    return function
