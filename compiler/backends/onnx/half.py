"""16-bit operands among float32 values, for GPUs: their kernels of MatMulNBits, QMoE, MoE and GroupQueryAttention are made for them.

The values of a graph stay float32: the residual stream, which overflows float16 in large models and loses what single layers add in
bfloat16, norms and routing. What one of these operators reads is narrowed, and what it gives is widened:

    %q: linear(%n, @q)       n16 = Cast(n)      q16 = MatMulNBits(n16, ...)      q = Cast(q16)

A value that was widened and only moved since is not rounded again: the moves are repeated on what it was widened from. What is then
read by nothing is left out of the model (`Emitter.prune`). Norms of such values (of q and k) read and give 16 bits as well; they compute
in float32 all the same.

Two kinds of linear layers stay float32 throughout: those that routing depends on, so that the experts chosen are those that would be
chosen on a processor, and those that give the logits, among which 8 or 11 bits would make ties.
"""

from __future__ import annotations

from collections.abc import Iterable

from onnx import helper

from moec.compiler.backends.onnx.emit import ONNX_TYPES, Emitter
from moec.compiler.ir import Graph

_MOVES = frozenset(("Reshape", "Split", "Slice", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Identity", "Gather"))
"""Operators whose results are elements of their first input."""

_COMPUTED = frozenset(("attention", "embedding", "experts", "layer_norm", "rms_norm"))
"""Ops at which a search for what something depends on ends: what they give was rounded or normalised already."""


class Halves:
    """The 16-bit values of one model.

    Args:
        dtype: `f16` or `bf16`.
    """

    def __init__(self, emitter: Emitter, dtype: str) -> None:
        self.e, self.dtype = emitter, dtype
        self._sources: dict[str, str] = {}

    def widen(self, x: str) -> str:
        """A 16-bit value as float32."""
        wide = self.e.op("Cast", x, to=ONNX_TYPES["f32"])
        self._sources[wide] = x
        return wide

    def narrow(self, x: str) -> str:
        """A float32 value in 16 bits: rounded, unless it has no more."""
        return self.source(x) or self.e.op("Cast", x, to=ONNX_TYPES[self.dtype])

    def source(self, x: str) -> str | None:
        """The 16-bit value that x is, widened and moved; None if it has more bits."""
        if x in self._sources:
            return self._sources[x]
        node = self.e.producer(x)
        if node is None:
            return None
        if node.op_type == "Cast" and self.e.stored_type(node.input[0]) == ONNX_TYPES[self.dtype]:
            return str(node.input[0])
        if node.op_type not in _MOVES or (source := self.source(node.input[0])) is None:
            return None
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        moved = self.e.multi(node.op_type, [source, *node.input[1:]], len(node.output), node.domain, **attrs)
        return moved[list(node.output).index(x)]


def exact_linears(graph: Graph) -> frozenset[str]:
    """The linear nodes that stay float32: the last ones before the choice and weights of experts, and before the graph's results."""
    wanted: list[str] = [*graph.outputs]
    for node in graph.nodes:
        if node.op == "experts":
            wanted += node.inputs[1:3]
    return frozenset(_last_linears(graph, wanted))


def _last_linears(graph: Graph, names: Iterable[str]) -> set[str]:
    seen, found, left = set[str](), set[str](), list(names)
    while left:
        name = left.pop()
        node = graph.producers.get(name)
        if node is None or name in seen or node.op in _COMPUTED:
            continue
        seen.add(name)
        if node.op == "linear":
            found.add(node.name)
        else:
            left += [source for source in node.inputs if source]
    return found
