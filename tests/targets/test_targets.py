"""The contract of all targets, and target files of one's own."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from moec.runtime.errors import MoecError
from moec.runtime.host import check_features, cpu_features
from moec.targets import Target, get_target, known_targets, read_target
from moec.targets.cpu import describe_host

GOOD = {"name": "box", "description": "our box", "kind": "cpu", "tvm": {"kind": "llvm", "mcpu": "x86-64-v3"}, "mem_bw_gb_s": 40}


@pytest.mark.parametrize("name", known_targets())
def test_every_target_keeps_the_contract(name: str) -> None:
    target = get_target(name)
    assert target.name == name
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert len(target.description) > 10
    tvm = json.loads(target.tvm)
    assert tvm["kind"] == {"cpu": "llvm", "cuda": "cuda"}[target.kind]
    json.dumps(asdict(target))  # the manifest has it
    figures = [getattr(target, f.name) for f in fields(Target) if f.name.startswith(("mem_bw", "peak"))]
    if any(figure is not None for figure in figures):
        assert target.sources, "figures need a source"
    assert all(source.startswith("https://") for source in target.sources)
    if target.kind == "cuda":
        assert all(figure is not None for figure in figures)
        assert target.memory_bytes is not None
        assert 10**9 < target.memory_bytes < 10**12
        assert re.fullmatch(r"sm_\d+a?", tvm["arch"])
    else:
        assert name == "cpu" or target.features, "code for a processor needs to say which"


@pytest.mark.parametrize("name", known_targets())
def test_tvm_understands_every_target(name: str) -> None:
    tvm_target = pytest.importorskip("tvm.target")
    understood = tvm_target.Target(get_target(name).tvm)
    assert str(understood.kind) in ("llvm", "cuda")


def test_a_target_is_found_by_name_or_by_how_only_one_begins() -> None:
    assert get_target("h100").name == "h100-sxm"
    for name in ("x86-64", "h10", "", "no/such"):
        with pytest.raises(MoecError, match=f"unknown target '{name}'.*Choices: a100-80g, arm64-neon, cpu"):
            get_target(name)
    with pytest.raises(MoecError, match="did you mean 'rtx-4090'"):
        get_target("rtx4090")


def test_this_machine_can_run_code_for_itself() -> None:
    check_features(get_target("cpu").features, "cpu")


V4 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
V3 = {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}


@pytest.mark.parametrize(
    ("machine", "features", "mcpu", "mattr"),
    [
        ("x86_64", V4 | V3 | {"avx512_vnni", "sse4_2"}, "x86-64-v4", ["+avx512vnni", "-prefer-256-bit"]),
        ("x86_64", V3 | {"avx_vnni"}, "x86-64-v3", ["+avxvnni"]),
        ("x86_64", V3 - {"fma"} | {"sse4_2", "ssse3", "popcnt"}, "x86-64-v2", None),
        ("x86_64", set(), "x86-64", None),
        ("aarch64", {"asimd", "asimddp"}, "generic", ["+neon", "+dotprod"]),
    ],
)
def test_a_processor_is_described_by_its_level_and_what_it_has_beyond(
    machine: str, features: set[str], mcpu: str, mattr: list[str] | None
) -> None:
    text, needed = describe_host(machine, frozenset(features))
    assert json.loads(text) == {"kind": "llvm", "mcpu": mcpu, **({"mattr": mattr} if mattr else {})}
    assert set(needed) <= features


def test_code_for_another_processor_is_refused() -> None:
    if not cpu_features():
        pytest.skip("this system does not list its features")
    with pytest.raises(MoecError, match="x.moec: its code needs avx1024, which this processor .* lacks: compile it for this machine"):
        check_features(["avx1024"], "x.moec")
    assert platform.machine()


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_file_describes_a_target(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"box{suffix}"
    path.write_text(json.dumps({**GOOD, "features": ["avx2"], "memory_bytes": 10**9}))  # JSON is YAML as well
    target = get_target(str(path))
    assert target == Target("box", "our box", "cpu", json.dumps(GOOD["tvm"]), 10**9, 40, features=("avx2",))


def test_a_published_target_survives_being_written_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    for name in known_targets():
        values = {key: value for key, value in asdict(get_target(name)).items() if value is not None}
        path.write_text(json.dumps(values))
        assert read_target(path) == get_target(name)


BAD = {
    "unknown key 'mem_bw_gbs': did you mean 'mem_bw_gb_s'": {**GOOD, "mem_bw_gbs": 1},
    "description, tvm missing": {"name": "a", "kind": "cpu"},
    "mem_bw_gb_s: expected a number, got 'fast'": {**GOOD, "mem_bw_gb_s": "fast"},
    "mem_bw_gb_s: expected a number, got True": {**GOOD, "mem_bw_gb_s": True},
    "memory_bytes: expected an integer, got 1.5": {**GOOD, "memory_bytes": 1.5},
    "mem_bw_gb_s must be positive": {**GOOD, "mem_bw_gb_s": -1},
    "features: expected a list of strings": {**GOOD, "features": [1]},
    "kind 'tpu' is neither cpu nor cuda": {**GOOD, "kind": "tpu"},
    "tvm's kind is 'llvm', expected 'cuda'": {**GOOD, "kind": "cuda"},
    "tvm: not valid JSON": {**GOOD, "tvm": "llvm"},
    "expected an object": [],
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_target_file_is_refused_with_the_reason(tmp_path: Path, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(BAD[message]))
    with pytest.raises(MoecError, match=re.escape(message)):
        get_target(str(path))


def test_files_that_are_no_targets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MoecError, match="cannot be read"):
        get_target(str(tmp_path / "none.json"))
    for name, content in (("a.json", "{"), ("a.yaml", "a: [")):
        (tmp_path / name).write_text(content)
        with pytest.raises(MoecError, match="not valid"):
            get_target(str(tmp_path / name))


def test_targets_check_their_figures() -> None:
    with pytest.raises(MoecError, match="peak_f32_tflops must be positive, not 0"):
        replace(get_target("cpu"), peak_f32_tflops=0)
