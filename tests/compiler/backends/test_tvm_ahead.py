"""Steps that the emulated GPU runs one after the other without the host, under a driver that does everything as late as it may."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from moec.compiler.backends.tvm import cuda
from moec.runtime.errors import MoecError
from moec.runtime.executor import repeated
from moec.runtime.executors.tvm import PORTION, TvmExecutor
from moec.runtime.generate import Request, Token, generate
from moec.runtime.sampler import BAD_LOGITS, Best, Sampling
from moec.runtime.session import _NoText
from moec.runtime.shared_executor import SharedExecutor
from moec.runtime.text import Detokenizer, StopStrings
from moec.runtime.tvm_device import Gpu
from tests.compiler.backends.test_tvm import with_format
from tests.compiler.backends.test_tvm_cuda import moe
from tests.compiler.backends.tvm_model import Compiled
from tests.graphs import random_weights
from tests.targets.kernels import emulator
from tests.targets.kernels.emulator import needs_emulator
from tests.targets.kernels.emulator.driver import EmulatedDriver, driven

pytestmark = needs_emulator


class Driven(NamedTuple):
    model: Compiled
    gpu: Gpu
    driver: EmulatedDriver


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driven]:
    with pytest.MonkeyPatch.context() as patch:
        emulator.install()
        patch.setattr(cuda, "has_many", lambda _: False)
        patch.setattr(cuda, "need_cuda_compiler", lambda: "none")
        patch.setattr(cuda, "machine_code", lambda source, arch, compiler: b"")
        gpu, driver = driven(patch)
        graph = with_format(moe(), "int4_g32")
        folder = tmp_path_factory.mktemp("ahead")
        yield Driven(Compiled(graph, random_weights(graph), folder, "h100-sxm", gpu, (1, 2, 3, 40)), gpu, driver)


def begun(executor: TvmExecutor, lengths: list[int], seed: int = 0) -> tuple[list[int], list[NDArray[np.int64]]]:
    """Sequences of random tokens, and the next token of each."""
    draw, handles = np.random.default_rng(seed), [executor.add() for _ in lengths]
    for handle, length in zip(handles, lengths, strict=True):
        executor.forward([(handle, draw.integers(0, executor.vocab_size, length))])
    return handles, [draw.integers(0, executor.vocab_size, 1) for _ in handles]


def assert_same(found: Best, expected: Best) -> None:
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.logprobs, expected.logprobs)


@pytest.mark.parametrize("lengths", [[5], [3, 9], [30, 1, 7]])
def test_what_a_step_at_a_time_finds(subject: Driven, lengths: list[int]) -> None:
    executor = subject.model.executor
    assert executor.counters is not None
    handles, tokens = begun(executor, lengths)
    for count in (1, 7, PORTION):  # pages end on the way
        steps = list(zip(handles, tokens, strict=True))
        before = [executor.length(handle) for handle in handles]
        executor.counters.reset()
        expected = repeated(executor, steps, count)
        ran = executor.counters.read()
        for handle, length in zip(handles, before, strict=True):
            executor.truncate(handle, length)
        executor.counters.reset()
        found = executor.ahead(steps, count)
        assert found.ids.shape == (count, len(lengths))
        assert_same(found, expected)
        assert executor.counters.read() == ran
        assert [executor.length(handle) for handle in handles] == [length + count for length in before]
        tokens = [found.ids[-1, i : i + 1] for i in range(len(handles))]
    for handle in handles:
        executor.remove(handle)


def test_what_the_interpreter_finds(subject: Driven) -> None:
    executor, ids = subject.model.executor, np.array([3, 1, 4])
    handle = executor.add()
    executor.forward([(handle, ids[:2])])
    found = executor.ahead([(handle, ids[2:])], 6)
    for token, logprob in zip(found.ids[:, 0], found.logprobs[:, 0], strict=True):
        best = Best.of(subject.model.expected(ids)[-1:])
        assert token == best.ids[0]
        assert logprob == pytest.approx(best.logprobs[0], abs=1e-4)
        ids = np.append(ids, token)
    executor.remove(handle)


def test_the_host_waits_once(subject: Driven) -> None:
    executor, log = subject.model.executor, subject.driver.log
    handles, tokens = begun(executor, [2, 4])
    step = list(zip(handles, tokens, strict=True))
    for _ in range(2):
        log.clear()
        executor.ahead(step, 4)
    assert log == ["copy_in", *["launch"] * 4, "copy_out", "wait"]
    for _ in range(3):
        executor.best(step)
    log.clear()
    executor.best(step)
    assert log == ["launch", "wait"]  # its copies are in the recording
    executor.truncate(handles[0], 2)
    executor.forward([(handles[0], np.zeros(30, np.int64))])  # to the end of its page
    log.clear()
    executor.best(step)
    assert log == ["copy_in", "launch", "wait"]  # the table has one page more
    for handle in handles:
        executor.remove(handle)


@pytest.mark.parametrize("lengths", [[4], [3, 30, 7]])
def test_generation_in_portions(subject: Driven, lengths: list[int]) -> None:
    executor, draw = subject.model.executor, np.random.default_rng(7)
    prompts, shared = [draw.integers(0, 40, length).tolist() for length in lengths], SharedExecutor(executor, 8)

    def run(portion: int) -> list[Token]:
        shared.portion = portion
        parts = (np.random.default_rng(0), Detokenizer(_NoText(), frozenset(), []), StopStrings([]))
        return list(generate(shared, [Request(i, prompt, *parts) for i, prompt in enumerate(prompts)], Sampling(), 19, eos))

    eos = frozenset[int]()
    eos = frozenset([run(1)[11 * len(prompts)].id])  # ends one of them early
    expected, found = run(1), run(PORTION)
    assert len(expected) < 19 * len(prompts)
    assert [(t.index, t.id, t.finish_reason) for t in found] == [(t.index, t.id, t.finish_reason) for t in expected]
    np.testing.assert_allclose(
        [t.logprob for t in found], [t.logprob for t in expected], atol=1e-5
    )  # kernels may be those of other batches
    assert shared.free == 8


def test_more_pages_than_there_were(subject: Driven) -> None:
    """New memory for pages keeps what the old has, and recordings of the old are gone."""
    executor = subject.model.executor
    handles, tokens = begun(executor, [5])
    expected = repeated(executor, [(handles[0], tokens[0])], PORTION)
    executor.truncate(handles[0], 5)
    assert_same(executor.ahead([(handles[0], tokens[0])], PORTION), expected)
    executor.truncate(handles[0], 5)
    executor._pages._grow(64)
    assert_same(executor.ahead([(handles[0], tokens[0])], PORTION), expected)
    executor.remove(handles[0])


def test_what_fails_changes_nothing(subject: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = subject.model.executor
    handles, tokens = begun(executor, [executor.context_length - 3, 4])
    steps = list(zip(handles, tokens, strict=True))
    before = [executor.length(handle) for handle in handles]
    with pytest.raises(MoecError, match=f"a sequence of {executor.context_length + 1} tokens is longer than the context"):
        executor.ahead(steps, 4)
    assert [executor.length(handle) for handle in handles] == before
    expected = executor.ahead(steps, 3)
    for handle, length in zip(handles, before, strict=True):
        executor.truncate(handle, length)
    bad = np.zeros((3, 2, 3), np.float32)
    bad[2, 1, 2] = np.nan
    with monkeypatch.context() as patch:
        patch.setattr(subject.gpu, "ahead", lambda *_: bad)
        with pytest.raises(MoecError, match=BAD_LOGITS[:30]):
            executor.ahead(steps, 3)
    assert [executor.length(handle) for handle in handles] == before
    assert_same(executor.ahead(steps, 3), expected)
    for handle in handles:
        executor.remove(handle)


def test_an_older_library_goes_a_step_at_a_time(subject: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    model = subject.model
    assert (model.executor.portion, model.section["ahead"]) == (PORTION, True)
    section = {key: value for key, value in model.section.items() if key != "ahead"}
    library, sizes = model.folder / "lib.so", (model.executor.vocab_size, model.executor.context_length)
    old = TvmExecutor(library, section, model.arrays, *sizes, device=driven(monkeypatch)[0])
    assert old.portion == 1
    handles, tokens = begun(old, [5])
    found = old.ahead([(handles[0], tokens[0])], 3)
    monkeypatch.undo()  # launches go to the first driver again
    again, _ = begun(model.executor, [5])
    assert_same(found, model.executor.ahead([(again[0], tokens[0])], 3))
    model.executor.remove(again[0])
