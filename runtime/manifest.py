"""The manifest of an artifact, parsed and checked. `moec.runtime.artifact` describes its keys."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from moec.runtime.errors import MoecError
from moec.runtime.files import BLOCK_BYTES, Folder, is_safe_name
from moec.runtime.formats import get_format
from moec.runtime.strict_json import Fields

FORMAT_VERSION = 1
FEATURES: frozenset[str] = frozenset()
"""Features that an artifact may require and this reader knows."""

MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.json.sha256"
ALIGNMENT = 64
WEIGHT_SUFFIX = ".safetensors"

_MAX_BYTES = 1 << 26
_MAX_RANK = 16
_HEX = frozenset("0123456789abcdef")
DTYPES = ("bool", "uint8", "int8", "uint16", "int16", "float16", "uint32", "int32", "float32", "uint64", "int64", "float64")


@dataclass(frozen=True)
class FileEntry:
    """One file: its size and digests. A weight file has the digest of its header, and a CRC-32 for each MiB."""

    size: int
    sha256: str
    header_sha256: str | None
    blocks_crc32: str


@dataclass(frozen=True)
class ArrayEntry:
    """Where a stored array lies."""

    file: str
    offset: int
    nbytes: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightEntry:
    """A parameter: its format (or one an expert), its shape and its stored arrays by component."""

    format: str | tuple[str, ...]
    shape: tuple[int, ...]
    arrays: Mapping[str, ArrayEntry]


@dataclass(frozen=True)
class Manifest:
    """What an artifact says about itself."""

    model: Mapping[str, Any]
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    backend: str
    target: Mapping[str, Any]
    executor: Mapping[str, Any]
    weights: Mapping[str, WeightEntry]
    files: Mapping[str, FileEntry]
    raw: Mapping[str, Any]
    """The whole object, for those that print it (recipe, quality, sizes)."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all stored arrays."""
        return sum(entry.nbytes for weight in self.weights.values() for entry in weight.arrays.values())


def read_manifest(folder: Folder) -> Manifest:
    """Read, check and parse the manifest of an artifact.

    Raises:
        MoecError: the folder is no artifact, its manifest is damaged, or it needs a newer moec.
    """
    if not folder.holds(MANIFEST):
        raise MoecError(f"{folder.path}: no {MANIFEST} in this folder; expected an artifact, as `moec compile` writes it")
    content = folder.read(MANIFEST, _MAX_BYTES)
    if folder.read(MANIFEST_DIGEST, 4096) != manifest_digest(content):
        raise MoecError(
            f"{folder.path}: {MANIFEST} does not match {MANIFEST_DIGEST}: one of them was changed or damaged; copy the artifact again"
        )
    return parse_manifest(content, f"{folder.path}: {MANIFEST}")


def manifest_digest(content: bytes) -> bytes:
    """What the file beside the manifest holds."""
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode()


def parse_manifest(content: bytes, where: str = MANIFEST) -> Manifest:
    """Parse the text of a manifest.

    Raises:
        MoecError: it breaks a rule; the message says where, what and what was expected.
    """
    top = Fields.parse(content, where)
    _check_version(top)
    files = {name: _file_entry(name, fields) for name, fields in top.fields("files").each()}
    if len({name.lower() for name in files}) != len(files):
        top.fail("files", "two names differ in case only")
    weights = {name: _weight_entry(fields, files) for name, fields in top.fields("weights").each()}
    _check_overlaps(top, weights)
    model, target = top.fields("model"), top.fields("target")
    for fields in (model, target):
        fields.text("name")
    vocab_size = model.integer("vocab_size", 1, 2**31 - 1)
    return Manifest(
        model=model.values,
        vocab_size=vocab_size,
        context_length=model.integer("context_length", 1, 2**40),
        eos_token_ids=_eos_token_ids(model, vocab_size),
        backend=top.text("backend"),
        target=target.values,
        executor=top.object("executor"),
        weights=weights,
        files=files,
        raw=top.values,
    )


def _eos_token_ids(model: Fields, vocab_size: int) -> tuple[int, ...]:
    value = model.values.get("eos_token_id")
    if isinstance(value, list):
        return model.integers("eos_token_id", 0, vocab_size - 1)
    return () if value is None else (model.integer("eos_token_id", 0, vocab_size - 1),)


def _check_version(top: Fields) -> None:
    if top.text("format") != "moec":
        top.fail("format", f"expected 'moec', got {top.text('format')!r}")
    writer = top.text("moec_version")
    if (version := top.integer("format_version", 1)) > FORMAT_VERSION:
        top.fail("format_version", f"{version} needs moec >= {writer}; this one reads up to {FORMAT_VERSION}: update moec")
    if missing := sorted(set(top.texts("requires")) - FEATURES):
        top.fail("requires", f"{', '.join(missing)} needs moec >= {writer}: update moec")


def _file_entry(name: str, fields: Fields) -> FileEntry:
    if not is_safe_name(name) or name in (MANIFEST, MANIFEST_DIGEST):
        raise MoecError(f"{fields.where}: this file name is not allowed (relative, [A-Za-z0-9._-] and / only)")
    size = fields.integer("size")
    is_weights = name.endswith(WEIGHT_SUFFIX)
    keys = ("sha256", "header_sha256") if is_weights else ("sha256",)
    for key in keys:
        if len(text := fields.text(key)) != 64 or not _HEX.issuperset(text):
            fields.fail(key, "expected 64 lower-case hex digits")
    blocks = fields.text("blocks_crc32") if is_weights else ""
    if len(blocks) != (8 * -(-size // BLOCK_BYTES) if is_weights else 0) or not _HEX.issuperset(blocks):
        fields.fail("blocks_crc32", f"expected 8 hex digits for each {BLOCK_BYTES} bytes")
    return FileEntry(size, fields.text("sha256"), fields.text("header_sha256") if is_weights else None, blocks)


def _weight_entry(fields: Fields, files: Mapping[str, FileEntry]) -> WeightEntry:
    shape = fields.integers("shape", 0, 2**40, _MAX_RANK)
    stored = fields.values.get("format")
    names = fields.texts("format") if isinstance(stored, list) else (fields.text("format"),)
    for each in set(names):
        get_format(each)
    if isinstance(stored, list) and (not shape or len(names) != shape[0]):
        fields.fail("format", f"{len(names)} formats for shape {list(shape)}: expected one for each index of the first axis")
    arrays = {component: _array_entry(inner, files) for component, inner in fields.fields("arrays").each()}
    return WeightEntry(names if isinstance(stored, list) else names[0], shape, arrays)


def _array_entry(fields: Fields, files: Mapping[str, FileEntry]) -> ArrayEntry:
    if (dtype_name := fields.text("dtype")) not in DTYPES:
        fields.fail("dtype", f"unknown element type {dtype_name!r}; expected one of {', '.join(DTYPES)}")
    dtype = np.dtype(dtype_name).newbyteorder("<")
    shape = fields.integers("shape", 0, 2**40, _MAX_RANK)
    file, offset, nbytes = fields.text("file"), fields.integer("offset"), fields.integer("nbytes")
    if file not in files or files[file].header_sha256 is None:
        fields.fail("file", f"{file!r} is no weight file of this artifact")
    if prod(shape) * dtype.itemsize != nbytes:
        fields.fail("nbytes", f"{nbytes}, but {dtype_name}{list(shape)} has {prod(shape) * dtype.itemsize} bytes")
    if offset % ALIGNMENT:
        fields.fail("offset", f"{offset} is not a multiple of {ALIGNMENT}")
    if offset + nbytes > files[file].size:
        fields.fail("offset", f"bytes {offset} to {offset + nbytes} lie outside of {file} ({files[file].size} bytes)")
    return ArrayEntry(file, offset, nbytes, dtype, shape)


def _check_overlaps(top: Fields, weights: Mapping[str, WeightEntry]) -> None:
    spans = sorted(
        (entry.file, entry.offset, entry.offset + entry.nbytes, f"{param} {component}")
        for param, weight in weights.items()
        for component, entry in weight.arrays.items()
        if entry.nbytes
    )
    for before, after in pairwise(spans):
        if before[0] == after[0] and after[1] < before[2]:
            top.fail("weights", f"{before[3]} and {after[3]} share bytes of {before[0]}")
