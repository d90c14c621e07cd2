"""`moec doctor`: what this machine can compile for and run, and what is missing."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from moec import __version__
from moec.compiler.cli.common import JsonOption, format_size, print_json
from moec.runtime.host import available_cores, cpu_name, memory_bytes
from moec.runtime.onnx_gpu import CUDA
from moec.targets import get_target

GROUPS = {
    "run": ("numpy", "tokenizers", "apache-tvm-ffi", "jinja2", "typer"),
    "compile": ("torch", "transformers", "safetensors", "apache-tvm", "networkx", "pyyaml"),
    "onnx": ("onnx", "onnxruntime"),
}
"""Packages by what needs them; an extra has the group's name, the base install is `run`."""

_NAMES = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu")}
"""Packages that come under several names."""


def command(json: JsonOption = False) -> None:
    """Say what this machine can compile for and run, and what is missing."""
    found = examine()
    if json:
        print_json(found)
        return
    print(f"moec {found['moec']}, Python {found['python']}, {found['system']}")
    memory = "memory unknown" if found["memory_bytes"] is None else format_size(found["memory_bytes"])
    print(f"processor: {found['cpu']}, {found['cores']} cores, {memory}")
    print(f"instruction sets used: {' '.join(found['features']) or 'the base set'}")
    print("GPU: " + (", ".join(found["gpus"]) or "none found"))
    for group, packages in found["packages"].items():
        for name, version in packages.items():
            print(f"{group:<8} {name:<16} {version or 'missing'}")
    print(f"TVM runtime: {found['tvm_runtime'] or 'in each artifact (no compiler installed here)'}")
    print("ONNX Runtime providers: " + (", ".join(found["onnxruntime_providers"]) or "none"))
    for what, able in found["can"].items():
        print(f"{'yes' if able else 'no ':<4} {what}")
    for hint in found["missing"]:
        print(f"to do: {hint}")


def examine() -> dict[str, Any]:
    """What `moec doctor --json` prints."""
    packages = {group: {name: _version(name) for name in names} for group, names in GROUPS.items()}
    complete = {group: all(versions.values()) for group, versions in packages.items()}
    providers = _providers() if packages["onnx"]["onnxruntime"] else []
    missing = [
        f"pip install '{'moec' if group == 'run' else f'moec[{group}]'}' for {', '.join(n for n, v in versions.items() if v is None)}"
        for group, versions in packages.items()
        if not complete[group]
    ]
    return {
        "moec": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": available_cores(),
        "memory_bytes": memory_bytes(),
        "features": list(get_target("cpu").features),
        "gpus": _gpus(),
        "packages": packages,
        "tvm_runtime": _tvm_runtime(),
        "onnxruntime_providers": providers,
        "can": {
            "run artifacts of the tvm backend on this processor": complete["run"],
            "run artifacts of the onnx backend": complete["run"] and bool(providers),
            "run artifacts of the onnx backend on a GPU": complete["run"] and CUDA in providers and bool(_gpus()),
            "compile with the tvm backend": complete["run"] and complete["compile"],
            "compile for NVIDIA GPUs": complete["run"] and complete["compile"] and _cuda_compiler(),
            "compile with the onnx backend": complete["run"] and complete["compile"] and complete["onnx"],
            "run on a GPU": complete["run"] and bool(_gpus()),
        },
        "missing": missing,
    }


def _version(package: str) -> str | None:
    for name in _NAMES.get(package, (package,)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _tvm_runtime() -> str | None:
    """The TVM runtime that compiling copies into artifacts; found without importing the compiler."""
    spec = importlib.util.find_spec("tvm")
    if spec is None or spec.origin is None:
        return None
    library = Path(spec.origin).parent / "lib" / "libtvm_runtime.so"
    return str(library) if library.is_file() else None


def _cuda_compiler() -> bool:
    """Whether nvcc or NVRTC is here; a GPU is not needed."""
    bindings = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None
    return shutil.which("nvcc") is not None or bindings


def _providers() -> list[str]:
    import onnxruntime  # asked for what it was built with

    return list(onnxruntime.get_available_providers())


def _gpus() -> list[str]:
    """The GPUs that the driver lists."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout  # noqa: S603  # a fixed command
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.splitlines() if line.strip()]
