"""Which functions a library for a GPU has, and which kernels its layers of experts run in each: what measured records say, or defaults.

One token has a function of its own, and so have 2, 4 and 8, to which calls are filled up. More tokens have functions by ranges, which end
where the choice for some layer changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moec.compiler.backends.tvm.platform import ANY, ONE
from moec.runtime.tvm_functions import Function
from moec.targets import Target
from moec.targets.kernels.cuda import tuned
from moec.targets.kernels.cuda.experts_layer import FP8, Layer
from moec.targets.kernels.cuda.experts_layout import ExpertsLayout
from moec.targets.kernels.cuda.linear_tokens import MOST_TOKENS
from moec.targets.kernels.cuda.space import MOST_DECODE

CHUNK = 2048
"""Tokens of a call at most: the products of more are hardly faster, and their hidden values take memory."""

FEW = (2, 4, 8)


def layer_of(layout: ExpertsLayout, top_k: int) -> Layer:
    """A layer as records know it."""
    return Layer(layout.experts, top_k, layout.d, layout.f, layout.gate_up_format, layout.down_format, "float32", layout.gated)


class Choices:
    """The choices for a model.

    Args:
        products: whether there are kernels for the products of many tokens; without them many tokens take plain ones.
        activations: of experts where tokens are many, see `make`; those of few tokens are exact, which costs nothing there.
    """

    def __init__(self, target: Target, products: bool, activations: str = "float") -> None:
        self._target, self._products, self._activations = target, products, activations
        self._tables: dict[Layer, list[tuple[int | None, tuned.Choice]]] = {}
        self._plain: dict[str, None] = {}
        self._made: dict[tuple[Layer, str], tuple[Function, tuned.Choice | None]] = {}

    def functions(self, layers: Sequence[Layer]) -> list[Function]:
        """The functions of a library for these layers, by how many tokens they are for."""
        few = [Function(f"decode{t}", t, t, t) for t in FEW]
        return [ONE, *few, *(Function(f"forward{bound}", most=bound) for bound in self._bounds(layers)), ANY]

    def _bounds(self, layers: Sequence[Layer]) -> list[int]:
        """Where ranges of many tokens end."""
        if not self._products:
            return []
        ends = {end for layer in layers for end, _ in self._table(layer) if end is not None and MOST_DECODE < end < CHUNK}
        return sorted(ends) or [MOST_TOKENS]  # of linear layers

    def of(self, layer: Layer, function: Function) -> tuned.Choice | None:
        """What a layer runs in a function; None: plain kernels."""
        key = (layer, function.name)
        if key not in self._made:
            self._made[key] = function, self._of(layer, function.most or CHUNK)
        return self._made[key][1]

    def _of(self, layer: Layer, tokens: int) -> tuned.Choice | None:
        if not self._products:
            few = tuned.takes_few(self._target, layer, tokens)
            return tuned.choose(self._target, layer, tokens) if few else None
        return next(choice for bound, choice in self._table(layer) if bound is None or tokens <= bound)

    def _table(self, layer: Layer) -> list[tuple[int | None, tuned.Choice]]:
        if layer not in self._tables:
            self._tables[layer] = table = tuned.dispatch(self._target, layer)
            if (rounded := self._rounded(layer)) != layer and self._products:
                few = [entry for entry in table if entry[0] is not None and entry[0] <= MOST_DECODE]
                many = [entry for entry in tuned.dispatch(self._target, rounded) if entry[0] is None or entry[0] > MOST_DECODE]
                self._tables[layer] = [*few, *many]
        return self._tables[layer]

    def _rounded(self, layer: Layer) -> Layer:
        """The layer as it is computed where tokens are many."""
        if self._activations == "float":
            return layer
        narrow = replace(layer, dtype=FP8)
        return narrow if self._activations == FP8 and narrow.narrow else replace(layer, dtype="bfloat16")

    def only_plain(self, what: str) -> None:
        """Keep in mind that something has plain kernels only."""
        self._plain[what] = None

    def made(self) -> list[dict[str, Any]]:
        """What was chosen, and why, as JSON values."""
        found = list[dict[str, Any]]()
        for (layer, name), (function, choice) in self._made.items():
            few = function.most is not None and function.most <= MOST_DECODE
            head: dict[str, Any] = {"layer": (layer if few else self._rounded(layer)).name, "function": name, "tokens": function.most}
            if choice is None:
                found.append({**head, "kernel": "plain", "why": f"{self._target.name} has no other kernels for so many tokens"})
            else:
                rest = {"options": dict(choice.options), "measured": choice.measured, "why": choice.why}
                found.append({**head, "kernel": choice.kernel, **rest})
        return found

    def lines(self) -> list[str]:
        """The same in words: a line for each layer and reason."""
        groups: dict[tuple[str, str, str], list[str]] = {}
        for entry in self.made():
            tokens = f"{entry['tokens']}" if entry["tokens"] is not None else "more"
            groups.setdefault((entry["layer"], entry["kernel"], entry["why"]), []).append(tokens)
        rest = "plain kernels, which are slow for many tokens; in bf16, or quantised without factors, they have fast ones"
        plain = [f"{what}: {rest}" for what in self._plain]
        return plain + [f"{layer}, T up to {', '.join(tokens)}: {kernel} kernels, {why}" for (layer, kernel, why), tokens in groups.items()]
