"""Which nodes compute each token by itself.

A backend that runs a packed stream of tokens of several sequences, some of them earlier in a cache, may only run a node as it stands
if the node of two streams one after the other is the results of the two streams one after the other:

    node(concat(a, b)) == concat(node(a), node(b))    along T

That is what is tried here, on small random streams. It catches whatever mixes tokens (a sum, convolution or product over T) and
whatever depends on the place in the stream (`arange` over T, a slice along T, T as a number).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moec.compiler.aten import TORCH_DTYPES
from moec.compiler.errors import MoecError
from moec.compiler.interpreter import concrete, evaluate
from moec.compiler.ir import Graph, Node, TensorType, dim_symbols
from moec.compiler.text import print_node

ROW_WISE = frozenset({"embedding", "linear", "rms_norm", "layer_norm", "rope", "router", "skip", "experts"})
"""Semantic ops that treat each token by itself, by definition."""

_LENGTHS = (3, 4)
_LARGE = 1 << 16


def check_tokenwise(graph: Graph, state: Sequence[str] = ("attention",)) -> None:
    """Check that every node treats each token by itself, but for the ops in `state`, for which the backend keeps a cache.

    Raises:
        MoecError: some do not; the message names the nodes.
    """
    mixing = [n for n in graph.nodes if n.op not in ROW_WISE and n.op not in state and not is_tokenwise(graph, n)]
    if mixing:
        lines = "; ".join(print_node(graph, node) for node in mixing[:3])
        more = f" and {len(mixing) - 3} more" if len(mixing) > 3 else ""
        raise MoecError(
            f"graph {graph.name}: {len(mixing)} nodes mix tokens or depend on their place and need recurrent state, "
            f"which this backend does not keep yet: {lines}{more}. Only attention may look at other tokens"
        )


def is_tokenwise(graph: Graph, node: Node) -> bool:
    """Whether a node treats each token by itself."""
    generator = torch.Generator().manual_seed(0)
    types = [graph.type_of(name) if name else None for name in node.inputs]
    if any(len(_axes(t)) > 1 for t in (*types, *(o.type for o in node.outputs)) if t is not None):
        return False
    if not any(_axes(o.type) for o in node.outputs):
        return not any(_axes(t) for t in types if t is not None)
    for highest in (2, 1):  # indices that a node can look up, in any axis of at least that size
        parts = [[_sample(t, length, highest, generator) for t in types] for length in _LENGTHS]
        whole = [None if t is None else _join(t, [part[i] for part in parts]) for i, t in enumerate(types)]
        try:
            separate = [evaluate(node, part, _symbols(n), torch.float32, "cpu") for part, n in zip(parts, _LENGTHS, strict=True)]
            together = evaluate(node, whole, _symbols(sum(_LENGTHS)), torch.float32, "cpu")
        except (IndexError, RuntimeError):
            continue
        joined = [_join(o.type, [part[i] for part in separate]) for i, o in enumerate(node.outputs)]
        return all(_same(a, b) for a, b in zip(together, joined, strict=True))
    return False


def _axes(kind: TensorType) -> list[int]:
    """The axes that hold tokens."""
    return [axis for axis, dim in enumerate(kind.shape) if dim_symbols(dim) - {"B"}]


def _symbols(tokens: int) -> Mapping[str, int]:
    return {"B": 1, "T": tokens, "R": tokens}


def _sample(kind: TensorType | None, tokens: int, highest: int, generator: torch.Generator) -> Tensor | None:
    if kind is None:
        return None
    shape, dtype = concrete(kind.shape, _symbols(tokens)), TORCH_DTYPES[kind.dtype]
    if not _axes(kind):
        generator = torch.Generator().manual_seed(len(shape))  # the same weights for every stream
        if torch.Size(shape).numel() > _LARGE:  # a row stands for all
            return torch.randn(shape[-1], generator=generator).to(dtype).expand(shape)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, highest, shape, generator=generator).to(dtype)


def _join(kind: TensorType, parts: Sequence[Tensor | None]) -> Tensor:
    tensors = [part for part in parts if part is not None]
    axes = _axes(kind)
    return torch.cat(tensors, axes[0]) if axes else tensors[0]


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
