"""Weight files: safetensors whose header must agree with the manifest.

8 bytes    N, little-endian
N bytes    JSON: {"NAME": {"dtype": "U8", "shape": [...], "data_offsets": [begin, end]}, ...}, padded with spaces
the rest   the tensors, without holes; each array of the manifest starts at a multiple of 64 of the file
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from moec.runtime.errors import MoecError
from moec.runtime.files import digest
from moec.runtime.manifest import MANIFEST, WEIGHT_SUFFIX, Manifest
from moec.runtime.strict_json import Fields

_MAX_HEADER = 100_000_000
"""As in the safetensors library."""

_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "uint16",
    "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64",
}  # fmt: skip


def header_size(descriptor: int, where: str) -> int:
    """Bytes of the header, its length field included.

    Raises:
        MoecError: the file is too short for it.
    """
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise MoecError(f"{where}: header of {length} bytes in a file of {size}; it is damaged: copy the artifact again")
    return 8 + length


def describe(path: Path) -> dict[str, Any]:
    """The manifest's `files` entry for a file, read from disk: what the writer calls once a file is complete."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        is_weights = path.name.endswith(WEIGHT_SUFFIX)
        sha256, blocks = digest(descriptor, blocks=is_weights)
        entry: dict[str, Any] = {"size": os.fstat(descriptor).st_size, "sha256": sha256}
        if is_weights:
            header = os.pread(descriptor, header_size(descriptor, str(path)), 0)
            entry |= {"header_sha256": hashlib.sha256(header).hexdigest(), "blocks_crc32": blocks}
        return entry
    finally:
        os.close(descriptor)


def check_header(where: str, name: str, descriptor: int, manifest: Manifest) -> None:
    """Check the header of a weight file: its digest, and that it holds the arrays of the manifest where the manifest says.

    Args:
        where: the file, for messages.
        name: the file, as the manifest calls it.
        descriptor: the open file.
        manifest: what to compare with.

    Raises:
        MoecError: it does not.
    """
    size = header_size(descriptor, where)
    header = os.pread(descriptor, size, 0)
    if hashlib.sha256(header).hexdigest() != manifest.files[name].header_sha256:
        raise MoecError(f"{where}: header (bytes 0 to {size}) does not match its SHA-256 in {MANIFEST}: copy the artifact again")
    tensors: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
    end = size
    for tensor, fields in Fields.parse(header[8:], f"{where}: header").each():
        if tensor == "__metadata__":
            continue
        offsets = fields.integers("data_offsets", most=2)
        if len(offsets) != 2:
            fields.fail("data_offsets", f"expected two, got {len(offsets)}")
        begin, stop = offsets
        tensors[size + begin, size + stop] = (fields.text("dtype"), fields.integers("shape"))
        end = max(end, size + stop)
    if end != manifest.files[name].size:
        raise MoecError(f"{where}: the tensors end at byte {end} of {manifest.files[name].size}; compile the artifact again")
    for param, weight in manifest.weights.items():
        for component, entry in weight.arrays.items():
            if entry.file != name:
                continue
            dtype, shape = tensors.get((entry.offset, entry.offset + entry.nbytes), ("", ()))
            if _DTYPES.get(dtype) != entry.dtype.name or shape != entry.shape:
                raise MoecError(f"{where}: header and {MANIFEST} disagree about {param} {component}; compile the artifact again")
