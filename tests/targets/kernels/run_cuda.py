"""Running CUDA kernels on numpy arrays, on the emulated GPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from numpy.typing import NDArray
from tvm import relax
from tvm.target import Target

from moec.compiler.backends.tvm.build import generate
from moec.compiler.backends.tvm.cuda import CudaPlatform
from moec.targets import get_target
from moec.targets.kernels.cuda import pipeline as kernel_pipeline
from tests.targets.kernels import emulator

TARGET = Target({**json.loads(get_target("h100-sxm").tvm), "host": json.loads(get_target("cpu").tvm)})


def on_device(array: NDArray[Any]) -> Any:
    """A copy in the emulated GPU's memory."""
    shape, dtype = tvm_ffi.Shape(array.shape), tvm_ffi.dtype(array.dtype.name)
    tensor = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")(shape, dtype, tvm_ffi.device("cuda", 0), None)
    source = np.ascontiguousarray(array)
    tvm_ffi.get_global_func("runtime.TVMTensorCopyFromTo")(tvm_ffi.from_dlpack(source), tensor)
    return tensor


def from_device(tensor: Any, like: NDArray[Any]) -> None:
    """Copy a tensor back into an array."""
    tvm_ffi.get_global_func("runtime.TVMTensorCopyFromTo")(tensor, tvm_ffi.from_dlpack(like))


def load(module: Any) -> Any:
    """What a module compiles to, loaded."""
    emulator.install()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lib.so")
        module.export_library(str(path))
        return tvm_ffi.load_module(str(path))


class CudaKernel:
    """A compiled PrimFunc."""

    def __init__(self, func: Any) -> None:
        self._library = load(tvm.compile(func.with_attr("global_symbol", "kernel"), TARGET, tir_pipeline=kernel_pipeline.NAME))
        self._function = self._library["kernel"]

    def __call__(self, *inputs: NDArray[Any], outputs: Sequence[tuple[tuple[int, ...], str]] = ()) -> list[NDArray[Any]]:
        """Call it with inputs (which it may change), then new outputs of these shapes and types."""
        arrays = [*inputs, *(np.zeros(shape, np.dtype(dtype)) for shape, dtype in outputs)]
        tensors = [on_device(x) for x in arrays]
        self._function(*tensors)
        for tensor, array in zip(tensors, arrays, strict=True):
            from_device(tensor, array)
        return arrays[len(inputs) :]


class CudaFunction:
    """A Relax function of some kernels: `emit(bb, *arguments)` returns its result; arguments have the given types."""

    def __init__(self, types: Sequence[Any], emit: Callable[..., Any]) -> None:
        bb = relax.BlockBuilder()
        arguments = [relax.Var(f"a{i}", kind) for i, kind in enumerate(types)]
        with bb.function("main", arguments):
            with bb.dataflow():
                result = bb.emit_output(emit(bb, *arguments))
            bb.emit_func_output(result)
        platform = CudaPlatform(get_target("h100-sxm"))
        self._vm = load(generate(bb.finalize(), platform))["vm_load_executable"]()
        self._vm["vm_initialization"](2, 0, 2, 1, 0, 2)

    def __call__(self, *inputs: NDArray[Any], outputs: Sequence[tuple[tuple[int, ...], str]]) -> list[NDArray[Any]]:
        """Call it with inputs (which it may change); the result, of the shape and type given."""
        tensors = [on_device(x) for x in inputs]
        result = self._vm["main"](*tensors)
        for tensor, array in zip(tensors, inputs, strict=True):
            from_device(tensor, array)
        found = np.empty(outputs[0][0], outputs[0][1])
        from_device(result, found)
        return [found]
