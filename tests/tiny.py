"""The small model that the repository holds, traced once a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from moec.compiler.frontend import huggingface
from moec.compiler.ir import Graph
from moec.compiler.model import Model
from moec.compiler.weights import WeightSource

ROOT = Path(__file__).resolve().parents[1]
MODEL, TEXT = ROOT / "examples/models/tiny-moe", ROOT / "examples/data/prose_en.txt"

_LOAD = huggingface.load


@cache
def load(path: Path = MODEL) -> tuple[Graph, WeightSource]:
    """The graph and weights of a checkpoint."""
    return _LOAD(path)


def model() -> Model:
    """The small model."""
    return Model(*load())


@contextmanager
def traced_once() -> Iterator[None]:
    """Whatever loads the small model gets what was traced before: tracing takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "load", lambda path: load() if Path(path).resolve() == MODEL else _LOAD(path))
        yield
