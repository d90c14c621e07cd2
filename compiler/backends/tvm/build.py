"""From a lowered graph to a shared library: the list of TVM passes, and the target."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import tvm
from tvm import relax
from tvm.ir import IRModule
from tvm.support import cc
from tvm.target import Target as TvmTarget

from moec.compiler.backends.tvm.lower import FunctionLowering, Kernels, cache_types
from moec.compiler.backends.tvm.storage import Storage
from moec.compiler.errors import MoecError
from moec.compiler.ir import Graph
from moec.targets import Target
from moec.targets.kernels.cpu.isa import Isa

FUNCTIONS: dict[str, tuple[int | None, int | None]] = {"decode": (1, 1), "forward": (None, None)}
"""The functions of the library, with the tokens and rows that they are compiled for (None: any number)."""


def tvm_target(target: Target) -> TvmTarget:
    """TVM's form of a target.

    Raises:
        MoecError: it is no processor.
    """
    if target.kind != "cpu":
        raise MoecError(f"target {target.name}: the tvm backend compiles for processors only so far; take a target of kind cpu")
    text = target.tvm
    return TvmTarget(json.loads(text) if text.lstrip().startswith("{") else text)


def lower(graph: Graph, storage: Mapping[str, Storage], isa: Isa, page_shapes: Sequence[tuple[int, ...]]) -> IRModule:
    """The graph as a module with one Relax function for each of `FUNCTIONS`."""
    bb = relax.BlockBuilder()
    kernels = Kernels(bb, isa)
    for name, (tokens, rows) in FUNCTIONS.items():
        FunctionLowering(graph, storage, kernels, tokens, rows).build(name, cache_types(page_shapes))
    return bb.finalize()


def pipeline() -> tvm.transform.Pass:
    """What happens to the module before code is generated."""
    return tvm.transform.Sequential(
        [
            relax.backend.DispatchSortScan(),  # cumsum
            relax.transform.LegalizeOps(skip_ops=["relax.reshape"]),  # the ATen table becomes TIR; reshapes stay views
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
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


def build_library(
    graph: Graph,
    storage: Mapping[str, Storage],
    isa: Isa,
    target: TvmTarget,
    page_shapes: Sequence[tuple[int, ...]],
    path: Path,
) -> None:
    """Compile the graph and write the library."""
    module = lower(graph, storage, isa, page_shapes)
    with target:
        module = pipeline()(module)
    executable = tvm.compile(module, target, relax_pipeline=tvm.transform.Sequential([]))
    compiler = _compiler(target)
    try:
        executable.export_library(str(path), fcompile=cc.cross_compiler(compiler))
    except RuntimeError as error:
        raise MoecError(f"linking {path.name} with {compiler} failed: {str(error).splitlines()[0]}") from error


def _compiler(target: TvmTarget) -> str:
    """The C compiler that links for a target; where it is not for this machine, the one that is named after its platform.

    Raises:
        MoecError: there is none.
    """
    if is_native(target):
        names, package = [os.environ.get("CC") or "cc", "gcc", "clang"], "gcc"
    else:
        gnu = str(target.attrs["mtriple"]).replace("-unknown-", "-").replace("-pc-", "-")
        names, package = [f"{gnu}-gcc", f"{gnu}-g++"], f"gcc-{gnu}"
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise MoecError(f"no C compiler to link with ({' or '.join(names)}): install one, such as the package {package}")
    return found


def is_native(target: TvmTarget) -> bool:
    """Whether code for a target is for a platform like this one."""
    triple = str(target.attrs.get("mtriple") or "")
    return not triple or (triple.split("-", maxsplit=1)[0] == platform.machine() and sys.platform in triple)
