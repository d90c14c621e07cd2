"""Other inference engines, measured as `moec bench` measures ours: one file a peer, one function `measure` in it.

    measure(model, prompt_tokens, new_tokens, threads, repetitions) -> list[Speed]

`model` is a checkpoint folder. All peers feed random token ids, batch 1, without tokenisation or sampling, decode after
the prompt, and drop one warm-up run.
"""

from dataclasses import dataclass


class PeerUnavailableError(Exception):
    """This peer cannot run here, or not this model; the message says why and what to do."""


@dataclass(frozen=True)
class Speed:
    """One repetition."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
