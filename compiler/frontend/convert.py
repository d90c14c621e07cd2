"""From an exported ATen program to a `Graph`, one node at a time. Nothing is simplified here."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch.export.graph_signature import InputKind

from moec.compiler.aten import DTYPE_NAMES
from moec.compiler.errors import MoecError
from moec.compiler.ir import Attr, Dim, Graph, Node, Param, TensorType, Value

_NO_TENSOR = ("aten._assert_tensor_metadata", "aten.sym_", "aten._assert_scalar", "aten._assert_async")
_LAYOUT = ("device", "layout", "pin_memory", "memory_format", "non_blocking", "generator")


def _named_symbols(program: torch.export.ExportedProgram, names: Mapping[str, tuple[str, ...]]) -> dict[sympy.Symbol, sympy.Symbol]:
    symbols = {}
    for fx in program.graph.nodes:
        for size, name in zip(fx.meta["val"].shape, names[fx.name], strict=False) if fx.name in names else ():
            if isinstance(size, torch.SymInt):
                symbols[size.node.expr] = sympy.Symbol(name, integer=True, positive=True)
    return symbols


class _Converter:
    def __init__(self, symbols: Mapping[sympy.Symbol, sympy.Symbol]) -> None:
        self.symbols = symbols
        self.names: dict[tuple[str, int], str] = {}  # (fx node, output index) -> value or parameter

    def dim(self, size: Any) -> Dim:
        if isinstance(size, int):
            return size
        expression = size.node.expr if isinstance(size, torch.SymInt) else size
        expression = sympy.expand(expression.xreplace(dict(self.symbols)))
        return int(expression) if expression.is_Integer else str(expression)

    def type(self, tensor: torch.Tensor) -> TensorType:
        dtype = "c64" if tensor.dtype.is_complex else DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        return TensorType(dtype, tuple(self.dim(s) for s in tensor.shape))

    def operand(self, fx: torch.fx.Node) -> str:
        return self.names[fx.name, 0]

    def attr(self, value: Any) -> Attr:
        if isinstance(value, torch.fx.Node):
            return self.dim(value.meta["val"])
        if isinstance(value, torch.SymInt):
            return self.dim(value)
        if isinstance(value, torch.dtype):
            return DTYPE_NAMES.get(value, str(value))
        if isinstance(value, (list, tuple)):
            return tuple(self.attr(v) for v in value)
        return value

    def arguments(self, fx: torch.fx.Node) -> tuple[list[str], dict[str, Attr]]:
        """The node's inputs and attributes, by the schema of its operator."""
        assert isinstance(fx.target, torch._ops.OpOverload)
        schema = fx.target._schema.arguments
        bound = {**dict(zip((a.name for a in schema), fx.args, strict=False)), **fx.kwargs}
        inputs: list[str] = []
        attrs: dict[str, Attr] = {}
        for argument in schema:
            kind = str(argument.type)
            value: Any = bound.get(argument.name)
            if "Tensor" in kind and "List[" in kind:
                inputs += ["" if v is None else self.operand(v) for v in value or ()]
                attrs[argument.name] = len(value or ())
            elif "Tensor" in kind:
                is_tensor = isinstance(value, torch.fx.Node) and isinstance(value.meta["val"], torch.Tensor)
                if value is None or is_tensor:
                    inputs.append(self.operand(value) if is_tensor else "")
                else:
                    attrs[argument.name] = self.attr(value)  # torch takes a number where the schema says tensor
            elif argument.name not in _LAYOUT and value is not None:
                attrs[argument.name] = self.attr(value)
        while inputs and not inputs[-1]:
            inputs.pop()
        return inputs, attrs

    def node(self, fx: torch.fx.Node) -> Node:
        if not isinstance(fx.target, torch._ops.OpOverload):
            raise MoecError(f"the traced program calls {fx.target}, which is no tensor operator")
        inputs, attrs = self.arguments(fx)
        value = fx.meta["val"]
        results = list(value) if isinstance(value, (tuple, list)) else [value]
        outputs = [Value(fx.name if len(results) == 1 else f"{fx.name}_{i}", self.type(r)) for i, r in enumerate(results)]
        self.names.update({(fx.name, i): output.name for i, output in enumerate(outputs)})
        return Node(str(fx.target), tuple(inputs), tuple(outputs), attrs)


def convert(
    program: torch.export.ExportedProgram,
    name: str,
    inputs: Mapping[str, tuple[str, ...]],
    param_name: Callable[[str], str] = str,
    meta: Mapping[str, Attr] | None = None,
) -> Graph:
    """The graph of an exported program.

    Args:
        program: what `moec.compiler.frontend.trace` exported.
        name: the graph's name.
        inputs: names for the symbolic sizes of each input's axes: `{"ids": ("B", "T")}`.
        param_name: our name of a parameter, buffer or constant, from the program's.
        meta: the graph's facts.
    """
    converter = _Converter(_named_symbols(program, inputs))
    values: list[Value] = []
    nodes: list[Node] = []
    params: dict[str, Param] = {}
    outputs: tuple[str, ...] = ()
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for fx in program.graph.nodes:
        if fx.op == "placeholder":
            spec, kind = specs[fx.name], converter.type(fx.meta["val"])
            if spec.kind == InputKind.USER_INPUT:
                converter.names[fx.name, 0] = fx.name
                values.append(Value(fx.name, kind))
            else:
                target = param_name(spec.target or fx.name)
                converter.names[fx.name, 0] = target
                params[target] = Param(target, kind, kind.dtype)
        elif fx.op == "call_function" and fx.target is operator.getitem:
            source, index = fx.args
            converter.names[fx.name, 0] = converter.names[source.name, index]
        elif fx.op == "call_function" and not str(fx.target).startswith(_NO_TENSOR) and _has_tensor(fx):
            nodes.append(converter.node(fx))
        elif fx.op == "output":
            outputs = tuple(converter.operand(a) for a in fx.args[0])
    return Graph(name, tuple(values), params, tuple(nodes), outputs, dict(meta or {})).with_nodes(nodes, outputs)


def _has_tensor(fx: torch.fx.Node) -> bool:
    value = fx.meta.get("val")
    return isinstance(value, torch.Tensor) or (isinstance(value, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in value))
