"""Generation: several sequences in one batch, each leaving when it ends while the next one takes its place."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moec.runtime.sampler import Sampling, logprob
from moec.runtime.shared_executor import SharedExecutor
from moec.runtime.text import Detokenizer, StopStrings


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    Args:
        id: its number in the vocabulary.
        text: the text that became certain with it; a character or stop string in the making is held back, so it may be empty.
        logprob: the logarithm of its probability under the model (before temperature and the rest).
        index: which prompt it belongs to, counted from 0.
        finish_reason: None, or why this is the sequence's last token: `eos`, `stop` (a stop string), `length`.
    """

    id: int
    text: str
    logprob: float
    index: int
    finish_reason: str | None = None


@dataclass
class Request:
    """A prompt and what has come of it so far."""

    index: int
    prompt: Sequence[int]
    generator: np.random.Generator
    detokenizer: Detokenizer
    stops: StopStrings
    handle: int = -1
    generated: list[int] = field(default_factory=list)


def generate(
    executor: SharedExecutor,
    requests: Sequence[Request],
    sampling: Sampling,
    max_new_tokens: int,
    eos: frozenset[int],
) -> Iterator[Token]:
    """Generate for every request, as many at a time as the executor has room for: one forward of the model a step, for all of them.

    Args:
        executor: the model; sequences are taken from it, and given back at the end or when the iterator is closed.
        requests: what to generate for.
        sampling: how tokens are chosen.
        max_new_tokens: the most tokens of each.
        eos: tokens that end a sequence.
    """
    waiting = deque(requests)
    active: list[Request] = []
    try:
        while waiting or active:
            while waiting and (executor.free or not active):
                request = waiting.popleft()
                request.handle = executor.add()
                active.append(request)
            chosen = _choose(executor, active, sampling)
            going: list[Request] = []
            ended: list[Request] = []
            tokens: list[Token] = []
            for request, choice in zip(active, chosen, strict=True):
                token = _advance(request, *choice, executor, max_new_tokens, eos)
                tokens.append(token)
                (going if token.finish_reason is None else ended).append(request)
            for request in ended:
                active.remove(request)
                executor.remove(request.handle)
            yield from tokens
            active = going
    finally:
        for request in active:
            executor.remove(request.handle)


def _next_input(request: Request) -> NDArray[np.int64]:
    return np.asarray(request.generated[-1:] or request.prompt, np.int64)


def _choose(executor: SharedExecutor, active: Sequence[Request], sampling: Sampling) -> list[tuple[int, float]]:
    """The next token of each request, and the logarithm of its probability under the model."""
    steps = [(request.handle, _next_input(request)) for request in active]
    if sampling.greedy:
        best = executor.best(steps)
        return list(zip(best.ids.tolist(), best.logprobs.tolist(), strict=True))
    found = []
    for request, logits in zip(active, executor.forward(steps), strict=True):
        token = sampling.choose(logits, request.generator, request.prompt, request.generated)
        found.append((token, logprob(logits, token)))
    return found


def _advance(
    request: Request, chosen: int, probability: float, executor: SharedExecutor, max_new_tokens: int, eos: frozenset[int]
) -> Token:  # fmt: skip
    """Take a request's next token, and see whether that was the last."""
    request.generated.append(chosen)
    text = "" if chosen in eos else request.stops.push(request.detokenizer.push(chosen))
    reason = None
    if request.stops.found:
        reason = "stop"
    elif chosen in eos:
        reason = "eos"
    elif len(request.generated) >= max_new_tokens or executor.length(request.handle) >= executor.context_length:
        reason = "length"
    if reason is not None and reason != "stop":
        text += request.stops.push(request.detokenizer.flush())
        if request.stops.found:
            reason = "stop"
        text += request.stops.flush()
    return Token(chosen, text, probability, request.index, reason)
