"""Quantisers: functions from a float weight and a format to codes, scales and zero points. A file's name is the quantiser's.

Each file has `quantize(weight: Tensor [N, K], fmt: IntFormat) -> Quantized`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from torch import Tensor

from moec.compiler.backends.base import Quantized
from moec.runtime.errors import unknown
from moec.runtime.formats.int import IntFormat

Quantizer = Callable[[Tensor, IntFormat], Quantized]


def known_quantizers() -> list[str]:
    """The names of all quantisers."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def get_quantizer(name: str) -> Quantizer:
    """The quantiser of this name.

    Raises:
        MoecError: there is none; the message lists those that exist.
    """
    if name not in known_quantizers():
        raise unknown("quantiser", name, known_quantizers())
    quantizer: Quantizer = importlib.import_module(f"{__name__}.{name}").quantize
    return quantizer
