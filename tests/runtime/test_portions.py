"""Generation in portions of steps gives what one step at a time gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.runtime import MoecError, Session, Token
from moec.runtime.executor import repeated
from moec.runtime.session import Prompt
from tests.runtime.fakes import MarkovExecutor, chain_table, fake_session, random_table

VOCAB = 4096
PORTIONS = [2, 3, 4, 8, 50]


@pytest.fixture
def session(tmp_path: Path) -> Iterator[tuple[Session, MarkovExecutor]]:
    """A model whose tokens end some texts early: every 80th of them is followed by the end."""
    table = random_table(seed=5, vocab=VOCAB).copy()
    table[::80, 0] = 100
    opened, executor = fake_session(tmp_path / "tiny.moec", table, max_sequences=3)
    with opened:
        yield opened, executor
    assert executor.sequences == {}


def generated(session: tuple[Session, MarkovExecutor], portion: int, prompts: Sequence[Prompt], **options: Any) -> list[Token]:
    """What comes of prompts; the lengths of the portions are in `portions` of the executor."""
    opened, executor = session
    executor.portion = opened.executor.portion = portion
    executor.portions.clear()
    return list(opened.generate(prompts, **options))


@pytest.mark.parametrize("portion", PORTIONS)
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 17])
def test_any_number_of_tokens(session: tuple[Session, MarkovExecutor], portion: int, tokens: int) -> None:
    expected = generated(session, 1, [[4095, 7]], max_new_tokens=tokens, ignore_eos=True)
    assert not session[1].portions
    assert generated(session, portion, [[4095, 7]], max_new_tokens=tokens, ignore_eos=True) == expected
    whole, rest = divmod(tokens - 1, portion)  # the first token is that of the prompt
    assert session[1].portions == [portion] * whole + [rest] * (rest > 0)


@pytest.mark.parametrize("portion", PORTIONS)
def test_sequences_that_end_at_different_times(session: tuple[Session, MarkovExecutor], portion: int) -> None:
    prompts: list[Prompt] = [[5], [77, 8, 9], "Some text", [1000], [1, 2, 3], [2222]]
    options: dict[str, Any] = {"max_new_tokens": 40, "stop": "th"}
    expected = generated(session, 1, prompts, **options)
    ends = [(token.index, token.finish_reason) for token in expected if token.finish_reason]
    lengths = [sum(token.index == i for token in expected) for i in range(len(prompts))]
    assert len({reason for _, reason in ends}) == 3 and len(set(lengths)) > 3, (ends, lengths)
    got = generated(session, portion, prompts, **options)
    assert got == expected  # the order too, in which the tokens of a step come
    assert session[1].portions


@pytest.mark.parametrize("portion", PORTIONS)
@pytest.mark.parametrize("stop", [["the"], ["zzz", "he w"], [" in the w"], ["water!"]])
def test_stop_strings_across_portions(tmp_path: Path, portion: int, stop: list[str]) -> None:
    from tests.runtime.test_session import saying

    opened = saying(tmp_path / "a.moec", " in the water")
    expected = generated(opened, 1, ["Say"], stop=stop)
    assert generated(opened, portion, ["Say"], stop=stop) == expected


@pytest.mark.parametrize("portion", PORTIONS)
def test_the_context_ends_a_portion(tmp_path: Path, portion: int) -> None:
    opened = fake_session(tmp_path / "a.moec", random_table(vocab=VOCAB), context_length=13)
    prompts: list[Prompt] = [[1] * 5, [2] * 9]
    expected = generated(opened, 1, prompts, max_new_tokens=100, ignore_eos=True)
    assert [token.finish_reason for token in expected].count("length") == 2
    assert generated(opened, portion, prompts, max_new_tokens=100, ignore_eos=True) == expected


def test_a_failure_comes_where_it_would_come_otherwise(tmp_path: Path) -> None:
    table = chain_table({1: 2, 2: 3, 3: 4, 4: 5}, VOCAB)
    table[4] = np.nan
    opened, executor = fake_session(tmp_path / "a.moec", table)
    for portion in (1, 8):
        executor.portion = opened.executor.portion = portion
        stream = opened.generate([1], max_new_tokens=20)
        assert [next(stream).id for _ in range(3)] == [2, 3, 4]
        with pytest.raises(MoecError, match="NaN or infinite"):
            next(stream)
        assert executor.sequences == {}


def test_a_failure_behind_the_end_of_a_sequence_is_none(tmp_path: Path) -> None:
    table = chain_table({1: 2, 2: 3, 3: 0, 10: 11, 11: 12, 12: 13, 13: 14, 14: 15, 15: 16, 16: 0}, VOCAB)
    table[0] = np.nan  # what comes after the end
    session = fake_session(tmp_path / "a.moec", table)
    expected = generated(session, 1, [[1], [10]])
    assert [token.finish_reason for token in expected].count("eos") == 2
    assert generated(session, 4, [[1], [10]]) == expected


def test_who_draws_or_waits_gets_a_step_at_a_time(session: tuple[Session, MarkovExecutor]) -> None:
    _, executor = session
    for options in ({"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.1}):
        generated(session, 8, [[5], [6]], max_new_tokens=9, ignore_eos=True, **options)
        assert executor.portions == []
    generated(session, 8, [[i + 1] for i in range(5)], max_new_tokens=9, ignore_eos=True)
    assert executor.portions == [1] * 8 + [8]  # the last two began when the first three were done


def test_closing_in_the_middle_of_a_portion_frees_its_sequences(session: tuple[Session, MarkovExecutor]) -> None:
    opened, executor = session
    executor.portion = opened.executor.portion = 8
    for stop_after in range(12):
        stream = opened.generate([[5], [6]], max_new_tokens=9, ignore_eos=True)
        for _ in range(stop_after):
            next(stream)
        stream.close()  # type: ignore[attr-defined]  # it is a generator
        assert executor.sequences == {}


def test_repeated_steps_fail_as_a_whole() -> None:
    table = chain_table({1: 2, 2: 3, 3: 4}, 8)
    executor = MarkovExecutor(table)
    first, second = executor.add(), executor.add()
    executor.forward([(first, np.array([7, 7])), (second, np.array([7]))])
    best = repeated(executor, [(first, np.array([1])), (second, np.array([5, 2]))], 3)
    assert best.ids.tolist() == [[2, 3], [3, 4], [4, 0]]
    assert executor.sequences == {first: [7, 7, 1, 2, 3], second: [7, 5, 2, 3, 4]}
    executor.table[3] = np.nan
    with pytest.raises(MoecError, match="NaN"):
        repeated(executor, [(second, np.array([1]))], 5)
    assert executor.length(second) == 5
