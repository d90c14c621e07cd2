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
