"""A graph as a page: the data flow as SVG, layers that are alike drawn once, beside what each part weighs."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import networkx as nx

from moec.compiler.heatmap import STYLE as HEAT_STYLE
from moec.compiler.ir import Graph, Node
from moec.compiler.plan import Plan
from moec.compiler.roles import layer_of
from moec.compiler.text import print_node

_COLOURS = {
    "embedding": "#c9e4de", "linear": "#c6def1", "experts": "#f7d9c4", "router": "#faedcb", "attention": "#dbcdf0",
    "rms_norm": "#e8e8e4", "layer_norm": "#e8e8e4", "rope": "#f2c6de", "skip": "#faedcb",
}  # fmt: skip
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y = 210, 34, 18, 26


@dataclass(frozen=True)
class Section:
    """A run of layers with the same nodes: those of the first, and which layers they stand for."""

    first: int | None
    last: int | None
    nodes: tuple[Node, ...]

    @property
    def title(self) -> str:
        if self.first is None:
            return "before and after the layers"
        return f"layer {self.first}" if self.first == self.last else f"layers {self.first} to {self.last}, all alike"


def sections(graph: Graph) -> list[Section]:
    """The graph's nodes cut into layers by their parameters' names, neighbouring layers of one shape folded together."""
    cut: list[tuple[int | None, list[Node]]] = []
    layer: int | None = None
    for node in graph.nodes:
        named = [layer_of(name) for name in node.inputs if name in graph.params]
        if named:
            layer = named[-1]
        if not cut or cut[-1][0] != layer:
            cut.append((layer, []))
        cut[-1][1].append(node)
    folded: list[Section] = []
    shapes: list[str] = []
    for at, nodes in cut:
        shape = _shape(graph, nodes)
        previous = folded[-1] if folded else None
        if previous and previous.last is not None and at == previous.last + 1 and shapes[-1] == shape:
            folded[-1] = Section(previous.first, at, previous.nodes)
        else:
            folded.append(Section(at, at, tuple(nodes)))
            shapes.append(shape)
    return folded


def _shape(graph: Graph, nodes: Sequence[Node]) -> str:
    """A digest of what the nodes do, names left out."""
    digest = hashlib.sha256()
    for node in nodes:
        formats = [str(graph.params[n].format) for n in node.inputs if n in graph.params]
        digest.update(repr((node.op, sorted(node.attrs.items(), key=str), [o.type for o in node.outputs], formats)).encode())
    return digest.hexdigest()


def draw_nodes(graph: Graph, nodes: Iterable[Node]) -> str:
    """An SVG of some nodes: a row a step of the longest path, an arrow for every value read."""
    nodes = list(nodes)
    flow = nx.DiGraph()
    owner = {o.name: n.name for n in nodes for o in n.outputs}
    flow.add_nodes_from(n.name for n in nodes)
    flow.add_edges_from((owner[i], n.name) for n in nodes for i in n.inputs if i in owner)
    by_name = {n.name: n for n in nodes}
    place: dict[str, tuple[float, float]] = {}
    width = 0.0
    for row, names in enumerate(nx.topological_generations(flow)):
        # A node goes below the middle of what it reads, as far left as its neighbour allows.
        wish = {n: sum(place[p][0] for p in flow.pred[n]) / max(1, len(flow.pred[n])) for n in names}
        at = 0.0
        for name in sorted(names, key=lambda n: wish[n]):
            x = max(at, wish[name])
            place[name] = (x, row * (_HEIGHT + _GAP_Y))
            at = x + _WIDTH + _GAP_X
            width = max(width, x + _WIDTH)
    parts = []
    for source, sink in flow.edges:
        (x1, y1), (x2, y2) = place[source], place[sink]
        x1, y1, x2 = x1 + _WIDTH / 2, y1 + _HEIGHT, x2 + _WIDTH / 2
        bend = (y1 + y2) / 2
        parts.append(f'<path d="M{x1:.0f} {y1:.0f} C{x1:.0f} {bend:.0f} {x2:.0f} {bend:.0f} {x2:.0f} {y2:.0f}"/>')
    for name, (x, y) in place.items():
        node = by_name[name]
        params = [n for n in node.inputs if n in graph.params]
        label = node.op.removeprefix("aten.").removesuffix(".default")
        detail = ", ".join(f"{p.rsplit('.', 2)[-2] if p.count('.') > 1 else p} {_format(graph, p)}" for p in params[:2])
        parts.append(
            f'<g transform="translate({x:.0f} {y:.0f})"><title>{html.escape(print_node(graph, node))}</title>'
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="{_COLOURS.get(node.op, "#ffffff")}"/>'
            f'<text x="8" y="14">{html.escape(label)} <tspan class="t">{node.outputs[0].type}</tspan></text>'
            f'<text x="8" y="28" class="t">{html.escape(detail)}</text></g>'
        )
    height = max((y for _, y in place.values()), default=0) + _HEIGHT
    return f'<svg viewBox="-4 -4 {width + 8:.0f} {height + 8:.0f}" width="{width + 8:.0f}">{"".join(parts)}</svg>'


def _format(graph: Graph, param: str) -> str:
    fmt = graph.params[param].format
    return fmt if isinstance(fmt, str) else "mixed"


_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; color: #222 } table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right } td:first-child, th:first-child { text-align: left }
svg { font: 11px ui-monospace, monospace; max-width: 100% } rect { stroke: #888 } path { fill: none; stroke: #aaa }
.t { fill: #666; font-size: 9px }
"""


def page(graph: Graph, plan: Plan, use: str = "") -> str:
    """The whole page as HTML that needs nothing else.

    Args:
        use: what `moec.compiler.heatmap` makes of statistics.
    """
    rows = "".join(
        f"<tr><td>{r.role}</td><td>{r.format}</td><td>{r.tensors}</td><td>{r.parameters:,}</td>"
        f"<td>{r.bytes:,}</td><td>{r.bits_per_weight:.2f}</td></tr>"
        for r in plan.rows
    )
    drawings = "".join(f"<h2>{s.title}</h2>{draw_nodes(graph, s.nodes)}" for s in sections(graph))
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(graph.name)}</title><style>{_STYLE}{HEAT_STYLE}</style>"
        f"<h1>{html.escape(graph.name)}</h1><p>{plan.parameters:,} parameters, {plan.active_parameters:,} active a token; "
        f"{plan.weight_bytes:,} bytes, {plan.bytes_per_token:,} read a token; {plan.layers} layers</p>"
        "<table><tr><th>role</th><th>format</th><th>tensors</th><th>parameters</th><th>bytes</th><th>bits a weight</th></tr>"
        f"{rows}</table>{use}{drawings}\n"
    )
