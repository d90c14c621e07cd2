"""The traced graph in normal form: what the passes and backends build on.

* semantic ops wherever a rule finds them; every other op is in `moec.compiler.core_aten.CORE_ATEN`;
* tokens keep their axes [B, T, ...]; attention reads [B, T, H, d]; experts read [B, T, D];
* experts' weights have one layout, which the weight source produces (`Normalized.layouts`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from moec.compiler.frontend.layout import Computed, Layout
from moec.compiler.frontend.rewrite import Rewriter, merge
from moec.compiler.frontend.rules import arithmetic, attention, canonical, complex, experts, linear, norms, pieces, rope, rope_pairs, views
from moec.compiler.ir import Graph, Node, Value

RULES = merge(
    canonical.RULES,  # first: the others know one spelling only
    pieces.RULES,
    arithmetic.RULES,
    complex.RULES,
    linear.RULES,
    norms.RULES,
    rope_pairs.RULES,
    rope.RULES,  # before views: a rotation of permuted heads moves the permutation itself
    attention.RULES,
    experts.RULES,
    views.RULES,
)


@dataclass(frozen=True)
class Normalized:
    """A graph in normal form, the layouts that its parameters need, and why rules that nearly applied did not."""

    graph: Graph
    layouts: Mapping[str, Layout | Computed]
    misses: tuple[tuple[str, str], ...]


def normalize(graph: Graph, *passes: Callable[[Graph], Graph]) -> Normalized:
    """Rewrite until nothing changes.

    Args:
        graph: as traced.
        passes: rewrites of whole graphs in normal form; their results are put in normal form again.
    """
    layouts: dict[str, Layout | Computed] = {}
    misses: tuple[tuple[str, str], ...] = ()
    for _ in range(8):
        visit = Rewriter(graph, RULES)
        visit.layouts = layouts
        after = visit.run()
        misses = tuple(visit.misses)
        if _same(after, graph):
            for each in passes:
                after = each(after)
            if _same(after, graph):
                break
        graph = after
    kept = {name: layout for name, layout in layouts.items() if name in after.params}
    return Normalized(_named(after), kept, misses)


def _same(a: Graph, b: Graph) -> bool:
    return len(a.nodes) == len(b.nodes) and all(
        x.op == y.op and x.inputs == y.inputs and x.attrs == y.attrs for x, y in zip(a.nodes, b.nodes, strict=True)
    )


def _stem(graph: Graph, node: Node) -> str:
    """A name that tells what the node is: that of its weight where it has one."""
    weights = [name for name in node.inputs if name in graph.params]
    if node.op in ("linear", "rms_norm", "layer_norm", "embedding", "experts") and weights:
        owner = weights[0].removesuffix(".weight")
        return owner.rsplit(".", 1)[0] if node.op == "experts" else owner
    return node.op.split(".")[1] if "." in node.op else node.op


def _named(graph: Graph) -> Graph:
    """The graph with values named after what makes them."""
    names: dict[str, str] = {v.name: v.name for v in graph.inputs}
    taken = {*names, *graph.params}
    counts: dict[str, int] = {}
    nodes = []
    for node in graph.nodes:
        outputs = []
        for index, output in enumerate(node.outputs):
            stem = _stem(graph, node) + (("_weights", "_ids")[index] if node.op == "router" else f"_{index}" if index else "")
            name = stem
            while name in taken:
                counts[stem] = counts.get(stem, 0) + 1
                name = f"{stem}_{counts[stem]}"
            taken.add(name)
            names[output.name] = name
            outputs.append(Value(name, output.type))
        nodes.append(Node(node.op, tuple(names.get(n, n) for n in node.inputs), tuple(outputs), node.attrs))
    return replace(graph, nodes=tuple(nodes), outputs=tuple(names.get(n, n) for n in graph.outputs))
