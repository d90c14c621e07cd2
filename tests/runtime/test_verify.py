"""Damage: every flipped bit and every truncation is found, and the report says where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moec.runtime.artifact import open_artifact
from moec.runtime.errors import MoecError
from moec.runtime.files import BLOCK_BYTES
from moec.runtime.manifest import MANIFEST, MANIFEST_DIGEST
from moec.runtime.verify import find_problems
from moec.runtime.weight_file import describe
from tests.runtime.fakes import weight_file, write_artifact, write_manifest

WEIGHTS = "weights/shared.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("verify") / "tiny.moec")


def header_size(folder: Path) -> int:
    return 8 + int.from_bytes((folder / WEIGHTS).read_bytes()[:8], "little")


def refused_by_verify(folder: Path) -> bool:
    try:
        return bool(find_problems(folder))
    except MoecError:
        return True


def refused_by_load(folder: Path) -> bool:
    try:
        open_artifact(folder).close()
    except MoecError:
        return True
    return False


def test_a_whole_artifact_has_no_problems(folder: Path) -> None:
    assert find_problems(folder) == []


@pytest.mark.parametrize("name", [MANIFEST, MANIFEST_DIGEST, "code/model.bin", WEIGHTS])
def test_every_flipped_bit_is_found(folder: Path, name: str) -> None:
    path = folder / name
    good = path.read_bytes()
    payload = header_size(folder) if name == WEIGHTS else len(good)
    try:
        for position in range(len(good)):
            bit = 1 << (position % 8)
            path.write_bytes(good[:position] + bytes([good[position] ^ bit]) + good[position + 1 :])
            assert refused_by_verify(folder), position
            assert refused_by_load(folder) == (position < payload), position  # a default load skips weight payloads alone
    finally:
        path.write_bytes(good)


def test_every_flipped_bit_of_the_weight_header_is_found_on_load(folder: Path) -> None:
    path = folder / WEIGHTS
    good = path.read_bytes()
    try:
        for position in range(header_size(folder)):
            for bit in range(8):
                path.write_bytes(good[:position] + bytes([good[position] ^ (1 << bit)]) + good[position + 1 :])
                assert refused_by_load(folder), (position, bit)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("name", [MANIFEST, MANIFEST_DIGEST, "code/model.bin", WEIGHTS])
def test_every_truncation_is_found_on_load(folder: Path, name: str) -> None:
    path = folder / name
    good = path.read_bytes()
    try:
        for length in range(len(good)):
            path.write_bytes(good[:length])
            assert refused_by_load(folder), length
        path.write_bytes(good + b"\0")
        assert refused_by_load(folder)
    finally:
        path.write_bytes(good)


def test_the_report_names_file_bytes_section_and_what_to_do(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "big.moec")
    arrays = {"first:data": np.zeros(BLOCK_BYTES // 4, np.float32), "second:data": np.ones(BLOCK_BYTES // 4, np.float32)}
    content, places = weight_file(arrays)
    (folder / WEIGHTS).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][WEIGHTS] = describe(folder / WEIGHTS)
    manifest["weights"] = {
        key.split(":")[0]: {
            "format": "f32",
            "shape": list(array.shape),
            "arrays": {
                "data": {
                    "file": WEIGHTS, "offset": places[key][0], "nbytes": array.nbytes, "dtype": "float32", "shape": list(array.shape),
                }
            },
        }
        for key, array in arrays.items()
    }  # fmt: skip
    write_manifest(folder, manifest)
    assert find_problems(folder) == []
    damaged = bytearray(content)
    damaged[places["second:data"][0] + BLOCK_BYTES // 2] ^= 1
    (folder / WEIGHTS).write_bytes(damaged)
    (problem,) = find_problems(folder)
    assert (problem.file, problem.begin, problem.end) == (WEIGHTS, BLOCK_BYTES, 2 * BLOCK_BYTES)
    assert problem.section == "first data, second data"  # the block begins with the end of the first
    assert str(problem) == (
        "weights/shared.safetensors bytes 1048576 to 2097152 (first data, second data): "
        "changed or damaged; copy this file again, or compile the artifact again"
    )
    with pytest.raises(MoecError, match="bytes 1048576 to 2097152"):
        open_artifact(folder, verify=True)
    open_artifact(folder).close()


def test_files_that_are_missing_extra_short_or_renamed_are_reported(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.moec"
    shutil.copytree(folder, copy)
    (copy / "extra.so").write_bytes(b"x")
    (copy / "link").symlink_to("/")
    (copy / "code/model.bin").rename(copy / "code/other.bin")
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-5])
    problems = {problem.file: problem for problem in find_problems(copy)}
    assert set(problems) == {"extra.so", "link", "code/model.bin", "code/other.bin", WEIGHTS}
    assert "does not list this file; delete it" in problems["extra.so"].message
    assert "is missing" in problems["code/model.bin"].message
    assert "cut short" in problems[WEIGHTS].message
    assert problems[WEIGHTS].section == "norm data"
