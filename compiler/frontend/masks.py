"""What an attention mask of transformers means, read off the mask function instead of a mask tensor.

Transformers composes masks from small functions of (batch, head, query index, key index) and hands them to a mask interface.
Ours keeps no tensor: it names the pattern, and the attention implementation of `moec.compiler.frontend.trace` reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from moec.compiler.errors import MoecError

_NEUTRAL = ("and_masks", "remap_positions_for_packed_sequence", "add_offsets_to_mask_function", "packed_sequence_mask_function")
"""Combinators that change nothing for one whole sequence a row whose positions count up by one."""


@dataclass(frozen=True)
class Mask:
    """The keys that a query sees: those of `causal`, `window` and `chunk` as in `moec.compiler.ops.attention`."""

    causal: bool = False
    window: int = 0
    chunk: int = 0

    def __getitem__(self, _: Any) -> Mask:
        return self  # models cut a mask tensor to the key length

    def to(self, *_: Any, **__: Any) -> Mask:
        return self

    def both(self, other: Mask) -> Mask:
        """What both masks allow."""
        window = min(filter(None, (self.window, other.window)), default=0)
        if self.chunk and other.chunk and self.chunk != other.chunk:
            raise MoecError(f"attention mask: chunks of {self.chunk} and of {other.chunk} tokens in one layer are not supported")
        return Mask(self.causal or other.causal, window, self.chunk or other.chunk)


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


def mask_interface(*, mask_function: Callable[..., Any], **_: Any) -> Mask:
    """The mask implementation that is registered with transformers."""
    return describe(mask_function)


def merged(mask: Any, causal: bool, window: int) -> Mask:
    """The mask of one attention call: what the model passed, and what it told the attention function besides."""
    stated = Mask(causal=causal, window=window)
    if mask is None:
        return stated
    if isinstance(mask, Mask):
        # the mask already says whether the layer is causal; a window told twice is one window
        return replace(mask.both(stated), causal=mask.causal)
    raise MoecError("attention: the model makes its own mask tensor, which has no place in the graph's attention")
