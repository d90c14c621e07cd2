"""How a module keeps the weights of its experts, and the one layout in which graphs see them.

Graphs: up [E, 2F, D] with the gate rows first, down [E, D, F], up bias [E, 2F]. A module may keep them transposed, or gate and up
rows alternating; the weight source applies a `Layout` when it reads, to a whole parameter or to one expert of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from moec.compiler.interpreter import evaluate
from moec.compiler.ir import Node, Param


@dataclass(frozen=True)
class Layout:
    """What to do to one expert's tensor: [D, 2F] -> [2F, D] if `transposed`, then alternating rows apart if `interleaved`.

    A `flat` parameter that is no expert's loses its axes of size one.
    """

    transposed: bool = False
    interleaved: bool = False
    flat: bool = False

    def apply(self, value: Tensor, stacked: bool) -> Tensor:
        """The value in the layout of the graph.

        Args:
            value: a parameter, or one expert of it.
            stacked: the first axis is the experts.
        """
        if self.flat:
            return value.flatten()
        rows = 1 if stacked else 0
        if self.transposed:
            value = value.transpose(-1, -2)
        if self.interleaved:
            pairs = value.unflatten(rows, (-1, 2))  # rows g0 u0 g1 u1 ... -> [F, 2, ...]
            value = pairs.transpose(rows, rows + 1).flatten(rows, rows + 1)
        return value.contiguous()

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the graph of a parameter that the module keeps in this shape."""
        if self.flat:
            return (prod(shape),)
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape


@dataclass(frozen=True)
class Computed:
    """A parameter that the model computes from others, and from nothing else: the graph sees its value as one.

    Args:
        inputs: the parameters that it is made of.
        nodes: the operations, in order.
        output: which of their results it is.
    """

    inputs: tuple[Param, ...]
    nodes: tuple[Node, ...]
    output: str

    def value(self, values: Mapping[str, Tensor]) -> Tensor:
        """Its value for the values of `inputs`."""
        known = dict(values)
        dtype = next(iter(known.values())).dtype
        for node in self.nodes:
            results = evaluate(node, [known[name] for name in node.inputs], {}, dtype, "cpu")
            known.update(zip((o.name for o in node.outputs), results, strict=True))
        return known[self.output].contiguous()
