"""What transformers' extension points do not carry across, one file a model type, found by its file name.

A file has `METHODS`: "Class.method" of the family's modules -> a function that computes the same with `torch.ops.moec` operators
or in a form that does not depend on which experts are chosen. It is used while tracing only; the table of families
(`python -m moec.compiler.frontend.families`) holds the result against the original.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any


def methods_of(model: Any) -> dict[str, Callable[..., Any]]:
    """The replacements for a model: those of every model type that one of its configurations names."""
    files = {module.name for module in pkgutil.iter_modules(__path__)}
    types = {str(getattr(m.config, "model_type", "")) for m in model.modules() if hasattr(m, "config")}
    found: dict[str, Callable[..., Any]] = {}
    for name in sorted(types & files):
        found.update(importlib.import_module(f"{__name__}.{name}").METHODS)
    return found


@contextlib.contextmanager
def replaced(model: Any) -> Iterator[None]:
    """While this lasts, the modules' methods are the replacements."""
    classes = {type(m).__name__: type(m) for m in model.modules()}
    before: list[tuple[type, str, Any]] = []
    try:
        for path, function in methods_of(model).items():
            owner, _, method = path.partition(".")
            if owner in classes:
                before.append((classes[owner], method, classes[owner].__dict__[method]))
                setattr(classes[owner], method, function)
        yield
    finally:
        for cls, method, original in before:
            setattr(cls, method, original)
