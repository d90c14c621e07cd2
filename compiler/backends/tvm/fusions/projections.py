"""Linear layers of the same value, with the normalisation and the residual addition in front of them.

    %h = aten.add.Tensor(%x, %y)          or none
    %n = rms_norm(%h, @w)                 or layer_norm, or none
    %q = linear(%n, @q)
    %k = linear(%n, @k)
    ...

become one kernel of %x and %y, which also writes %h, and %n where something else reads it. A single linear layer without a norm in front
of it is that kernel already. Of several tokens there are only those for which the kernel is right (`ProjectionsSpec.suits`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from moec.compiler.backends.tvm.fusion import read_outside
from moec.compiler.backends.tvm.fusions.matrix import in_fragments
from moec.compiler.backends.tvm.semantic import norm_spec, residual_norm
from moec.compiler.backends.tvm.storage import matrix_layout
from moec.compiler.ir import Graph, Node
from moec.targets.kernels.cuda.calls import Gpu
from moec.targets.kernels.cuda.layout import FragmentLayout
from moec.targets.kernels.cuda.projections import Projection, ProjectionsSpec
from moec.targets.kernels.specs import NormSpec

if TYPE_CHECKING:
    from moec.compiler.backends.tvm.cuda import CudaKernels
    from moec.compiler.backends.tvm.lower import FunctionLowering


@dataclass(frozen=True)
class Projections:
    """Some linear layers and what is computed before them."""

    linears: tuple[Node, ...]
    spec: ProjectionsSpec
    norm: Node | None = None
    addition: Node | None = None

    @property
    def nodes(self) -> Sequence[Node]:
        return [node for node in (self.addition, self.norm, *self.linears) if node is not None]

    def lower(self, low: FunctionLowering) -> None:
        first = self.nodes[0]
        inputs = [low.flat(name) for name in first.inputs[: 2 if self.addition is not None else 1]]
        inputs += [low.full(name) for name in (self.norm.inputs[1:] if self.norm is not None else ()) if name]
        for linear in self.linears:
            arrays = low.weights(linear.inputs[1])
            inputs += [arrays[name] for name in matrix_layout(low.storage[linear.inputs[1]]).arrays()]
        inputs += [low.full(name) for linear in self.linears for name in linear.inputs[2:] if name]
        found = iter(cast("CudaKernels", low.kernels).projections(self.spec, inputs))
        written = [self.addition, self.norm if self.spec.written else None, *self.linears]
        for node in (node for node in written if node is not None):
            low.set_flat(node.name, next(found))


def match(graph: Graph, storage: Mapping[str, Any], gpu: Gpu, tokens: int) -> list[Projections]:
    """The linear layers of each value, together with as much as can be; where others have taken a part, what is left."""
    groups: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "linear" and _fits(graph, storage, node):
            groups.setdefault(node.inputs[0], []).append(node)
    found = (choice for name, linears in groups.items() for choice in _choices(graph, storage, name, tuple(linears), gpu, tokens))
    return [choice for choice in found if choice.spec.suits(gpu)]


def _fits(graph: Graph, storage: Mapping[str, Any], node: Node) -> bool:
    """Whether a linear layer has one row for each token, its parameters are those of the model, and the kernel reads their format."""
    kind = graph.type_of(node.inputs[0])
    rows = len(kind.shape) == 3 and kind.shape[:2] in (("B", "T"), ("B", "R")) and kind.dtype == "f32"
    if not rows or node.inputs[0] in graph.params or not all(name in graph.params for name in node.inputs[1:] if name):
        return False
    return in_fragments(storage, node)


def _choices(
    graph: Graph, storage: Mapping[str, Any], name: str, linears: tuple[Node, ...], gpu: Gpu, tokens: int
) -> Iterator[Projections]:
    """From the one with the most nodes to that with the fewest; only one of them can be had."""
    norm = graph.producers.get(name)
    if norm is not None and (spec := _norm_spec(graph, norm)) is not None:
        addition = graph.producers.get(norm.inputs[0])
        if addition is not None and residual_norm(graph, addition) is norm:
            yield _fused(graph, storage, gpu, tokens, linears, norm, addition, spec)
        yield _fused(graph, storage, gpu, tokens, linears, norm, None, spec)
    elsewhere = [user for user in linears if not any(reader.op == "router" for reader in graph.users.get(user.name, ()))]
    for some in (linears, tuple(elsewhere)):  # the layer in front of a router goes with it
        if len(some) > 1:
            yield _fused(graph, storage, gpu, tokens, some)


def _norm_spec(graph: Graph, node: Node) -> NormSpec | None:
    """The normalisation of a whole row."""
    if node.op not in ("rms_norm", "layer_norm") or not all(name in graph.params for name in node.inputs[1:] if name):
        return None
    return norm_spec(graph, node)


def _fused(
    graph: Graph, storage: Mapping[str, Any], gpu: Gpu, tokens: int, linears: tuple[Node, ...], norm: Node | None = None,
    addition: Node | None = None, spec: NormSpec | None = None,
) -> Projections:  # fmt: skip
    if spec is not None and addition is not None:
        spec = replace(spec, residual=True)
    matrices = [Projection(cast(FragmentLayout, matrix_layout(storage[linear.inputs[1]])), linear.has(2)) for linear in linears]
    written = norm is not None and norm.name in read_outside(graph, [norm, *linears])
    return Projections(linears, ProjectionsSpec.of(matrices, gpu.multiprocessors, spec, written, tokens), norm, addition)
