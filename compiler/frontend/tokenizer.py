"""A checkpoint's tokenizer: its files are copied into the artifact as they are."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from moec.compiler.errors import MoecError
from moec.compiler.frontend.huggingface import resolve

_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def tokenizer_files(model: str | Path) -> dict[str, bytes]:
    """The tokenizer's files in a checkpoint by name; those that are there."""
    folder = resolve(model)
    return {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Raises:
        MoecError: there is no tokenizer.json, or it is damaged.
    """
    path = resolve(model) / "tokenizer.json"
    if not path.is_file():
        raise MoecError(f"{path}: no such file; expected the checkpoint's tokenizer, without which text cannot be read")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise MoecError(f"{path}: not a tokenizer ({error}); download the checkpoint again") from error
