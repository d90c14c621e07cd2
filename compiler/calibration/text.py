"""Calibration text as windows of tokens, each with the domain (the file) that it comes from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.model import Model

Files = str | Path | Sequence[str | Path]
"""One file or folder, or several."""

HELDOUT_EVERY = 8
"""One window in so many is not calibrated on: damage is measured there."""

SAMPLE_WINDOW = 128
"""Tokens of a window of a small sample."""


@dataclass(frozen=True)
class Text:
    """Windows of tokens.

    Args:
        ids: [W, T] int64.
        domain: the index in `domains` of each window.
        domains: the names of the files.
        heldout: windows [H, T + 1] that statistics do not see, with the token after each.
        tokenizer: what made them (of the `tokenizers` library), for passes that read other text.
    """

    ids: Tensor
    domain: tuple[int, ...]
    domains: tuple[str, ...]
    heldout: Tensor
    tokenizer: Any = field(default=None, repr=False, compare=False)

    @property
    def tokens(self) -> int:
        """Tokens that are calibrated on."""
        return self.ids.numel()

    def fingerprint(self) -> str:
        """A digest of the windows."""
        digest = hashlib.sha256(self.ids.numpy().tobytes())
        digest.update(self.heldout.numpy().tobytes())
        return digest.hexdigest()

    def first(self, windows: int) -> Text:
        """The text with so many windows at most, taken evenly from all of it."""
        if windows >= len(self.ids):
            return self
        at = torch.linspace(0, len(self.ids) - 1, windows, device="cpu").round().long()
        return replace(self, ids=self.ids[at], domain=tuple(self.domain[i] for i in at.tolist()))

    def sample(self, tokens: int, window: int = SAMPLE_WINDOW) -> Text:
        """About so many tokens, in the first `window` of each of evenly chosen windows: little text of all domains."""
        length = min(window, self.ids.shape[1])
        part = self.first(max(1, tokens // length))
        return replace(part, ids=part.ids[:, :length])


def read_text(files: Sequence[str | Path], tokenizer: Any, *, context: int = 512, tokens: int = 1 << 16, seed: int = 0) -> Text:
    """Windows of text files, the same number of each where they have them, chosen at random places.

    Args:
        files: text files in UTF-8; of a folder, its *.txt files.
        tokenizer: of the `tokenizers` library.
        context: tokens of a window.
        tokens: about how many tokens to calibrate on.
        seed: of the choice.

    Raises:
        MoecError: a file cannot be read, or is shorter than one window.
    """
    paths = [p for f in map(Path, files) for p in (sorted(f.glob("*.txt")) if f.is_dir() else [f])]
    if not paths:
        raise MoecError(f"--calibration {', '.join(map(str, files))}: no *.txt file there; give text files or a folder of them")
    generator = np.random.default_rng(seed)
    share = max(2, -(-tokens * HELDOUT_EVERY // (HELDOUT_EVERY - 1) // context // len(paths)))
    fit, heldout, domain = list[np.ndarray](), list[np.ndarray](), list[int]()
    for index, path in enumerate(paths):
        windows = _windows(path, tokenizer, context)
        chosen = np.sort(generator.permutation(len(windows))[:share])
        for place, window in enumerate(windows[chosen]):
            if place % HELDOUT_EVERY == HELDOUT_EVERY // 2 or (len(chosen) < HELDOUT_EVERY and 0 < place == len(chosen) - 1):
                heldout.append(window)
            else:
                fit.append(window[:-1])
                domain.append(index)
    if not heldout:
        raise MoecError(
            f"--calibration {', '.join(map(str, files))}: only one window of {context} tokens; damage is measured on a second one: "
            "give more text or a smaller --context"
        )
    ids, held = (torch.from_numpy(np.stack(rows)) for rows in (fit, heldout))
    return Text(ids, tuple(domain), tuple(p.stem for p in paths), held, tokenizer)


def calibration_text(files: Files, checkpoint: Path | None, model: Model, tokens: int, seed: int) -> Text:
    """The calibration text of a model: windows of 512 tokens, or of the model's context where that is shorter.

    Raises:
        MoecError: the model has no tokenizer, or see `read_text`.
    """
    from moec.compiler.frontend.tokenizer import load_tokenizer

    if checkpoint is None:
        raise MoecError("--calibration needs a checkpoint folder, whose tokenizer reads the text; the model in memory has none")
    names = [files] if isinstance(files, (str, Path)) else list(files)
    context = min(512, int(model.graph.meta["context_length"]))
    return read_text(names, load_tokenizer(checkpoint), context=context, tokens=tokens, seed=seed)


def _windows(path: Path, tokenizer: Any, context: int) -> np.ndarray:
    """[W, context + 1]: the windows of a file, which overlap by the one token that is predicted."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MoecError(f"cannot read the calibration text {path}: {error}") from error
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
    count = (len(ids) - 1) // context
    if count < 1:
        raise MoecError(
            f"the calibration text {path} has {len(ids)} tokens, fewer than one window of {context + 1}: "
            "give more text or a smaller --context"
        )
    return np.stack([ids[i * context : (i + 1) * context + 1] for i in range(count)])
