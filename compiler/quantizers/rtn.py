"""Round to nearest, each group with the scale that minimises its squared error."""

from __future__ import annotations

from torch import Tensor

from moec.compiler.grid import round_to_nearest
from moec.compiler.packed import Quantized
from moec.compiler.quantizers import Needs
from moec.runtime.formats.int import IntFormat

NEEDS: Needs = "none"


def quantize(weight: Tensor, fmt: IntFormat, moment: Tensor | None = None) -> Quantized:  # noqa: ARG001  # every quantiser has it
    """Codes, scales and zero points of a weight.

    Args:
        weight: [N, K], any float type, finite.
        fmt: bits, group size and symmetry.
        moment: not read.
    """
    return round_to_nearest(weight, fmt)
