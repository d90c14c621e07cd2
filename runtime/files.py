"""Files of a folder that nobody vouches for: nothing outside of it is ever opened.

Names are relative, `/` between parts, each part of letters, digits, `.`, `_`, `-`, and not starting with a dot: that leaves out `..`,
absolute names, drives, backslashes, NUL, control characters and look-alikes. Every part is opened relative to the one before
without following links, and only regular files count.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from moec.runtime.errors import MoecError

BLOCK_BYTES = 1 << 20
"""A digest by blocks has a CRC-32 for each of this many bytes, so that damage can be located."""

_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_MAX_NAME = 255


def is_safe_name(name: str) -> bool:
    """Whether a name can only mean a file inside the folder.

    >>> [is_safe_name(n) for n in ("lib.so", "code/model.onnx", "../x", "/x", "a//b", "C:x", ".hidden", "")]
    [True, True, False, False, False, False, False, False]
    """
    return 0 < len(name) <= _MAX_NAME and all(_PART.fullmatch(part) for part in name.split("/"))


class Folder:
    """An open folder: it stays the same one when another takes its name meanwhile.

    Attributes:
        path: its name, for messages.

    Raises:
        MoecError: there is no such folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            what = "does not exist" if isinstance(error, FileNotFoundError) else f"is no folder that can be read ({error.strerror})"
            raise MoecError(f"{path}: {what}; expected an artifact, as `moec compile MODEL -o NAME.moec` writes it") from error

    def open(self, name: str) -> int:
        """A file descriptor, for reading, of a regular file inside the folder. The caller closes it.

        Raises:
            MoecError: the name is unsafe; or there is no such regular file, or a link is in the way.
        """
        if not is_safe_name(name):
            raise MoecError(f"{self.path}: file name {name!r} is not allowed (relative, [A-Za-z0-9._-] and / only)")
        *parents, last = name.split("/")
        descriptor = os.dup(self._descriptor)
        try:
            for part in parents:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = inner
            # O_NONBLOCK: a FIFO must not hang; it is refused below.
            found = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor)
        except OSError as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be opened ({error.strerror}; links are refused)"
            raise MoecError(f"{self.path}: file {name} {reason}; copy or compile the artifact again") from error
        finally:
            os.close(descriptor)
        if not stat.S_ISREG(os.fstat(found).st_mode):
            os.close(found)
            raise MoecError(f"{self.path}: {name} is not a regular file; copy or compile the artifact again")
        return found

    def holds(self, name: str) -> bool:
        """Whether something of that name lies directly in the folder."""
        return name in os.listdir(self._descriptor)  # noqa: PTH208  # a Path has no descriptor

    def read(self, name: str, limit: int) -> bytes:
        """The content of a small file inside the folder.

        Raises:
            MoecError: it cannot be opened, or has more than `limit` bytes.
        """
        with os.fdopen(self.open(name), "rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise MoecError(f"{self.path}: {name} has more than {limit} bytes")
        return content

    def files(self) -> list[str]:
        """Every entry below the folder that is not itself a folder, links and special files included, sorted."""
        found: list[str] = []
        for parent, folders, files, _ in os.fwalk(".", dir_fd=self._descriptor):
            links = [name for name in folders if (self.path / parent / name).is_symlink()]
            found += [(Path(parent) / name).as_posix() for name in (*files, *links)]
        return sorted(found)

    @property
    def current(self) -> bool:
        """Whether its path still means this folder."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._descriptor))
        except OSError:
            return False

    def close(self) -> None:
        """Let go of it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _blocks(descriptor: int) -> Iterator[bytes]:
    offset = 0
    while block := os.pread(descriptor, BLOCK_BYTES, offset):
        yield block
        offset += len(block)


def digest(descriptor: int, blocks: bool = False) -> tuple[str, str]:
    """The SHA-256 of an open file in hex and, if asked for, the CRC-32 of each block as eight hex digits a block."""
    whole, parts = hashlib.sha256(), []
    for block in _blocks(descriptor):
        whole.update(block)
        if blocks:
            parts.append(f"{zlib.crc32(block):08x}")
    return whole.hexdigest(), "".join(parts)
