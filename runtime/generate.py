"""Generation: several sequences in one batch, each leaving when it ends while the next one takes its place."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moec.runtime.errors import MoecError
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
    ended: bool = False

    @property
    def held(self) -> int:
        """Tokens that its sequence holds when the last one that was generated is yet to be fed to it."""
        return len(self.prompt) + len(self.generated) - 1


def generate(
    executor: SharedExecutor,
    requests: Sequence[Request],
    sampling: Sampling,
    max_new_tokens: int,
    eos: frozenset[int],
) -> Iterator[Token]:
    """Generate for every request, as many at a time as the executor has room for: one forward of the model a step, for all of them.

    Where tokens are the likeliest ones and no request waits, the executor may run a portion of steps before it hands out their tokens. What
    comes out is the same; steps behind the end of a sequence are lost, though counters of experts have them.

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
            portion = list(active)
            for chosen in _choose(executor, portion, sampling, _steps(executor, portion, sampling, bool(waiting), max_new_tokens)):
                tokens: list[Token] = []
                for request, choice in zip(portion, chosen, strict=True):
                    if not request.ended:
                        tokens.append(_advance(request, *choice, executor.context_length, max_new_tokens, eos))
                for request in [request for request in active if request.ended]:
                    active.remove(request)
                    executor.remove(request.handle)
                yield from tokens
    finally:
        for request in active:
            executor.remove(request.handle)


def _next_input(request: Request) -> NDArray[np.int64]:
    return np.asarray(request.generated[-1:] or request.prompt, np.int64)


def _steps(executor: SharedExecutor, active: Sequence[Request], sampling: Sampling, waiting: bool, max_new_tokens: int) -> int:
    """How many steps to ask for at a time, one where somebody waits for a place; 0 where the executor cannot run ahead."""
    if executor.portion == 1 or not sampling.greedy or not all(request.generated for request in active):
        return 0
    if waiting:
        return 1
    left = (min(max_new_tokens - len(request.generated), executor.context_length - request.held) for request in active)
    return min(executor.portion, *left)


def _choose(executor: SharedExecutor, active: Sequence[Request], sampling: Sampling, count: int) -> list[list[tuple[int, float]]]:
    """The next token of each request, and the logarithm of its probability under the model, in each of `count` steps; of 0 in one."""
    steps = [(request.handle, _next_input(request)) for request in active]
    if count:
        with suppress(MoecError):  # a step failed, perhaps behind the end of a sequence: one at a time from here, as nothing has changed
            found = executor.ahead(steps, count)
            pairs = zip(found.ids.tolist(), found.logprobs.tolist(), strict=True)
            return [list(zip(ids, logprobs, strict=True)) for ids, logprobs in pairs]
    if sampling.greedy:
        best = executor.best(steps)
        return [list(zip(best.ids.tolist(), best.logprobs.tolist(), strict=True))]
    drawn = []
    for request, logits in zip(active, executor.forward(steps), strict=True):
        token = sampling.choose(logits, request.generator, request.prompt, request.generated)
        drawn.append((token, logprob(logits, token)))
    return [drawn]


def _advance(
    request: Request, chosen: int, probability: float, context_length: int, max_new_tokens: int, eos: frozenset[int]
) -> Token:  # fmt: skip
    """Take a request's next token, and see whether that was the last."""
    request.generated.append(chosen)
    text = "" if chosen in eos else request.stops.push(request.detokenizer.push(chosen))
    reason = None
    if request.stops.found:
        reason = "stop"
    elif chosen in eos:
        reason = "eos"
    elif len(request.generated) >= max_new_tokens or request.held >= context_length:
        reason = "length"
    if reason is not None and reason != "stop":
        text += request.stops.push(request.detokenizer.flush())
        if request.stops.found:
            reason = "stop"
        text += request.stops.flush()
    request.ended = reason is not None
    return Token(chosen, text, probability, request.index, reason)
