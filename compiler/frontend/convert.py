"""From an exported ATen program to a `Graph`, one node at a time."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.export.graph_signature import InputKind

from moec.compiler.aten import DTYPE_NAMES
from moec.compiler.errors import MoecError
from moec.compiler.ir import Attr, Dim, Graph, Node, Param, TensorType, Value

_DROPPED = ("aten._assert_tensor_metadata", "aten.sym_", "aten._assert_scalar", "aten.sym_constrain")


def convert(program: torch.export.ExportedProgram, name: str, meta: Mapping[str, Attr], symbols: Mapping[str, str]) -> Graph:
    """The graph of an exported program.

    Args:
        program: what `moec.compiler.frontend.trace` exported.
        name: the graph's name.
        meta: the graph's facts.
        symbols: names for the program's symbolic sizes, from the one torch chose to ours.
    """

    def dim(size: Any) -> Dim:
        if isinstance(size, int):
            return size
        expression = size.node.expr if isinstance(size, torch.SymInt) else size
        return int(expression) if expression.is_Integer else str(expression.subs(dict(symbols)))

    def kind(tensor: torch.Tensor) -> TensorType:
        return TensorType(DTYPE_NAMES[tensor.dtype], tuple(dim(s) for s in tensor.shape))

    names: dict[str, str] = {}
    inputs, nodes, params = [], [], {}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for fx in program.graph.nodes:
        if fx.op == "placeholder":
            spec = specs[fx.name]
            if spec.kind == InputKind.USER_INPUT:
                names[fx.name] = fx.name
                inputs.append(Value(fx.name, kind(fx.meta["val"])))
            else:
                target = str(spec.target).removeprefix("model.") if spec.target else fx.name
                names[fx.name] = target
                params[target] = Param(target, kind(fx.meta["val"]), DTYPE_NAMES[fx.meta["val"].dtype])
        elif fx.op == "call_function":
            if fx.target is operator.getitem or str(fx.target).startswith(_DROPPED):
                names[fx.name] = f"{names.get(fx.args[0].name, fx.args[0].name)}_{fx.args[1]}" if fx.target is operator.getitem else ""
                continue
            nodes.append(_node(fx, names, dim, kind))
        elif fx.op == "output":
            outputs = tuple(names[a.name] for a in fx.args[0])
    return Graph(name, tuple(inputs), params, tuple(nodes), outputs, dict(meta)).with_nodes(nodes, outputs)


def _node(fx: torch.fx.Node, names: dict[str, str], dim: Any, kind: Any) -> Node:
    if not isinstance(fx.target, torch._ops.OpOverload):
        raise MoecError(f"the traced program calls {fx.target}, which is no tensor operator")
    bound = {**dict(zip((a.name for a in fx.target._schema.arguments), fx.args, strict=False)), **fx.kwargs}
    inputs: list[str] = []
    attrs: dict[str, Attr] = {}

    def attr(value: Any) -> Attr:
        if isinstance(value, torch.fx.Node):
            return dim(value.meta["val"])
        if isinstance(value, torch.dtype):
            return DTYPE_NAMES[value]
        if isinstance(value, (list, tuple)):
            return tuple(attr(v) for v in value)
        return value

    for argument in fx.target._schema.arguments:
        if argument.name not in bound:
            if "Tensor" in str(argument.type):
                inputs.append("")
            continue
        value = bound[argument.name]
        if "Tensor" in str(argument.type):
            if "List[" in str(argument.type):
                inputs += [names[v.name] for v in value]
                attrs[argument.name] = len(value)
            elif isinstance(value, (int, float)) or (isinstance(value, torch.fx.Node) and not isinstance(value.meta["val"], torch.Tensor)):
                attrs[argument.name] = attr(value)  # torch takes a number where the schema says tensor
            else:
                inputs.append("" if value is None else names[value.name])
        elif argument.name not in ("device", "layout", "pin_memory", "memory_format") and value is not None:
            attrs[argument.name] = attr(value)
    while inputs and not inputs[-1]:
        inputs.pop()
    value = fx.meta["val"]
    results = list(value) if isinstance(value, (tuple, list)) else [value]
    outputs = [Value(fx.name if len(results) == 1 else f"{fx.name}_{i}", kind(r)) for i, r in enumerate(results)]
    names[fx.name] = fx.name
    return Node(str(fx.target), tuple(inputs), tuple(outputs), attrs)
