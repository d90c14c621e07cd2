"""Things that are found by their file's name: the files of a package, loaded by name, with options that are keyword-only arguments."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

from moec.compiler.errors import MoecError
from moec.runtime.errors import unknown

R = TypeVar("R")


def file_names(package: str, folders: bool = False) -> list[str]:
    """The names of the files of a package, or of its folders."""
    return sorted(m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__) if m.ispkg == folders)


def load_file(package: str, kind: str, name: str, folders: bool = False) -> ModuleType:
    """The file (or the folder) of this name.

    Args:
        kind: what error messages call it.

    Raises:
        MoecError: there is none; the message lists those that exist.
    """
    if name not in (known := file_names(package, folders)):
        raise unknown(kind, name, known)
    return importlib.import_module(f"{package}.{name}")


def with_options(function: Callable[..., R], options: Mapping[str, Any] | None, what: str) -> Callable[..., R]:
    """A function with some of its keyword-only arguments given.

    Args:
        what: what error messages call it: `quantiser gptq`.

    Raises:
        MoecError: it has no such argument; the message lists those that it has.
    """
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options or ():
        if not known:
            raise MoecError(f"the {what} has no options, got {option!r}")
        if option not in known:
            raise unknown(f"option of the {what}", option, known)
    return partial(function, **options) if options else function
