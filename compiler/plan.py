"""What a compilation will write, and what a token will cost: exact bytes without reading a weight."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from moec.compiler.artifact import Shard
from moec.compiler.backends import CACHE_BYTES
from moec.compiler.errors import MoecError
from moec.compiler.ir import Graph, Node, Param
from moec.compiler.recipe import Recipe
from moec.compiler.roles import ROLES, parameter_roles
from moec.runtime.formats import get_format
from moec.targets import Target

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_size(size: str | int) -> int:
    """Bytes of a size such as `12GiB`, `500 MB` or a plain number.

    >>> parse_size("1.5GiB")
    1610612736
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS:
        raise MoecError(f"size {size!r} is not understood: write a number with a unit, such as 12GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def param_bytes(param: Param) -> int:
    """Bytes of a parameter in its format, scales and zero points included."""
    shape = tuple(d for d in param.type.shape if isinstance(d, int))
    if isinstance(param.format, str):
        return get_format(param.format).nbytes(shape)
    return sum(get_format(name).nbytes(shape[1:]) for name in param.format)


@dataclass(frozen=True)
class PlanRow:
    """The parameters of one role in one format."""

    role: str
    format: str
    tensors: int
    parameters: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / max(1, self.parameters)


@dataclass(frozen=True)
class Plan:
    """What will be written.

    `weight_bytes` is what the weight files hold (with the backend's padding when it is known); `active_parameters` and `bytes_per_token`
    are what one token of decode reads, with its K experts a layer. Keys and values of a token take `cache_bytes_per_token`.
    """

    model: str
    target: str
    recipe: str
    parameters: int
    active_parameters: int
    weight_bytes: int
    bytes_per_token: int
    cache_dtype: str
    cache_bytes_per_token: int
    layers: int
    ops: dict[str, int]
    rows: tuple[PlanRow, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(graph: Graph, recipe: Recipe, target: Target, shards: Sequence[Shard] | None, cache_dtype: str = "float32") -> Plan:
    """The plan for a graph whose parameters have their formats.

    Args:
        shards: the backend's weight files, for exact sizes; None where the backend has not lowered the graph.
        cache_dtype: what keys and values are kept in.
    """
    roles = parameter_roles(graph)
    groups: dict[tuple[str, str], list[Param]] = {}
    for name, param in graph.params.items():
        fmt = param.format if isinstance(param.format, str) else "mixed"
        groups.setdefault((roles[name], fmt), []).append(param)
    rows = tuple(
        PlanRow(role, fmt, len(params), sum(_count(p) for p in params), sum(param_bytes(p) for p in params))
        for (role, fmt), params in sorted(groups.items(), key=lambda g: (ROLES.index(g[0][0]), g[0][1]))
    )
    shares = {name: _share(graph, name) for name in graph.params}
    attentions = [n for n in graph.nodes if n.op == "attention"]
    cached = sum(prod(d for d in graph.type_of(n.inputs[i]).shape[2:] if isinstance(d, int)) for n in attentions for i in (1, 2))
    return Plan(
        model=graph.name,
        target=target.name,
        recipe=recipe.name,
        parameters=sum(map(_count, graph.params.values())),
        active_parameters=round(sum(_count(p) * shares[n] for n, p in graph.params.items())),
        weight_bytes=sum(r.bytes for r in rows) if shards is None else sum(a.nbytes for s in shards for a, _ in s.arrays.values()),
        bytes_per_token=round(sum(param_bytes(p) * shares[n] for n, p in graph.params.items())),
        cache_dtype=cache_dtype,
        cache_bytes_per_token=CACHE_BYTES[cache_dtype] * cached,
        layers=int(graph.meta.get("layers", len(attentions))),
        ops=dict(Counter(n.op for n in graph.nodes).most_common()),
        rows=rows,
    )


def _count(param: Param) -> int:
    """How many numbers are stored."""
    if isinstance(param.format, str):
        return 0 if param.format == "zero" else prod(d for d in param.type.shape if isinstance(d, int))
    return sum(fmt != "zero" for fmt in param.format) * prod(d for d in param.type.shape[1:] if isinstance(d, int))


def _share(graph: Graph, name: str) -> float:
    """The part of a parameter that one token reads: K of E experts, one row of an embedding table, or all of it."""
    share = 0.0
    for node in graph.users.get(name, ()):
        rows = graph.params[name].type.shape[0] if graph.params[name].type.shape else 1
        assert isinstance(rows, int)
        if node.op == "experts" and name in node.inputs[3:]:
            chosen = graph.type_of(node.inputs[1]).shape[-1]
            assert isinstance(chosen, int)
            share = max(share, min(1.0, chosen / _choices(graph, node, rows)))
        elif node.op == "embedding":
            share = max(share, 1 / rows)
        else:
            share = 1.0
    return share


def _choices(graph: Graph, node: Node, experts: int) -> int:
    """Among how many experts the ids of an `experts` node choose: more than its own where a layer is split into parts."""
    table = graph.producers.get(node.inputs[1])
    if table is None or table.op != "aten.index.Tensor" or table.inputs[0] not in graph.params:
        return experts
    rows = graph.type_of(table.inputs[0]).shape[0]
    assert isinstance(rows, int)
    return max(experts, rows - 1)  # the last entry is that of skipped slots
