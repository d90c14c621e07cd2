"""Round to nearest, each group with the scale that minimises its squared error; fp8 with the one that the largest weight asks for."""

from __future__ import annotations

from torch import Tensor

from moec.compiler.fp8 import round_to_fp8
from moec.compiler.grid import round_to_nearest
from moec.compiler.packed import CodedFormat, Quantized
from moec.compiler.quantizers import Needs
from moec.runtime.formats.fp8 import Fp8Format
from moec.runtime.formats.int import IntFormat

NEEDS: Needs = "none"
FORMATS = (IntFormat, Fp8Format)


def quantize(weight: Tensor, fmt: CodedFormat, moment: Tensor | None = None) -> Quantized:  # noqa: ARG001  # every quantiser has it
    """Codes, scales and zero points of a weight.

    Args:
        weight: [N, K], any float type, finite.
        fmt: bits, group size and symmetry; or where fp8 has scales.
        moment: not read.
    """
    if isinstance(fmt, Fp8Format):
        return round_to_fp8(weight, fmt)
    return round_to_nearest(weight, fmt)
