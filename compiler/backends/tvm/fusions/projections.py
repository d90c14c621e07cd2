"""Linear layers of the same value, with the normalisation and the residual addition in front of them.

    %h = aten.add.Tensor(%x, %y)          or none
    %n = rms_norm(%h, @w)                 or layer_norm, or none
    %q = linear(%n, @q)
    %k = linear(%n, @k)
    ...

become one kernel of %x and %y, which also writes %h, and %n where something else reads it. A single linear layer without a norm in front
of it is that kernel already. Of several tokens there are only those for which the kernel is right (`ProjectionsSpec.suits`).

Of any number of tokens up to some hundred the linear layers become one kernel, without what is in front of them.
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
from moec.targets.kernels.cuda.linear_tokens import TokensSpec
from moec.targets.kernels.cuda.matrices import Projection
from moec.targets.kernels.cuda.projections import ProjectionsSpec
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
        inputs += _parameters(low, self.linears)
        found = iter(cast("CudaKernels", low.kernels).projections(self.spec, inputs))
        written = [self.addition, self.norm if self.spec.written else None, *self.linears]
        for node in (node for node in written if node is not None):
            low.set_flat(node.name, next(found))


@dataclass(frozen=True)
class Several:
    """Some linear layers of one value, of any number of tokens."""

    linears: tuple[Node, ...]
    spec: TokensSpec

    @property
    def nodes(self) -> Sequence[Node]:
        return self.linears

    def lower(self, low: FunctionLowering) -> None:
        inputs = [low.flat(self.linears[0].inputs[0]), *_parameters(low, self.linears)]
        found = cast("CudaKernels", low.kernels).linear_tokens(self.spec, inputs)
        for linear, value in zip(self.linears, found, strict=True):
            low.set_flat(linear.name, value)


def _parameters(low: FunctionLowering, linears: Sequence[Node]) -> list[Any]:
    """The arrays of the layers' weights, then their biases."""
    arrays = [(low.weights(linear.inputs[1]), matrix_layout(low.storage[linear.inputs[1]])) for linear in linears]
    found = [weights[name] for weights, layout in arrays for name in layout.arrays()]
    return found + [low.full(name) for linear in linears for name in linear.inputs[2:] if name]


def match(graph: Graph, storage: Mapping[str, Any], gpu: Gpu, tokens: int) -> list[Projections]:
    """The linear layers of each value, together with as much as can be; where others have taken a part, what is left."""
    groups = _groups(graph, storage).items()
    found = (choice for name, linears in groups for choice in _choices(graph, storage, name, linears, gpu, tokens))
    return [choice for choice in found if choice.spec.suits(gpu)]


def match_up_to(graph: Graph, storage: Mapping[str, Any], gpu: Gpu, most: int) -> list[Several]:
    """The linear layers of each value, where there are several, for any number of tokens up to `most`."""
    found = list[Several]()
    for linears in _groups(graph, storage).values():
        for some in _together(graph, linears):
            matrices = _matrices(storage, some)
            if TokensSpec.suits(matrices, gpu, most):
                found.append(Several(some, TokensSpec.of(matrices, gpu, most)))
    return found


def _groups(graph: Graph, storage: Mapping[str, Any]) -> dict[str, tuple[Node, ...]]:
    """The linear layers of each value that the kernels take."""
    groups: dict[str, tuple[Node, ...]] = {}
    for node in graph.nodes:
        if node.op == "linear" and _fits(graph, storage, node):
            groups[node.inputs[0]] = (*groups.get(node.inputs[0], ()), node)
    return groups


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
    for some in _together(graph, linears):
        yield _fused(graph, storage, gpu, tokens, some)


def _together(graph: Graph, linears: tuple[Node, ...]) -> Iterator[tuple[Node, ...]]:
    """All of several linear layers, and those that are left where one in front of a router goes with that."""
    elsewhere = tuple(user for user in linears if not any(reader.op == "router" for reader in graph.users.get(user.name, ())))
    for some in (linears, elsewhere) if elsewhere != linears else (linears,):
        if len(some) > 1:
            yield some


def _matrices(storage: Mapping[str, Any], linears: Sequence[Node]) -> list[Projection]:
    return [Projection(cast(FragmentLayout, matrix_layout(storage[linear.inputs[1]])), linear.has(2)) for linear in linears]


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
    matrices = _matrices(storage, linears)
    written = norm is not None and norm.name in read_outside(graph, [norm, *linears])
    return Projections(linears, ProjectionsSpec.of(matrices, gpu.multiprocessors, spec, written, tokens), norm, addition)
