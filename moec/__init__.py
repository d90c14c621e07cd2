"""moec: a compiler for Mixture-of-Experts models.

    moec.compile("path/to/checkpoint", "model.moec", recipe="int4")       needs the extra `compile`
    for token in moec.load("model.moec").generate("Once upon a time"):    needs the base install only
        print(token.text, end="")

Importing the package is cheap: each name below imports what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moec.compiler.compare import compare
    from moec.compiler.frontend.module import moe_experts
    from moec.compiler.pipeline import compile_model as compile
    from moec.runtime import load

__version__ = "0.1.0"
__all__ = ["__version__", "compare", "compile", "load", "moe_experts"]

_LAZY = {
    "compare": ("moec.compiler.compare", "compare"),
    "compile": ("moec.compiler.pipeline", "compile_model"),
    "load": ("moec.runtime", "load"),
    "moe_experts": ("moec.compiler.frontend.module", "moe_experts"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)
