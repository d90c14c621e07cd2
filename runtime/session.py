"""A session: a loaded artifact that generates text.

with moec.runtime.load("olmoe.moec") as session:
    for token in session.generate("The capital of France is", max_new_tokens=16):
        print(token.text, end="", flush=True)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from moec.runtime import chat
from moec.runtime.artifact import ATTEMPTS, Artifact, open_artifact
from moec.runtime.counters import ExpertCount
from moec.runtime.errors import MoecError
from moec.runtime.executor import Executor
from moec.runtime.executors import load_executor
from moec.runtime.generate import Request, Token, generate
from moec.runtime.sampler import Sampling
from moec.runtime.shared_executor import SharedExecutor
from moec.runtime.text import Detokenizer, StopStrings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"

Prompt = str | Sequence[int]
"""A text, or the tokens of one."""


def load(path: str | os.PathLike[str], threads: int | None = None, max_sequences: int = 8, verify: bool = False) -> Session:
    """Load an artifact to run it.

    Args:
        path: the artifact's folder.
        threads: threads to compute with; all cores unless given.
        max_sequences: sequences that can be open at once.
        verify: check every byte of the weights first (a default load checks everything but weight payloads).

    Raises:
        MoecError: it is no artifact, it is damaged, it needs another version, or this machine cannot run it.
    """
    for name, value in (("threads", threads), ("max_sequences", max_sequences)):
        if value is not None and value < 1:
            raise MoecError(f"{name} {value}: expected at least 1")
    for _ in range(ATTEMPTS):
        artifact = open_artifact(path, verify)
        try:
            executor = load_executor(artifact, threads, max_sequences)
        except BaseException as error:
            replaced = not artifact.current
            artifact.close()
            if not (replaced and isinstance(error, MoecError)):
                raise
            continue
        if artifact.current:
            return Session(artifact, executor, max_sequences)
        artifact.close()  # the code may be that of the artifact which took its place
    raise MoecError(f"{path}: was replaced {ATTEMPTS} times while it was being loaded; wait until whoever writes it is done")


class OpenSequence:
    """One sequence for people with their own loop: what it was fed is remembered in its cache."""

    def __init__(self, session: Session, handle: int) -> None:
        self._session, self._handle = session, handle

    def __len__(self) -> int:
        return self._session.executor.length(self._handle)

    def prefill(self, ids: Sequence[int], all_logits: bool = False) -> NDArray[np.float32]:
        """Append tokens; the logits after the last of them [V], or after each [T, V].

        Raises:
            MoecError: there are none, one is not in the vocabulary, or the context is full.
        """
        tokens = self._session.check_ids(ids, room=self._session.executor.context_length - len(self))
        logits = self._session.executor.forward([(self._handle, tokens)], all_logits=all_logits)
        return logits if all_logits else logits[0]

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token; the logits after it [V]."""
        return self.prefill([token])

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= len(self):
            raise MoecError(f"truncate to {length}: the sequence has {len(self)} tokens")
        self._session.executor.truncate(self._handle, length)


class Session:
    """A model that is ready to run. Several threads may use one session; each forward of the model runs alone.

    Attributes:
        artifact: what was loaded.
        executor: what computes.
        max_sequences: sequences that can be open at once.
    """

    def __init__(self, artifact: Artifact, executor: Executor, max_sequences: int = 8) -> None:
        self.artifact = artifact
        self.executor = SharedExecutor(executor, max_sequences)
        self.max_sequences = max_sequences
        self._tokenizer: Tokenizer | None = None
        self._special: frozenset[int] = frozenset()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            MoecError: the artifact has none.
        """
        if self._tokenizer is None:
            if TOKENIZER not in self.artifact.manifest.files:
                raise MoecError(f"{self.artifact.folder}: no {TOKENIZER} in this artifact: give token ids instead of text")
            from tokenizers import Tokenizer  # costs 30 ms, and those who feed ids do not need it

            try:
                self._tokenizer = Tokenizer.from_buffer(self.artifact.read(TOKENIZER))
            except Exception as error:  # the library has no error class of its own
                raise MoecError(f"{self.artifact.folder}: {TOKENIZER} is not understood: {error}; compile the artifact again") from error
            added = self._tokenizer.get_added_tokens_decoder()
            self._special = frozenset(token for token, entry in added.items() if entry.special)
        return self._tokenizer

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text, with those that the model expects around it unless `special` is false."""
        return list(self.tokenizer.encode(text, add_special_tokens=special).ids)

    def chat_ids(self, messages: Sequence[chat.Message]) -> list[int]:
        """The tokens of a conversation in the model's chat template, up to where the assistant speaks."""
        return self.encode(chat.render(self.artifact, messages), special=False)

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Iterator[Token]:
        """Go on from a prompt, or from several at once; `Token.index` tells which. Closing the iterator frees its memory.

        Args:
            prompt: a text or tokens, or a list of those.
            max_new_tokens: the most tokens for each; a sequence also ends where the model's context does.
            temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty: see `moec.runtime.sampler.Sampling`.
            seed: makes sampling reproducible; prompt i draws from its own stream (seed, i).
            stop: texts that end a sequence; they are not part of the output.
            ignore_eos: go on after an end-of-text token.

        Raises:
            MoecError: a prompt is empty or longer than the context, a token is not in the vocabulary, an option is out of range.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty)
        stops = [stop] if isinstance(stop, str) else list(stop)
        if max_new_tokens < 1:
            raise MoecError(f"max_new_tokens {max_new_tokens}: expected at least 1")
        if seed is not None and seed < 0:
            raise MoecError(f"seed {seed}: expected 0 or more")
        ids = [self._prompt_ids(each, index) for index, each in enumerate(_prompts(prompt))]
        entropy = np.random.SeedSequence().entropy if seed is None else seed
        decoder = self.tokenizer if TOKENIZER in self.artifact.manifest.files else _NoText()
        requests = [
            Request(
                index,
                tokens,
                np.random.default_rng([entropy, index] if isinstance(entropy, int) else None),
                Detokenizer(decoder, self._special, tokens),
                StopStrings(stops),
            )
            for index, tokens in enumerate(ids)
        ]
        eos = frozenset() if ignore_eos else frozenset(self.artifact.manifest.eos_token_ids)
        return generate(self.executor, requests, sampling, max_new_tokens, eos)

    def chat(self, messages: Sequence[chat.Message], **options: Any) -> Iterator[Token]:
        """Answer a conversation; options as in `generate`.

        Raises:
            MoecError: the model has no chat template, or it refuses the messages.
        """
        return self.generate(self.chat_ids(messages), **options)

    @contextmanager
    def sequence(self) -> Iterator[OpenSequence]:
        """A sequence for one's own loop; its memory is given back at the end of the `with`."""
        handle = self.executor.add()
        try:
            yield OpenSequence(self, handle)
        finally:
            self.executor.remove(handle)

    def expert_counts(self, reset: bool = False) -> list[ExpertCount] | None:
        """How many experts ran in each layer since loading or the last reset, all sequences and threads together.

        A GPU may have run steps behind the end of a sequence (see `moec.runtime.generate`), which count.

        Args:
            reset: start again from zero.

        Returns:
            The counts of the layers with experts, in order; None for a model without, or with the ONNX backend, which does not count.
        """
        return self.executor.counts(reset)

    def check_ids(self, ids: Sequence[int], room: int, what: str = "prompt") -> NDArray[np.int64]:
        """Token ids as an array.

        Raises:
            MoecError: there are none, more than `room`, or one is not in the vocabulary.
        """
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or tokens.size == 0 or tokens.dtype.kind not in "iu":
            raise MoecError(f"{what}: expected at least one token id, got {'none' if tokens.size == 0 else f'{ids!r:.60}'}")
        if tokens.size > room:
            raise MoecError(
                f"{what}: {tokens.size} tokens, but there is room for {room} (the context is {self.executor.context_length}): shorten it"
            )
        bad = tokens[(tokens < 0) | (tokens >= self.executor.vocab_size)]
        if bad.size:
            raise MoecError(f"{what}: token id {bad[0]} is not in the vocabulary of {self.executor.vocab_size}")
        return tokens.astype(np.int64)

    def close(self) -> None:
        """Give everything back."""
        self.executor.close()
        self.artifact.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prompt_ids(self, prompt: Prompt, index: int) -> list[int]:
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        tokens: list[int] = self.check_ids(ids, self.executor.context_length, f"prompt {index}").tolist()
        return tokens


class _NoText:
    """Decodes every token to nothing: for artifacts without a tokenizer."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        del ids, skip_special_tokens
        return ""


def _prompts(prompt: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt or several -> several."""
    if isinstance(prompt, (str, np.ndarray)) or not len(prompt) or isinstance(prompt[0], (int, np.integer)):
        return [prompt]  # type: ignore[list-item]  # a list of integers is one prompt
    return prompt  # type: ignore[return-value]
