"""Decide, before any weight is read, how each parameter is stored and which operator runs each `experts` node.

`experts` nodes run as

    qmoe      com.microsoft QMoE: integer formats, activations that the operator has, block dividing D and F.
    moe       com.microsoft MoE in float32: plain formats of small models (ONNX Runtime widens all experts at load).
    unrolled  one branch an expert, of which only those that are routed to run: everything else (low-rank factors too), and standard
              operators.

Measured with ONNX Runtime 1.31.1, one thread of a Zen 4 machine, one token. 64 experts of 2 x 1024 x 2048 and 2048 x 1024, top-8, 4 bits:
QMoE 5.4 ms with float and 1.1 to 2.0 ms with int8 activations, unrolled 6.6 to 10 ms and 1.5 to 2.7 ms; at 128 tokens QMoE is 2 to 3
times as fast. So QMoE is taken wherever it can say what the node means, with one exception: for 8-bit blocks QMoE rounds activations to
int8, which costs more quality than the 8 bits do, so that 8-bit experts are unrolled unless int8 activations were asked for. (It
does so for 2-bit blocks too, where the weights lose far more.) 32 float32 experts of 2 x 512 x 1024 and 1024 x 512, top-4: MoE 2.0 to
2.7 ms, unrolled 1.9 ms, unrolled and widened from bfloat16 as they run, without copies in memory, 2.1 ms; MoE is the fastest for experts
a tenth of that size.

GPUs (`half`): MoE with 16-bit weights whatever their size, and QMoE for 8 bits as well, whose activations keep 16 bits there. It wants
blocks of at least 32, D and F that 64 divides, and 2-bit codes without zero points (the next container takes those).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from moec.compiler.backends.base import StoredArray
from moec.compiler.backends.onnx.layout import IntLayout, common_block, container, interleaved, separated
from moec.compiler.errors import MoecError
from moec.compiler.ir import Graph, Node, Param
from moec.compiler.ops import EXPERT_MATRICES
from moec.compiler.packed import Packed, Quantized
from moec.runtime.formats import get_format
from moec.runtime.formats.float import STORAGE
from moec.runtime.formats.fp8 import Fp8Format
from moec.runtime.formats.int import IntFormat

GATED = {"silu": (1.0, 0.0), "swiglu_oai": (1.702, 1.0)}
"""Gated activations of QMoE and MoE: gate * sigmoid(alpha * gate) * (up + beta)."""

EXACT_ON_GPU = frozenset(("silu", "swiglu_oai", "relu", "identity"))
"""Activations that the operators are known to compute on a GPU as they do on a processor."""

GPU_BLOCK = 32
"""The smallest block of QMoE on a GPU."""

GPU_TILE = 64
"""What divides D and F there."""

PLAIN = {"silu": "silu", "gelu_tanh": "gelu", "relu": "relu", "identity": "identity"}
"""Activations of QMoE and MoE without a gate. Their gelu is the tanh form."""

FLOAT_EXPERTS_BYTES = 1 << 30
"""Above so many bytes of float32 copies, plain experts are unrolled and widened when they run."""


@dataclass(frozen=True)
class PlainLayout:
    """A weight stored as the numbers it has; `interleave`: rows n and n + N/2 become neighbours."""

    format: str
    shape: tuple[int, ...]
    interleave: bool = False

    def arrays(self) -> dict[str, StoredArray]:
        return {} if self.format == "zero" else {"weight": StoredArray(np.dtype(STORAGE[self.format]).name, self.shape)}

    def store(self, packed: Packed) -> dict[str, NDArray[np.generic]]:
        assert not isinstance(packed, Quantized)
        if self.format == "zero":
            return {}
        array = np.ascontiguousarray(packed, dtype=STORAGE[self.format]).reshape(self.shape)
        return {"weight": interleaved(array) if self.interleave else array}

    def restore(self, arrays: Mapping[str, NDArray[np.generic]]) -> Packed:
        if self.format == "zero":
            return np.zeros(self.shape, np.uint8)
        array = np.ascontiguousarray(arrays["weight"])
        return separated(array) if self.interleave else array


Layout = IntLayout | PlainLayout


@dataclass(frozen=True)
class Experts:
    """How an `experts` node runs. `bits`, `block`: of its weights (qmoe). `wide`: plain weights are widened when they run. `rows`: each
    choice of a token is a row of its own (see `experts`).
    """

    mode: str
    bits: int = 0
    block: int = 0
    wide: bool = False
    rows: bool = False


@dataclass(frozen=True)
class Placement:
    """What was decided: a layout a parameter (of one expert, where stacked), and a way to run each `experts` node by its name."""

    layouts: Mapping[str, Layout]
    stacked: frozenset[str]
    experts: Mapping[str, Experts]


def fixed(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    """The shape of a parameter, which has no symbols."""
    return tuple(d for d in shape if isinstance(d, int))


def int_format(param: Param) -> IntFormat | None:
    """The parameter's format if it is an integer one.

    Raises:
        MoecError: it is one of 8-bit floating point, or experts differ in theirs.
    """
    if not isinstance(param.format, str):
        raise MoecError(
            f"@{param.name}: the onnx backend needs one weight format for all experts, got {', '.join(sorted(set(param.format)))}"
        )
    fmt = get_format(param.format)
    if isinstance(fmt, Fp8Format):
        raise MoecError(
            f"@{param.name}: the onnx backend has no operators for {param.format}: choose int8_channel or int8_g128 in its place, or the "
            "backend tvm"
        )
    return fmt if isinstance(fmt, IntFormat) else None


def place(graph: Graph, portable: bool, activations: str, terms: bool = False, half: str | None = None) -> Placement:
    """Choose layouts and operators for a graph.

    Args:
        portable: standard operators only.
        activations: `float` or `int8`, what linear layers and experts compute with where there is a choice.
        terms: with float activations, linear layers with 8-bit weights compute with two int8 terms (see `linear`).
        half: for GPUs, the type of activations, `f16` or `bf16`.
    """
    stacked = {name for node in graph.nodes if node.op == "experts" for name in _matrices(node)}
    plain = [graph.params[name] for name in stacked if int_format(graph.params[name]) is None and graph.params[name].format != "zero"]
    floats = sum(4 * prod(fixed(param.type.shape)) for param in plain)
    wide = floats > FLOAT_EXPERTS_BYTES and half is None
    terms = terms or half is not None  # either takes 8-bit codes whole
    layouts: dict[str, Layout] = {}
    experts: dict[str, Experts] = {}
    for node in graph.nodes:
        if node.op == "experts":
            plan = _experts(graph, node, portable, activations, wide) if half is None else _gpu_experts(graph, node)
            experts[node.name] = plan
            for name, layout in _expert_layouts(graph, node, plan, portable, activations, terms and half is not None).items():
                if layouts.setdefault(name, layout) != layout:
                    raise MoecError(f"@{name} is used by two experts nodes that the onnx backend runs differently")
    for param in graph.params.values():
        if param.name not in layouts:
            multiplied = _multiplied(graph, param)
            layouts[param.name] = _layout(param, fixed(param.type.shape), portable, activations, multiplied=multiplied, terms=terms)
    return Placement(layouts, frozenset(stacked), experts)


def _matrices(node: Node) -> list[str]:
    return [node.inputs[at] for at in EXPERT_MATRICES if at < len(node.inputs) and node.inputs[at]]


def _multiplied(graph: Graph, param: Param) -> bool:
    return any(n.op == "linear" for n in graph.users.get(param.name, ()))


def _experts(graph: Graph, node: Node, portable: bool, activations: str, wide: bool) -> Experts:
    up, down = (graph.params.get(name) for name in node.inputs[3:5])
    if up is None or down is None:
        raise MoecError(f"experts %{node.name}: weights that are computed cannot be lowered; they must be parameters")
    formats = int_format(up), int_format(down)
    known = node.attrs["activation"] in (GATED if node.attrs.get("gated", True) else PLAIN)
    factors = len(_matrices(node)) > 2
    if portable or not known or factors or _may_be_negative(graph, node.inputs[2]):
        return Experts("unrolled", wide=wide)
    if formats[0] is None and formats[1] is None:
        return Experts("unrolled", wide=True) if wide else Experts("moe")
    if formats[0] is not None and formats[1] is not None:
        blocks = [common_block(f, fixed(p.type.shape)[2], whole=True) for f, p in ((formats[0], up), (formats[1], down))]
        bits = max(container(f.bits) for f in formats if f is not None)
        if min(blocks) and (bits != 8 or activations == "int8"):
            return Experts("qmoe", bits, min(blocks))
    return Experts("unrolled", wide=wide)


def _gpu_experts(graph: Graph, node: Node) -> Experts:
    up, down = (graph.params.get(name) for name in node.inputs[3:5])
    if up is None or down is None:
        raise MoecError(f"experts %{node.name}: weights that are computed cannot be lowered; they must be parameters")
    formats = int_format(up), int_format(down)
    activation = node.attrs["activation"]
    known = activation in EXACT_ON_GPU & (GATED if node.attrs.get("gated", True) else PLAIN).keys()
    sizes = [fixed(param.type.shape)[2] for param in (up, down)]  # D and F
    if not known or len(_matrices(node)) > 2 or "zero" in (up.format, down.format):
        return Experts("unrolled")
    if formats[0] is None and formats[1] is None:
        return Experts("unrolled") if any(size % 16 for size in sizes) else Experts("moe", rows=True)
    if formats[0] is not None and formats[1] is not None and not any(size % GPU_TILE for size in sizes):
        block = min(common_block(f, size, whole=True) for f, size in zip(formats, sizes, strict=True) if f is not None)
        symmetric = all(f.symmetric for f in formats if f is not None)
        bits = max(2 if symmetric else 4, *(container(f.bits) for f in formats if f is not None))
        if block >= GPU_BLOCK:
            return Experts("qmoe", bits, block, rows=True)
    return Experts("unrolled")


def _may_be_negative(graph: Graph, weights: str) -> bool:
    """Whether routing weights may be negative, which QMoE and MoE take for experts that were not chosen: scores that are mapped may be."""
    node = graph.producers.get(weights)
    while node is not None and node.op == "skip":
        node = graph.producers.get(node.inputs[0])
    return node is not None and node.op == "router" and node.attrs.get("score") == "identity"


def _expert_layouts(
    graph: Graph, node: Node, plan: Experts, portable: bool, activations: str, whole: bool
) -> dict[str, Layout]:  # fmt: skip
    gated = bool(node.attrs.get("gated", True)) and plan.mode != "unrolled"
    layouts: dict[str, Layout] = {}
    for at, name in enumerate(node.inputs[3:7]):
        if not name:
            continue
        param, interleave = graph.params[name], gated and at in (0, 2)
        shape = fixed(param.type.shape)
        if at >= 2:  # biases [E, N] are stored whole, their columns like the rows of the weights
            layouts[name] = PlainLayout(str(param.format), shape)
        elif (fmt := int_format(param)) is None:
            layouts[name] = PlainLayout(str(param.format), shape[1:], interleave)
        elif plan.mode == "qmoe":
            layouts[name] = IntLayout(fmt, shape[1], shape[2], plan.bits, plan.block, interleave=interleave)
        else:
            layouts[name] = _layout(param, shape[1:], portable, activations, multiplied=True, terms=whole)
    for name in _matrices(node)[2:]:
        param = graph.params[name]
        layouts[name] = _layout(param, fixed(param.type.shape)[1:], portable, activations, multiplied=True, terms=whole)
    return layouts


def _layout(param: Param, shape: tuple[int, ...], portable: bool, activations: str, *, multiplied: bool, terms: bool = False) -> Layout:
    """The layout of a matrix [N, K], or of a plain parameter of any shape."""
    if (fmt := int_format(param)) is None:
        return PlainLayout(str(param.format), shape)
    n, k = prod(shape[:-1]), shape[-1]
    bits = container(fmt.bits)
    if portable:
        size = fmt.group_size(k) if fmt.groups(k) > 1 else k + k % 2
        return IntLayout(fmt, n, k, max(bits, 4), 0 if size % 2 else size, signed=size % 2 == 0)
    block = common_block(fmt, k)
    if multiplied and activations == "float":
        return IntLayout(fmt, n, k, max(bits, 4), block, split=bits == 8 and block > 0 and not terms)
    return IntLayout(fmt, n, k, bits, block)
