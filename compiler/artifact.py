"""Writing an artifact: weight files whose layout is known before a weight is read, finished shard by shard, and the manifest.

Work happens in `OUT.part`, which becomes OUT by one rename when everything is on disk. A killed run leaves finished shards behind; the
next run of the same work (the same fingerprint) keeps them.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.backends.base import Backend, Location, StoredArray
from moec.compiler.errors import MoecError
from moec.compiler.ir import Param
from moec.compiler.roles import layer_of
from moec.runtime.manifest import MANIFEST, MANIFEST_DIGEST, manifest_digest
from moec.runtime.weight_file import describe

ALIGN = 64
"""Byte alignment of every array in a file, so that mapped memory suits vector loads."""

_SAFETENSORS = {
    "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "float16": "F16", "float32": "F32", "float64": "F64", "uint64": "U64", "int64": "I64", "bool": "BOOL",
}  # fmt: skip

_PROGRESS = "progress.json"


@dataclass(frozen=True)
class Shard:
    """One weight file: its path in the artifact, its header, and where each (parameter, component) lies."""

    path: str
    header: bytes
    nbytes: int
    arrays: Mapping[tuple[str, str], tuple[StoredArray, Location]]

    @property
    def params(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.arrays))


def plan_shards(backend: Backend) -> list[Shard]:
    """The weight files of a lowered graph, one a layer, with every offset."""
    layers: dict[int, dict[tuple[str, str], StoredArray]] = {}
    for param in backend.graph.params.values():
        layer = layer_of(param.name)
        arrays = {(param.name, component): array for component, array in backend.storage(param).items()}
        layers.setdefault(-1 if layer is None else layer, {}).update(arrays)
    return [
        _plan_shard(f"weights/{'shared' if layer < 0 else f'{layer:05d}'}.safetensors", arrays) for layer, arrays in sorted(layers.items())
    ]


def _plan_shard(path: str, arrays: Mapping[tuple[str, str], StoredArray]) -> Shard:
    entries: dict[str, Any] = {}
    offset, offsets, pads = 0, {}, 0
    for (name, component), array in arrays.items():
        offsets[name, component] = offset
        end = offset + array.nbytes
        entries[f"{name}:{component}"] = {
            "dtype": _SAFETENSORS[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = -(-end // ALIGN) * ALIGN
        if offset > end:  # safetensors files have no holes
            entries[f"_pad.{pads}"] = {"dtype": "U8", "shape": [offset - end], "data_offsets": [end, offset]}
            pads += 1
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    header = len(text).to_bytes(8, "little") + text
    located = {key: (array, Location(path, len(header) + offsets[key], array.nbytes)) for key, array in arrays.items()}
    return Shard(path, header, len(header) + offset, located)


@contextmanager
def io_errors(path: Path) -> Iterator[None]:
    """Turn a failed write into one clear error."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MoecError(f"disk full while writing {path}: free some space and run the same command again") from error
        raise MoecError(f"cannot write {path}: {error.strerror or error}") from error


class ArtifactWriter:
    """An artifact in the making.

    Args:
        out: the artifact's folder in the end.
        fingerprint: what determines the weight files' contents; finished files of an interrupted run with the same fingerprint are kept.
        resume: False starts anew.
    """

    def __init__(self, out: Path, fingerprint: str, resume: bool = True) -> None:
        self.out, self.fingerprint = out, fingerprint
        self.folder = out.with_name(out.name + ".part")
        if out.exists() and not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
            raise MoecError(f"{out} exists and is not an artifact: choose another output, moec will not replace it")
        self.finished: dict[str, dict[str, Any]] = {}
        with io_errors(self.folder):
            if resume and (files := self._earlier_files()) is not None:
                self.finished = {p: d for p, d in files.items() if self._intact(self.folder / p, d)}
            else:
                shutil.rmtree(self.folder, ignore_errors=True)
            (self.folder / "weights").mkdir(parents=True, exist_ok=True)
            for stale in self.folder.rglob("*.tmp"):
                stale.unlink()
            self._record()

    def _earlier_files(self) -> dict[str, Any] | None:
        """Weight files that an earlier run of the same work finished; a run that was cut off at the very end left its manifest."""
        for name in (_PROGRESS, MANIFEST):
            try:
                record = json.loads((self.folder / name).read_text())
                if record["fingerprint"] == self.fingerprint:
                    return {p: d for p, d in record["files"].items() if p.startswith("weights/")}
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return None

    @staticmethod
    def _intact(path: Path, digest: Mapping[str, Any]) -> bool:
        # The size is enough: a file gets its name only after its bytes are on disk.
        return path.is_file() and path.stat().st_size == digest["size"]

    def _record(self) -> None:
        self.write_text(_PROGRESS, json.dumps({"fingerprint": self.fingerprint, "files": self.finished}))

    def write_text(self, name: str, text: str) -> None:
        """Write a small file, whole or not at all."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file, whole or not at all."""
        path = self.folder / name
        with io_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".tmp")
            with part.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(path)

    def write_shard(self, shard: Shard, arrays: Callable[[str], Iterator[tuple[int | None, Mapping[str, np.ndarray]]]]) -> None:
        """Write one weight file, unless an earlier run finished it.

        Args:
            arrays: gives a parameter's arrays by component, whole (None) or expert by expert (its index).
        """
        if shard.path in self.finished:
            return
        path = self.folder / shard.path
        part = path.with_name(path.name + ".tmp")
        with io_errors(path), part.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, shard.nbytes)  # a full disk shows now, not after hours
            os.pwrite(stream.fileno(), shard.header, 0)
            for name in shard.params:
                for expert, values in arrays(name):
                    for component, value in values.items():
                        self._put(stream.fileno(), shard, name, component, expert, value)
            os.fsync(stream.fileno())
        with io_errors(path):
            part.replace(path)
        self.finished[shard.path] = describe(path)
        self._record()

    @staticmethod
    def _put(fd: int, shard: Shard, name: str, component: str, expert: int | None, value: np.ndarray) -> None:
        stored, location = shard.arrays[name, component]
        shape = stored.shape if expert is None else stored.shape[1:]
        if value.shape != shape or value.dtype != np.dtype(stored.dtype):
            raise AssertionError(f"{name}:{component} is {value.dtype}{value.shape}, planned {stored.dtype}{shape}")
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
        place = 0 if expert is None else stored.place(expert)
        assert place is not None
        at = location.offset + place * data.nbytes
        while data.nbytes:
            written = os.pwrite(fd, data[: 1 << 30], at)
            data, at = data[written:], at + written

    def commit(self, manifest: dict[str, Any]) -> None:
        """State every file in the manifest, write it, and give the artifact its name, replacing an older artifact."""
        files = {}
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            name = path.relative_to(self.folder).as_posix()
            if name not in (_PROGRESS, MANIFEST, MANIFEST_DIGEST):
                files[name] = self.finished.get(name) or describe(path)
        content = (json.dumps({**manifest, "fingerprint": self.fingerprint, "files": files}, indent=1) + "\n").encode()
        self.write_bytes(MANIFEST, content)
        self.write_bytes(MANIFEST_DIGEST, manifest_digest(content))
        with io_errors(self.out):
            (self.folder / _PROGRESS).unlink()
            if self.out.exists():
                _exchange(self.folder, self.out)
                shutil.rmtree(self.folder)
            else:
                self.folder.rename(self.out)
            _sync_folder(self.out.parent)


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders in one step, so that there is no moment without an artifact (Linux; elsewhere two renames)."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, exchange = -100, 2
    swapped = hasattr(libc, "renameat2") and libc.renameat2(at_cwd, bytes(a), at_cwd, bytes(b), exchange) == 0
    if not swapped:
        aside = b.with_name(b.name + ".old")
        b.rename(aside)
        a.rename(b)
        aside.rename(a)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def weight_table(shards: list[Shard], params: Mapping[str, Param]) -> dict[str, Any]:
    """The manifest's `weights` section."""
    table: dict[str, Any] = {}
    for shard in shards:
        for (name, component), (array, location) in shard.arrays.items():
            param = params[name]
            entry = table.setdefault(name, {"format": param.format, "shape": list(param.type.shape), "arrays": {}})
            entry["arrays"][component] = {
                "file": location.file, "offset": location.offset, "nbytes": location.nbytes,
                "dtype": array.dtype, "shape": list(array.shape),
            }  # fmt: skip
    return table
