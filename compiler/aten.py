"""How an `aten.*` node is called: tensor arguments are inputs, the others are attributes under their schema names.

A list of tensors takes several inputs, whose number is the attribute of the list's name: `aten.cat.default(%a, %b) {tensors=2, dim=-1}`.
A dimension in an attribute may be an expression over the graph's symbols; an element type is named as in the IR.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.ir import Attr, dim_value

TORCH_DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f64": torch.float64,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}
_WORDS = ("approximate", "reduction", "rounding_mode", "reduce", "mode")
"""Arguments of ATen that are words."""

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@lru_cache(maxsize=1024)
def overload(op: str) -> torch._ops.OpOverload:
    """The torch operator that `aten.NAME.OVERLOAD` names.

    Raises:
        MoecError: torch has no such operator.
    """
    namespace, _, rest = op.partition(".")
    name, _, variant = rest.partition(".")
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), name), variant or "default")
    except AttributeError as error:
        raise MoecError(f"op {op!r} is neither a semantic op nor an ATen operator of torch {torch.__version__}") from error
    assert isinstance(found, torch._ops.OpOverload)  # noqa: SLF001  # as above
    return found


def call(
    op: str,
    tensors: Sequence[Tensor | None],
    attrs: Mapping[str, Attr],
    symbols: Mapping[str, int],
    float_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Any:
    """Run one ATen operator.

    Args:
        tensors: the node's inputs.
        attrs: the node's attributes.
        symbols: values of the graph's symbols.
        float_dtype: what `f32` stands for.
        device: where operators that make tensors (`aten.full`, `aten.arange`) put them.
    """
    if op == "aten.view.default":  # in the IR a view is any reshape: memory layout is no part of a graph's meaning
        return tensors[0].reshape([dim_value(d, symbols) for d in attrs["size"]])  # type: ignore[union-attr]
    function, queue = overload(op), list(tensors)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in function._schema.arguments:  # noqa: SLF001  # torch has no public name for it
        if argument.name == "device":
            value: Any = torch.device(device)
        elif "Tensor" in str(argument.type) and argument.name not in attrs:
            value = queue.pop(0) if queue else None
        elif "List[" in str(argument.type) and "Tensor" in str(argument.type):
            value = [queue.pop(0) for _ in range(attrs[argument.name])]
        elif argument.name in attrs:
            value = _value(attrs[argument.name], argument.name, symbols, float_dtype)
            if "Tensor" in str(argument.type) and not isinstance(value, bool):  # a number where the schema says tensor
                value = torch.tensor(value, dtype=float_dtype if isinstance(value, float) else torch.int64)
            if op == "aten.where.self":  # which takes tensors only: the number has the element type of the other operand
                other = next(t for t in tensors[1:] if t is not None)
                value = torch.scalar_tensor(value, dtype=other.dtype, device=other.device)
        elif argument.has_default_value():
            value = argument.default_value
        else:
            raise MoecError(f"{op}: attribute {argument.name!r} is missing")
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return function(*args, **kwargs)


def _value(attr: Attr, name: str, symbols: Mapping[str, int], float_dtype: torch.dtype) -> Any:
    """An attribute as torch takes it: element types by their objects, dimensions by their values."""
    if isinstance(attr, tuple):
        return [_value(a, "", symbols, float_dtype) for a in attr]
    if isinstance(attr, str) and name == "dtype":
        return float_dtype if attr == "f32" else TORCH_DTYPES[attr]
    if isinstance(attr, str) and name not in _WORDS:
        return dim_value(attr, symbols)
    return attr
