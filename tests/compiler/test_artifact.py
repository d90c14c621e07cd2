"""The artifact writer: offsets, stops at every system call, full disks."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from moec.compiler.artifact import ALIGN, ArtifactWriter, Shard, plan_shards
from moec.compiler.backends.base import Location, StoredArray
from moec.compiler.errors import MoecError
from moec.compiler.ir import Graph, Param
from moec.compiler.packed import Packed
from tests import graphs


class PlainBackend:
    """Stores every parameter as float32."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def stacked(self, param: Param) -> bool:
        return ".experts." in param.name

    def storage(self, param: Param) -> dict[str, StoredArray]:
        return {"data": StoredArray("float32", tuple(d for d in param.type.shape if isinstance(d, int)))}

    def store(self, param: Param, packed: Packed, expert: int | None = None) -> dict[str, np.ndarray[Any, Any]]:
        assert isinstance(packed, np.ndarray)
        return {"data": packed}

    def restore(self, param: Param, arrays: Mapping[str, np.ndarray[Any, Any]], expert: int | None = None) -> Packed:
        return arrays["data"]

    def build(self, folder: Path, locations: Mapping[tuple[str, str], Location]) -> dict[str, Any]:
        return {}


GRAPH = graphs.moe()
WEIGHTS = graphs.random_weights(GRAPH)
BACKEND = PlainBackend(GRAPH)
SHARDS = plan_shards(BACKEND)


def arrays(name: str) -> Iterator[tuple[int | None, dict[str, np.ndarray[Any, Any]]]]:
    param = GRAPH.params[name]
    for expert in range(6) if BACKEND.stacked(param) else (None,):
        yield expert, {"data": WEIGHTS.load(name, expert).numpy()}


def write(out: Path, resume: bool = True, fingerprint: str = "a", shards: list[Shard] = SHARDS) -> None:
    writer = ArtifactWriter(out, fingerprint, resume)
    for shard in shards:
        writer.write_shard(shard, arrays)
    writer.write_text("graph.txt", "graph")
    writer.commit({"format": "moec"})


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_layout(tmp_path: Path) -> None:
    write(tmp_path / "m.moec")
    assert [s.path for s in SHARDS] == ["weights/shared.safetensors", "weights/00000.safetensors"]
    for shard in SHARDS:
        path = tmp_path / "m.moec" / shard.path
        assert path.stat().st_size == shard.nbytes
        tensors = load_file(path)  # another implementation reads the same
        for (name, component), (stored, location) in shard.arrays.items():
            assert location.offset % ALIGN == 0
            wanted = WEIGHTS.load(name).numpy()
            raw = np.frombuffer(path.read_bytes(), stored.dtype, wanted.size, location.offset)
            assert np.array_equal(raw.reshape(stored.shape), wanted)
            assert np.array_equal(tensors[f"{name}:{component}"], wanted)


class Killed(BaseException):
    """The process ends here."""


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> Callable[[], int]:
    """Make the `number`-th call of the calls that write fail (0: never); returns how many were made."""
    calls = 0
    for name in ("pwrite", "fsync", "posix_fallocate", "replace", "rename", "mkdir", "unlink"):
        real = getattr(os, name)

        def counted(*args: Any, _real: Callable[..., Any] = real, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise error
            return _real(*args, **kwargs)

        monkeypatch.setattr(os, name, counted)
    return lambda: calls


def count_writes(tmp_path: Path) -> int:
    """How many calls that write one artifact takes."""
    with pytest.MonkeyPatch.context() as patch:
        count = stop_at(patch, 0, Killed())
        write(tmp_path / "counted.moec")
        return count()


def test_killed_anywhere_it_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "whole.moec")
    expected = content(tmp_path / "whole.moec")
    total = count_writes(tmp_path)
    assert total > 20
    for number in range(1, total + 1):
        out = tmp_path / f"{number}.moec"
        with pytest.MonkeyPatch.context() as patch, suppress(Killed):
            stop_at(patch, number, Killed())
            write(out)
        if out.exists():
            assert content(out) == expected, number
        write(out)
        assert content(out) == expected, number
        assert not out.with_name(out.name + ".part").exists()


def test_replacing_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    out = tmp_path / "m.moec"
    write(out, fingerprint="old", shards=SHARDS[:1])
    old = content(out)
    write(tmp_path / "new.moec")
    new = content(tmp_path / "new.moec")
    total = count_writes(tmp_path)
    for number in range(1, total + 1):
        with pytest.MonkeyPatch.context() as patch, suppress(Killed):
            stop_at(patch, number, Killed())
            write(out, resume=False)
        assert content(out) in (old, new), number


def test_finished_shards_are_kept(tmp_path: Path) -> None:
    out, seen = tmp_path / "m.moec", list[str]()
    writer = ArtifactWriter(out, "a")
    writer.write_shard(SHARDS[0], arrays)
    again = ArtifactWriter(out, "a")

    def watched(name: str) -> Iterator[tuple[int | None, dict[str, np.ndarray[Any, Any]]]]:
        seen.append(name)
        return arrays(name)

    for shard in SHARDS:
        again.write_shard(shard, watched)
    assert set(seen) == set(SHARDS[1].params)
    assert not ArtifactWriter(out, "b").finished  # other work starts anew


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_disk_errors_are_one_clear_error(tmp_path: Path, code: int) -> None:
    total = count_writes(tmp_path)
    for number in range(1, total + 1):
        out = tmp_path / f"{number}.moec"
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, number, OSError(code, os.strerror(code)))
            try:
                write(out)
            except MoecError as error:
                assert ("disk full" in str(error)) == (code == errno.ENOSPC), number
                assert not out.exists() or (out / "manifest.json").is_file()
        write(out)  # and nothing is lost
        assert (out / "manifest.json").is_file()


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(MoecError, match="is not an artifact"):
        write(tmp_path / "mine")
    assert content(tmp_path / "mine") == {"thesis.txt": b"years"}


def test_manifest_lists_every_file(tmp_path: Path) -> None:
    write(tmp_path / "m.moec")
    files = json.loads((tmp_path / "m.moec" / "manifest.json").read_text())["files"]
    assert set(files) == set(content(tmp_path / "m.moec")) - {"manifest.json", "manifest.json.sha256"}
