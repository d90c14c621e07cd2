"""Attention of few tokens, with the normalisation and rope of their q and k in front of it.

    %qn = rms_norm(%q, @w)              over the whole row or, after the view, over each head; or none
    %q4 = aten.view.default(%qn)
    %qr = rope(%q4, %cos, %sin)         both q and k, or neither
    ... the same for k
    %a = attention(%qr, %kr, %v)

becomes one kernel of %q, %k, %v, %cos and %sin, as far as nobody else reads what lies between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from moec.compiler.backends.tvm import aten_table
from moec.compiler.backends.tvm.relax_types import stream
from moec.compiler.backends.tvm.semantic import attention_spec
from moec.compiler.ir import Graph, Node
from moec.targets.kernels.cuda.calls import Gpu
from moec.targets.kernels.cuda.step_spec import StepSpec
from moec.targets.kernels.specs import NormSpec

if TYPE_CHECKING:
    from moec.compiler.backends.tvm.cuda import CudaKernels
    from moec.compiler.backends.tvm.lower import FunctionLowering


@dataclass(frozen=True)
class Chain:
    """What is done to q or k before attention.

    Args:
        source: the value that it begins with.
        nodes: what is computed from it.
        rope, norm: those of the nodes that are not views.
    """

    source: str
    nodes: tuple[Node, ...] = ()
    rope: Node | None = None
    norm: Node | None = None


@dataclass(frozen=True)
class AttentionStep:
    """An attention node and what is computed with it."""

    node: Node
    spec: StepSpec
    q: Chain
    k: Chain

    @property
    def nodes(self) -> Sequence[Node]:
        return [*self.q.nodes, *self.k.nodes, self.node]

    def lower(self, low: FunctionLowering) -> None:
        inputs = [low.flat(name) for name in (self.q.source, self.k.source, self.node.inputs[2])]
        inputs += [low.blocks, low.page_table, low.semaphores()]
        inputs += [low.full(chain.norm.inputs[1]) for chain in (self.q, self.k) if chain.norm is not None and chain.norm.inputs[1:]]
        inputs += [low.flat(name) for name in self.q.rope.inputs[1:]] if self.q.rope is not None else []
        inputs += [low.full(self.node.inputs[3])] if self.spec.attention.sinks else []
        kernels = cast("CudaKernels", low.kernels)
        low.set_flat(self.node.name, kernels.attention_step(self.spec, low.caches(self.node), inputs))


def match(graph: Graph, storage: Mapping[str, Any], gpu: Gpu, tokens: int | None) -> list[AttentionStep]:
    """Every attention node of a graph, for so many tokens (None: any number)."""
    del storage, gpu  # options follow where the kernel is emitted
    return [_step(graph, node, tokens) for node in graph.nodes if node.op == "attention"]


def _step(graph: Graph, node: Node, tokens: int | None) -> AttentionStep:
    attention = attention_spec(graph, node)
    q, k = (_chain(graph, node, i, heads * attention.d) for i, heads in enumerate((attention.heads, attention.kv_heads)))
    angles = [chain.rope.inputs[1:] if chain.rope is not None else None for chain in (q, k)]
    if angles[0] != angles[1]:  # q or k alone, or turned by different angles
        q, k = Chain(node.inputs[0]), Chain(node.inputs[1])
    norms = [_norm(graph, chain, heads * attention.d) for chain, heads in ((q, attention.heads), (k, attention.kv_heads))]
    return AttentionStep(node, StepSpec(attention, norms[0], norms[1], q.rope is not None, tokens), q, k)


def _norm(graph: Graph, chain: Chain, width: int) -> NormSpec | None:
    if chain.norm is None:
        return None
    size, attrs = int(graph.type_of(chain.norm.name).shape[-1]), chain.norm.attrs
    return NormSpec(size, width // size, float(attrs["eps"]), float(attrs.get("offset", 0.0)), weight=len(chain.norm.inputs) > 1)


def _chain(graph: Graph, node: Node, position: int, width: int) -> Chain:
    """From attention backwards: rope, then a norm, with views around them."""
    chain, reader, name = Chain(node.inputs[position]), node, node.inputs[position]
    shape = graph.type_of(name).shape[2:]
    views: tuple[Node, ...] = ()
    while (found := _only_reader(graph, name, reader)) is not None:
        if _is_view(graph, found):
            views = (found, *views)
        elif found.op == "rope" and graph.type_of(found.name).shape[2:] == shape and chain.rope is None and chain.norm is None:
            chain = Chain(found.inputs[0], (found, *views, *chain.nodes), rope=found)
            views = ()
        elif _is_norm(graph, found, width, int(shape[-1])) and chain.norm is None:
            chain = Chain(found.inputs[0], (found, *views, *chain.nodes), chain.rope, found)
            views = ()
        else:
            break
        reader, name = found, found.inputs[0]
    if views:  # they cost nothing, and then the source is what a projection writes
        chain = Chain(name, (*views, *chain.nodes), chain.rope, chain.norm)
    return chain


def _only_reader(graph: Graph, name: str, reader: Node) -> Node | None:
    """The node that computes a value for one reader alone."""
    node = graph.producers.get(name)
    alone = graph.users.get(name, ()) == (reader,) and reader.inputs.count(name) == 1 and name not in graph.outputs
    return node if node is not None and alone and len(node.outputs) == 1 else None


def _is_view(graph: Graph, node: Node) -> bool:
    """Whether a value stays the same row of numbers a token."""
    names = aten_table.VIEWS | aten_table.IDENTITY
    if not node.inputs or node.inputs[0] in graph.params or not (node.op.startswith("aten.") and aten_table.base_name(node.op) in names):
        return False
    kind = stream(graph.type_of(node.name))
    return kind is not None and kind[0] == "T" and kind == stream(graph.type_of(node.inputs[0]))


def _is_norm(graph: Graph, node: Node, width: int, d: int) -> bool:
    """Whether a node is an rms_norm of heads or of their whole row."""
    size = graph.type_of(node.name).shape[-1]
    return node.op == "rms_norm" and size in (d, width) and all(name in graph.params for name in node.inputs[1:])
