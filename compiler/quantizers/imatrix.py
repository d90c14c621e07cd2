"""Round to nearest, each group with the scale that minimises its squared error weighted by the mean square of the inputs.

The importance matrix of llama.cpp (https://github.com/ggml-org/llama.cpp/pull/4861): sum over k of E[x_k^2] (w_k - q_k)^2 is the error of
the outputs where inputs do not correlate.
"""

from __future__ import annotations

from torch import Tensor

from moec.compiler.fp8 import search_fp8
from moec.compiler.grid import round_to_nearest
from moec.compiler.packed import CodedFormat, Quantized
from moec.compiler.quantizers import Needs
from moec.runtime.formats.fp8 import Fp8Format
from moec.runtime.formats.int import IntFormat

NEEDS: Needs = "diagonal"
FORMATS = (IntFormat, Fp8Format)


def quantize(weight: Tensor, fmt: CodedFormat, moment: Tensor | None = None) -> Quantized:
    """Codes, scales and zero points of a weight.

    Args:
        weight: [N, K], any float type, finite.
        fmt: bits, group size and symmetry; or where fp8 has scales.
        moment: [K], the mean square of each input; without it all count alike.
    """
    if isinstance(fmt, Fp8Format):
        return search_fp8(weight, fmt, moment)
    return round_to_nearest(weight, fmt, moment)
