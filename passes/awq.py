"""Scale input channels so that those with large inputs lose less when weights are quantised (AWQ, https://arxiv.org/abs/2306.00978).

    %n = rms_norm(%h, @norm)            %n = rms_norm(%h, @norm / s)
    %l = linear(%n, @gate)          ->  %l = linear(%n, @gate * s)
    %y = experts(%n, ..., @up, @down)   %y = experts(%n, ..., @up * s, @down)

The function stays as it is. One scale serves all readers of a norm, the router among them; each expert has one of its own between the
rows of its up projection and the columns of its down projection, which the gate does not see; the values of attention have one between
their projection and the output's. s = (mean square of the input)^(alpha/2); alpha is searched for what leaves the smallest error
sum over k of E[x_k^2] |Q(W s)/s - W|_k^2 when weights are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.factors import require_no_factors
from moec.compiler.folding import READS, owned, readers, scaled, times, value_paths
from moec.compiler.grid import round_to_nearest
from moec.compiler.ir import Graph
from moec.compiler.layers import MoeLayer, moe_layers
from moec.compiler.model import Model
from moec.compiler.moments import Moments, diagonal_moments
from moec.compiler.packed import is_quantized
from moec.compiler.roles import parameter_roles
from moec.compiler.weights import Edit
from moec.runtime.formats import get_format
from moec.runtime.formats.int import IntFormat

_SAMPLE_ROWS, _SAMPLE_EXPERTS = 256, 8
"""What the search tries of a matrix, and of a stack."""


@dataclass(frozen=True)
class Awq:
    """Scales for the formats that weights will get; without any nothing changes.

    Args:
        experts, linear: integer formats that `quantize` will give these roles.
        grid: values of alpha, from 0 up to 1, that are tried.
    """

    experts: str | None = None
    linear: str | None = None
    grid: int = 20

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise MoecError(f"awq: grid={self.grid}: expected the number of values to try, at least 1")
        for name in (self.experts, self.linear):
            if name is not None and not isinstance(get_format(name), IntFormat):
                raise MoecError(f"awq: {name} is no integer format; name those that quantize will use, such as int4_g64")

    def run(self, model: Model, context: Context) -> Model:
        if self.experts is None and self.linear is None:
            return model
        require_no_factors(model.graph, "awq")
        moments = diagonal_moments(model.graph, context.statistics(model, "awq"), weighted=True)
        search = _Search(model, moments, self._formats(model.graph), self.grid)
        source, alphas = model, dict[str, float]()
        for fold in _folds(source.graph):
            found = search.best(fold)
            if found is not None:
                alphas[fold.name], scale = found
                model = fold.apply(model, scale)
        for layer in moe_layers(source.graph):
            if _scalable(source.graph, layer):
                pairs = [search.best(_Fold(layer.name, (layer.down,), expert=e)) for e in range(layer.count)]
                scales = [torch.ones(layer.width, dtype=torch.float64) if pair is None else pair[1] for pair in pairs]
                alphas[f"{layer.name}.down"] = sum(pair[0] for pair in pairs if pair is not None) / layer.count
                model = _scale_hidden(model, layer, torch.stack(scales))
        context.note("awq", alpha=alphas)
        return model

    def _formats(self, graph: Graph) -> dict[str, IntFormat]:
        """Of the parameters that will be quantised."""
        formats = {}
        for name, role in parameter_roles(graph).items():
            wanted = {"experts": self.experts, "linear": self.linear}.get(role)
            fmt = get_format(wanted) if wanted else None
            if isinstance(fmt, IntFormat) and not is_quantized(graph.params[name]):
                formats[name] = fmt
        return formats


@dataclass(frozen=True)
class _Fold:
    """A place for a scale: the columns of `members` are multiplied by it, and `apply` divides what makes their input.

    `expert`: only of this one. `tie` makes a scale respect channels that share one.
    """

    name: str
    members: tuple[str, ...]
    apply: Callable[[Model, Tensor], Model] = lambda model, _: model
    tie: Callable[[Tensor], Tensor] = lambda scale: scale
    expert: int | None = None


@dataclass(frozen=True)
class _Search:
    """The search of alpha on the weights as they are."""

    model: Model
    moments: Moments
    formats: Mapping[str, IntFormat]
    grid: int

    def best(self, fold: _Fold) -> tuple[float, Tensor] | None:
        """The best alpha, and its scale [K] float64; None where nothing is to be gained."""
        trials = [trial for name in fold.members if name in self.formats for trial in self._trials(name, fold.expert)]
        if not trials:
            return None
        total = torch.stack([moment.double() for _, moment, _ in trials]).mean(0)
        size = fold.tie(total.clamp_min(1e-8 * float(total.mean()) or 1.0)).sqrt()
        best = (0.0, torch.ones_like(size), sum(self._error(*trial, torch.ones_like(size)) for trial in trials))
        for step in range(1, self.grid):
            scale = size.pow(step / self.grid)
            scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4)
            error = sum(self._error(*trial, scale) for trial in trials)
            if error < best[2]:
                best = (step / self.grid, scale, error)
        return best[:2] if best[0] > 0 else None

    def _trials(self, name: str, expert: int | None) -> Iterator[tuple[Tensor, Tensor, IntFormat]]:
        """Weights [n, K] with the mean squares of their inputs [K]."""
        shape = self.model.graph.params[name].type.shape
        stacked = len(shape) == 3
        experts: list[int | None] = [None]
        if stacked:
            experts = [expert] if expert is not None else list(range(0, int(shape[0]), -(-int(shape[0]) // _SAMPLE_EXPERTS)))
        for one in experts:
            weight, moment = self.model.load(name, one), self.moments(name, one)
            if moment is not None:
                device = torch.get_default_device()
                yield weight[:: -(-len(weight) // _SAMPLE_ROWS)].to(device), moment.to(device), self.formats[name]

    @staticmethod
    def _error(weight: Tensor, moment: Tensor, fmt: IntFormat, scale: Tensor) -> float:
        changed = round_to_nearest(weight * scale.float(), fmt).values(fmt) / scale.float() - weight
        return float((changed.square().sum(0) * moment).sum())


def _folds(graph: Graph) -> Iterator[_Fold]:
    """The norms whose readers can all be scaled, and the values of attention."""
    for node in graph.nodes:
        reading = readers(graph, node.outputs[0].name) if node.op == "rms_norm" else None
        if reading and owned(graph, node.inputs[1] if len(node.inputs) > 1 else ""):
            members = tuple(reader.inputs[READS[reader.op]] for reader in reading)
            norm, offset = node.inputs[1], float(node.attrs.get("offset", 0.0))

            def apply(model: Model, scale: Tensor, norm: str = norm, offset: float = offset, members: tuple[str, ...] = members) -> Model:
                base = model.weights
                edits: dict[str, Edit] = {name: times(base, name, right=scale) for name in members}
                edits[norm] = lambda _: (base.load(norm).double().cpu() + offset) / scale.cpu() - offset
                return _exact(model.edited(model.graph, edits), [norm, *members])

            yield _Fold(node.name, members, apply)
    for path in value_paths(graph):
        shape = (path.kv_heads, path.repeats, path.size)

        def tie(scale: Tensor, shape: tuple[int, int, int] = shape) -> Tensor:
            return scale.view(shape).mean(1, keepdim=True).expand(shape).reshape(-1)

        value, output, bias = path.value.inputs[1], path.output.inputs[1], (*path.value.inputs[2:3], "")[0]
        if bias and not owned(graph, bias):
            continue

        def divide(
            model: Model, scale: Tensor, shape: tuple[int, int, int] = shape, value: str = value, output: str = output, bias: str = bias
        ) -> Model:
            by_row = 1 / scale.view(shape)[:, 0].reshape(-1)
            edits = {name: times(model.weights, name, left=by_row) for name in (value, bias) if name}
            edits[output] = times(model.weights, output, right=scale)
            return _exact(model.edited(model.graph, edits), [*edits])

        yield _Fold(path.output.name, (output,), divide, tie)


def _scalable(graph: Graph, layer: MoeLayer) -> bool:
    """Whether the rows of the up projection can be divided: what follows is linear in them, or positively homogeneous."""
    attrs = layer.experts.attrs
    linear = attrs["activation"] != "swiglu_oai" and not attrs.get("limit") if layer.gated else attrs["activation"] in ("relu", "identity")
    return linear and owned(graph, layer.up) and owned(graph, layer.down) and all(owned(graph, b) for b in layer.biases)


def _scale_hidden(model: Model, layer: MoeLayer, scale: Tensor) -> Model:
    """Divide what enters each expert's down projection by scale [E, F], and multiply the columns."""
    rows = torch.cat((torch.ones_like(scale), 1 / scale), 1) if layer.gated else 1 / scale  # [E, 2F]: the gate half stays
    edits = {
        layer.up: scaled(model.weights, layer.up, rows[:, :, None]),
        layer.down: scaled(model.weights, layer.down, scale[:, None, :]),
    }
    if bias := (*layer.experts.inputs[5:6], "")[0]:
        edits[bias] = scaled(model.weights, bias, rows)
    return _exact(model.edited(model.graph, edits), [bias] if bias else [])


def _exact(model: Model, names: list[str]) -> Model:
    """Vectors and routers, which nobody quantises, keep their scaled values in float32."""
    roles = parameter_roles(model.graph)
    kept = [model.graph.params[name] for name in names if roles[name] in ("router", "other")]
    return Model(model.graph.with_params([replace(param, format="f32") for param in kept]), model.weights)


PASS = Awq
