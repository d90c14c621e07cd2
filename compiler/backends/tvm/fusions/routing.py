"""From a token's hidden state to its experts.

    %h = aten.add.Tensor(%x, %y)
    %n = rms_norm(%h, @norm)                    or layer_norm, or none
    %l = linear(%n, @gate)
    %w, %i = router(%l)
    %w2, %i2 = skip(%w, %i)                     or none

become one kernel of %x and %y, whoever else reads what lies between, of one token or of so few that their thread blocks are few.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from moec.compiler.backends.tvm.fusion import read_outside
from moec.compiler.backends.tvm.relax_types import stream
from moec.compiler.backends.tvm.semantic import norm_spec, residual_norm, router_spec, skip_spec
from moec.compiler.backends.tvm.storage import experts_layout, matrix_layout
from moec.compiler.ir import Graph, Node
from moec.targets.kernels.cuda.calls import Gpu
from moec.targets.kernels.cuda.matrices import Projection
from moec.targets.kernels.cuda.router import MOST_EXPERTS, MOST_SLOTS
from moec.targets.kernels.cuda.routing_step import RoutingSpec

if TYPE_CHECKING:
    from moec.compiler.backends.tvm.cuda import CudaKernels
    from moec.compiler.backends.tvm.lower import FunctionLowering
    from moec.targets.kernels.cuda.experts_layout import ExpertsLayout
    from moec.targets.kernels.cuda.layout import FragmentLayout


@dataclass(frozen=True)
class RoutingStep:
    """A router with the nodes around it."""

    spec: RoutingSpec
    linear: Node
    router: Node
    addition: Node | None = None
    norm: Node | None = None
    skip: Node | None = None

    @property
    def nodes(self) -> Sequence[Node]:
        return [node for node in (self.addition, self.norm, self.linear, self.router, self.skip) if node is not None]

    def lower(self, low: FunctionLowering) -> None:
        inputs = [low.full(self.router.inputs[1])] if self.spec.router.bias else []
        inputs += [low.semaphores(), *(low.flat(name) for name in self._sources)]
        inputs += [low.full(name) for name in (self.norm.inputs[1:] if self.norm is not None else ()) if name]
        inputs += [*low.weights(self.linear.inputs[1]).values(), *(low.full(name) for name in self.linear.inputs[2:] if name)]
        found = cast("CudaKernels", low.kernels).routing_step(self.spec, inputs, list(self._layers(low)))
        names = [self.addition.name] if self.addition is not None else []
        names += [self.norm.name] if self.norm is not None and self.spec.product.written else []
        last = self.skip or self.router
        for name, value in zip([*names, self.linear.name, *(output.name for output in last.outputs)], found, strict=True):
            low.set_flat(name, value)

    def _layers(self, low: FunctionLowering) -> Iterator[tuple[ExpertsLayout, int]]:
        """The experts that read the normalised row."""
        for node in low.graph.users.get(self.norm.name, ()) if self.norm is not None else ():
            if node.op == "experts" and node.inputs[0] == self.linear.inputs[0]:
                layout = experts_layout(low.graph, node, low.platform)
                yield cast("ExpertsLayout", layout), int(low.graph.type_of(node.inputs[1]).shape[-1])

    @property
    def _sources(self) -> Sequence[str]:
        """What is added, or what comes in."""
        first = self.nodes[0]
        return first.inputs if first is self.addition else first.inputs[:1]


def match(graph: Graph, storage: Mapping[str, Any], gpu: Gpu, tokens: int) -> list[RoutingStep]:
    """Every router that follows a linear layer."""
    return _all(graph, storage, gpu, tokens, tokens)


def match_up_to(graph: Graph, storage: Mapping[str, Any], gpu: Gpu, most: int) -> list[RoutingStep]:
    """The same for any number of tokens up to `most`."""
    return _all(graph, storage, gpu, None, most)


def _all(graph: Graph, storage: Mapping[str, Any], gpu: Gpu, tokens: int | None, most: int) -> list[RoutingStep]:
    found = (_step(graph, storage, node, gpu, tokens, most) for node in graph.nodes if node.op == "router")
    return [step for step in found if step is not None and step.spec.takes(most, gpu.multiprocessors)]


def _step(graph: Graph, storage: Mapping[str, Any], router: Node, gpu: Gpu, tokens: int | None, most: int) -> RoutingStep | None:
    linear = graph.producers.get(router.inputs[0])
    spec = router_spec(graph, router)
    fits = spec.experts <= MOST_EXPERTS and max(spec.top_k, spec.groups) <= MOST_SLOTS
    if linear is None or linear.op != "linear" or not fits or not _parameters(graph, linear) or not _parameters(graph, router):
        return None
    norm = graph.producers.get(linear.inputs[0])
    if norm is not None and not _normalises(graph, norm):
        norm = None
    addition = graph.producers.get(norm.inputs[0]) if norm is not None else None
    if addition is not None and residual_norm(graph, addition) is not norm:
        addition = None
    skip = _skip(graph, router)
    layout = cast("FragmentLayout", matrix_layout(storage[linear.inputs[1]]))
    gate = Projection(layout, bias=linear.has(2))
    rows = norm_spec(graph, norm, addition) if norm is not None else None
    inside = [node for node in (addition, norm, linear, router, skip) if node is not None]
    written = norm is not None and norm.name in read_outside(graph, inside)
    slots = skip_spec(graph, skip) if skip is not None else None
    chosen = RoutingSpec.of(gate, gpu, rows, spec, slots, written, tokens, most)
    return RoutingStep(chosen, linear, router, addition, norm, skip)


def _parameters(graph: Graph, node: Node) -> bool:
    """Whether all inputs but the first are parameters, and the first is a row of each token."""
    kind = stream(graph.type_of(node.inputs[0]))
    return kind is not None and kind[0] == "T" and all(name in graph.params for name in node.inputs[1:] if name)


def _normalises(graph: Graph, node: Node) -> bool:
    """Whether a node normalises the whole row of a token."""
    if node.op not in ("rms_norm", "layer_norm") or not _parameters(graph, node):
        return False
    kind = stream(graph.type_of(node.name))
    return kind is not None and kind[1] == graph.type_of(node.name).shape[-1]


def _skip(graph: Graph, router: Node) -> Node | None:
    """The node that skips slots of a router, if nobody else reads these, nor counts that may depend on them."""
    users = {user.name: user for output in router.outputs for user in graph.users.get(output.name, ())}
    (only,) = users.values() if len(users) == 1 else (None,)
    if only is None or only.op != "skip" or len(only.inputs) != 2 or set(graph.outputs) & {output.name for output in router.outputs}:
        return None
    return only if tuple(only.inputs) == tuple(output.name for output in router.outputs) else None
