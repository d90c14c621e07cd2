"""Sessions on a small Markov model: what is generated, when memory is freed, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from moec.runtime import MoecError, Session, Token, load
from moec.runtime.session import Prompt
from tests.runtime.fakes import TINY_MODEL, MarkovExecutor, chain_table, fake_session, random_table, write_artifact

VOCAB = 4096


@pytest.fixture
def session(tmp_path: Path) -> Iterator[tuple[Session, MarkovExecutor]]:
    opened, executor = fake_session(tmp_path / "tiny.moec", random_table(vocab=VOCAB))
    with opened:
        yield opened, executor
    assert executor.sequences == {}


def ids(tokens: Iterator[Token], sequence: int = 0) -> list[int]:
    return [token.id for token in tokens if token.index == sequence]


def text(tokens: Iterator[Token]) -> str:
    return "".join(token.text for token in tokens)


def saying(folder: Path, sentence: str, prompt: str = "Say", **options: int) -> tuple[Session, MarkovExecutor]:
    """A session whose model goes on from the prompt with a sentence (its tokens must differ), and then with token 0."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    chain = [tokenizer.encode(prompt).ids[-1], *tokenizer.encode(sentence).ids]
    assert len(set(chain)) == len(chain)
    return fake_session(folder, chain_table(dict(pairwise(chain)), VOCAB), **options)


def test_greedy_generation_follows_the_likeliest_tokens(session: tuple[Session, MarkovExecutor]) -> None:
    opened, executor = session
    expected, token = [], 5
    for _ in range(10):
        token = int(executor.table[token].argmax())
        expected.append(token)
    tokens = list(opened.generate([3, 5], max_new_tokens=10))
    assert [token.id for token in tokens] == expected
    assert [token.finish_reason for token in tokens] == [None] * 9 + ["length"]
    row = executor.table[5].astype(np.float64)
    assert tokens[0].logprob == pytest.approx(row[expected[0]] - np.log(np.exp(row).sum()), abs=1e-5)
    assert text(iter(tokens)) == opened.tokenizer.decode([3, 5, *expected])[len(opened.tokenizer.decode([3, 5])) :]


def test_several_prompts_run_in_one_batch_and_give_what_each_gives_alone(session: tuple[Session, MarkovExecutor]) -> None:
    opened, executor = session
    prompts: list[Prompt] = ["One", "Two of them", [7, 8, 9], "Four", "Five", "Six"]
    alone = [[(t.id, t.text, t.finish_reason) for t in opened.generate(p, max_new_tokens=4 + i)] for i, p in enumerate(prompts)]
    executor.batches.clear()
    together: list[list[tuple[int, str, str | None]]] = [[] for _ in prompts]
    for token in opened.generate(prompts, max_new_tokens=4):
        together[token.index].append((token.id, token.text, token.finish_reason))
    assert [[t[0] for t in tokens] for tokens in together] == [[t[0] for t in tokens[:4]] for tokens in alone]
    assert together[0] == alone[0]
    assert executor.batches == [4] * 4 + [2] * 4  # four places: one forward a step for all that are running


def test_a_sequence_that_ends_makes_room_for_the_next(tmp_path: Path) -> None:
    table = chain_table({1: 2, 2: 3, 3: 0, 10: 11, 11: 12, 12: 13, 13: 14, 14: 0, 20: 21, 21: 0}, VOCAB)
    session, executor = fake_session(tmp_path / "a.moec", table, max_sequences=2)
    tokens = list(session.generate([[1], [10], [20]], max_new_tokens=8))
    assert {s: ids(iter(tokens), s) for s in range(3)} == {0: [2, 3, 0], 1: [11, 12, 13, 14, 0], 2: [21, 0]}
    assert executor.batches == [2, 2, 2, 2, 2]  # the third prompt entered when the first had ended
    assert [t.finish_reason for t in tokens if t.id == 0] == ["eos"] * 3
    assert executor.sequences == {}


def test_closing_the_iterator_frees_its_sequences(session: tuple[Session, MarkovExecutor]) -> None:
    opened, executor = session
    for stop_after in range(4):
        stream = opened.generate(["a", "b", "c"], max_new_tokens=5)
        for _ in range(stop_after):
            next(stream)
        stream.close()  # type: ignore[attr-defined]  # it is a generator
        assert executor.sequences == {}
    abandoned = opened.generate("a")
    next(abandoned)
    del abandoned
    assert executor.sequences == {}


def test_a_failing_model_frees_its_sequences(session: tuple[Session, MarkovExecutor]) -> None:
    opened, executor = session
    executor.table = executor.table.copy()
    executor.table[:, 9] = np.nan
    with pytest.raises(MoecError, match="NaN or infinite"):
        list(opened.generate(["a", "b"]))
    assert executor.sequences == {}


def test_two_iterators_share_a_session_until_it_is_full(session: tuple[Session, MarkovExecutor]) -> None:
    opened, _ = session
    expected = ids(opened.generate("a", max_new_tokens=5))
    first, second = opened.generate("a", max_new_tokens=5), opened.generate(["a", "b", "c"], max_new_tokens=5)
    got = [next(first).id]
    next(second)
    with pytest.raises(MoecError, match="all 4 sequences are in use: finish or close other iterators"):
        next(opened.generate("x"))
    got += [token.id for token in first]
    assert got == expected
    assert ids(opened.generate(["a"] * 4, max_new_tokens=5), 3) == expected  # waits for the one free place
    list(second)


def test_threads_sharing_a_session_get_what_one_alone_gets(session: tuple[Session, MarkovExecutor]) -> None:
    opened, _ = session
    expected = ids(opened.generate("a", max_new_tokens=20))
    results: list[list[int]] = []
    threads = [threading.Thread(target=lambda: results.append(ids(opened.generate("a", max_new_tokens=20)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


def test_sampling_with_a_seed_is_reproducible_whatever_else_is_in_the_batch(session: tuple[Session, MarkovExecutor]) -> None:
    opened, _ = session

    def run(prompt: Prompt | Sequence[Prompt], seed: int | None) -> list[int]:
        return ids(opened.generate(prompt, max_new_tokens=12, temperature=1.0, top_p=0.95, seed=seed))

    assert run("Hello", 1) == run("Hello", 1) == run(["Hello", "other", "more"], 1)
    assert run("Hello", 1) != run("Hello", 2)
    assert run("Hello", None) != run("Hello", None)
    pair = list(opened.generate(["Hello", "Hello"], max_new_tokens=12, temperature=1.0, seed=1))
    assert ids(iter(pair), 0) != ids(iter(pair), 1)


def test_text_streams_character_by_character(tmp_path: Path) -> None:
    sentence = " €5 für Zoë"
    session, _ = saying(tmp_path / "a.moec", sentence)
    tokens = list(session.generate("Say", max_new_tokens=50))
    assert text(iter(tokens)) == sentence
    assert not any("\ufffd" in token.text for token in tokens)
    assert (tokens[-1].id, tokens[-1].text, tokens[-1].finish_reason) == (0, "", "eos")


@pytest.mark.parametrize(
    ("stop", "shown"), [("the", " in "), (["zzz", "he w"], " in t"), (" in", ""), ("water!", " in the water"), ([], " in the water")]
)
def test_generation_ends_before_a_stop_string(tmp_path: Path, stop: str | list[str], shown: str) -> None:
    session, _ = saying(tmp_path / "a.moec", " in the water")
    tokens = list(session.generate("Say", stop=stop))
    assert text(iter(tokens)) == shown
    found = shown != " in the water"
    assert tokens[-1].finish_reason == ("stop" if found else "eos")


def test_what_is_held_back_shows_at_the_end(tmp_path: Path) -> None:
    session, _ = saying(tmp_path / "a.moec", " in the water")
    count = len(session.encode(" in the water"))
    tokens = list(session.generate("Say", stop="water tank", max_new_tokens=count))
    assert text(iter(tokens)) == " in the water"
    assert tokens[-1].finish_reason == "length"


def test_generation_goes_on_after_the_end_if_asked(tmp_path: Path) -> None:
    session, _ = fake_session(tmp_path / "a.moec", chain_table({1: 0, 0: 5, 5: 6}, VOCAB))
    assert ids(session.generate([1], max_new_tokens=3)) == [0]
    assert ids(session.generate([1], max_new_tokens=3, ignore_eos=True)) == [0, 5, 6]


def test_generation_ends_with_the_context(tmp_path: Path) -> None:
    session, _ = fake_session(tmp_path / "a.moec", random_table(vocab=VOCAB), context_length=8)
    for length in (1, 7, 8):
        tokens = list(session.generate([1] * length, max_new_tokens=100))
        assert len(tokens) == 8 - length + 1
        assert tokens[-1].finish_reason == "length"
    with pytest.raises(MoecError, match=r"prompt 0: 9 tokens, but there is room for 8 \(the context is 8\): shorten it"):
        session.generate([1] * 9)


REFUSED: list[tuple[str, Callable[[Session], object]]] = [
    ("prompt 0: expected at least one token id, got none", lambda s: s.generate("")),
    ("prompt 0: expected at least one token id, got none", lambda s: s.generate([])),
    ("prompt 1: expected at least one token id, got none", lambda s: s.generate(["a", ""])),
    ("prompt 0: token id 4096 is not in the vocabulary of 4096", lambda s: s.generate([1, 4096])),
    ("prompt 0: token id -1 is not in the vocabulary", lambda s: s.generate([-1])),
    ("prompt 0: expected at least one token id, got .1, 0.5.", lambda s: s.generate([1, 0.5])),  # type: ignore[arg-type]  # a user may
    ("max_new_tokens 0: expected at least 1", lambda s: s.generate("a", max_new_tokens=0)),
    ("seed -1: expected 0 or more", lambda s: s.generate("a", seed=-1)),
    ("temperature -1: expected 0 to 100", lambda s: s.generate("a", temperature=-1)),
    ("chat: expected messages such as", lambda s: s.chat([])),
    ("chat: expected messages such as", lambda s: s.chat([{"content": "no role"}])),
    ("has no chat template; give it a plain prompt", lambda s: s.chat([{"role": "user", "content": "Hi"}])),
]


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[m for m, _ in REFUSED])
def test_bad_requests_are_refused_before_anything_runs(
    session: tuple[Session, MarkovExecutor], message: str, call: Callable[[Session], object]
) -> None:
    with pytest.raises(MoecError, match=message):
        call(session[0])
    assert session[1].batches == []


def test_ones_own_loop(session: tuple[Session, MarkovExecutor]) -> None:
    opened, executor = session
    with opened.sequence() as sequence:
        np.testing.assert_array_equal(sequence.prefill([1, 2, 3]), executor.table[3])
        np.testing.assert_array_equal(sequence.decode(9), executor.table[9])
        assert len(sequence) == 4
        sequence.truncate(2)
        assert len(sequence) == 2
        np.testing.assert_array_equal(sequence.prefill([4, 5], all_logits=True), executor.table[[4, 5]])
        with pytest.raises(MoecError, match="61 tokens, but there is room for 60"):
            sequence.prefill([1] * 61)
        with pytest.raises(MoecError, match="truncate to 9: the sequence has 4 tokens"):
            sequence.truncate(9)
    assert executor.sequences == {}


def test_a_closed_session_says_so(tmp_path: Path) -> None:
    session, executor = fake_session(tmp_path / "a.moec", random_table(vocab=VOCAB))
    stream = session.generate("a")
    next(stream)
    session.close()
    assert executor.sequences == {}
    with pytest.raises(MoecError, match="this session is closed: load the artifact again"):
        next(stream)
    session.close()


def test_an_artifact_without_a_tokenizer_takes_and_gives_ids(tmp_path: Path) -> None:
    from moec.runtime.artifact import open_artifact

    session = Session(open_artifact(write_artifact(tmp_path / "a.moec")), MarkovExecutor(random_table()))
    tokens = list(session.generate([1, 2], max_new_tokens=3, ignore_eos=True))
    assert len(tokens) == 3
    assert text(iter(tokens)) == ""
    with pytest.raises(MoecError, match="no tokenizer.json in this artifact: give token ids"):
        session.generate("text")


def test_a_tokenizer_that_is_none_is_one_clear_error(tmp_path: Path) -> None:
    from moec.runtime.artifact import open_artifact

    folder = write_artifact(tmp_path / "a.moec", {"tokenizer.json": b"{}"})
    session = Session(open_artifact(folder), MarkovExecutor(random_table()))
    with pytest.raises(MoecError, match="tokenizer.json is not understood"):
        session.encode("a")


def test_load_refuses_unknown_backends_bad_options_and_foreign_processors(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "a.moec")
    with pytest.raises(MoecError, match="unknown backend 'fake'"):
        load(folder)
    with pytest.raises(MoecError, match="threads 0: expected at least 1"):
        load(folder, threads=0)
    with pytest.raises(MoecError, match="max_sequences 0: expected at least 1"):
        load(folder, max_sequences=0)
    backends = [p.stem for p in (Path(__file__).parents[2] / "runtime" / "executors").glob("[a-z]*.py")]
    if backends:
        target = {"name": "x", "kind": "cpu", "features": ["avx1024"]}
        foreign = write_artifact(tmp_path / "b.moec", {"lib.so": b"x"}, target=target, backend=backends[0])
        with pytest.raises(MoecError, match="its code needs avx1024, which this processor .* lacks: compile it for this machine"):
            load(foreign)
