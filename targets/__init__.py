"""Targets: the hardware that moec compiles for, as data. A file in this folder holds one `Target`; its name is the file's.

Numbers have their unit in the name and a source. `None` stands for a figure that the vendor does not publish, or that depends on the
machine. A target of one's own is a JSON or YAML file with the fields of `Target`:

    {"name": "edge-box", "description": "our box", "kind": "cpu", "tvm": {"kind": "llvm", "mcpu": "x86-64-v3"}, "mem_bw_gb_s": 40}
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moec.runtime.errors import MoecError, unknown
from moec.runtime.strict_json import Fields, loads

__all__ = ["Target", "cuda", "get_target", "known_targets", "llvm", "read_target"]

_FIGURES = ("memory_bytes", "multiprocessors", "mem_bw_gb_s", "peak_f32_tflops", "peak_bf16_tflops", "peak_int8_tops")
_SUFFIXES = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class Target:
    """One piece of hardware.

    Args:
        name: the file's name with dashes.
        description: what it is, in words.
        kind: `cpu` or `cuda`.
        tvm: TVM's target as JSON text.
        multiprocessors: of a GPU.
        memory_bytes: memory that holds weights and caches.
        mem_bw_gb_s: memory bandwidth, 10^9 bytes a second.
        peak_f32_tflops, peak_bf16_tflops, peak_int8_tops: dense arithmetic peaks, 10^12 a second.
        features: instruction sets that code for it may use, as /proc/cpuinfo names them; a machine that lacks one refuses the code.
        sources: where the figures come from.
    """

    name: str
    description: str
    kind: str
    tvm: str
    memory_bytes: int | None = None
    mem_bw_gb_s: float | None = None
    peak_f32_tflops: float | None = None
    peak_bf16_tflops: float | None = None
    peak_int8_tops: float | None = None
    multiprocessors: int | None = None
    features: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("cpu", "cuda"):
            raise MoecError(f"target {self.name}: kind {self.kind!r} is neither cpu nor cuda")
        expected = {"cpu": "llvm", "cuda": "cuda"}[self.kind]
        if (kind := Fields.parse(self.tvm, f"target {self.name}: tvm").text("kind")) != expected:
            raise MoecError(f"target {self.name}: tvm's kind is {kind!r}, expected {expected!r} for kind {self.kind!r}")
        for field in _FIGURES:
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise MoecError(f"target {self.name}: {field} must be positive, not {value}")


def cuda(arch: str, shared_memory_bytes: int) -> str:
    """TVM's target for an NVIDIA GPU: its architecture, and the most shared memory that a block may ask for."""
    limits = {"max_num_threads": 1024, "max_threads_per_block": 1024, "registers_per_block": 65536, "thread_warp_size": 32}
    return json.dumps({"kind": "cuda", "arch": arch, "max_shared_memory_per_block": shared_memory_bytes, **limits})


def llvm(mcpu: str, mattr: Sequence[str] = (), mtriple: str | None = None) -> str:
    """TVM's target for a processor: LLVM's names of it, of features to add (`+x`) or drop (`-x`), and of the platform if not this one."""
    target: dict[str, object] = {"kind": "llvm", "mcpu": mcpu}
    if mtriple is not None:
        target["mtriple"] = mtriple
    if mattr:
        target["mattr"] = list(mattr)
    return json.dumps(target)


def known_targets() -> list[str]:
    """The names of all targets."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def get_target(name: str) -> Target:
    """The target of this name, of the only name that begins so (`h100`), or that a file describes.

    Raises:
        MoecError: there is none; the message lists those that exist.
    """
    if name.endswith(_SUFFIXES):
        return read_target(Path(name))
    names = known_targets()
    if name not in names:
        begin_so = [known for known in names if known.startswith(f"{name}-")]
        if len(begin_so) != 1:
            raise unknown("target", name, names)
        name = begin_so[0]
    target = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").TARGET
    assert isinstance(target, Target)
    return target


def read_target(path: Path) -> Target:
    """The target that a JSON or YAML file describes.

    Raises:
        MoecError: there is no such file, a key is unknown or missing, or a value has another type.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MoecError(f"target file {path}: cannot be read ({error}); or give one of: {', '.join(known_targets())}") from error
    values = loads(text, f"target file {path}") if path.suffix == ".json" else _load_yaml(text, path)
    if not isinstance(values, Mapping):
        raise MoecError(f"target file {path}: expected an object with the fields of a target")
    known = {field.name: field for field in fields(Target)}
    for key in values:
        if key not in known:
            raise MoecError(f"target file {path}: {unknown('key', str(key), known)}")
    if missing := [key for key in ("name", "description", "kind", "tvm") if key not in values]:
        raise MoecError(f"target file {path}: {', '.join(missing)} missing")
    return Target(**{key: _field(key, value, path) for key, value in values.items()})


def _field(key: str, value: Any, path: Path) -> Any:
    """A value of a target file as the field's type."""
    if key == "tvm" and isinstance(value, Mapping):
        return json.dumps(value)
    if key in ("features", "sources"):
        suits = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        expected = "a list of strings"
    elif key in _FIGURES:
        whole = key in ("memory_bytes", "multiprocessors")
        suits = isinstance(value, (int,) if whole else (int, float)) and not isinstance(value, bool)
        expected = "an integer" if whole else "a number"
    else:
        suits, expected = isinstance(value, str), "a string"
    if not suits:
        raise MoecError(f"target file {path}: {key}: expected {expected}, got {value!r}")
    return tuple(value) if isinstance(value, list) else value


def _load_yaml(text: str, path: Path) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise MoecError(f"target file {path}: reading YAML needs pyyaml: pip install 'moec[compile]', or write JSON") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MoecError(f"target file {path}: not valid YAML: {error}") from error
