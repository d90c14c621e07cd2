"""Which matrices the kernels of fusions read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moec.compiler.backends.tvm.storage import matrix_layout
from moec.compiler.ir import Node
from moec.targets.kernels.cuda.layout import FragmentLayout


def in_fragments(storage: Mapping[str, Any], linear: Node) -> bool:
    """Whether the matrix of a linear layer lies as the tensor cores' kernels read it."""
    layout = matrix_layout(storage[linear.inputs[1]])
    return isinstance(layout, FragmentLayout) and layout.in_fragments
