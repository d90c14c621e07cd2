"""Which layers are measured: those of a model, or sizes that are given."""

from __future__ import annotations

from collections.abc import Sequence

from moec.compiler.errors import MoecError
from moec.targets.kernels.cuda.experts_layer import FP8, Layer

DTYPES = ("bfloat16", "float32", FP8)


def layers_of(model: str | None, sizes: Sequence[str], formats: Sequence[str], dtype: str) -> list[Layer]:
    """The different expert layers of a model, and those given as `E,K,D,F`, in each format.

    Raises:
        MoecError: there is none, or a size, a format or the type of activations is not what it should be.
    """
    if dtype not in DTYPES:
        raise MoecError(f"--activations {dtype!r}: expected one of {', '.join(DTYPES)}")
    found = [_size(text) for text in sizes]
    if model is not None:
        from moec.compiler.frontend.huggingface import load
        from moec.compiler.layers import need_layers

        found += [(m.count, m.top_k, m.hidden, m.width, m.gated) for m in need_layers(load(model)[0], "targets measure")]
    if not found:
        raise MoecError("nothing to measure: name a model, or a layer with --layer E,K,D,F such as 64,8,2048,1024")
    return [make_layer(size, text, dtype) for size in dict.fromkeys(found) for text in formats]


def make_layer(size: tuple[int, int, int, int, bool], formats: str, dtype: str = "bfloat16", widths: Sequence[int] = ()) -> Layer:
    """A layer of these E, K, D, F and gate whose formats are a text: `a`, `a/b` for gate_up and down, `a+b+...` for experts in turn.

    Args:
        widths: F of experts in turn, where they differ.

    >>> make_layer((4, 2, 256, 128, True), "int4_g64+int2_g64/int8_g64").gate_up
    ('int4_g64', 'int2_g64', 'int4_g64', 'int2_g64')

    Raises:
        MoecError: there are no kernels for a format.
    """
    experts, top_k, d, f, gated = size
    if not 1 <= top_k <= experts:
        raise MoecError(f"layer {experts},{top_k},{d},{f}: expected K from 1 to E")
    both: list[str | tuple[str, ...]] = []
    for part in formats.split("/"):
        names = part.split("+")
        both.append(names[0] if len(names) == 1 else tuple(names[e % len(names)] for e in range(experts)))
    if len(both) > 2:
        raise MoecError(f"formats {formats!r}: expected one, or two with a / between")
    each = tuple(widths[e % len(widths)] for e in range(experts)) if len(widths) > 1 else ()
    layer = Layer(experts, top_k, d, f, both[0], both[-1], dtype, gated, each)
    for stack in (layer.layout.gate_up, layer.layout.down):
        assert stack.classes  # checks the formats
    return layer


def _size(text: str) -> tuple[int, int, int, int, bool]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise MoecError(f"--layer {text!r}: expected E,K,D,F such as 64,8,2048,1024")
    experts, top_k, d, f = (int(part) for part in parts)
    return experts, top_k, d, f, True
