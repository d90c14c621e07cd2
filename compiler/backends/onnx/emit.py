"""Building an ONNX model node by node.

    e = Emitter(weight_files)
    y = e.op("Add", x, e.const(np.float32(1)))

Weights are external data: byte ranges of the artifact's own weight files. Equal nodes are made once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from moec.compiler.backends.base import Location, StoredArray

OPSET = 23
IR_VERSION = 11
CONTRIB = "com.microsoft"

ONNX_TYPES: dict[str, int] = {
    "f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "f64": TensorProto.DOUBLE,
    "i64": TensorProto.INT64, "i32": TensorProto.INT32, "i16": TensorProto.INT16, "i8": TensorProto.INT8,
    "u8": TensorProto.UINT8, "bool": TensorProto.BOOL, "u4": TensorProto.UINT4, "i4": TensorProto.INT4,
}  # fmt: skip
"""ONNX's element type for each of the IR's, and for packed 4-bit numbers."""


class Emitter:
    """A model in the making.

    Args:
        locations: where each stored array lies.
        storage: the stored arrays by (parameter, component).
        reserved: names of the model's inputs and outputs.
        prune: leave out nodes whose results nothing reads.
    """

    def __init__(
        self,
        locations: Mapping[tuple[str, str], Location],
        storage: Mapping[tuple[str, str], StoredArray],
        reserved: Iterable[str] = (),
        prune: bool = False,
    ) -> None:
        self.locations, self.storage, self.prune = locations, storage, prune
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._nodes: list[list[onnx.NodeProto]] = [[]]
        self._made: list[dict[Any, tuple[str, ...]]] = [{}]
        self._producers: dict[str, onnx.NodeProto] = {}
        self._initializers: dict[str, TensorProto] = {}
        self._constants: dict[Any, str] = {}
        self._names: set[str] = {"", *reserved}
        self._contrib = False

    def name(self, stem: str) -> str:
        """A name that nothing in the model has yet."""
        found, number = stem, 0
        while found in self._names:
            number += 1
            found = f"{stem}.{number}"
        self._names.add(found)
        return found

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """An input of the model, of a reserved name."""
        self.inputs.append(helper.make_tensor_value_info(name, ONNX_TYPES[dtype], list(shape)))
        return name

    def output(self, value: str, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Make a value an output of the model, under a reserved name."""
        self._add("Identity", (value,), (name,), "", {})
        self.outputs.append(helper.make_tensor_value_info(name, ONNX_TYPES[dtype], list(shape)))

    def named(self, op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attrs: Any) -> None:
        """A node whose results have given names."""
        self._add(op, inputs, outputs, domain, attrs)

    def op(self, op: str, *inputs: str, domain: str = "", stem: str = "", **attrs: Any) -> str:
        """A node with one result. Attributes that are None are left out."""
        return self.multi(op, inputs, 1, domain, stem, **attrs)[0]

    def multi(self, op: str, inputs: Sequence[str], count: int, domain: str = "", stem: str = "", **attrs: Any) -> tuple[str, ...]:
        """A node with `count` results."""
        inputs = tuple(inputs)
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        attrs = {k: v for k, v in attrs.items() if v is not None}
        key = (op, domain, inputs, count, repr(sorted(attrs.items())))
        for made in self._made:
            if key in made:
                return made[key]
        outputs = tuple(self.name(stem or op) for _ in range(count))
        self._add(op, inputs, outputs, domain, attrs)
        self._made[-1][key] = outputs
        return outputs

    def _add(self, op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str, attrs: Mapping[str, Any]) -> None:
        self._contrib |= domain == CONTRIB
        node = helper.make_node(op, list(inputs), list(outputs), outputs[0], domain=domain, **attrs)
        self._nodes[-1].append(node)
        self._producers |= dict.fromkeys(outputs, node)

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node that gives a value; None for inputs and constants."""
        return self._producers.get(name)

    def stored_type(self, name: str) -> int | None:
        """ONNX's element type of a constant or stored array; None for other values."""
        tensor = self._initializers.get(name)
        return None if tensor is None else tensor.data_type

    @contextmanager
    def branch(self) -> Iterator[list[onnx.NodeProto]]:
        """Nodes made meanwhile go into the list that this gives: the body of a branch, which sees everything made before."""
        self._nodes.append([])
        self._made.append({})
        yield self._nodes[-1]
        self._nodes.pop()
        self._made.pop()

    def when(self, condition: str, then: tuple[list[onnx.NodeProto], str], other: tuple[list[onnx.NodeProto], str], dtype: str) -> str:
        """The result of one of two branches."""
        graphs = []
        for nodes, result in (then, other):
            info = helper.make_tensor_value_info(result, ONNX_TYPES[dtype], None)
            kept = _needed(nodes, [result]) if self.prune else nodes
            graphs.append(helper.make_graph(kept, self.name("branch"), [], [info]))
        output = self.name("If")
        self._add("If", (condition,), (output,), "", {"then_branch": graphs[0], "else_branch": graphs[1]})
        return output

    def const(self, value: NDArray[Any] | np.generic | Sequence[int]) -> str:
        """A small constant; a plain sequence is a vector of int64."""
        array = np.asarray(value, np.int64) if isinstance(value, (list, tuple)) else np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.name("const")
            self._initializers[name] = onnx.numpy_helper.from_array(array, name)
            self._constants[key] = name
        return self._constants[key]

    def number(self, value: float | bool, dtype: str) -> str:
        """A scalar constant of an element type of the IR."""
        kind = onnx.helper.tensor_dtype_to_np_dtype(ONNX_TYPES[dtype])
        return self.const(np.asarray(value).astype(kind))

    def stored(self, param: str, component: str, dtype: str, shape: Sequence[int], row: int | None = None) -> str:
        """A stored array, or one index of its first axis, as an initializer of the given element type and shape."""
        key = ("stored", param, component, dtype, tuple(shape), row)
        if key not in self._constants:
            location, rows = self.locations[param, component], self.storage[param, component].shape[0] if row is not None else 1
            nbytes = location.nbytes // rows
            tensor = TensorProto(data_type=ONNX_TYPES[dtype], dims=list(shape), data_location=TensorProto.EXTERNAL)
            tensor.name = self.name(f"{param}:{component}" if row is None else f"{param}.{row}:{component}")
            for field, value in (("location", location.file), ("offset", location.offset + (row or 0) * nbytes), ("length", nbytes)):
                tensor.external_data.add(key=field, value=str(value))
            self._initializers[tensor.name] = tensor
            self._constants[key] = tensor.name
        return self._constants[key]

    def model(self, name: str, doc: str) -> onnx.ModelProto:
        """The finished model."""
        nodes, initializers = self._nodes[0], list(self._initializers.values())
        if self.prune:
            nodes = _needed(nodes, [output.name for output in self.outputs])
            read = {name for node in nodes for name in _read(node)}
            initializers = [tensor for tensor in initializers if tensor.name in read]
        graph = helper.make_graph(nodes, name, self.inputs, self.outputs, initializers, doc)
        opsets = [helper.make_opsetid("", OPSET)] + ([helper.make_opsetid(CONTRIB, 1)] if self._contrib else [])
        model = helper.make_model(graph, opset_imports=opsets, producer_name="moec")
        model.ir_version = IR_VERSION
        return model


def _read(node: onnx.NodeProto) -> set[str]:
    """What a node and its branches read."""
    names = set(node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            names |= {o.name for o in attribute.g.output}
            for inner in attribute.g.node:
                names |= _read(inner)
    return names


def _needed(nodes: Sequence[onnx.NodeProto], results: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes that lead to some results, in order."""
    wanted, kept = set(results), list[onnx.NodeProto]()
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= _read(node)
            kept.append(node)
    return kept[::-1]
