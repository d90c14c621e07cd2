"""From a graph to a Relax function over one packed stream of tokens (B = 1).

A value that has one row of numbers a token lies as [T, numbers] from its first to its last use, so that views cost nothing and every
kernel sees two axes; only operators of the ATen table that need more axes get them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import relax, tirx

from moec.compiler.aten import overload
from moec.compiler.backends.tvm import aten_table
from moec.compiler.backends.tvm.aten_elementwise import ELEMENTWISE
from moec.compiler.backends.tvm.fusion import Fusion
from moec.compiler.backends.tvm.platform import Kernels, Platform
from moec.compiler.backends.tvm.relax_types import DTYPES, Sizes, stream, typed
from moec.compiler.backends.tvm.semantic import SEMANTIC, add_and_norm, residual_norm
from moec.compiler.backends.tvm.storage import Storage
from moec.compiler.errors import MoecError
from moec.compiler.ir import Dim, Graph, Node, TensorType
from moec.compiler.ops import OPS
from moec.compiler.text import print_node
from moec.runtime.counters import COUNTS
from moec.runtime.tvm_functions import Function

Expr = Any


def check_supported(graph: Graph) -> None:
    """Check that every op can be lowered.

    Raises:
        MoecError: some cannot; the message names them all.
    """
    for node in graph.nodes:
        if node.op in OPS and node.op not in SEMANTIC:
            raise MoecError(f"{node.op} needs recurrent state, which the tvm backend does not keep yet: {print_node(graph, node)}")
    missing = [n for n in graph.nodes if n.op not in SEMANTIC and not aten_table.supported(n.op)]
    if missing:
        ops = sorted({n.op for n in missing})
        raise MoecError(
            f"graph {graph.name}: the tvm backend has no lowering for {', '.join(ops)}, first in: {print_node(graph, missing[0])}. "
            "Add a row to the table in moec/compiler/backends/tvm/aten_table.py"
        )


class FunctionLowering:
    """One Relax function of the graph for certain numbers of tokens and rows.

    Its arguments are the graph's inputs as streams (`ids` [T], `positions` [T], `rows` [R]), `blocks` int32 [NB, 4] and `page_table`
    int32 [S, MP] of the attention kernels, K and V pages of each attention node, and the weights: one tuple of the arrays
    of each parameter, then of the counts of each experts node, then the platform's semaphores if it has any. Types of its elements are
    not stated, since the virtual machine would check each of them in every call.
    """

    def __init__(
        self, graph: Graph, storage: Mapping[str, Storage], platform: Platform, kernels: Kernels, bb: relax.BlockBuilder,
        function: Function,
    ) -> None:  # fmt: skip
        self.graph, self.storage, self.platform, self.kernels, self.bb = graph, storage, platform, kernels, bb
        self.name, self.tokens, self.rows = function.name, function.tokens, function.rows
        self.sizes = Sizes(self.tokens, self.rows)
        self._flat: dict[str, Expr] = {}
        self._full: dict[str, Expr] = {}
        self._weights: dict[tuple[str, str], Expr] = {}
        self._semaphores: Expr | None = None
        self._counted = 0
        fusions = platform.fusions(graph, storage, function)
        self._fused: dict[str, Fusion] = {value.name: f for f in fusions for node in f.nodes for value in node.outputs}

    def build(self, cache_types: Sequence[relax.TensorType]) -> None:
        """Add the function to the module."""
        inputs = []
        for value in self.graph.inputs:
            kind = stream(value.type)
            if kind is None or kind[1] != 1:
                raise MoecError(f"graph {self.graph.name}: input %{value.name}: {value.type} is not one number a token")
            inputs.append(relax.Var(value.name, relax.TensorType([self._count(kind[0])], DTYPES[value.type.dtype])))
        blocks = 1 if self.tokens == 1 else tirx.Var("NB", "int64")
        self.blocks = relax.Var("blocks", relax.TensorType([blocks, 4], "int32"))
        table = [tirx.Var("S", "int64"), tirx.Var("MP", "int64")]
        self.page_table = relax.Var("page_table", relax.TensorType(table, "int32"))
        self._caches = [relax.Var(f"cache{i}", kind) for i, kind in enumerate(cache_types)]
        self._tuple = relax.Var("weights", relax.ObjectType())
        arrays = [(param, component, array) for param, s in self.storage.items() for component, array in s.arrays().items()]
        self._arrays = {(p, c): (i, relax.TensorType(array.shape, array.dtype)) for i, (p, c, array) in enumerate(arrays)}
        with self.bb.function(self.name, [*inputs, self.blocks, self.page_table, *self._caches, self._tuple]):
            with self.bb.dataflow():
                for value, var in zip(self.graph.inputs, inputs, strict=True):
                    self._flat[value.name] = var
                for node in self.graph.nodes:
                    if node.name not in self._fused:
                        self._node(node)
                result = self.bb.emit_output(self.flat(self.graph.outputs[0]))
            self.bb.emit_func_output(result)

    def _count(self, symbol: str) -> Any:
        return self.sizes.tokens if symbol == "T" else self.sizes.rows

    def weight(self, param: str, component: str) -> Expr:
        """An array of a parameter."""
        key = (param, component)
        if key not in self._weights:
            self._weights[key] = self._item(*self._arrays[key])
        return self._weights[key]

    def _item(self, index: int, kind: relax.TensorType) -> Expr:
        """An element of the tuple of weights."""
        args = (self._tuple, relax.prim_value(index))
        return self.bb.emit(relax.op.call_pure_packed("vm.builtin.tuple_getitem", *args, ty_args=[kind]))

    def weights(self, param: str) -> dict[str, Expr]:
        """All arrays of a parameter."""
        return {component: self.weight(param, component) for component in self.storage[param].arrays()}

    def caches(self, node: Node) -> tuple[Expr, Expr]:
        """K and V pages of an attention node."""
        index = [n.name for n in self.graph.nodes if n.op == "attention"].index(node.name)
        return self._caches[2 * index], self._caches[2 * index + 1]

    def next_counts(self) -> Expr | None:
        """The counts of the next experts node, if its kernel counts."""
        if not self.platform.counted:
            return None
        self._counted += 1
        return self._item(len(self._arrays) + self._counted - 1, relax.TensorType([COUNTS], "int64"))

    def semaphores(self) -> Expr:
        """int32 zeros for the kernels whose thread blocks wait for the last one of them; each leaves them as they were."""
        assert self.platform.semaphores, "the platform has none"
        if self._semaphores is None:
            counted = sum(node.op == "experts" for node in self.graph.nodes) if self.platform.counted else 0
            self._semaphores = self._item(len(self._arrays) + counted, relax.TensorType([self.platform.semaphores], "int32"))
        return self._semaphores

    def flat(self, name: str) -> Expr:
        """A value as a stream [T, numbers], or [T] where a token has one number and one axis."""
        self._ask(name)
        if name not in self._flat:
            kind = stream(self.graph.type_of(name))
            assert kind is not None, name
            shape = self._flat_shape(self.graph.type_of(name), kind)
            self._flat[name] = self.bb.emit(relax.op.reshape(self._full[name], shape))
        return self._flat[name]

    def _flat_shape(self, kind: TensorType, found: tuple[str, int]) -> list[Any]:
        count = self._count(found[0])
        return [count] if kind.shape in (("B", "T"), ("B", "R"), ("R",)) else [count, found[1]]

    def matrix(self, name: str) -> Expr:
        """A value as [everything else, its last axis]."""
        kind = self.graph.type_of(name)
        found = stream(kind)
        width = kind.shape[-1]
        if found is None or found[1] != width:
            lead: Any = 1
            for dim in kind.shape[:-1]:
                lead = lead * self.sizes.dim(dim)
            return self.bb.emit(relax.op.reshape(self.flat(name) if found else self.full(name), [lead, width]))
        return self.flat(name)

    def full(self, name: str) -> Expr:
        """A value, or a parameter, in the shape that the graph states, with B = 1."""
        if name in self.graph.params:
            return self.weight(name, "data")
        self._ask(name)
        if name not in self._full:
            shape = self.sizes.type(self.graph.type_of(name)).shape
            self._full[name] = self.bb.emit(relax.op.reshape(self._flat[name], shape))
        return self._full[name]

    def _ask(self, name: str) -> None:
        """Emit the fusion that computes a value, unless it is there."""
        fusion = self._fused.get(name)
        if fusion is not None:
            for value in (value for node in fusion.nodes for value in node.outputs):
                del self._fused[value.name]
            fusion.lower(self)

    def set_flat(self, name: str, value: Expr) -> None:
        """Define a value by its stream."""
        self._flat[name] = value

    def set_full(self, name: str, value: Expr) -> None:
        """Define a value by its tensor in the shape that the graph states."""
        self._full[name] = value

    def _node(self, node: Node) -> None:
        if node.name in self._flat:  # came with a node before it
            return
        if (norm := residual_norm(self.graph, node)) is not None:
            add_and_norm(self, node, norm)
        elif (lower := SEMANTIC.get(node.op)) is not None:
            lower(self, node)
        else:
            self._aten(node)

    def _aten(self, node: Node) -> None:
        name = aten_table.base_name(node.op)
        source, result = node.inputs[0] if node.inputs else "", node.outputs[0]
        kind = stream(result.type)
        if name in aten_table.IDENTITY or name in aten_table.VIEWS:
            if source not in self.graph.params and kind and stream(self.graph.type_of(source)) == kind:
                shapes = (self.graph.type_of(source), result.type)
                if len({len(self._flat_shape(s, kind)) for s in shapes}) == 1:
                    self._flat[result.name] = self.flat(source)
                    return
            self._full[result.name] = typed(relax.op.reshape(self.full(source), self.sizes.type(result.type).shape))
            return
        if name == "topk":
            SEMANTIC["aten.topk"](self, node)
            return
        streams = [stream(self.graph.type_of(n)) for n in node.inputs if n]
        if (
            name in ELEMENTWISE
            and kind
            and all(
                s == kind and n not in self.graph.params and self._rank(n) == len(self._flat_shape(result.type, kind))
                for s, n in zip(streams, node.inputs, strict=False)
            )
        ):
            out = relax.TensorType(self._flat_shape(result.type, kind), DTYPES[result.type.dtype])
            self._flat[result.name] = self.bb.emit(ELEMENTWISE[name](self._bind(node, self.flat, [out])))
            return
        lower = {**ELEMENTWISE, **aten_table.OTHERS}[name]
        found = lower(self._bind(node, self.full, [self.sizes.type(o.type) for o in node.outputs]))
        for output, value in zip(node.outputs, found if isinstance(found, Sequence) else [found], strict=True):
            self._full[output.name] = self.bb.emit(value)

    def _rank(self, name: str) -> int:
        kind = self.graph.type_of(name)
        found = stream(kind)
        return len(self._flat_shape(kind, found)) if found else 0

    def _bind(self, node: Node, tensor: Callable[[str], Expr], out: list[relax.TensorType]) -> dict[str, Any]:
        """The arguments of an ATen node by their names."""
        queue, bound = list(node.inputs), dict[str, Any]()
        for argument in overload(node.op)._schema.arguments:  # noqa: SLF001  # torch has no public way to a schema
            kind = str(argument.type)
            if "List[" in kind and "Tensor" in kind:
                bound[argument.name] = [tensor(queue.pop(0)) for _ in range(node.attrs[argument.name])]
            elif argument.name in node.attrs:
                bound[argument.name] = self._attr(node.attrs[argument.name])
            elif "Tensor" in kind:
                name = queue.pop(0) if queue else ""
                bound[argument.name] = tensor(name) if name else None
        return {**bound, "out": out}

    def _attr(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return [self._attr(v) for v in value]
        return self._size(value) if isinstance(value, str) and value not in DTYPES and value.isascii() else value

    def _size(self, value: Dim) -> Any:
        try:
            return self.sizes.dim(value)
        except MoecError:
            return value  # a word, such as the name of a rounding mode


def cache_types(page_shapes: Sequence[tuple[int, ...]], dtype: str) -> list[relax.TensorType]:
    """The types of the page pools of the caches; all have the same number of pages."""
    pages = tirx.Var("pages", "int64")
    return [relax.TensorType([pages, *shape], dtype) for shape in page_shapes]
