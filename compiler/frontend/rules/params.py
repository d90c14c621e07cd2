"""What rules do to parameters: the graph sees another layout, which the weight source produces."""

from __future__ import annotations

from dataclasses import replace

from moec.compiler.errors import MoecError
from moec.compiler.frontend.layout import Computed, Layout
from moec.compiler.frontend.rewrite import Rewriter
from moec.compiler.ir import Node, Param, TensorType


def as_param(b: Rewriter, name: str, stem: str) -> str:
    """The value as a parameter: itself if it is one, else a new one that the weight source computes.

    Args:
        stem: the last part of the new parameter's name; the parts before are what the parameters that it is made of share.

    Raises:
        MoecError: the value depends on the graph's inputs.
    """
    if b.is_param(name):
        return name
    nodes: dict[str, Node] = {}
    inputs: dict[str, Param] = {}

    def visit(value: str) -> None:
        if b.is_param(value):
            inputs[value] = b.params[value]
        elif (node := b.made(value)) is None or node.op.startswith("moec."):
            raise MoecError(f"the experts' weights %{name} depend on the model's input, so that they are no weights")
        elif value not in nodes:
            for operand in filter(None, node.inputs):
                visit(operand)
            nodes[value] = node

    visit(name)
    parts = [p.split(".") for p in inputs]
    shared = [column[0] for column in zip(*parts, strict=False) if len(set(column)) == 1]
    made = ".".join([*(shared[:-1] if len(parts) == 1 else shared), stem])
    if made in inputs:
        made += "_normal"
    first = next(iter(inputs.values()))
    b.params[made] = Param(made, b.type(name), first.format)
    b.layouts[made] = Computed(tuple(inputs.values()), tuple(nodes.values()), name)
    return made


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
