"""Perplexity on a text, and the distance to a reference model: for checkpoints through the interpreter, for artifacts through the runtime.

The text is tokenised as one stream and cut into non-overlapping windows of N tokens. Each window is fed on its own, and every next
token is scored, the token after the window included; an incomplete tail is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.compiler.device import on_device
from moec.compiler.errors import MoecError
from moec.compiler.frontend import huggingface
from moec.compiler.frontend.tokenizer import load_tokenizer
from moec.compiler.interpreter import Interpreter
from moec.compiler.progress import Progress

_LOGIT_BYTES = 1 << 27
"""Logits held at once: windows are evaluated in groups of about this size."""

Logits = Callable[[Tensor], Iterator[Tensor]]
"""From windows of ids [W, N] to the logits [N, V] of each in turn."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured, in nats.

    `kl_divergence` is the mean over tokens of KL(reference || model); `top1_agreement` the share of tokens where both have the same best.
    """

    tokens: int
    nll: float
    perplexity: float
    context: int
    kl_divergence: float | None = None
    top1_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if v is not None}


def windows(ids: np.ndarray, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and next tokens [W, context] of a token stream.

    >>> windows(np.arange(6), 2)[1].tolist()
    [[1, 2], [3, 4]]
    """
    count = (len(ids) - 1) // context
    if count < 1:
        raise MoecError(f"the text has {len(ids)} tokens: one window of {context} needs {context + 1}; lower --context or give more text")
    stream = torch.from_numpy(np.asarray(ids[: count * context + 1], dtype=np.int64))
    return stream[:-1].view(count, context), stream[1:].view(count, context)


def read_windows(data: str | Path, tokenizer: Any, context: int, max_tokens: int | None) -> tuple[Tensor, Tensor]:
    """Inputs and next tokens [W, context] of a text file, about `max_tokens` of them from its beginning.

    Raises:
        MoecError: the file cannot be read or is too short.
    """
    try:
        text = Path(data).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MoecError(f"cannot read the text {data}: {error}") from error
    inputs, targets = windows(np.asarray(tokenizer.encode(text, add_special_tokens=False).ids), context)
    count = len(inputs) if max_tokens is None else max(1, max_tokens // context)
    return inputs[:count], targets[:count]


def window_length(context: int | None, limit: int) -> int:
    """Tokens of a window: 512 unless given, or the model's context where that is shorter.

    Raises:
        MoecError: the model's context is shorter than what is asked for.
    """
    context = context or min(512, limit)
    if not 0 < context <= limit:
        raise MoecError(f"--context {context}: the model's context is {limit} tokens")
    return context


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    reference: str | Path | None = None,
    context: int | None = None,
    max_tokens: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate an artifact or a checkpoint on a text file.

    Args:
        model: an artifact or a checkpoint.
        data: a text file in UTF-8.
        reference: a checkpoint (or artifact) to measure the distance to.
        context: tokens of a window; by default 512, or the model's context where that is shorter.
        max_tokens: stop after about this many tokens.
        threads: threads of the runtime.
        device: what checkpoints are interpreted on, as in `compile_model`; artifacts run on what they were compiled for.

    Raises:
        MoecError: no such model or file, or the text is too short.
    """
    place = on_device(device)
    subject, tokenizer, limit = _open(model, threads)
    other = _open(reference, threads)[0] if reference is not None else None
    context = window_length(context, limit)
    inputs, targets = read_windows(data, tokenizer, context, max_tokens)
    group = max(1, _LOGIT_BYTES // (context * int(tokenizer.get_vocab_size()) * 4))

    def scored() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        for start in range(0, len(inputs), group):
            part = inputs[start : start + group]
            references = other(part) if other else repeat(None)
            yield from zip(targets[start : start + group], subject(part), references, strict=False)

    nll = kl = agree = 0.0
    rows = scored()
    with place:
        for _ in (progress or Progress()).track(range(len(inputs)), "evaluate"):
            wanted, logits, truth = next(rows)
            logp = logits.double().log_softmax(-1)
            nll -= logp.gather(1, wanted[:, None].to(logp.device)).sum().item()
            if truth is not None:
                expected = truth.to(logp.device).double().log_softmax(-1)  # one of the two may be an artifact's
                kl += (expected.exp() * (expected - logp)).sum().item()
                agree += (expected.argmax(-1) == logp.argmax(-1)).sum().item()
    tokens = targets.numel()
    distance = (kl / tokens, agree / tokens) if other else (None, None)
    return Evaluation(tokens, nll / tokens, math.exp(nll / tokens), context, *distance)


def _open(model: str | Path, threads: int | None) -> tuple[Logits, Any, int]:
    """What gives a model's logits, its tokenizer, and its context length."""
    if (Path(model) / "manifest.json").is_file():
        from moec import runtime

        session = runtime.load(model, threads=threads)

        def of_artifact(ids: Tensor) -> Iterator[Tensor]:
            for window in ids:
                handle = session.executor.add()
                try:
                    yield torch.from_numpy(session.executor.forward([(handle, window.numpy())], all_logits=True))
                finally:
                    session.executor.remove(handle)

        return of_artifact, session.tokenizer, session.executor.context_length
    graph, weights = huggingface.load(model)

    def of_checkpoint(ids: Tensor) -> Iterator[Tensor]:
        results: list[Tensor] = []
        positions = torch.arange(ids.shape[1]).expand(1, -1)
        batches = [{"ids": window[None], "positions": positions} for window in ids]
        Interpreter(graph, weights).run(batches, lambda _, outputs: results.append(outputs[0][0]))
        return iter(results)

    return of_checkpoint, load_tokenizer(model), int(graph.meta["context_length"])
