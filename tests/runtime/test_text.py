"""Streaming text: the pieces joined are the whole, nothing shows too early, nothing is held too long."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from moec.runtime.text import Detokenizer, StopStrings
from tests.runtime.fakes import TINY_MODEL

TINY = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))


def _byte_tokenizer() -> Tokenizer:
    """One token a byte, as byte-fallback tokenizers have them, and two words that begin with a space."""
    vocab = {f"<0x{value:02X}>": value for value in range(256)} | {"▁Hello": 256, "▁world": 257, "!": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token=None))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


BYTES = _byte_tokenizer()


def flat(parts: list[list[int]]) -> list[int]:
    return [token for part in parts for token in part]


def stream(tokenizer: Tokenizer, ids: list[int], context: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer, context=context or [])
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_pieces_of_a_text_joined_are_the_text(text: str) -> None:
    ids = TINY.encode(text).ids
    pieces = stream(TINY, ids)
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 4095), max_size=30), st.lists(st.integers(1, 4095), max_size=10))
def test_pieces_of_any_tokens_joined_are_what_the_tokenizer_decodes(ids: list[int], context: list[int]) -> None:
    assert "".join(stream(TINY, ids)) == TINY.decode(ids)
    if not TINY.decode(context).endswith("\ufffd"):
        assert "".join(stream(TINY, ids, context)) == TINY.decode(context + ids)[len(TINY.decode(context)) :]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([[256], [257], [258]]) | st.text(max_size=3).map(lambda text: list(text.encode())), max_size=12).map(flat))
def test_pieces_of_byte_tokens_joined_are_what_the_tokenizer_decodes(ids: list[int]) -> None:
    assert "".join(stream(BYTES, ids)) == BYTES.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 258), max_size=24))
def test_any_byte_tokens_have_some_text(ids: list[int]) -> None:
    assert len("".join(stream(BYTES, ids))) <= len(BYTES.decode(ids)) + sum(token < 256 for token in ids) + 1


def test_a_character_shows_when_its_last_byte_has_come() -> None:
    assert stream(BYTES, list("a€b".encode())) == ["a", "", "", "€", "b", ""]


def test_a_space_after_the_prompt_is_kept() -> None:
    assert stream(BYTES, [257, 258], context=[256]) == [" world", "!", ""]
    assert stream(BYTES, [257, 258]) == ["world", "!", ""]


def test_bytes_that_are_no_characters_are_not_held_back_for_ever() -> None:
    longest, shown = 0, 0
    detokenizer = Detokenizer(BYTES)
    for count in range(1, 200):
        shown += len(detokenizer.push(0x80))
        longest = max(longest, count - shown)
    assert longest <= 8
    assert shown + len(detokenizer.flush()) == 199


def test_special_tokens_have_no_text() -> None:
    detokenizer = Detokenizer(TINY, special=[0])
    hello = TINY.encode("Hello").ids
    assert "".join(detokenizer.push(token) for token in [0, *hello, 0]) == "Hello"


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string_that_is_whole(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    prefixes = ["".join(pieces[: n + 1]) for n in range(len(pieces))]
    come = next((prefix for prefix in prefixes if any(stop in prefix for stop in stops)), whole)  # the stream ends here
    at = min((come.find(stop) for stop in stops if stop in come), default=-1)
    filter_ = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += filter_.push(piece)
        if not filter_.found:
            assert not any(shown.endswith(stop[:n]) and _may_go_on(whole, shown, stop) for stop in stops for n in range(1, len(stop)))
    assert filter_.found == (at >= 0)
    assert shown + filter_.flush() == (whole if at < 0 else whole[:at])


def _may_go_on(whole: str, shown: str, stop: str) -> bool:
    """Whether a stop string begins within what was shown and ends after it."""
    return any(whole.startswith(stop, start) for start in range(max(0, len(shown) - len(stop) + 1), len(shown)))


@pytest.mark.parametrize("stops", [[], [""]])
def test_without_stop_strings_nothing_is_held_back(stops: list[str]) -> None:
    assert StopStrings(stops).push("anything") == "anything"


def test_the_tiny_model_is_where_the_tests_expect_it() -> None:
    assert (Path(TINY_MODEL) / "tokenizer.json").is_file()
