"""Quantisers: functions from a float weight and a format to codes, scales and zero points. A file's name is the quantiser's.

Each file has `quantize(weight, fmt, moment) -> Quantized` and `NEEDS`, which says what of the inputs' second moment it reads:

    none        nothing: the weight alone decides
    diagonal    moment [K]: the mean of x_k^2 over the inputs x [K] that the weight is multiplied with
    full        moment [K, K]: the mean of x x^T

Options of a quantiser are keyword-only arguments of its function. Any quantiser combines with any integer format and any statistics; one
whose `FORMATS` has `Fp8Format` takes 8-bit floating point too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.packed import CodedFormat, Quantized
from moec.compiler.plugins import file_names, load_file, with_options
from moec.runtime.formats import get_format
from moec.runtime.formats.fp8 import Fp8Format
from moec.runtime.formats.int import IntFormat

Needs = Literal["none", "diagonal", "full"]


class Quantize(Protocol):
    """The function of a quantiser."""

    def __call__(self, weight: Tensor, fmt: CodedFormat, moment: Tensor | None = None) -> Quantized:
        """Codes of a weight [N, K]; `moment` as the quantiser's `NEEDS` says, None where there are no statistics."""
        ...


@dataclass(frozen=True)
class Quantizer:
    """A quantiser: its name, what it needs, its function, the options that this has already, and the kinds of formats that it takes."""

    name: str
    needs: Needs
    quantize: Quantize
    options: Mapping[str, Any] = field(default_factory=dict)
    formats: tuple[type, ...] = (IntFormat,)

    @property
    def description(self) -> str:
        """What tells its results from another's."""
        return f"{self.name} {json.dumps(dict(self.options), sort_keys=True)}"

    def require(self, *formats: str | None) -> None:
        """Check that weights can be quantised to formats, plain ones and None left out.

        Raises:
            MoecError: it has no way to one of them.
        """
        for name in formats:
            if name is not None and isinstance(get_format(name), CodedFormat) and not isinstance(get_format(name), self.formats):
                able = [other for other in known_quantizers() if Fp8Format in get_quantizer(other).formats]
                raise MoecError(
                    f"quantiser {self.name}: {name} is floating point, whose steps are not all alike: "
                    f"choose the method {' or '.join(able)}, or an integer format such as int8_channel"
                )


def known_quantizers() -> list[str]:
    """The names of all quantisers."""
    return file_names(__name__)


def get_quantizer(name: str, options: Mapping[str, Any] | None = None) -> Quantizer:
    """The quantiser of this name.

    Args:
        options: keyword arguments of its function.

    Raises:
        MoecError: there is none, or it has no such option; the message lists those that exist.
    """
    module = load_file(__name__, "quantiser", name)
    function = with_options(module.quantize, options, f"quantiser {name}")
    return Quantizer(name, module.NEEDS, function, options or {}, getattr(module, "FORMATS", (IntFormat,)))
