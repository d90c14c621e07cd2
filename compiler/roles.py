"""What each parameter is for, read off the graph: no names of models or modules are looked at."""

from __future__ import annotations

import re
from typing import Literal

from moec.compiler.ir import Graph, Node
from moec.compiler.ops import EXPERT_MATRICES

Role = Literal["experts", "linear", "embedding", "router", "other"]
ROLES: tuple[Role, ...] = ("experts", "linear", "embedding", "router", "other")


def parameter_roles(graph: Graph) -> dict[str, Role]:
    """The role of every parameter.

    `experts`: a projection of stacked experts, or a low-rank factor of one. `embedding`: a token embedding, or the projection to the
    logits (one role, since models tie them). `router`: a projection whose result decides which experts run. `linear`: any other matrix
    of a linear layer.
    `other`: norms, biases, tables.
    """
    roles: dict[str, Role] = {}
    for name in graph.params:
        uses = [(node, node.inputs.index(name)) for node in graph.users.get(name, ())]
        if any(node.op == "experts" and at in EXPERT_MATRICES for node, at in uses):
            roles[name] = "experts"
        elif any(node.op == "embedding" and at == 1 for node, at in uses):
            roles[name] = "embedding"
        elif matrices := [node for node, at in uses if node.op == "linear" and at == 1]:
            if any(node.name in graph.outputs for node in matrices):
                roles[name] = "embedding"
            elif any(_routes(graph, node) for node in matrices):
                roles[name] = "router"
            else:
                roles[name] = "linear"
        else:
            roles[name] = "other"
    return roles


def _routes(graph: Graph, node: Node) -> bool:
    """Whether which experts run depends on this linear's result without passing through another projection than one of scores."""
    frontier, seen = [node], set[str]()
    while frontier:
        for output in frontier.pop().outputs:
            for user in graph.users.get(output.name, ()):
                if user.op in ("router", "skip") or (user.op == "experts" and user.inputs[1] == output.name):
                    return True
                plain = user.op.startswith("aten.") and "matmul" not in user.op and "mm" not in user.op
                if user.name not in seen and (plain or _maps_scores(graph, user)):
                    seen.add(user.name)
                    frontier.append(user)
    return False


def _maps_scores(graph: Graph, node: Node) -> bool:
    """Whether a projection leads from the scores of a router to those of other experts."""
    users = graph.users.get(node.name, ())
    return node.op == "linear" and any(user.op == "router" and user.attrs.get("score") == "identity" for user in users)


def layer_of(parameter: str) -> int | None:
    """The layer that a parameter belongs to by its name (`model.layers.3.mlp...` is 3), or None.

    >>> layer_of("model.layers.3.mlp.gate.weight"), layer_of("lm_head.weight")
    (3, None)
    """
    match = re.search(r"\.(\d+)\.", f".{parameter}.")
    return int(match[1]) if match else None


Kind = Literal["experts", "attention", "shared", "dense", "embedding", "head"]
KINDS: tuple[Kind, ...] = ("experts", "attention", "shared", "dense", "embedding", "head")
"""What matrices are for, finer than `Role`: `linear` is one of three, and the two uses of `embedding` are told apart."""

_VIEWS = ("aten.view.default", "aten.reshape.default")


def node_kinds(graph: Graph) -> dict[str, Kind]:
    """The kind of every node that multiplies by a matrix, by the node's name; routers are left out.

    `attention`: what leads to an attention op or from it, within a block. `shared`: a linear layer that reads what experts read, or what
    such a layer makes of it (shared experts, and their gates). `dense`: any other linear layer.
    """
    roles, found = parameter_roles(graph), dict[str, Kind]()
    read = {_viewed(graph, node.inputs[0]) for node in graph.nodes if node.op == "experts"}
    for node in graph.nodes:
        if node.op in ("experts", "embedding"):
            found[node.name] = "experts" if node.op == "experts" else "embedding"
        elif node.op == "linear" and node.inputs[1] in graph.params and roles[node.inputs[1]] != "router":
            if node.name in graph.outputs:
                found[node.name] = "head"
            elif _meets(graph, node, {"attention", "linear_attention"}, forward=True) or _meets(
                graph, node, {"attention", "linear_attention"}, forward=False
            ):
                found[node.name] = "attention"
            else:
                makers = _makers(graph, node)
                shared = _viewed(graph, node.inputs[0]) in read or any(found.get(maker) == "shared" for maker in makers)
                found[node.name] = "shared" if shared else "dense"
    return found


def _viewed(graph: Graph, value: str) -> str:
    """What a value is a view of."""
    while (node := graph.producers.get(value)) is not None and node.op in _VIEWS:
        value = node.inputs[0]
    return value


def _ends_block(graph: Graph, node: Node) -> bool:
    """Whether a node adds to the residual stream, or decides on experts: blocks do not reach beyond."""
    values = [name for name in node.inputs if name and name not in graph.params]
    added = node.op == "aten.add.Tensor" and len(values) == 2 and all(len(graph.type_of(name).shape) == 3 for name in values)
    return added or node.op in ("experts", "router", "embedding")


def _meets(graph: Graph, start: Node, ops: set[str], *, forward: bool) -> bool:
    """Whether one of these ops is met within the block."""
    frontier, seen = [start], {start.name}
    while frontier:
        node = frontier.pop()
        near = (
            [user for value in node.outputs for user in graph.users.get(value.name, ())]
            if forward
            else [graph.producers[name] for name in node.inputs if name in graph.producers]
        )
        for other in near:
            if other.op in ops:
                return True
            if other.name not in seen and not _ends_block(graph, other):
                seen.add(other.name)
                frontier.append(other)
    return False


def _makers(graph: Graph, node: Node) -> set[str]:
    """The linear nodes whose results a node reads through other ops, within the block."""
    frontier, found = [node], set[str]()
    while frontier:
        for name in frontier.pop().inputs:
            other = graph.producers.get(name)
            if other is None or other.name in found or _ends_block(graph, other):
                continue
            if other.op == "linear":
                found.add(other.name)
            else:
                frontier.append(other)
    return found
