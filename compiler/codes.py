"""Codes of quantised weights on disk: a file for each piece of work, written whole, found again after an interruption."""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moec.compiler.errors import MoecError
from moec.compiler.packed import Quantized

Key = tuple[str, "int | None"]
"""A parameter, and an expert of it."""


class CodesOnDisk(MutableMapping[Key, Quantized]):
    """A mapping whose items go to a file when a piece of work is finished, and are read from there when they are asked for.

    Args:
        folder: where the files are; made if need be.
        fingerprint: of all that the codes depend on. Files of another one are neither read nor touched.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder, self._fingerprint = folder, fingerprint
        self._fresh: dict[Key, Quantized] = {}
        self._stored: dict[Key, Path] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, key: Key) -> Quantized:
        if key in self._fresh:
            return self._fresh[key]
        with safe_open(self._stored[key], framework="np") as file:
            return Quantized(*(file.get_tensor(f"{_label(key)}:{part}") for part in ("codes", "scale", "zero")))

    def __setitem__(self, key: Key, value: Quantized) -> None:
        self._fresh[key] = value

    def __delitem__(self, key: Key) -> None:
        self._fresh.pop(key, None)
        self._stored.pop(key, None)

    def __iter__(self) -> Iterator[Key]:
        return iter({**self._stored, **self._fresh})

    def __len__(self) -> int:
        return len(self._stored) + len(self._fresh)

    def resume(self, work: str) -> bool:
        """Whether a piece of work was finished earlier; its codes are there then."""
        path = self._path(work)
        try:
            with safe_open(path, framework="np") as file:
                if (file.metadata() or {}).get("fingerprint") != self._fingerprint:
                    return False
                labels = {name.rpartition(":")[0] for name in file.keys()}  # noqa: SIM118  # not a mapping
        except (OSError, SafetensorError):
            return False  # there is none, or it is no file of ours: it is written anew
        for label in labels:
            name, _, expert = label.rpartition("#")
            self._stored[name, int(expert) if expert else None] = path
        return True

    def finish(self, work: str) -> None:
        """Write what was added since the last piece of work was finished.

        Raises:
            MoecError: it cannot be written.
        """
        path = self._path(work)
        part = path.with_suffix(".part")
        arrays = {
            f"{_label(key)}:{name}": getattr(packed, name) for key, packed in self._fresh.items() for name in ("codes", "scale", "zero")
        }
        try:
            save_file(arrays, part, {"fingerprint": self._fingerprint})
            part.replace(path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise MoecError(f"cannot write codes to {path}: {error}; free some space and start again to go on from here") from error
        self._stored |= dict.fromkeys(self._fresh, path)
        self._fresh.clear()
        give_back()

    def _path(self, work: str) -> Path:
        digest = hashlib.sha256(f"{self._fingerprint} {work}".encode()).hexdigest()[:16]
        return self._folder / f"codes-{re.sub('[^A-Za-z0-9_]+', '-', work)[-80:]}-{digest}.safetensors"


def give_back() -> None:
    """Return freed memory to the system: threads made the codes, and what a thread has freed the C library keeps for it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _label(key: Key) -> str:
    name, expert = key
    return f"{name}#{'' if expert is None else expert}"
