"""Many models that differ from one model in their experts only, run on the same windows: what a search over experts evaluates.

Float weights stay in memory, all windows are one batch, nothing before the first layer that differs from an earlier candidate is
computed again, and an expert that is an old one is not copied. The meaning is that of `regroup.map_experts` (tests hold the two together).
The same walk can be differentiated in the choices' matrices.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.factors import folded
from moec.compiler.interpreter import LazyStack, bind_symbols, evaluate
from moec.compiler.ir import Node
from moec.compiler.layers import MoeLayer, moe_layers, require_no_table
from moec.compiler.model import Model
from moec.compiler.ops import router, router_scores

T = TypeVar("T")

WEIGHT_BYTES = 1 << 32
"""Weights are kept in memory up to this size; the others are read again for each candidate."""

_PREFIX_BYTES = 1 << 30
"""States before a layer are kept up to this size, but those of two candidates in any case, for others whose earlier layers are the same."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The experts of one layer: new expert j is sum over i of merge[j, i] old expert i, and its score that of route.

    Args:
        merge, route: float32 [E', E]; one-hot rows keep experts as they are.
        top_k: experts a token; None leaves it, or takes E' where there are fewer.
    """

    merge: Tensor
    route: Tensor
    top_k: int | None = None

    @classmethod
    def keep(cls, experts: Sequence[int], count: int, top_k: int | None = None) -> Choice:
        """The choice of some of `count` experts.

        >>> Choice.keep([2, 0], 3).merge.tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
        """
        rows = torch.eye(count)[list(experts)]
        return cls(rows, rows, top_k)

    @cached_property
    def key(self) -> bytes:
        """Equal for equal choices."""
        parts = (self.merge.cpu().numpy().tobytes(), self.route.cpu().numpy().tobytes(), repr((self.merge.shape, self.top_k)).encode())
        return hashlib.sha256(b"".join(parts)).digest()

    @cached_property
    def kept(self) -> list[int] | None:
        """The old expert of each new one, where every new one is an old one by weights and by score."""
        if self.merge.requires_grad or self.route.requires_grad:
            return None
        same = self.merge is self.route or torch.equal(self.merge, self.route)
        return _one_hot(self.merge) if same else None


def _one_hot(rows: Tensor) -> list[int] | None:
    places = rows.argmax(1)
    return places.tolist() if torch.equal(rows, torch.eye(rows.shape[1])[places]) else None


@dataclass
class _Recent:
    """The latest results of something, by key."""

    size: int
    found: OrderedDict[object, object] = field(default_factory=OrderedDict)

    def get(self, key: object) -> object:
        if key in self.found:
            self.found.move_to_end(key)
        return self.found.get(key)

    def put(self, key: object, value: T) -> T:
        self.found[key] = value
        self.found.move_to_end(key)
        while len(self.found) > self.size:
            self.found.popitem(last=False)
        return value


class _Stack:
    """Experts of a stack in another order."""

    is_meta = False

    def __init__(self, base: Tensor | LazyStack, members: Sequence[int]) -> None:
        self.base, self.members = base, members
        self.shape = (len(members), *base.shape[1:])

    def __getitem__(self, expert: int) -> Tensor:
        return self.base[self.members[expert]]


class Candidates:
    """Evaluates choices of experts.

    Args:
        model: what the candidates are made of.
        ids: [W, T] tokens, all run at once.

    Raises:
        MoecError: a layer's router cannot be rewritten.
    """

    def __init__(self, model: Model, ids: Tensor, what: str = "the search") -> None:
        self.device = torch.get_default_device()
        model = folded(model)
        self.model, self.ids = model, ids.to(self.device)
        self.layers: list[MoeLayer] = moe_layers(model.graph)
        if not self.layers:
            raise MoecError(f"{what}: the model has no Mixture-of-Experts layer whose router is known")
        for layer in self.layers:
            require_no_table(layer, what)
            if int(layer.router.attrs.get("groups", 1)) > 1:
                raise MoecError(f"{what}: the router of %{layer.name} chooses among groups of experts, which a free choice does not keep")
        graph = model.graph
        self._routers = {layer.router.name: index for index, layer in enumerate(self.layers)}
        self._experts = {layer.name: index for index, layer in enumerate(self.layers)}
        self._last = {name: at for at, node in enumerate(graph.nodes) for name in node.inputs if name not in graph.params}
        self._weights: dict[str, Tensor] = {}
        self._bytes = 0
        state = 4 * self.ids.numel() * 3 * self.layers[0].hidden  # about: the residual stream, its norm, and what else is alive
        self._prefixes = _Recent(max(2 * len(self.layers), min(96, _PREFIX_BYTES // state)))
        self._merged = _Recent(8 * len(self.layers))

    @torch.no_grad()
    def logits(self, choices: Sequence[Choice | None]) -> Tensor:
        """The logits [W, T, V] of the model with these choices, one a layer (None: as it is)."""
        keys = [None if c is None else c.key for c in choices]
        start, state = 0, self._inputs(self.ids)
        for layer in reversed(range(len(self.layers))):
            if (found := self._prefixes.get((layer, *keys[:layer]))) is not None:
                assert isinstance(found, tuple)
                start, state = found[0], dict(found[1])
                break

        def keep(layer: int, at: int, environment: Mapping[str, Tensor]) -> None:
            self._prefixes.put((layer, *keys[:layer]), (at, dict(environment)))

        return self._walk(self.ids, choices, start, state, keep)

    def differentiable(self, choices: Sequence[Choice | None], ids: Tensor) -> Tensor:
        """The logits [W, T, V] for other windows of tokens [W, T], on the tape of whatever the choices' matrices are on."""
        ids = ids.to(self.device)
        return self._walk(ids, choices, 0, self._inputs(ids), lambda *_: None)

    def _inputs(self, ids: Tensor) -> dict[str, Tensor]:
        values = (ids, torch.arange(ids.shape[1], device=self.device).expand(len(ids), -1))
        return dict(zip((v.name for v in self.model.graph.inputs), values, strict=False))

    def _walk(
        self,
        ids: Tensor,
        choices: Sequence[Choice | None],
        start: int,
        environment: dict[str, Tensor],
        before_router: Callable[[int, int, Mapping[str, Tensor]], None],
    ) -> Tensor:
        """Run the nodes from `start` on, with what is alive before it."""
        if len(choices) != len(self.layers):
            raise MoecError(f"{len(choices)} choices for a model of {len(self.layers)} Mixture-of-Experts layers")
        graph = self.model.graph
        symbols = bind_symbols(graph, self._inputs(ids))
        for at, node in enumerate(graph.nodes[start:], start):
            if (layer_at := self._routers.get(node.name)) is not None:
                before_router(layer_at, at, environment)
            results = self._run(node, environment, choices, symbols)
            environment.update(zip((o.name for o in node.outputs), results, strict=True))
            for name in (*node.inputs, *(o.name for o in node.outputs)):
                if name in environment and self._last.get(name, -1) <= at and name not in graph.outputs:
                    environment.pop(name)
        return environment[graph.outputs[0]]

    def _run(
        self, node: Node, environment: Mapping[str, Tensor], choices: Sequence[Choice | None], symbols: Mapping[str, int]
    ) -> tuple[Tensor, ...]:
        given: list[Tensor | LazyStack | _Stack | None] = [
            None if not name else environment[name] if name in environment else self._weight(name) for name in node.inputs
        ]
        if (at := self._routers.get(node.name)) is not None and (choice := choices[at]) is not None:
            return self._route(node, choice, given)
        if (at := self._experts.get(node.name)) is not None and (choice := choices[at]) is not None:
            for place in (3, 4, 5, 6):
                if place < len(given) and (stack := given[place]) is not None:
                    assert isinstance(stack, Tensor)
                    given[place] = self._combined(node.inputs[place], stack, choice)
        return evaluate(node, given, symbols, torch.float32, self.device)

    def _route(self, node: Node, choice: Choice, given: Sequence[object]) -> tuple[Tensor, ...]:
        """The router, with its scores led to the choice's experts."""
        attrs, logits, bias = dict(node.attrs), given[0], given[1] if len(given) > 1 else None
        assert isinstance(logits, Tensor)
        score = str(attrs.get("score", "softmax"))
        scores = router_scores(logits, "softmax" if score == "softmax_topk" else score)
        if (kept := choice.kept) is not None:
            scores = scores[..., kept]
            bias = bias[kept] if isinstance(bias, Tensor) else None
        else:
            scores = scores @ choice.route.T
            bias = choice.route @ bias if isinstance(bias, Tensor) else None
        top_k = choice.top_k or min(int(attrs["top_k"]), len(choice.route))
        attrs |= {"score": "identity", "normalize": bool(attrs.get("normalize")) or score == "softmax_topk", "top_k": top_k}
        return router(scores, bias, **attrs)

    def _combined(self, name: str, stack: Tensor, choice: Choice) -> Tensor | _Stack:
        """The choice's experts of one stacked parameter."""
        if choice.merge.requires_grad:
            return (choice.merge @ stack.flatten(1)).view(-1, *stack.shape[1:])
        if (members := _one_hot(choice.merge)) is not None:
            return stack[members] if stack.dim() == 2 else _Stack(stack, members)
        key = name, choice.merge.cpu().numpy().tobytes()
        if (found := self._merged.get(key)) is not None:
            assert isinstance(found, Tensor)
            return found
        merged: Tensor = (choice.merge @ stack.flatten(1)).view(-1, *stack.shape[1:])
        return self._merged.put(key, merged)

    def _weight(self, name: str) -> Tensor:
        if (found := self._weights.get(name)) is not None:
            return found
        value = self.model.load(name)
        if self._bytes + value.numel() * 4 <= WEIGHT_BYTES:
            self._weights[name] = value
            self._bytes += value.numel() * 4
        return value
