"""Text while it is being generated: tokens become text as soon as it is certain, and stop strings never show, not even in part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

_UNCERTAIN = "\ufffd"
"""What a decoder writes for bytes that are not, or not yet, a character."""

_CONTEXT = 6
"""Tokens before the new ones that are decoded with them, for decoders that treat the beginning of a text specially.
There may be a few more: it begins where a character does.
"""

_LONGEST_CHARACTER = 4
"""Bytes, and so at most tokens, of a character in UTF-8."""


class Decoder(Protocol):
    """The part of `tokenizers.Tokenizer` that is needed here."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens."""
        ...


class Detokenizer:
    """Turns a stream of tokens into text, piece by piece.

    The pieces joined are what the decoder makes of all tokens at once (where bytes that are no characters make a decoder change its
    mind about characters before them, those stay as they were). A token that ends within a character is held back.

    Args:
        decoder: the tokenizer.
        special: ids that have no text.
        context: the tokens before the stream.
    """

    def __init__(self, decoder: Decoder, special: Iterable[int] = (), context: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._special = frozenset(special)
        self._context = self._trim([token for token in context[-64:] if token not in self._special])
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that is certain now that this token has come."""
        if token in self._special:
            return ""
        self._pending.append(token)
        text = self._text(self._pending)
        if not text.endswith(_UNCERTAIN):
            return self._emit(len(self._pending), text)
        # A run of bytes that are no characters must not be held back for ever: what is more than a character ago is certain
        # if it decodes the same on its own.
        cut = len(self._pending) - _LONGEST_CHARACTER
        if cut > 0 and (first := self._text(self._pending[:cut])) + self._decode(self._pending[cut:]) == text:
            return self._emit(cut, first)
        return ""

    def flush(self) -> str:
        """The rest, at the end of the stream."""
        return self._emit(len(self._pending), self._text(self._pending)) if self._pending else ""

    def _emit(self, count: int, text: str) -> str:
        self._context = self._trim([*self._context, *self._pending[:count]])
        del self._pending[:count]
        return text

    def _trim(self, tokens: list[int]) -> list[int]:
        """The last tokens, from where a character begins."""
        if len(tokens) <= _CONTEXT:
            return tokens
        ends = (tokens[-count:] for count in range(_CONTEXT, _CONTEXT + _LONGEST_CHARACTER))
        return next((end for end in ends if not self._decode(end).startswith(_UNCERTAIN)), tokens[-_CONTEXT:])

    def _decode(self, tokens: list[int]) -> str:
        return self._decoder.decode(tokens, skip_special_tokens=False)

    def _text(self, tokens: list[int]) -> str:
        """The text of tokens that follow the context."""
        before, whole = self._decode(self._context), self._decode(self._context + tokens)
        return whole[len(before) :] if whole.startswith(before) else self._decode(tokens)


class StopStrings:
    """Cuts a stream of text before the first stop string, and holds back what may become one.

    >>> stops = StopStrings(["END"])
    >>> [stops.push(piece) for piece in ("a E", "N", "x EN", "D b")]
    ['a ', '', 'ENx ', '']
    >>> stops.found
    True
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain now that this piece has come; nothing once a stop string was found."""
        if self.found:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        if at := [index for stop in self._stops if (index := text.find(stop)) >= 0]:
            self.found, self._held = True, ""
            return text[: min(at)]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """The rest, at the end of the stream."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that begins the stop string without being all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
