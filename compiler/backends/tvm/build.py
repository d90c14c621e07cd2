"""From a lowered graph to a shared library: the list of TVM passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.ir import IRModule

from moec.compiler.backends.tvm.lower import FunctionLowering, cache_types
from moec.compiler.backends.tvm.platform import AHEAD, BEST, Functions, Platform
from moec.compiler.backends.tvm.storage import Storage
from moec.compiler.ir import Graph
from moec.runtime.tvm_pages import STORED


def lower(graph: Graph, storage: Mapping[str, Storage], platform: Platform, page_shapes: Sequence[tuple[int, ...]]) -> IRModule:
    """The graph as a module with the platform's functions, which share their kernels."""
    bb = relax.BlockBuilder()
    shared = Functions(bb)
    for function in platform.functions(graph):
        kernels, types = platform.kernels(shared, function), cache_types(page_shapes, STORED[platform.cache_dtype])
        FunctionLowering(graph, storage, platform, kernels, bb, function).build(types)
    platform.add_best(shared, int(graph.type_of(graph.outputs[0]).shape[-1]))
    return bb.finalize()


def pipeline(platform: Platform) -> tvm.transform.Pass:
    """What happens to the module before code is generated."""
    return tvm.transform.Sequential(
        [
            relax.backend.DispatchSortScan(),  # cumsum
            relax.transform.LegalizeOps(skip_ops=["relax.reshape"]),  # the ATen table becomes TIR; reshapes stay views
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            *platform.schedules(),
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )


def generate(module: IRModule, platform: Platform) -> Any:
    """A module of Relax functions and kernels as TVM's executable."""
    with platform.target:
        module = pipeline(platform)(module)
    nothing = tvm.transform.Sequential([])
    return tvm.compile(module, platform.target, relax_pipeline=nothing, tir_pipeline=platform.tir_pipeline)


def build_library(
    graph: Graph, storage: Mapping[str, Storage], platform: Platform, page_shapes: Sequence[tuple[int, ...]], path: Path
) -> dict[str, Any]:
    """Compile the graph and write the library; returns what the runtime has to know about it."""
    module = lower(graph, storage, platform, page_shapes)
    names = {function.name_hint for function in module.get_global_vars()}
    return {**platform.export(generate(module, platform), path), "best": BEST in names, "ahead": AHEAD in names}
