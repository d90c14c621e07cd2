"""The reader: what it gives, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.runtime.artifact import open_artifact
from moec.runtime.errors import MoecError
from moec.runtime.manifest import MANIFEST, parse_manifest
from moec.runtime.weight_file import describe
from tests.runtime.fakes import weights, write_artifact, write_manifest

WEIGHTS = "weights/shared.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "tiny.moec")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of an artifact, and its digest with it."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    write_manifest(folder, manifest)


def test_weights_are_mapped_aligned_and_read_only(folder: Path) -> None:
    with open_artifact(folder) as artifact:
        for key, expected in weights().items():
            param, component = key.split(":")
            array = artifact.weights[param, component]
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)
            assert array.ctypes.data % 64 == 0
            assert not array.flags.writeable
            assert not array.flags.owndata
        assert len(artifact.weights) == 3
        assert artifact.manifest.weight_bytes == sum(array.nbytes for array in weights().values())
        assert artifact.manifest.eos_token_ids == (0,)
        assert artifact.read("code/model.bin") == artifact.path("code/model.bin").read_bytes()
        with pytest.raises(MoecError, match="does not list a file 'other'"):
            artifact.path("other")


def test_an_array_outlives_its_artifact(folder: Path) -> None:
    artifact = open_artifact(folder)
    array = artifact.weights["norm", "data"]
    artifact.close()
    np.testing.assert_array_equal(array, [0, 1, 2])


def test_a_file_that_changes_after_opening_is_not_used(folder: Path) -> None:
    with open_artifact(folder) as artifact:
        (folder / "code/model.bin").write_bytes(b"evil" * 100)
        with pytest.raises(MoecError, match="changed since the artifact was opened"):
            artifact.read("code/model.bin")


def test_what_is_no_artifact_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, message in (("none", "does not exist"), ("file", "is no folder that can be read"), ("", "no manifest.json in this folder")):
        with pytest.raises(MoecError, match=message):
            open_artifact(tmp_path / path)


def weight(manifest: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = manifest["weights"]["layers.0.w"]
    return entry


def codes(manifest: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = weight(manifest)["arrays"]["codes"]
    return entry


BROKEN: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("expected 'moec', got 'gguf'", lambda m: m.update(format="gguf")),
    ("format: missing; expected a string", lambda m: m.pop("format")),
    ("format_version: 2 needs moec >= 9.1.0; .* update moec", lambda m: m.update(format_version=2, moec_version="9.1.0")),
    ("format_version: expected an integer, got '1'", lambda m: m.update(format_version="1")),
    ("format_version: expected an integer, got True", lambda m: m.update(format_version=True)),
    ("format_version: expected 1 to .*, got 0", lambda m: m.update(format_version=0)),
    ("requires: telepathy needs moec >= 0.1.0: update moec", lambda m: m.update(requires=["telepathy"])),
    ("requires: expected a list, got null", lambda m: m.update(requires=None)),
    ("model: expected an object, got 7", lambda m: m.update(model=7)),
    ("model: vocab_size: missing; expected an integer", lambda m: m["model"].pop("vocab_size")),
    ("model: vocab_size: expected 1 to .*, got -1", lambda m: m["model"].update(vocab_size=-1)),
    ("model: context_length: expected an integer, got 0.5", lambda m: m["model"].update(context_length=0.5)),
    ("model: eos_token_id: expected 0 to 15, got 16", lambda m: m["model"].update(eos_token_id=16)),
    ("model: eos_token_id: expected at most 4096 integers from 0 to 15", lambda m: m["model"].update(eos_token_id=[1, 16])),
    ("backend: expected a string", lambda m: m.update(backend=None)),
    ("executor: expected an object", lambda m: m.update(executor=[])),
    ("weights: layers.0.w: expected an object", lambda m: m["weights"].update({"layers.0.w": 1})),
    ("unknown format 'int9_g64'", lambda m: weight(m).update(format="int9_g64")),
    ("unknown format 'fp7'", lambda m: weight(m).update(format="fp7")),
    ("format: 2 formats for shape .8, 128.: expected one for each index", lambda m: weight(m).update(format=["f32", "f32"])),
    ("format: expected a list of strings", lambda m: weight(m).update(format=["f32"] * 7 + [1])),
    ("shape: expected at most 16 integers", lambda m: weight(m).update(shape=[8, -128])),
    ("shape: expected at most 16 integers", lambda m: weight(m).update(shape=[1] * 17)),
    ("shape: expected at most 16 integers", lambda m: weight(m).update(shape=[8, True])),
    ("codes: file: 'lib.so' is no weight file of this artifact", lambda m: codes(m).update(file="lib.so")),
    ("codes: file: 'code/model.bin' is no weight file", lambda m: codes(m).update(file="code/model.bin")),
    ("codes: dtype: unknown element type 'object'", lambda m: codes(m).update(dtype="object")),
    ("codes: nbytes: 8, but uint8.8, 64. has 512 bytes", lambda m: codes(m).update(nbytes=8)),
    ("codes: nbytes: 512, but uint8.8, 65. has 520 bytes", lambda m: codes(m).update(shape=[8, 65])),
    ("codes: nbytes: 512, but .* has 1298074214633706907132624082305024 bytes", lambda m: codes(m).update(shape=[2**40, 2**40, 2**30])),
    ("codes: offset: 3 is not a multiple of 64", lambda m: codes(m).update(offset=3)),
    ("codes: offset: expected 0 to .*, got -64", lambda m: codes(m).update(offset=-64)),
    ("codes: offset: bytes 65536 to 66048 lie outside of", lambda m: codes(m).update(offset=65536)),
    ("codes: offset: expected 0 to 9223372036854775807", lambda m: codes(m).update(offset=2**64)),
    ("layers.0.w .* and layers.0.w .* share bytes of", lambda m: weight(m)["arrays"]["scale"].update(offset=codes(m)["offset"] + 448)),
    ("files: '?../x'?: this file name is not allowed", lambda m: m["files"].update({"../x": m["files"]["code/model.bin"]})),
    ("files: manifest.json: this file name is not allowed", lambda m: m["files"].update({MANIFEST: m["files"]["code/model.bin"]})),
    ("files: two names differ in case only", lambda m: m["files"].update({"CODE/model.bin": m["files"]["code/model.bin"]})),
    ("sha256: expected 64 lower-case hex digits", lambda m: m["files"]["code/model.bin"].update(sha256="A" * 64)),
    ("header_sha256: missing", lambda m: m["files"][WEIGHTS].pop("header_sha256")),
    ("blocks_crc32: expected 8 hex digits for each 1048576 bytes", lambda m: m["files"][WEIGHTS].update(blocks_crc32="")),
    ("size: expected 0 to", lambda m: m["files"]["code/model.bin"].update(size=-1)),
    ("code/model.bin has 400 bytes, expected 399", lambda m: m["files"]["code/model.bin"].update(size=399)),
    ("code/model.bin does not match its SHA-256", lambda m: m["files"]["code/model.bin"].update(sha256="0" * 64)),
    ("header .bytes 0 to 320. does not match its SHA-256", lambda m: m["files"][WEIGHTS].update(header_sha256="0" * 64)),
    ("header and manifest.json disagree about norm data", lambda m: m["weights"]["norm"]["arrays"]["data"].update(dtype="uint32")),
    ("header and manifest.json disagree about layers.0.w codes", lambda m: codes(m).update(shape=[64, 8])),
    ("file gone.bin is missing; copy or compile", lambda m: m["files"].update({"gone.bin": m["files"]["code/model.bin"]})),
]


@pytest.mark.parametrize(("message", "change"), BROKEN, ids=[m for m, _ in BROKEN])
def test_a_broken_manifest_is_refused_with_the_reason(folder: Path, message: str, change: Callable[[dict[str, Any]], object]) -> None:
    edit(folder, change)
    with pytest.raises(MoecError, match=message) as caught:
        open_artifact(folder)
    assert "\n" not in str(caught.value)


TEXTS = {
    "key 'format' occurs twice": b'{"format": "moec", "format": "moec"}',
    "NaN is not a JSON number": b'{"format": NaN}',
    "number 1e400 is too large": b'{"format": 1e400}',
    "not valid JSON: .*utf-8": b'\xff{"format": "moec"}',
    "expected an object, got a list": b"[]",
    "not valid JSON: Expecting value": b"",
    "not valid JSON: Extra data": b"{} {}",
    "not valid JSON: .*(BOM|Expecting value)": "\ufeff{}".encode(),
    "not valid JSON: Exceeds the limit": b'{"format_version": ' + b"9" * 5000 + b"}",
    "not valid JSON: is nested too deeply": b"[" * 200_000,
}


@pytest.mark.parametrize("message", TEXTS)
def test_a_manifest_that_is_no_strict_json_is_refused(folder: Path, message: str) -> None:
    write_manifest(folder, TEXTS[message])
    with pytest.raises(MoecError, match=message):
        open_artifact(folder)


def test_keys_of_later_versions_are_ignored(folder: Path) -> None:
    edit(folder, lambda m: m.update(later={"a": [1]}))
    edit(folder, lambda m: m["files"]["code/model.bin"].update(later=1))
    open_artifact(folder, verify=True).close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_value_anywhere_is_parsed_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    base = tmp_path_factory.getbasetemp() / "fuzz.moec"
    manifest = json.loads((base if base.exists() else write_artifact(base)).joinpath(MANIFEST).read_text())
    place: Any = manifest
    key: Any = data.draw(st.sampled_from(sorted(place)))
    while isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(JSON)
    try:
        parse_manifest(json.dumps(manifest).encode())
    except MoecError as error:
        assert str(error)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_parsed_or_refused(content: bytes) -> None:
    with pytest.raises(MoecError):
        parse_manifest(content)


HEADER_VALUE = JSON | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "F99"]) | JSON,
        "shape": st.lists(st.integers(-1, 2**65), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 2**65), max_size=3) | JSON,
    }
)


@settings(max_examples=200, deadline=None)
@given(
    header=st.dictionaries(st.text(max_size=4), HEADER_VALUE, max_size=3).map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=60)
)
def test_any_weight_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: bytes) -> None:
    base = tmp_path_factory.getbasetemp() / "header.moec"
    if not base.exists():
        write_artifact(base)
    path = base / WEIGHTS
    content = len(header).to_bytes(8, "little") + header + bytes(-(8 + len(header)) % 64) + bytes(1024)
    path.write_bytes(content)
    edit(base, lambda m: m["files"].update({WEIGHTS: describe(path)}))  # somebody who forges the digests too
    with pytest.raises(MoecError):
        open_artifact(base)


@pytest.mark.parametrize("length", [0, 7, 8, 900, 901, 2**31, 2**63, 2**64 - 1])
def test_a_weight_header_of_impossible_length_is_refused(folder: Path, length: int) -> None:
    path = folder / WEIGHTS
    good = path.read_bytes()
    path.write_bytes(length.to_bytes(8, "little") + good[8:])
    with pytest.raises(MoecError, match="header"):
        open_artifact(folder)
