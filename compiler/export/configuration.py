"""The configuration of a changed model: which keys hold the number of experts, their width and top-k, found by trying.

Families name these keys differently. A key qualifies if it has the old value, and if the model that transformers builds with the new
value there has the weights (and, traced, the nodes) of the changed model. No family is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import Any

from moec.compiler.errors import MoecError
from moec.compiler.frontend.huggingface import model_of
from moec.compiler.frontend.model import trace
from moec.compiler.frontend.normalize import Normalized
from moec.compiler.ir import Graph, Param
from moec.compiler.layers import moe_layers

Key = tuple[str, ...]
"""Attribute names from the configuration down to a value."""

_HINTS = {
    "experts": ("expert",),
    "width": ("moe", "expert", "intermediate", "ffn"),
    "top_k": ("per_tok", "top", "moe_k", "select", "expert"),
}
"""Keys with these words are tried first."""

_TRIES = 24
"""Combinations of keys that are tried."""


@dataclass(frozen=True)
class Configured:
    """A configuration, the keys that were changed, and the model it describes: the module on the meta device, and traced."""

    config: Any
    changes: Mapping[Key, int]
    module: Any
    normal: Normalized
    original: Mapping[str, Param]


def layer_sizes(graph: Graph, what: str) -> dict[str, int] | None:
    """The number of experts, their width and top-k, which are the same in all MoE layers; None without such layers.

    Raises:
        MoecError: layers differ.
    """
    layers = moe_layers(graph)
    found = {"experts": [x.count for x in layers], "width": [x.width for x in layers], "top_k": [x.top_k for x in layers]}
    for name, values in found.items():
        if len(set(values)) > 1:
            raise MoecError(
                f"{what}: the MoE layers have {', '.join(map(str, values))} as their {name.replace('_', '-')}, and a configuration of "
                "transformers has one number for all: choose a recipe that treats layers alike"
            )
    return {name: values[0] for name, values in found.items()} if layers else None


def configure(config: Any, old: Graph, new: Graph, what: str) -> Configured:
    """The configuration whose model is `new`.

    Args:
        config: the configuration of the model before it was changed.
        old: its graph.

    Raises:
        MoecError: transformers' model of this type cannot be what `new` is; the message says where they differ.
    """
    before, after = layer_sizes(old, what), layer_sizes(new, what)
    if before is not None and after is None:
        raise MoecError(f"{what}: no MoE layer with a router is left, which transformers' {config.model_type} cannot be")
    changed = {n: (before[n], after[n]) for n in before if before[n] != after[n]} if before and after else {}
    choices = [list(_choices(config, name, value)) for name, (value, _) in changed.items()]
    reason = "no key of the configuration has the old value"
    for tried, keys in enumerate(product(*choices)):
        if tried >= _TRIES:
            break
        changes = {key: changed[name][1] for name, group in zip(changed, keys, strict=True) for key in group}
        candidate = deepcopy(config)
        for key, value in changes.items():
            setattr(_owner(candidate, key), key[-1], value)
        try:
            module = model_of(candidate, what)
        except MoecError as error:
            reason = str(error)
            continue
        if (wrong := _shapes_differ(module, old, new)) is not None:
            reason = wrong
            continue
        normal, traced, _ = trace(module)
        if (wrong := difference(new, normal.graph)) is None:
            return Configured(candidate, changes, module, normal, traced.params)
        reason = wrong
    raise MoecError(f"{what}: transformers' {config.model_type} cannot express what the recipe made ({reason})")


def _owner(config: Any, key: Key) -> Any:
    for name in key[:-1]:
        config = getattr(config, name)
    return config


def _choices(config: Any, name: str, value: int) -> Iterator[tuple[Key, ...]]:
    """Keys that have a value, one by one, and then all that look alike together."""
    keys = [key for key, found in _integers(config.to_dict()) if found == value and hasattr(_owner(config, key), key[-1])]
    rank = {key: min((i for i, hint in enumerate(_HINTS[name]) if hint in key[-1]), default=len(_HINTS[name])) for key in keys}
    keys.sort(key=lambda key: (rank[key], len(key)))
    yield from ((key,) for key in keys)
    likely = tuple(key for key in keys if rank[key] < len(_HINTS[name]))
    if len(likely) > 1:
        yield likely


def _integers(values: Mapping[str, Any], path: Key = ()) -> Iterator[tuple[Key, int]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _integers(value, (*path, name))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield (*path, name), value


def _shapes_differ(module: Any, old: Graph, new: Graph) -> str | None:
    """Whether the module's weights have other sizes than the new graph's; cheap, before anything is traced."""
    expected = {name: p.type.shape for name, p in new.params.items() if name in old.params}
    for name, tensor in module.state_dict().items():
        if (shape := expected.get(name)) is not None and sorted(map(int, shape)) != sorted(tensor.shape):
            return f"{name} would be {list(tensor.shape)} and is {list(shape)}"
    return None


def difference(found: Graph, wanted: Graph) -> str | None:
    """Where one graph differs from another in what it computes; names of values and formats of weights do not matter."""
    names: dict[str, str] = dict(zip((v.name for v in found.inputs), (v.name for v in wanted.inputs), strict=True))
    for a, b in zip(found.nodes, wanted.nodes, strict=False):
        if a.op != b.op:
            return f"it has %{a.name} = {a.op} where transformers has {b.op}"
        attrs = sorted(k for k in {*a.attrs, *b.attrs} if a.attrs.get(k) != b.attrs.get(k))
        if attrs:
            return f"%{a.name}, {a.op}: {attrs[0]} is {a.attrs.get(attrs[0])}, transformers has {b.attrs.get(attrs[0])}"
        if len(a.inputs) != len(b.inputs) or any(names.get(x, x) != y for x, y in zip(a.inputs, b.inputs, strict=True)):
            return f"%{a.name} = {a.op} reads {', '.join(a.inputs)}, transformers reads {', '.join(b.inputs)}"
        for name in a.inputs:
            if name in found.params and found.params[name].type.shape != wanted.params[name].type.shape:
                return f"{name} is {found.params[name].type}, transformers has {wanted.params[name].type}"
        names.update(zip(_outputs(a), _outputs(b), strict=True))
    if len(found.nodes) != len(wanted.nodes):
        return f"it has {len(found.nodes)} operations, transformers has {len(wanted.nodes)}"
    return None


def _outputs(node: Any) -> Sequence[str]:
    return [o.name for o in node.outputs]
