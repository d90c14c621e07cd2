"""Verification: every byte of an artifact against the digests of its manifest."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

from moec.runtime.errors import MoecError
from moec.runtime.files import BLOCK_BYTES, Folder, digest
from moec.runtime.manifest import MANIFEST, MANIFEST_DIGEST, Manifest, read_manifest

_COPY = "copy this file again, or compile the artifact again"


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file of an artifact.

    Args:
        file: its name.
        message: what is wrong and what to do.
        begin, end: the bytes that differ, where known.
        section: what lies there: parameters and components.
    """

    file: str
    message: str
    begin: int | None = None
    end: int | None = None
    section: str = ""

    def __str__(self) -> str:
        place = "" if self.begin is None else f" bytes {self.begin} to {self.end}"
        return f"{self.file}{place}{f' ({self.section})' if self.section else ''}: {self.message}"


def find_problems(path: Path) -> list[Problem]:
    """Everything that is wrong with an artifact's files: none if it is whole.

    Raises:
        MoecError: the manifest itself cannot be trusted, so that there is nothing to compare with.
    """
    with Folder(path) as folder:
        return check_all(folder, read_manifest(folder))


def check_all(folder: Folder, manifest: Manifest) -> list[Problem]:
    """Everything that is wrong with the files of an open artifact."""
    problems: list[Problem] = []
    for name in manifest.files:
        try:
            descriptor = folder.open(name)
        except MoecError as error:
            problems.append(Problem(name, str(error).removeprefix(f"{folder.path}: ")))
            continue
        try:
            problems += _check_file(name, descriptor, manifest)
        finally:
            os.close(descriptor)
    known = {*manifest.files, MANIFEST, MANIFEST_DIGEST}
    extra = [name for name in folder.files() if name not in known]
    return problems + [Problem(name, f"{MANIFEST} does not list this file; delete it") for name in extra]


def _check_file(name: str, descriptor: int, manifest: Manifest) -> list[Problem]:
    entry = manifest.files[name]
    if (size := os.fstat(descriptor).st_size) != entry.size:
        what = "cut short" if size < entry.size else "too long"
        first, last = sorted((size, entry.size))
        return [Problem(name, f"{what}: {size} bytes, expected {entry.size}; {_COPY}", first, last, _section(name, first, last, manifest))]
    if digest(descriptor)[0] == entry.sha256:
        return []
    damaged = [
        Problem(name, f"changed or damaged; {_COPY}", begin, end, _section(name, begin, end, manifest))
        for begin, end in _damaged_blocks(descriptor, entry.blocks_crc32)
    ]
    return damaged or [Problem(name, f"changed or damaged (SHA-256 differs); {_COPY}", 0, size)]


def _damaged_blocks(descriptor: int, crcs: str) -> list[tuple[int, int]]:
    """The byte ranges of blocks whose CRC-32 differs."""
    found: list[tuple[int, int]] = []
    for index in range(len(crcs) // 8):
        begin = index * BLOCK_BYTES
        block = os.pread(descriptor, BLOCK_BYTES, begin)
        if f"{zlib.crc32(block):08x}" != crcs[8 * index : 8 * index + 8]:
            found.append((begin, begin + len(block)))
    return found


def _section(name: str, begin: int, end: int, manifest: Manifest) -> str:
    """The arrays that lie in a byte range of a weight file."""
    inside = [
        f"{param} {component}"
        for param, weight in manifest.weights.items()
        for component, entry in weight.arrays.items()
        if entry.file == name and entry.offset < end and begin < entry.offset + entry.nbytes
    ]
    return ", ".join(inside[:3]) + (f" and {len(inside) - 3} more" if len(inside) > 3 else "")
