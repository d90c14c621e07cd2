"""From a graph to an ONNX model with a cache of keys and values.

inputs    ids, positions [B, T]; rows [R], of which tokens of a sequence the logits are wanted; past_key.i, past_value.i;
          with GroupQueryAttention seqlens_k [B], the last index of each sequence after this step, and total_sequence_length
outputs   logits [B, R, V]; present_key.i, present_value.i
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx

from moec.compiler.backends.onnx import aten, aten_shape, routing, semantic
from moec.compiler.backends.onnx.attention import Cache, lower_attention
from moec.compiler.backends.onnx.emit import ONNX_TYPES, Emitter
from moec.compiler.backends.onnx.experts import lower_experts
from moec.compiler.backends.onnx.fusion import Fusion, needed, of_positions, plan_fusion
from moec.compiler.backends.onnx.half import Halves, exact_linears
from moec.compiler.backends.onnx.linear import lower_linear
from moec.compiler.backends.onnx.placement import Placement
from moec.compiler.backends.onnx.shapes import Shapes, symbol_sources
from moec.compiler.backends.onnx.weights import Weights
from moec.compiler.errors import MoecError
from moec.compiler.ir import Attr, Dim, Graph, Node

RULES: dict[str, Callable[[Lowering, Node], str | Sequence[str]]] = {
    **aten.RULES,
    **aten_shape.RULES,
    "embedding": semantic.lower_embedding,
    "linear": lower_linear,
    "rms_norm": semantic.lower_rms_norm,
    "layer_norm": semantic.lower_layer_norm,
    "rope": semantic.lower_rope,
    "attention": lower_attention,
    "router": routing.lower_router,
    "skip": routing.lower_skip,
    "experts": lower_experts,
}
"""How each op is lowered: a function that gives the ONNX name of the result, or of each result; "" if it was set already."""


def check_lowerable(graph: Graph) -> None:
    """Check that there is a rule for every node.

    Raises:
        MoecError: there is none for some; the message names them.
    """
    if missing := sorted({node.op for node in graph.nodes} - RULES.keys()):
        raise MoecError(f"graph {graph.name}: the onnx backend has no lowering of {', '.join(missing)}")
    for node in graph.nodes:
        if node.op == "attention" and not node.attrs.get("causal", True):
            raise MoecError(f"attention %{node.name} is not causal: it sees tokens that are not there yet when a text is generated")


def reserved_names(graph: Graph) -> set[str]:
    """The names of the model's inputs and outputs."""
    layers = range(sum(node.op == "attention" for node in graph.nodes))
    caches = {f"{time}_{kind}.{layer}" for time in ("past", "present") for kind in ("key", "value") for layer in layers}
    return {*(v.name for v in graph.inputs), "logits", "seqlens_k", "total_sequence_length", *caches}


class Lowering:
    """One graph on its way to ONNX.

    Args:
        accuracy_level: of MatMulNBits and QMoE: 0 float activations, 4 int8 activations.
        half: for GPUs, the type of what products, attention and experts read: `f16` or `bf16` (see `half`).
    """

    def __init__(
        self, graph: Graph, emitter: Emitter, placement: Placement, portable: bool, accuracy_level: int, half: str | None = None
    ) -> None:
        self.graph: Graph = graph
        self.e: Emitter = emitter
        self.portable, self.accuracy_level, self.half = portable, accuracy_level, half
        self._halves = None if half is None else Halves(emitter, half)
        self.exact: frozenset[str] = frozenset() if half is None else exact_linears(graph)
        self.shapes = Shapes(emitter, symbol_sources(graph))
        self.weights = Weights(emitter, graph.params, placement, portable)
        self.fusion = Fusion() if portable else plan_fusion(graph, placement, self.exact, scales=half is None)
        self.caches: list[Cache] = []
        self.pending: dict[str, tuple[str, str]] = {}
        """Additions that the norm reading them will do: the names of both operands."""
        self._values: dict[str, str] = {}
        self._flat: dict[str, str] = {}
        self._presents: list[tuple[str, Sequence[int | str]]] = []

    def run(self) -> onnx.ModelProto:
        """The model."""
        read = needed(self.graph, self.fusion)
        for value in self.graph.inputs:
            if value.name in read or value.name != "positions":
                self._values[value.name] = self.e.input(value.name, value.type.dtype, value.type.shape)
        self._lower([node for node in self.graph.nodes if node.name in read])
        kind = self.graph.type_of(self.graph.outputs[0])
        self.e.output(self.value(self.graph.outputs[0]), "logits", kind.dtype, kind.shape)
        for name, shape in self._presents:
            self.e.outputs.append(onnx.helper.make_tensor_value_info(name, ONNX_TYPES[self.kind], list(shape)))
        return self.e.model(self.graph.name, "")

    def _lower(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if semantic.fused_addition(self, node):
                first, second = node.inputs
                self.pending[node.name] = self.value(first), self.value(second)
                continue
            results = RULES[node.op](self, node)
            names = (results,) if isinstance(results, str) else results
            for output, name in zip(node.outputs, names, strict=True):
                if name:
                    self._values[output.name] = name

    @property
    def kind(self) -> str:
        """The element type of caches, and of what products read."""
        return self.half or "f32"

    def narrow(self, value: str) -> str:
        """An ONNX float32 value as products, attention and experts take it."""
        return value if self._halves is None or not value else self._halves.narrow(value)

    def widen(self, value: str) -> str:
        """What one of them gives, in float32."""
        return value if self._halves is None else self._halves.widen(value)

    def half_of(self, value: str) -> str | None:
        """The 16-bit value that an ONNX float32 value was widened from; None if it has more bits."""
        return None if self._halves is None else self._halves.source(value)

    @property
    def context(self) -> int:
        """The most tokens of a sequence."""
        context = self.graph.meta["context_length"]
        assert isinstance(context, int)
        return context

    def of_context(self, names: tuple[str, ...]) -> list[str]:
        """What some values [B, T, ...] that depend on positions alone are at the positions of a whole context: [1, context, ...].

        ONNX Runtime computes them when it loads the model.
        """
        e = self.e
        at = e.op("Unsqueeze", e.op("Range", *(self.number(n, "i64") for n in (0, self.context, 1))), e.const([0]))
        part = Lowering(of_positions(self.graph, names), e, self.weights.placement, self.portable, self.accuracy_level, self.half)
        part.set_value("positions", at)
        part.shapes = Shapes(e, {"B": (at, 0), "T": (at, 1)})
        part._lower(part.graph.nodes)
        return [part.value(name) for name in names]

    def value(self, name: str) -> str:
        """The ONNX name of a value or parameter."""
        if name in self.graph.params:
            return self.weights.value(name)
        if name in self.pending:
            self._values[name] = self.e.op("Add", *self.pending.pop(name), stem=name)
        if name not in self._values:
            shape = self.shape(name)
            self._values[name] = self.e.op("Reshape", self._flat[name], self.e.const([0, 0, *(d for d in shape[2:] if isinstance(d, int))]))
        return self._values[name]

    def set_value(self, name: str, value: str) -> None:
        """State the ONNX name of a value."""
        self._values[name] = value

    def flat(self, name: str) -> str:
        """A value [B, T, H, d] as [B, T, H * d]."""
        if name not in self._flat:
            heads, size = self.shape(name)[2:]
            assert isinstance(heads, int)
            assert isinstance(size, int)
            self._flat[name] = self.e.op("Reshape", self.value(name), self.e.const([0, 0, heads * size]))
        return self._flat[name]

    def set_flat(self, name: str, value: str) -> None:
        """State the ONNX name of a value's flat form; the other form is made when somebody asks for it."""
        self._flat[name] = value

    def shape(self, name: str) -> tuple[Dim, ...]:
        """The shape of a value or parameter."""
        return self.graph.type_of(name).shape

    def dtype(self, name: str) -> str:
        """The element type of a value or parameter."""
        return self.graph.type_of(name).dtype

    def cast(self, name: str, dtype: str) -> str:
        """A value in an element type."""
        value = self.value(name)
        return value if self.dtype(name) == dtype else self.cast_value(value, dtype)

    def cast_value(self, value: str, dtype: str) -> str:
        """An ONNX value in an element type."""
        return self.e.op("Cast", value, to=ONNX_TYPES[dtype])

    def number(self, number: Attr, dtype: str) -> str:
        """A number, or a dimension in an attribute, as a scalar."""
        if isinstance(number, str):
            return self.cast_value(self.shapes.scalar(number), dtype)
        return self.e.const(np.asarray(number).astype(onnx.helper.tensor_dtype_to_np_dtype(ONNX_TYPES[dtype])))

    def cache_inputs(self) -> tuple[str, str]:
        """The inputs that say how long the sequences are."""
        if "seqlens_k" not in self._values:
            self._values["seqlens_k"] = self.e.input("seqlens_k", "i32", ["B"])
            self._values["total_sequence_length"] = self.e.input("total_sequence_length", "i32", [])
        return "seqlens_k", "total_sequence_length"

    def present(self, names: Sequence[str], shape: Sequence[int | str]) -> None:
        """State outputs that hold a layer's keys and values."""
        self._presents += [(name, shape) for name in names]
