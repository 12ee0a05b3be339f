"""Imports a function from a `pkg.mod:fn` path in a flag."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_function(path: str) -> Callable[..., Any]:
    """Return the function at `pkg.mod:fn`. Modules in the working folder can be imported too.

    Raises ValueError if the module cannot be imported or the object is not callable.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module, _, name = path.partition(":")
    try:
        loaded = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything on import
        raise ValueError(f"cannot import {path!r} as pkg.mod:fn: {error!r}") from error
    if not callable(loaded):
        raise ValueError(f"{path!r} is not a function")
    function: Callable[..., Any] = loaded
    return function
