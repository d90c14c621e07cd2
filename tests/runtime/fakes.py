"""Stand-ins for tests of the runtime: a tiny Markov model as executor, and a writer of small artifacts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.runtime.artifact import open_artifact
from moec.runtime.counters import ExpertCounters
from moec.runtime.errors import MoecError
from moec.runtime.executor import Step, repeated
from moec.runtime.manifest import MANIFEST, MANIFEST_DIGEST, manifest_digest
from moec.runtime.sampler import Best
from moec.runtime.session import Session
from moec.runtime.weight_file import describe

VOCAB = 16
TINY_MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"


class MarkovExecutor:
    """A model whose logits depend on the last token alone, unless `scores` says otherwise."""

    def __init__(self, table: NDArray[np.float32], context_length: int = 64) -> None:
        self.table = table
        self.counters: ExpertCounters | None = None
        self.vocab_size = table.shape[1]
        self.context_length = context_length
        self.sequences: dict[int, list[int]] = {}
        self.batches: list[int] = []
        self.portion = 1
        self.portions: list[int] = []
        self._next = 0

    def add(self) -> int:
        self._next += 1
        self.sequences[self._next] = []
        return self._next

    def remove(self, sequence: int) -> None:
        del self.sequences[sequence]

    def length(self, sequence: int) -> int:
        return len(self.sequences[sequence])

    def truncate(self, sequence: int, length: int) -> None:
        del self.sequences[sequence][length:]

    def forward(self, steps: Sequence[Step], all_logits: bool = False) -> NDArray[np.float32]:
        self.batches.append(len(steps))
        for sequence, tokens in steps:
            if len(self.sequences[sequence]) + len(tokens) > self.context_length:
                raise MoecError("the sequence would grow past the context")
            self.sequences[sequence] += tokens.tolist()
        rows = [token for _, tokens in steps for token in (tokens if all_logits else tokens[-1:])]
        logits: NDArray[np.float32] = self.table[np.asarray(rows)]
        return logits

    def best(self, steps: Sequence[Step]) -> Best:
        return Best.of(self.forward(steps))

    def ahead(self, steps: Sequence[Step], count: int) -> Best:
        self.portions.append(count)
        return repeated(self, steps, count)


@lru_cache(maxsize=4)
def random_table(seed: int = 0, vocab: int = VOCAB) -> NDArray[np.float32]:
    """Logits [V, V] of a random Markov model."""
    table = np.random.default_rng(seed).standard_normal((vocab, vocab), np.float32) * 2
    table.flags.writeable = False
    return table


def chain_table(successors: Mapping[int, int], vocab: int) -> NDArray[np.float32]:
    """Logits of a model that follows each token with a certain one (token 0 where nothing is said)."""
    table = np.zeros((vocab, vocab), np.float32)
    for token in range(vocab):
        table[token, successors.get(token, 0)] = 10.0
    return table


def weight_file(arrays: Mapping[str, NDArray[np.generic]], align: int = 64) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """A safetensors file with aligned tensors, and where each lies: (offset, nbytes)."""
    codes = {"uint8": "U8", "float16": "F16", "float32": "F32", "uint16": "BF16"}
    header: dict[str, Any] = {}
    position, places = 0, {}
    for name, array in arrays.items():
        if gap := -position % align:
            header[f"_pad.{len(header)}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [position, position + gap]}
            position += gap
        end = position + array.nbytes
        header[name] = {"dtype": codes[array.dtype.name], "shape": list(array.shape), "data_offsets": [position, end]}
        places[name] = (position, array.nbytes)
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % align)
    payload = bytearray(position)
    for name, array in arrays.items():
        payload[places[name][0] : places[name][0] + array.nbytes] = array.tobytes()
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text + bytes(payload), {n: (start + o, b) for n, (o, b) in places.items()}


def weights() -> dict[str, NDArray[np.generic]]:
    """The arrays of the small artifact: an int4 weight [8, 128] and a float one [3]."""
    draw = np.random.default_rng(1)
    return {
        "layers.0.w:codes": draw.integers(0, 255, (8, 64), np.uint8),
        "layers.0.w:scale": draw.random((8, 2)).astype(np.float16),
        "norm:data": np.arange(3, dtype=np.float32),
    }


def write_artifact(folder: Path, files: Mapping[str, bytes] | None = None, **changes: Any) -> Path:
    """Write a small artifact; `changes` replace keys of its manifest."""
    (folder / "weights").mkdir(parents=True)
    arrays = weights()
    content, places = weight_file(arrays)
    (folder / "weights" / "shared.safetensors").write_bytes(content)
    for name, data in {"code/model.bin": b"code" * 100, **(files or {})}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    table: dict[str, Any] = {
        "layers.0.w": {"format": "int4_g64", "shape": [8, 128], "arrays": {}},
        "norm": {"format": "f32", "shape": [3], "arrays": {}},
    }
    for key, array in arrays.items():
        param, component = key.split(":")
        offset, nbytes = places[key]
        table[param]["arrays"][component] = {
            "file": "weights/shared.safetensors", "offset": offset, "nbytes": nbytes,
            "dtype": array.dtype.name, "shape": list(array.shape),
        }  # fmt: skip
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    manifest = {
        "format": "moec",
        "format_version": 1,
        "requires": [],
        "moec_version": "0.1.0",
        "model": {"name": "tiny", "model_type": "markov", "vocab_size": VOCAB, "context_length": 64, "eos_token_id": 0},
        "backend": "fake",
        "target": {"name": "cpu", "kind": "cpu"},
        "executor": {},
        "weights": table,
        "recipe": [],
        "quality": None,
        "sizes": {"bytes_per_token": 1000},
        "files": {name: describe(folder / name) for name in names},
        **changes,
    }
    write_manifest(folder, manifest)
    return folder


def write_manifest(folder: Path, manifest: Mapping[str, Any] | bytes) -> None:
    """Write a manifest and its digest."""
    content = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(content)
    (folder / MANIFEST_DIGEST).write_bytes(manifest_digest(content))


def fake_session(
    folder: Path, table: NDArray[np.float32], max_sequences: int = 4, context_length: int = 64, **changes: Any
) -> tuple[Session, MarkovExecutor]:
    """A session with the tiny model's tokenizer whose logits come from a table."""
    executor = MarkovExecutor(table, context_length)
    model = {
        "name": "tiny", "model_type": "markov", "vocab_size": executor.vocab_size, "context_length": context_length, "eos_token_id": 0,
    }  # fmt: skip
    files = {name: (TINY_MODEL / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    write_artifact(folder, {**files, **changes.pop("files", {})}, model=model, **changes)
    return Session(open_artifact(folder), executor, max_sequences), executor
