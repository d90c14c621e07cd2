"""The verifier: what a graph must satisfy between any two passes.

Names are defined once and before use, parameters exist and have known formats, and every node, run on the meta device with two
assignments of the symbols, gives just the shapes and element types that the graph states.
"""

from __future__ import annotations

import os

import torch

from moec.compiler import aten
from moec.compiler.errors import MoecError
from moec.compiler.interpreter import concrete, evaluate
from moec.compiler.ir import Graph, Node, TensorType
from moec.compiler.text import print_graph
from moec.runtime.formats import get_format

CHECK = int(os.environ.get("MOEC_CHECK", "1"))
"""How much is checked: 0 nothing, 1 a graph when it is made and before it is lowered, 2 also after every pass."""

_SAMPLES = ((2, 7), (3, 10), (1, 13))


class VerifyError(MoecError):
    """A graph breaks a rule of the IR."""


def verify(graph: Graph) -> None:
    """Check a graph.

    Raises:
        VerifyError: a rule is broken; the message has the graph with the complaint under the offending node.
    """
    defined = {v.name for v in graph.inputs}
    _require(len(defined) == len(graph.inputs), graph, None, "two inputs have the same name")
    for param in graph.params.values():
        formats = (param.format,) if isinstance(param.format, str) else param.format
        for name in set(formats):
            get_format(name)
        count = param.type.shape[0] if param.type.shape else 0
        ok = isinstance(param.format, str) or len(param.format) == count
        _require(ok, graph, None, f"@{param.name}: {len(formats)} formats for the {count} experts of {param.type}")
        _require(all(isinstance(d, int) for d in param.type.shape), graph, None, f"@{param.name} has a symbolic shape")
    for node in graph.nodes:
        for name in node.inputs:
            known = not name or name in defined or name in graph.params
            _require(known, graph, node, f"{name!r} is not defined before this node")
        for output in node.outputs:
            clash = output.name in defined or output.name in graph.params
            _require(not clash, graph, node, f"{output.name!r} is defined twice")
            defined.add(output.name)
    for name in graph.outputs:
        _require(name in defined or name in graph.params, graph, None, f"the result {name!r} is not defined")
    for sample in _SAMPLES[:2] if len(graph.symbols) <= len(_SAMPLES[0]) else ():
        symbols = dict(zip(graph.symbols, sample, strict=False))
        for node in graph.nodes:
            _check_types(graph, node, symbols)


def _require(condition: bool, graph: Graph, node: Node | None, message: str) -> None:
    if condition:
        return
    text = print_graph(graph, {node.name: message} if node else {})
    error = VerifyError(f"graph {graph.name} is invalid{f' at %{node.name}' if node else ''}: {message}")
    error.add_note(text)
    raise error


def _meta(kind: TensorType, symbols: dict[str, int]) -> torch.Tensor:
    return torch.empty(concrete(kind.shape, symbols), dtype=aten.TORCH_DTYPES[kind.dtype], device="meta")


def _check_types(graph: Graph, node: Node, symbols: dict[str, int]) -> None:
    tensors = [_meta(graph.type_of(name), symbols) if name else None for name in node.inputs]
    try:
        results = evaluate(node, tensors, symbols, torch.float32, "meta")
    except MoecError:
        raise
    except Exception as error:  # noqa: BLE001  # torch raises many kinds, and each means the same here
        _require(condition=False, graph=graph, node=node, message=f"the op rejects its inputs: {str(error).splitlines()[0]}")
        return
    _require(len(results) == len(node.outputs), graph, node, f"the op has {len(results)} results")
    for output, result in zip(node.outputs, results, strict=True):
        stated = (output.type.dtype, concrete(output.type.shape, symbols))
        found = (aten.DTYPE_NAMES.get(result.dtype, str(result.dtype)), tuple(result.shape))
        _require(stated == found, graph, node, f"%{output.name} is stated as {stated} and is {found} for {symbols}")
