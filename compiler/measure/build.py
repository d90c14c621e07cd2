"""Compiling experts kernels into a folder. No GPU is needed: nvcc or NVRTC makes the machine code, which lies beside the libraries.

FOLDER/<name>.so            TVM's host code and the CUDA source
FOLDER/<sha256 of the source, 32 digits>.cubin
FOLDER/libtvm_runtime.so, libtvm_runtime_cuda.so, *.whl     what running them needs besides torch
FOLDER/cases.json           what there is
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from moec.compiler.cuda_code import machine_code, need_cuda_compiler
from moec.compiler.errors import MoecError
from moec.compiler.measure.cases import Case, Index
from moec.runtime.executors.tvm import CUDA_RUNTIME, RUNTIME
from moec.targets import Target
from moec.targets.kernels.cuda.family import FAMILIES, FAMILY, fingerprint

TASKS = 50
"""Libraries that a process compiles before another one takes its place."""


def tvm_version() -> str:
    """The version of TVM that compiles.

    Raises:
        MoecError: there is none.
    """
    try:
        return metadata.version("apache-tvm")
    except metadata.PackageNotFoundError as error:
        raise MoecError("compiling kernels needs TVM: pip install 'moec[compile,gpu]'") from error


def kernel_functions(case: Case) -> dict[str, Any]:
    """The PrimFuncs of a case by name."""
    from moec.targets.kernels.cpu.activation_functions import ExpertActivation
    from moec.targets.kernels.cuda import experts_decode, experts_prefill, sort
    from moec.targets.kernels.cuda.shape import Shape

    layer, options = case.layer, dict(case.options)
    activation = ExpertActivation(case.activation)
    if case.kernel == "prefill":
        shape = Shape.of(options)
        many = experts_prefill.PrefillSpec(layer.layout, activation, None, layer.top_k, "int32", case.biases, layer.outside, shape)
        arrange = {"arrange": experts_prefill.arrange_func(many)} if shape.cluster else {}
        return {
            "sort": sort.sort_func(layer.experts, layer.top_k, "int32", shape.tokens),
            **arrange,
            "gate_up": experts_prefill.gate_up_func(many),
            "down": experts_prefill.down_func(many),
            "combine": sort.combine_func(layer.d, layer.top_k, layer.outside),
        }
    assert case.tokens is not None
    few = experts_decode.DecodeSpec(
        layer.layout, activation, case.tokens, layer.top_k, "int32", case.biases, layer.outside, layer.terms, counted=False, **options
    )
    both = {"gate_up": experts_decode.gate_up_func, "down": experts_decode.down_func}
    return {name: both[name](few) for name in case.functions}


def generate(case: Case, target: Target) -> tuple[Any, str]:
    """TVM's executable of a case, and the CUDA source in it."""
    import tvm
    from tvm.ir import IRModule
    from tvm.target import Target as TvmTarget

    from moec.targets.kernels.cuda.pipeline import NAME

    module = IRModule({name: f.with_attr("global_symbol", name) for name, f in kernel_functions(case).items()})
    executable = tvm.compile(module, TvmTarget(json.loads(target.tvm), host="llvm"), tir_pipeline=NAME)
    (source,) = (str(part.inspect_source()) for part in executable.mod.imports if part.kind == "cuda")
    return executable, source


def compile_case(case: Case, folder: str, name: str, target: Target, compiler: str) -> str | None:
    """Write a library and its machine code; returns what went wrong."""
    try:
        executable, source = generate(case, target)
        code = machine_code(source, json.loads(target.tvm)["arch"], compiler)
    except Exception as error:  # noqa: BLE001  # TVM's and nvcc's errors are of any type; the others go on
        return str(error).strip().splitlines()[-1][:300] or type(error).__name__
    _write(Path(folder, f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.cubin"), code)
    beside = Path(folder, f"{name}.{os.getpid()}.so")
    executable.export_library(str(beside))
    beside.replace(Path(folder, f"{name}.so"))
    return None


def build(folder: Path, cases: Sequence[Case], target: Target, jobs: int) -> Iterator[tuple[Case, str | None]]:
    """Compile what the folder lacks, a case a time as it is done, with what went wrong; then it has an index of all that there is.

    Libraries of earlier versions of the kernels, of TVM, or for another target are removed.

    Raises:
        MoecError: the target is no GPU, or there is no compiler.
    """
    if target.kind != "cuda":
        raise MoecError(f"target {target.name}: expected a GPU; `moec targets` lists them")
    compiler = need_cuda_compiler()
    folder.mkdir(parents=True, exist_ok=True)
    arch, tvm = json.loads(target.tvm)["arch"], tvm_version()
    name_of = partial(Case.file_name, arch=arch, tvm=tvm)
    files = _present(folder, arch, tvm)
    missing = [case for case in dict.fromkeys(cases) if not (folder / f"{name_of(case)}.so").is_file()]
    files |= {case: name_of(case) for case in cases if case not in missing}
    kernels = {family: fingerprint(family) for family in FAMILIES}
    # New processes now and then, as TVM keeps what it made; not by `max_tasks_per_child`, with which Python 3.11 waits for ever
    # (https://github.com/python/cpython/issues/115634).
    for first in range(0, len(missing), TASKS * jobs):
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            some = missing[first : first + TASKS * jobs]
            running = {pool.submit(compile_case, case, str(folder), name_of(case), target, compiler): case for case in some}
            for done in as_completed(running):
                case, problem = running[done], done.result()
                if problem is None:
                    files[case] = name_of(case)
                yield case, problem
    Index(target.name, arch, tvm, kernels, files).write(folder)


def _present(folder: Path, arch: str, tvm: str) -> dict[Case, str]:
    """The libraries that an earlier build made and that still hold; others are removed."""
    try:
        index = Index.read(folder)
    except MoecError:
        return {}
    kept = {}
    for case, file in index.files.items():
        now = index.kernels.get(FAMILY[case.kernel]) == fingerprint(FAMILY[case.kernel]) and file == case.file_name(arch, tvm)
        if now and (folder / f"{file}.so").is_file():
            kept[case] = file
        else:
            (folder / f"{file}.so").unlink(missing_ok=True)
    return kept


def copy_runtime(folder: Path, python: str | None = None) -> list[str]:
    """Put what running needs into the folder: TVM's runtime, and `tvm_ffi` for a version of Python; returns what is missing.

    Args:
        python: such as `3.12`; this interpreter's unless given.
    """
    spec = importlib.util.find_spec("tvm")
    roots = [Path(root, "lib") for root in (spec.submodule_search_locations or ())] if spec else []
    missing = []
    for name in (RUNTIME, CUDA_RUNTIME):
        found = next((root / name for root in roots if (root / name).is_file()), None)
        if found is None:
            missing.append(f"{name}: not in the installed apache-tvm")
        elif not (folder / name).is_file() or (folder / name).stat().st_size != found.stat().st_size:
            _write(folder / name, found.read_bytes())
    python = python or f"{sys.version_info.major}.{sys.version_info.minor}"
    version = metadata.version("apache-tvm-ffi")
    if not list(folder.glob(f"apache_tvm_ffi-{version}-cp{python.replace('.', '')}-*.whl")):
        wheel = f"apache-tvm-ffi=={version}"
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        done = subprocess.run([*download, f"--python-version={python}", wheel], capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            missing.append(f"tvm_ffi: `pip install {wheel}` on the machine with the GPU ({done.stderr.strip()[-200:]})")
    return missing


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)
