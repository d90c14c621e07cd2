"""Quantised weights, and the functions between values and what an artifact stores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.ir import Param
from moec.runtime.formats import Format, Scales, get_format
from moec.runtime.formats.float import PlainFormat
from moec.runtime.formats.fp8 import Fp8Format
from moec.runtime.formats.int import IntFormat

CodedFormat = IntFormat | Fp8Format
"""A format of codes and scales, which quantisers give a weight."""


@dataclass(frozen=True)
class Quantized:
    """A weight [N, K] as codes: codes uint8 [N, K], scale float16 (fp8: float32) [N, groups], zero points uint8 [N, groups].

    value = (code - zero) * scale. The zero points of a symmetric format are its constant 2^(bits-1). In fp8 the code stands for a
    floating-point number, and zero points are 0; rows that share a scale each have it.
    """

    codes: NDArray[np.uint8]
    scale: Scales
    zero: NDArray[np.uint8]

    def values(self, fmt: CodedFormat) -> Tensor:
        """What the codes stand for: float32 [N, K]."""
        codes, scale, zero = (torch.from_numpy(a).to(torch.get_default_device()) for a in (self.codes, self.scale, self.zero))
        k, size = codes.shape[-1], fmt.group_size(codes.shape[-1])
        numbers = codes.float() if isinstance(fmt, IntFormat) else codes.view(torch.float8_e4m3fn).float()
        values: Tensor = torch.nn.functional.pad(numbers, (0, -k % size)).unflatten(-1, (-1, size))  # [N, groups, size]
        values.sub_(zero.float()[..., None]).mul_(scale.float()[..., None])
        result: Tensor = values.flatten(-2)[..., :k]
        return result


_FLOATS = {"bf16": torch.bfloat16, "f16": torch.float16}

Packed = Quantized | NDArray[np.generic]
"""A weight in its format: `Quantized`, or for plain formats the stored numbers (bfloat16 as uint16 bits)."""


def format_name(param: Param, expert: int | None) -> str:
    """The name of the format of a parameter, or of one expert of it."""
    return param.format if isinstance(param.format, str) else param.format[expert or 0]


def chosen_format(name: str, what: str) -> Format:
    """A format that a weight with values can be put into.

    Raises:
        MoecError: there is none of this name, or it has room for no values.
    """
    if name == "zero":
        raise MoecError(
            f"{what}: the format zero keeps nothing of a weight; low_rank puts factors in its place, remove_experts takes experts out"
        )
    return get_format(name)


def coded_format(param: Param, expert: int | None = None) -> CodedFormat | None:
    """The format of a parameter or of one expert of it, if it has codes; None if it is a plain one."""
    fmt = get_format(format_name(param, expert))
    return fmt if isinstance(fmt, CodedFormat) else None


def is_quantized(param: Param) -> bool:
    """Whether a parameter, or any expert of it, is in a format of codes."""
    formats = (param.format,) if isinstance(param.format, str) else param.format
    return any(isinstance(get_format(name), CodedFormat) for name in formats)


def rounded(value: Tensor, name: str) -> Tensor:
    """Floats as the plain format of this name keeps them; integers, and floats in any other format, as they are; zeros as `zero`."""
    if name == "zero":
        return torch.zeros_like(value)
    kind = _FLOATS.get(name)
    return value.to(kind) if kind is not None and value.is_floating_point() else value


def pack_plain(param: Param, value: Tensor, expert: int | None) -> NDArray[np.generic]:
    """A weight (or one expert of a stacked weight) in a plain format."""
    name = format_name(param, expert)
    if name == "zero":
        if value.any():
            raise MoecError(f"@{param.name}: a weight that is not zero cannot have the format zero; choose another")
        return np.zeros(tuple(value.shape), np.uint8)
    fmt = get_format(name)
    assert isinstance(fmt, PlainFormat)
    if name == "bf16" and value.dtype == torch.bfloat16:  # the bits as they are
        return value.contiguous().view(torch.uint16).cpu().numpy()
    if value.dtype in (torch.int64, torch.int32, torch.bool, torch.uint8):
        return value.cpu().numpy()
    return fmt.pack(value.float().cpu().numpy())["data"]
