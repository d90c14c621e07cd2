"""What is done to a module whose kernels are bound to threads already: other operators get a schedule, and the CUDA source comes out."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx
from tvm.ir import IRModule
from tvm.s_tir import dlight


def schedules() -> list[tvm.transform.Pass]:
    """The passes that schedule what is not a kernel."""
    gpu = dlight.gpu
    rules = [gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()]
    return [_mark_kernels, dlight.ApplyDefaultSchedule(*rules), _compact]


@tvm.transform.module_pass(opt_level=0, name="MarkKernels")  # type: ignore[untyped-decorator]
def _mark_kernels(module: IRModule, _: tvm.transform.PassContext) -> IRModule:
    """Say of kernels, which are bound to threads already, that they need no schedule."""
    for name, function in module.functions_items():
        if _is_kernel(function):
            module[name] = function.with_attr("tirx.is_scheduled", True)
    return module


@tvm.transform.module_pass(opt_level=0, name="Compact")  # type: ignore[untyped-decorator]
def _compact(module: IRModule, _: tvm.transform.PassContext) -> IRModule:
    """Make the arrays of scheduled operators as small as their use; those of kernels are."""
    others = {name: f for name, f in module.functions_items() if isinstance(f, tirx.PrimFunc) and not _is_kernel(f)}
    s_tir = tvm.s_tir.transform
    passes = [
        s_tir.CanonicalizeLoop(), s_tir.LowerCrossThreadReduction(), s_tir.LowerInitBlock(), s_tir.PlanAndUpdateBufferAllocationLocation(),
        s_tir.ConvertBlocksToOpaque(), s_tir.LiftThreadBinding(), s_tir.CompactBufferAllocation(),
    ]  # fmt: skip
    compact = tvm.transform.Sequential(passes)(IRModule(others))
    for name, function in compact.functions_items():
        module[name] = function
    return module


def _is_kernel(function: Any) -> bool:
    return isinstance(function, tirx.PrimFunc) and "tirx.kernel_launch_params" in function.attrs


def sources(module: Any) -> list[str]:
    """The CUDA sources in a module and what it imports."""
    own = [str(module.inspect_source())] if module.kind == "cuda" else []
    return [*own, *(source for imported in module.imports for source in sources(imported))]
