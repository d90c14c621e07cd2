"""The artifact: a folder `NAME.moec/` that holds a compiled model. This module is its reader; `moec.compiler` has the writer.

    NAME.moec/
      manifest.json          what this page describes
      manifest.json.sha256   one line, `<64 hex digits>  manifest.json`, as `sha256sum` writes it
      weights/*.safetensors  tokenizer.json  tokenizer_config.json  chat_template.jinja  and the code: lib.so, model.onnx, ...

manifest.json is an object with these keys (a key that is not listed is ignored, so that later versions can add some):

    "format": "moec", "format_version": 1      another version is refused
    "requires": ["NAME", ...]                  features that a reader must know, or refuse the artifact
    "moec_version": "0.1.0"                    who wrote it
    "model": {"name": str, "model_type": str, "vocab_size": int, "context_length": int,
              "eos_token_id": int | [int, ...] | null, ...}
    "backend": "tvm" | "onnx"                  the file of moec/runtime/executors that runs it
    "target": {"name": str, "kind": "cpu" | "cuda", ...}
    "executor": {...}                          for the executor alone
    "weights": {"PARAM": {"format": "int4_g64" | ["int4_g64", ... one an expert], "shape": [int, ...],
                          "arrays": {"COMPONENT": {"file": str, "offset": int, "nbytes": int, "dtype": str, "shape": [int, ...]}}}}
    "recipe": [...]                            what was done to the model
    "quality": {...} | null                    what that cost
    "sizes": {"weight_bytes": int, "original_weight_bytes": int, "bytes_per_token": int, "cache_bytes_per_token": int, ...}
    "files": {"FILE": {"size": int, "sha256": str,
                       "header_sha256": str, "blocks_crc32": str (the last two for weight files)}}

`shape` and `format` are those of the weight; an array's `shape` and `dtype` (numpy's name, little-endian) are those of its storage,
its `offset` counts from the start of the file. `bytes_per_token`: weight bytes that decoding one token reads. `eos_token_id` (one or
several) ends generation. `files` lists every file but the manifest and its digest; `moec.runtime.weight_file.describe` makes an entry.

Weight files are safetensors. Each array is one tensor, starts at a multiple of 64 bytes (tensors called `_pad.N` fill the gaps) and
is memory-mapped: nothing is copied. Two arrays never share bytes.

What loading checks: the manifest against its digest and, key by key, against this page; every file's size; the SHA-256 of every file
except weight files, before anything in it is used; of weight files the header. `verify` reads the weight payloads too: it finds any
changed byte, and files that do not belong. Digests protect against damage, not against somebody who rewrites both: an artifact
of the TVM backend contains native code, so run only artifacts that you trust.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moec.runtime import weight_file
from moec.runtime.errors import MoecError
from moec.runtime.files import Folder, digest
from moec.runtime.manifest import MANIFEST, ArrayEntry, Manifest, read_manifest
from moec.runtime.verify import check_all

ATTEMPTS = 20
"""How often an artifact is opened anew because another replaced it meanwhile."""


class Artifact:
    """An artifact that passed the checks of loading. Close it (or leave the `with`) to give its files back.

    Attributes:
        folder: where it lies.
        manifest: what it says about itself, parsed.
    """

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder = folder.path
        self.manifest = manifest
        self._open_folder = folder
        self._maps: dict[str, mmap.mmap] = {}
        try:
            for name in manifest.files:
                self._check(name)
        except BaseException:
            self._unmap()
            raise

    @cached_property
    def weights(self) -> Mapping[tuple[str, str], NDArray[np.generic]]:
        """The stored arrays by (param, component): read-only, memory-mapped, valid until `close`."""
        return _Weights(self.manifest, self._maps)

    @property
    def executor(self) -> Mapping[str, Any]:
        """The section of the manifest that the executor wrote for itself."""
        return self.manifest.executor

    def path(self, name: str) -> Path:
        """The path of a listed file whose digest was checked, for libraries that open files themselves.

        Raises:
            MoecError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise MoecError(f"{self.folder}: {MANIFEST} does not list a file {name!r}; compile the artifact again")
        return (self.folder / name).resolve()

    def read(self, name: str) -> bytes:
        """The content of a listed file that is no weight file, checked against its digest once more.

        Raises:
            MoecError: the manifest does not list it, or it changed since the artifact was opened.
        """
        self.path(name)
        entry = self.manifest.files[name]
        content = self._open_folder.read(name, entry.size)
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise MoecError(f"{self.folder}: {name} changed since the artifact was opened; open it again")
        return content

    @property
    def current(self) -> bool:
        """Whether the path still means the folder that was opened, and not one that replaced it."""
        return self._open_folder.current

    def close(self) -> None:
        """Unmap the weight files and let go of the folder. Arrays that are still in use stay."""
        self._unmap()
        self._open_folder.close()

    def _unmap(self) -> None:
        for mapped in self._maps.values():
            with contextlib.suppress(BufferError):  # someone holds an array; the map goes with the last of them
                mapped.close()
        self._maps.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, name: str) -> None:
        """Check the size of a file and its digest; map it if it is a weight file (then the digest is that of its header)."""
        entry = self.manifest.files[name]
        descriptor = self._open_folder.open(name)
        try:
            if (size := os.fstat(descriptor).st_size) != entry.size:
                raise MoecError(
                    f"{self.folder}: {name} has {size} bytes, expected {entry.size}; it is cut short or replaced: copy it again"
                )
            if entry.header_sha256 is not None:
                weight_file.check_header(f"{self.folder}: {name}", name, descriptor, self.manifest)
                self._maps[name] = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
            elif digest(descriptor)[0] != entry.sha256:
                raise MoecError(f"{self.folder}: {name} does not match its SHA-256 in {MANIFEST}; it was changed or damaged: copy it again")
        finally:
            os.close(descriptor)


class _Weights(Mapping[tuple[str, str], NDArray[np.generic]]):
    """The arrays of an artifact, made when asked for."""

    def __init__(self, manifest: Manifest, maps: Mapping[str, mmap.mmap]) -> None:
        self._entries: dict[tuple[str, str], ArrayEntry] = {
            (param, component): entry for param, weight in manifest.weights.items() for component, entry in weight.arrays.items()
        }
        self._maps = maps

    def __getitem__(self, key: tuple[str, str]) -> NDArray[np.generic]:
        entry = self._entries[key]
        count = entry.nbytes // entry.dtype.itemsize
        if count == 0:
            return np.empty(entry.shape, entry.dtype)
        return np.frombuffer(self._maps[entry.file], entry.dtype, count, entry.offset).reshape(entry.shape)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def open_artifact(path: str | os.PathLike[str], verify: bool = False) -> Artifact:
    """Open an artifact for reading.

    Args:
        path: the folder.
        verify: check every byte of the weights as well, and that no file is there that does not belong.

    Raises:
        MoecError: it is none, it is damaged, or it needs another version of moec.
    """
    for _ in range(ATTEMPTS):
        folder = Folder(Path(path))
        try:
            return _open(folder, verify)
        except BaseException as error:
            replaced = not folder.current
            folder.close()
            if not (replaced and isinstance(error, MoecError)):  # else: its files are being removed, another took its place
                raise
    raise MoecError(f"{path}: was replaced {ATTEMPTS} times while it was being opened; wait until whoever writes it is done")


def _open(folder: Folder, verify: bool) -> Artifact:
    manifest = read_manifest(folder)
    if verify and (problems := check_all(folder, manifest)):
        rest = f" (and {len(problems) - 1} more; see `moec verify`)" if problems[1:] else ""
        raise MoecError(f"{folder.path}: {problems[0]}{rest}")
    return Artifact(folder, manifest)
