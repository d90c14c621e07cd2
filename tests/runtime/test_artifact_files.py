"""The files of an artifact: names, kinds and links that are refused, and files that change underneath."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moec.runtime.artifact import open_artifact
from moec.runtime.errors import MoecError
from moec.runtime.files import is_safe_name
from moec.runtime.manifest import MANIFEST, MANIFEST_DIGEST
from tests.runtime.fakes import write_artifact, write_manifest

WEIGHTS = "weights/shared.safetensors"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of an artifact, and its digest with it."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    write_manifest(folder, manifest)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "tiny.moec")


UNSAFE = [
    "..", "../x", "a/../x", "a/..", "/etc/passwd", "//x", "a//b", "a/", "./x", ".", ".hidden", "a/.b", "C:x", "C:\\x", "a\\b", "a\0b",
    "",
    "a b", "a\nb", "é", "e\u0301", "\u202etxt", "x" * 256, "a:b", "~", "~/x", "-/../x", "\\\\host\\share", "a/b/../../../x", "*", "%2e",
]  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE)
def test_names_that_could_leave_the_folder_are_unsafe(name: str) -> None:
    assert not is_safe_name(name)


def _swap(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    (folder / name).unlink()
    make(folder / name)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket must be short
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "link out": lambda p: p.symlink_to("/etc/hostname"),
    "link inside": lambda p: p.symlink_to("../tokenizer.json"),
    "dangling link": lambda p: p.symlink_to("nowhere"),
    "link to a device": lambda p: p.symlink_to("/dev/zero"),
    "fifo": os.mkfifo,
    "socket": _socket,
    "folder": lambda p: p.mkdir(),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["code/model.bin", WEIGHTS, MANIFEST, MANIFEST_DIGEST])
def test_only_regular_files_are_read(folder: Path, name: str, kind: str) -> None:
    _swap(folder, name, SPECIAL[kind])
    with pytest.raises(MoecError, match="links are refused|not a regular file|no manifest.json|cannot be opened"):
        open_artifact(folder)


def test_a_folder_that_is_a_link_is_refused_inside_and_accepted_as_the_artifact(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alias.moec").symlink_to(folder)
    open_artifact(tmp_path / "alias.moec", verify=True).close()
    (folder / "code").rename(tmp_path / "code")
    (folder / "code").symlink_to(tmp_path / "code")
    with pytest.raises(MoecError, match="code/model.bin cannot be opened"):
        open_artifact(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_one_clear_error(folder: Path) -> None:
    (folder / "code/model.bin").chmod(0)
    with pytest.raises(MoecError, match="code/model.bin cannot be opened .Permission denied"):
        open_artifact(folder)


def test_failing_loads_leave_no_descriptors(folder: Path) -> None:
    edit(folder, lambda m: m["files"]["code/model.bin"].update(sha256="0" * 64))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(100):
        with pytest.raises(MoecError):
            open_artifact(folder)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_an_artifact_that_is_being_replaced_is_wholly_old_or_wholly_new(tmp_path: Path) -> None:
    folder, other = (
        write_artifact(tmp_path / name, {"code/model.bin": mark * 4096}) for name, mark in (("a.moec", b"a"), ("b.moec", b"b"))
    )
    aside = tmp_path / "aside"
    done = threading.Event()

    def replace() -> None:
        for _ in range(300):
            for source, to in ((folder, aside), (other, folder), (aside, other)):  # for a moment there is none
                source.rename(to)
            time.sleep(0.002)
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    seen: set[bytes] = set()
    try:
        while not done.is_set():
            try:
                with open_artifact(folder, verify=True) as artifact:
                    seen.add(artifact.read("code/model.bin"))
            except MoecError as error:
                assert "does not exist" in str(error) or "replaced" in str(error)
    finally:
        writer.join()
    assert seen == {b"a" * 4096, b"b" * 4096}
