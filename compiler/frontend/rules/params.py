"""What rules do to parameters: the graph sees another layout, which the weight source produces."""

from __future__ import annotations

from dataclasses import replace

from moec.compiler.errors import MoecError
from moec.compiler.frontend.layout import Layout
from moec.compiler.frontend.rewrite import Rewriter
from moec.compiler.ir import TensorType


def relaid(b: Rewriter, name: str, layout: Layout) -> None:
    """Make the parameter one that the weight source hands out in this layout."""
    if not b.is_param(name):
        raise MoecError(f"the experts' weights %{name} are computed by the model, so that they are no parameters of the graph")
    if layout == Layout() or name in b.layouts:
        return
    param = b.params[name]
    shape = layout.shape(tuple(d for d in param.type.shape if isinstance(d, int)))
    b.params[name] = replace(param, type=TensorType(param.type.dtype, shape))
    b.layouts[name] = layout
