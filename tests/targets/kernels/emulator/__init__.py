"""CUDA modules of TVM executed by the processor: memory of the "GPU" is this machine's, and kernels are compiled as C++.

`install()` registers the device and the loader of modules with TVM's runtime; from then on a library with CUDA code works without a GPU,
slowly. It checks what a kernel computes, its barriers, shuffles and products on tensor cores included, and with a sanitizer of GCC its
accesses and races, but not speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tvm_ffi

from tests.targets.kernels.emulator import ptx

HERE = Path(__file__).parent
CACHE = Path(tempfile.gettempdir()) / "moec-cuda-emulator"
SANITIZE = "MOEC_EMULATOR_SANITIZE"
"""An environment variable. `address`: accesses beside an array, or a block's shared memory, end the process. `thread`: accesses of the
threads of a block or cluster that no barrier orders are reported. The process needs the sanitizer from its start, `library asan` or `tsan`:

    library() { for name in $1 stdc++; do gcc -print-file-name=lib$name.so; done | xargs; }
    export MOEC_EMULATOR_SANITIZE=address ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:detect_odr_violation=0
    LD_PRELOAD="$(library asan)" python -m pytest tests/targets/kernels/cuda
    export MOEC_EMULATOR_SANITIZE=thread TSAN_OPTIONS=log_path=races
    LD_PRELOAD="$(library tsan)" setarch -R python -m pytest tests/targets/kernels/cuda
"""
FLAGS = ["-std=c++17", "-O0", "-fPIC", "-w"]  # compiling takes longer than what it gives
if (kind := os.environ.get(SANITIZE)) == "address":
    FLAGS += ["-fsanitize=address", "-g1", "--param", "asan-stack=0", "--param", "asan-globals=0"]
elif kind == "thread":
    FLAGS += ["-fsanitize=thread", "-g1"]
OPTIMISED = ["-O2", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]  # which takes a jump to another stack for an error
"""Flags for what is compiled once."""
PARTS = "emulator", "warp"

SHARED = "tirx.use_dyn_shared_memory"
DIMENSIONS = [*(f"{kind}.{axis}" for kind in ("blockIdx", "threadIdx") for axis in "xyz"), "clusterCtaIdx.x"]

ARCH = "sm_90a"
"""What the emulated GPU is."""


def launched(run: Callable[[], object]) -> None:
    """What becomes of a launch: it runs at once, unless a driver takes it by replacing this function."""
    run()


class Function(NamedTuple):
    """A kernel's entry in a module: its name, the bits of its arguments (0: a pointer), and what else is passed at a launch."""

    name: str
    types: Sequence[tuple[int, int]]
    tags: Sequence[str]


def available() -> bool:
    """Whether there is a C++ compiler, and no GPU in whose place the emulator would stand."""
    return shutil.which("g++") is not None and tvm_ffi.get_global_func("runtime.get_cuda_stream", allow_missing=True) is None


needs_emulator = pytest.mark.skipif(not available(), reason="no C++ compiler to emulate a GPU with")


@cache
def install() -> None:
    """Make TVM's device cuda the emulated one, for the rest of the process."""
    specs = [importlib.util.find_spec(name) for name in ("tvm", "tvm_ffi")]
    roots = [Path(folder) for spec in specs if spec for folder in spec.submodule_search_locations or ()]
    includes = [f"-I{root / 'include'}" for root in roots]
    ctypes.CDLL(str(_compile((HERE / "device.cc").read_text(), includes)), ctypes.RTLD_GLOBAL)
    tvm_ffi.register_global_func("ffi.Module.load_from_bytes.cuda", _load, override=True)


def _load(data: Any) -> Any:
    functions, source = _parse(bytes(data))
    source = re.sub(r"^\s*#include <(cuda|cuda_fp16|cuda_bf16|mma|cooperative_groups)\.h>", "", source, flags=re.MULTILINE)
    source = re.sub(r"extern __shared__ \S+\(\d+\) (\w+) (\w+)\[\];", r"\1* \2 = (\1*)emulator::shared;", source)
    source = re.sub(r"__shared__ (alignas\(\d+\))", r"\1 static", source)
    source = _architecture(ARCH) + ptx.translate(source)
    entries = "\n".join(f'extern "C" void run_{f.name}(void* p) {{ emulator::call(&{f.name}, (void**)p); }}' for f in functions)
    own = _prepared()
    text = f'#include "ptx.h"\n{source}\n#include "entry.h"\n{entries}\n'
    objects = [str(own / f"{part}.o") for part in PARTS]
    library = ctypes.CDLL(str(_compile(text, [f"-I{own}", f"-I{HERE}", *objects])))
    kept = {f.name: tvm_ffi.convert(_launcher(library, f)) for f in functions}
    return tvm_ffi.get_global_func("emulator.module")(lambda name: kept.get(str(name)))


def _architecture(arch: str) -> str:
    """What the compiler for an architecture defines."""
    number = re.sub(r"\D", "", arch)
    return f"#define __CUDA_ARCH__ {number}0\n" + (f"#define __CUDA_ARCH_FEAT_SM{number}_ALL\n" if arch.endswith("a") else "")


def _launcher(library: ctypes.CDLL, function: Function) -> Any:
    entry = getattr(library, f"run_{function.name}")

    def launch(*args: Any) -> None:
        count = len(function.types)
        values = [_value(argument, *kind) for argument, kind in zip(args[:count], function.types, strict=True)]
        size = {**dict.fromkeys(DIMENSIONS, 1), SHARED: 0}
        size.update({tag: int(n) for tag, n in zip([t for t in function.tags if t in size], args[count:], strict=False)})
        pointers = (ctypes.c_void_p * max(count, 1))(*(ctypes.addressof(value) for value in values))
        sizes = (ctypes.c_int * len(size))(*size.values())

        def run(_: object = values) -> None:  # to which there are pointers
            library.emulator_launch(ctypes.cast(entry, ctypes.c_void_p), pointers, sizes)

        if all(size[axis] > 0 for axis in DIMENSIONS):
            launched(run)

    return launch


def _value(argument: Any, code: int, bits: int) -> Any:
    if code == 3:  # a pointer
        return argument if isinstance(argument, ctypes.c_void_p) else ctypes.c_void_p(argument)
    if code == 2:
        return ctypes.c_float(argument)
    return (ctypes.c_int64 if bits == 64 else ctypes.c_int32)(argument)


def _parse(data: bytes) -> tuple[list[Function], str]:
    """The functions of a serialised CUDA module, and its source."""
    at = 0

    def number() -> int:
        nonlocal at
        at += 8
        return int.from_bytes(data[at - 8 : at], "little")

    def text() -> str:
        nonlocal at
        size = number()
        at += size
        return data[at - size : at].decode()

    assert text() == "cuda"
    functions = []
    for _ in range(number()):
        text()
        name = text()
        types = []
        for _ in range(number()):
            types.append((data[at], data[at + 1]))
            at += 4
        tags = [text() for _ in range(number())]
        extra = number()
        at += 4 * extra
        functions.append(Function(name, types, tags))
    return functions, text()


@cache
def _prepared() -> Path:
    """A folder with the emulator as object files, and its header as the compiler has it once it is read."""
    path = CACHE / _digest("")
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder, "made")
            made.mkdir()
            _run("-x", "c++-header", str(HERE / "ptx.h"), "-o", str(made / "ptx.h.gch"))
            for part in PARTS:
                _run(*OPTIMISED, "-c", str(HERE / f"{part}.cc"), "-o", str(made / f"{part}.o"))
            with contextlib.suppress(OSError):  # another process has made it meanwhile
                made.rename(path)
    return path


def _compile(source: str, extra: Sequence[str]) -> Path:
    """The shared library of a source, compiled once."""
    path = CACHE / f"{_digest(source)}.so"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            file, out = Path(folder, "source.cc"), Path(folder, "out.so")
            file.write_text(source)
            _run("-shared", str(file), *extra, "-o", str(out))
            out.rename(path)
    return path


def _digest(source: str) -> str:
    """What changes with a source, the emulator or the compiler's options."""
    own = "".join((HERE / name).read_text() for name in ("emulator.h", "emulator.cc", "entry.h", "ptx.h", "warp.cc"))
    return hashlib.sha256("\0".join([source, own, *FLAGS, *OPTIMISED]).encode()).hexdigest()[:24]


def _run(*arguments: str) -> None:
    done = subprocess.run(["g++", *FLAGS, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[:4000])
