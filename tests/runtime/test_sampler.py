"""The sampler against its definition, and its draws against the distribution."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from moec.runtime.errors import MoecError
from moec.runtime.sampler import Best, Sampling, logprob, softmax

LOGITS = arrays(np.float32, st.integers(1, 12), elements=st.floats(-20, 20, width=32))


def plain_softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(values - values.max())
    result: NDArray[np.float64] = weights / weights.sum()
    return result


@given(LOGITS, st.floats(0.1, 5))
def test_temperature_divides_logits(logits: NDArray[np.float32], temperature: float) -> None:
    expected = plain_softmax(logits.astype(np.float64) / temperature)
    np.testing.assert_allclose(Sampling(temperature).distribution(logits), expected, atol=1e-12)


@given(LOGITS, st.integers(1, 12))
def test_top_k_keeps_the_k_likeliest_and_the_lowest_ids_among_equals(logits: NDArray[np.float32], k: int) -> None:
    got = Sampling(1.0, top_k=k).distribution(logits)
    expected = sorted(range(len(logits)), key=lambda i: (-softmax(logits.astype(np.float64))[i], i))[:k]
    assert set(np.flatnonzero(got)) <= set(expected)
    kept = softmax(logits.astype(np.float64))[expected].sum()
    np.testing.assert_allclose(got[expected], softmax(logits.astype(np.float64))[expected] / kept, atol=1e-9)


@given(LOGITS, st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_reach_p(logits: NDArray[np.float32], p: float) -> None:
    whole = softmax(logits.astype(np.float64))
    kept = np.flatnonzero(Sampling(1.0, top_p=p).distribution(logits))
    assert whole[kept].sum() >= p - 1e-9
    assert len(kept) == 1 or whole[kept].sum() - whole[kept].min() < p + 1e-9
    assert whole[kept].min() >= np.delete(whole, kept).max(initial=0)


@given(LOGITS, st.floats(0.01, 1))
def test_min_p_drops_what_is_unlikely_beside_the_likeliest(logits: NDArray[np.float32], p: float) -> None:
    whole = softmax(logits.astype(np.float64))
    np.testing.assert_array_equal(Sampling(1.0, min_p=p).distribution(logits) > 0, whole >= p * whole.max())


@given(LOGITS)
def test_greedy_takes_the_lowest_id_among_the_likeliest(logits: NDArray[np.float32]) -> None:
    chosen = Sampling().choose(logits, np.random.default_rng(0))
    assert chosen == int(np.flatnonzero(logits == logits.max())[0])


def test_penalties_follow_their_formulas() -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.5], np.float32)
    both = Sampling(1.0, repetition_penalty=2.0, presence_penalty=0.25)
    expected = plain_softmax(np.array([1.0, -4.25, 1.0, 0.5]))  # 0 in the prompt, 1 generated
    np.testing.assert_allclose(both.distribution(logits, prompt=[0], generated=[1, 1]), expected)
    assert Sampling(0.0, presence_penalty=1.5).choose(logits, np.random.default_rng(0), generated=[0]) == 2


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.8), Sampling(1.0, min_p=0.1), Sampling(2.0, top_k=6, top_p=0.9)],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    logits = np.random.default_rng(3).normal(size=10).astype(np.float32)
    expected = sampling.distribution(logits)
    draw = np.random.default_rng(4)
    n = 5_000
    counts = np.bincount([sampling.choose(logits, draw) for _ in range(n)], minlength=10)
    assert not counts[expected == 0].any()
    deviation = np.abs(counts / n - expected)
    assert (deviation <= 4.5 * np.sqrt(expected * (1 - expected) / n) + 1e-12).all()


@given(LOGITS, st.integers(0, 2**32))
def test_a_drawn_token_is_always_possible(logits: NDArray[np.float32], seed: int) -> None:
    sampling = Sampling(1.0, top_k=3, top_p=0.9)
    assert sampling.distribution(logits)[sampling.choose(logits, np.random.default_rng(seed))] > 0


class AlmostOne(np.random.Generator):
    """A generator whose next number is the largest below 1."""

    def random(self, *args: object, **kwargs: object) -> float:  # type: ignore[override]  # only this form is used
        return 1 - 2**-53


def test_the_largest_random_number_still_draws_a_possible_token() -> None:
    logits = np.array([0.0, 0.0, -np.inf, -np.inf], np.float32)
    assert Sampling(1.0).choose(logits, AlmostOne(np.random.PCG64(0))) == 1


@given(LOGITS)
def test_logprob_is_the_log_softmax(logits: NDArray[np.float32]) -> None:
    expected = np.log(plain_softmax(logits.astype(np.float64)))
    np.testing.assert_allclose([logprob(logits, i) for i in range(len(logits))], expected, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)])
def test_logits_that_are_no_numbers_are_refused(sampling: Sampling, bad: float) -> None:
    with pytest.raises(MoecError, match="NaN or infinite"):
        sampling.choose(np.array([0.0, bad, 1.0], np.float32), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0: expected 0 to 100"),
        ({"temperature": float("nan")}, "temperature nan: expected 0 to 100"),
        ({"top_k": -1}, "top_k -1: expected 0"),
        ({"top_p": 1.5}, "top_p 1.5: expected 0 to 1"),
        ({"min_p": -0.1}, "min_p -0.1: expected 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0: expected 0.01 to 100"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(MoecError, match=message):
        Sampling(**options)  # type: ignore[arg-type]  # top_k comes as a number


def test_the_likeliest_of_rows_of_logits() -> None:
    logits = np.array([[0, 3, 3, 1], [2, -np.inf, 0, 1]], np.float32)
    best = Best.of(logits)
    assert best.ids.tolist() == [1, 0]
    np.testing.assert_allclose(best.logprobs, [logprob(logits[0], 1), logprob(logits[1], 0)])
    whole = np.log(np.exp(logits).sum(-1))
    same = Best.found(np.stack([best.ids.astype(np.float32), logits.max(-1), whole], -1))
    assert same.ids.tolist() == [1, 0]
    np.testing.assert_allclose(same.logprobs, best.logprobs, atol=1e-6)
    assert Best.of(logits[:0]).ids.size == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_likeliest_of_what_is_no_number_is_refused(bad: float) -> None:
    for rows, find in ((np.array([[0, bad]]), Best.of), (np.array([[1, bad, 0]]), Best.found)):
        with pytest.raises(MoecError, match="NaN or infinite"):
            find(rows.astype(np.float32))
