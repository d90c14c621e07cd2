"""What an attention mask of transformers means, read off the mask function instead of a mask tensor.

Transformers composes masks from small functions of (batch, head, query index, key index) and hands them to a mask interface.
Ours names the pattern, and the attention implementation of `moec.compiler.frontend.trace` reads it. A tensor is made only for a
model that computes with its mask, such as one whose queries choose their keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moec.compiler.errors import MoecError

_NEUTRAL = ("and_masks", "remap_positions_for_packed_sequence", "add_offsets_to_mask_function", "packed_sequence_mask_function")
"""Combinators that change nothing for one whole sequence a row whose positions count up by one."""


@dataclass(frozen=True)
class Mask:
    """The keys that a query sees: those of `causal`, `window` and `chunk` as in `moec.compiler.ops.attention`."""

    causal: bool = False
    window: int = 0
    chunk: int = 0

    def both(self, other: Mask) -> Mask:
        """What both masks allow."""
        window = min(filter(None, (self.window, other.window)), default=0)
        if self.chunk and other.chunk and self.chunk != other.chunk:
            raise MoecError(f"attention mask: chunks of {self.chunk} and of {other.chunk} tokens in one layer are not supported")
        return Mask(self.causal or other.causal, window, self.chunk or other.chunk)

    def tensor(self, queries: Any, keys: Any, device: Any) -> Tensor:
        """The mask as booleans [queries, keys], true where a query sees a key; both count from the first token."""
        q, k = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)[None, :]
        seen = q >= k if self.causal else (q >= 0) & (k >= 0)
        if self.window:
            seen = seen & (q - k < self.window)
        if self.chunk:
            seen = seen & (q // self.chunk == k // self.chunk)
        return seen


def describe(function: Callable[..., Any]) -> Mask:
    """The pattern of a mask function.

    Raises:
        MoecError: the function is none that we know.
    """
    maker = function.__qualname__.split(".")[0]
    cells = dict(zip(function.__code__.co_freevars, (c.cell_contents for c in function.__closure__ or ()), strict=True))
    match maker:
        case "causal_mask_function":
            return Mask(causal=True)
        case "bidirectional_mask_function":
            return Mask()
        case "sliding_window_overlay":
            return Mask(window=int(cells["sliding_window"]))
        case "chunked_overlay":
            return Mask(chunk=int(cells["chunk_size"]))
    if maker not in _NEUTRAL:
        raise MoecError(f"attention mask: the mask function {maker!r} is not one that can be compiled")
    mask = Mask()
    for value in cells.values():
        for inner in value if isinstance(value, tuple) else (value,):
            if callable(inner):
                mask = mask.both(describe(inner))
    return mask


class LazyMask:
    """What a model gets for its mask: a pattern, and for a model that computes with it a tensor."""

    def __init__(self, mask: Mask, make: Callable[[], Tensor]) -> None:
        self.mask, self._make = mask, make

    def tensor(self) -> Tensor:
        return self._make()

    def __getitem__(self, index: Any) -> LazyMask:
        return LazyMask(self.mask, lambda: self._make()[index])  # models cut a mask to the key length, which changes no pattern

    def to(self, *_: Any, **__: Any) -> LazyMask:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._make(), name)

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            return value._make() if isinstance(value, cls) else value

        return function(*map(plain, args), **{k: plain(v) for k, v in (kwargs or {}).items()})


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self.tensor(), name)(*others)


for _name in ("and", "rand", "or", "ror", "invert", "add", "radd", "mul", "rmul", "eq", "ne"):
    setattr(LazyMask, f"__{_name}__", _operator(f"__{_name}__"))


def mask_interface(
    *, batch_size: Any, q_length: Any, kv_length: Any, mask_function: Callable[..., Any], device: Any = None, **_: Any
) -> LazyMask:
    """The mask implementation that is registered with transformers."""
    mask = describe(mask_function)
    return LazyMask(mask, lambda: mask.tensor(q_length, kv_length, device).expand(batch_size, 1, -1, -1))


def merged(mask: LazyMask | None, causal: bool, window: int) -> Mask:
    """The mask of one attention call: what the model passed, and what it told the attention function besides."""
    stated = Mask(causal=causal, window=window)
    if mask is None:
        return stated
    # the mask already says whether the layer is causal; a window told twice is one window
    return replace(mask.mask.both(stated), causal=mask.mask.causal)


def attention_under(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, sinks: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Attention under a mask that the model computes: q [B, H, T, d], k and v [B, HK, T, d], mask [B, H or 1, T, T] -> [B, T, H, dv].

    Args:
        mask: booleans, true where a query sees a key, or numbers that are added to the logits.
        bias: [B, H, T, T], added to the logits.
        sinks: as in `moec.compiler.ops.attention`.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) if groups > 1 else x for x in (k, v))
    logits = torch.matmul(q, k.transpose(2, 3)) * scale  # [B, H, T, T]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min) if mask.dtype == torch.bool else logits + mask
    if sinks is not None:
        logits = torch.cat((logits, sinks.view(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], 1)), -1)
    weights = logits.softmax(-1)
    weights = weights if sinks is None else weights[..., :-1]
    return torch.matmul(weights, v).transpose(1, 2)
