"""What the experts of a model did on calibration text: sums over tokens, by layer and expert, and the file that keeps them.

Axes: N tokens, E experts, K experts a token, D hidden size, F expert intermediate size. f_e(x) is an expert's output and g_e(x) the
weight it enters the sum with; sums run over the tokens that were routed to the expert unless said otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.interpreter import States
from moec.compiler.tensor_file import save_tensors

VERSION = 2


@dataclass(frozen=True)
class LayerStatistics:
    """One `experts` node. Sums are float64 unless said otherwise."""

    count: Tensor
    """[E] int64: tokens routed to each expert."""
    weight: Tensor
    """[E]: sum of g."""
    weight_square: Tensor
    """[E]: sum of g^2."""
    score: Tensor
    """[E]: sum over all tokens of the router's score before the choice."""
    output_norm: Tensor
    """[E]: sum of ||f||."""
    weighted_norm: Tensor
    """[E]: sum of g ||f||."""
    output_peak: Tensor
    """[E]: the largest |f| of any element."""
    output: Tensor
    """[E, D]: sum of f."""
    input_square: Tensor
    """[E, D]: sum of x^2."""
    weighted_input_square: Tensor
    """[E, D]: sum of g^2 x^2."""
    hidden_square: Tensor
    """[E, F]: sum of h^2, h what enters the down projection."""
    weighted_hidden_square: Tensor
    """[E, F]: sum of g^2 h^2."""
    weighted_hidden: Tensor
    """[E, F]: sum of g |h|."""
    logit: Tensor
    """[E]: sum over all tokens of the router's logits."""
    logit_moment: Tensor
    """[E, E]: sum over all tokens of the outer product of the router's logits."""
    together: Tensor
    """[E, E] int64: tokens that were routed to both."""
    domain_count: Tensor
    """[domains, E] int64: `count` by domain."""
    ids: Tensor
    """[N, K] int16: the routing trace, in the order of the windows."""
    weights: Tensor
    """[N, K] float16: the weights of the trace."""

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def experts(self) -> int:
        return len(self.count)


@dataclass(frozen=True)
class Statistics:
    """All layers of a model.

    Args:
        layers: by the name of the `experts` node, in the order of the graph.
        linear_square: by the name of a weight of a `linear` op, the mean of the square of each input channel: [K].
        domains: names of the domains.
        window: tokens of a window (the trace is cut into windows of so many).
        fingerprint: of the model and of the text, one after the other.
    """

    layers: Mapping[str, LayerStatistics]
    linear_square: Mapping[str, Tensor]
    domains: tuple[str, ...]
    window: int
    fingerprint: str

    def layer(self, name: str) -> LayerStatistics:
        """The statistics of an `experts` node, on the default device.

        Raises:
            MoecError: they are of another model.
        """
        if name not in self.layers:
            raise MoecError(f"the statistics have no layer %{name}; they are of another model: calibrate again")
        found = self.layers[name]
        return replace(found, **{f.name: getattr(found, f.name).to(torch.get_default_device()) for f in fields(found)})

    @property
    def model_fingerprint(self) -> str:
        """The model's part of the fingerprint, which `moec.compiler.calibration.collect.model_fingerprint` makes."""
        return self.fingerprint[: len(self.fingerprint) // 2]

    def save(self, path: Path, states: tuple[int, States] | None = None) -> None:
        """Write a safetensors file, whole or not at all.

        Args:
            states: of unfinished statistics, the node after which the run stood and the values that were alive.
        """
        tensors = {f"linear:{n}": t for n, t in self.linear_square.items()}
        for name, layer in self.layers.items():
            tensors |= {f"layer:{name}:{f.name}": getattr(layer, f.name) for f in fields(LayerStatistics)}
        for index, state in enumerate(states[1] if states else ()):
            tensors |= {f"state:{index}:{n}": t.clone() for n, t in state.items()}  # views would be saved as one tensor
        facts = {
            "version": VERSION,
            "domains": self.domains,
            "window": self.window,
            "layers": list(self.layers),
            "fingerprint": self.fingerprint,
            "states": [states[0], len(states[1])] if states else None,
        }
        save_tensors(path, tensors, {"moec": json.dumps(facts)}, "the statistics")


def load_statistics(path: Path) -> Statistics:
    """Read a file of `Statistics.save`.

    Raises:
        MoecError: there is no such file, or it is something else.
    """
    found, states = load_unfinished(path)
    if states is not None:
        raise MoecError(f"{path}: these statistics are unfinished: calibrate again with the same options, which goes on where it stopped")
    return found


def load_unfinished(path: Path) -> tuple[Statistics, tuple[int, States] | None]:
    """Statistics, and where their run stood if they are unfinished.

    Raises:
        MoecError: there is no such file, or it is something else.
    """
    try:
        with safe_open(path, framework="pt", device=str(torch.get_default_device())) as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {}).get("moec", "{}"))
            if facts.get("version") != VERSION:
                raise MoecError(
                    f"{path}: not statistics of this version of moec (found {facts.get('version')}, expected {VERSION}): calibrate again"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise MoecError(f"{path}: not a statistics file ({error}); make one with --calibration") from error
    names = [f.name for f in fields(LayerStatistics)]
    layers = {layer: LayerStatistics(**{n: tensors[f"layer:{layer}:{n}"] for n in names}) for layer in facts["layers"]}
    linear = {name.removeprefix("linear:"): t for name, t in tensors.items() if name.startswith("linear:")}
    found = Statistics(layers, linear, tuple(facts["domains"]), int(facts["window"]), str(facts["fingerprint"]))
    if facts.get("states") is None:
        return found, None
    node, count = facts["states"]
    states: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        if name.startswith("state:"):
            _, index, value = name.split(":", 2)
            states[int(index)][value] = tensor
    return found, (int(node), states)
