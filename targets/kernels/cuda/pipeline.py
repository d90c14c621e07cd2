"""How TIR functions become CUDA kernels: TVM's passes for scheduled functions, but for three that the kernels of this folder do themselves.

They place their own barriers in dynamic shared memory, in branches too, where TVM's pass would stop, and lay that memory out; and their
registers must not shrink to what indices reach, since device functions get addresses. Scheduled functions use static shared memory.
"""

from __future__ import annotations

import tvm
from tvm import s_tir, tirx
from tvm.ir import IRModule

NAME = "moec.cuda"
FITTING = "tirx.launch_bounds_min_blocks_per_sm"
OVERLAP = "tirx.use_programtic_dependent_launch"  # the runtime's spelling


@tirx.transform.prim_func_pass(opt_level=0, name="MayAlias")  # type: ignore[untyped-decorator]
def _may_alias(function: tirx.PrimFunc, _: IRModule, __: tvm.transform.PassContext) -> tirx.PrimFunc:
    """Do not declare the parameters of a kernel that begins early to be free of aliases.

    Otherwise the compiler reads what a kernel does not write through the constant cache, and moves such a read in front of `grid_wait`,
    where the kernel before may still be writing.
    """
    early = OVERLAP in function.attrs.get("tirx.kernel_launch_params", ())
    return function.with_attr("tirx.noalias", False) if early else function


def _kept(name: str) -> tuple[tvm.transform.Pass, tvm.transform.Pass]:
    """Passes around the split of host and device: an attribute of a function is its kernel's then, which TVM forgets."""
    values: dict[str, object] = {}

    @tvm.transform.module_pass(opt_level=0, name="Note")  # type: ignore[untyped-decorator]
    def note(module: IRModule, _: tvm.transform.PassContext) -> IRModule:
        values.update({var.name_hint: f.attrs[name] for var, f in module.functions.items() if f.attrs and name in f.attrs})
        return module

    @tirx.transform.prim_func_pass(opt_level=0, name="Set")  # type: ignore[untyped-decorator]
    def put(function: tirx.PrimFunc, _: IRModule, __: tvm.transform.PassContext) -> tirx.PrimFunc:
        value = values.get(str(function.attrs.get("global_symbol", "")).removesuffix("_kernel"))
        return function if value is None or "tirx.is_global_func" not in function.attrs else function.with_attr(name, value)

    return note, put


def _factory() -> tuple[tvm.transform.Pass, object, object]:
    note, put = _kept(FITTING)
    passes = [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerCrossThreadReduction(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LiftThreadBinding(),
        s_tir.transform.UnifyThreadBinding(),
        s_tir.transform.LowerMatchBuffer(),
        tirx.transform.StmtSimplify(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.UnrollLoop(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.FP8ComputeLegalize(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        s_tir.transform.ThreadSync("shared"),
        s_tir.transform.ThreadSync("warp"),
        s_tir.transform.LowerThreadAllreduce(),
        note,
        tirx.transform.SplitHostDevice(),
        put,
        _may_alias,
        tirx.transform.MakePackedAPI(),
        tirx.transform.FP8StorageLegalize(),
        tirx.transform.BF16StorageLegalize(),
    ]
    return tvm.transform.Sequential(passes), s_tir.pipeline.finalize_host_passes, s_tir.pipeline.finalize_device_passes


tirx.compilation_pipeline.register_tir_pipeline(NAME, _factory)
