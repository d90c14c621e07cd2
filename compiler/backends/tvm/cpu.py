"""The platform of processors: kernels for LLVM, linked into one library."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.support import cc
from tvm.target import Target as TvmTarget

from moec.compiler.backends.tvm.fusion import Fusion
from moec.compiler.backends.tvm.platform import ANY, ONE, Alike, Expr, Formats, Functions, count_of, static
from moec.compiler.errors import MoecError
from moec.compiler.ir import Graph
from moec.runtime.executors.tvm import RUNTIME
from moec.runtime.tvm_functions import Function
from moec.targets.kernels.cpu.activation_functions import ExpertActivation
from moec.targets.kernels.cpu.attention import PAGE, attention_func, page_shapes
from moec.targets.kernels.cpu.embedding import embedding_func
from moec.targets.kernels.cpu.experts import experts_func
from moec.targets.kernels.cpu.experts_layout import ExpertsLayout, Factors
from moec.targets.kernels.cpu.isa import Isa
from moec.targets.kernels.cpu.layout import LaneLayout
from moec.targets.kernels.cpu.linear import linear_func
from moec.targets.kernels.cpu.norm import norm_func
from moec.targets.kernels.cpu.rope import rope_func
from moec.targets.kernels.cpu.router import router_func, topk_func
from moec.targets.kernels.cpu.skip import skip_func
from moec.targets.kernels.specs import AttentionSpec, NormSpec, RouterSpec, SkipSpec


class CpuKernels:
    """The CPU kernels in a module."""

    def __init__(self, functions: Functions, isa: Isa) -> None:
        self.bb, self.isa, self.functions = functions.bb, isa, functions

    def embedding(self, ids: Expr, weights: Mapping[str, Expr], layout: LaneLayout) -> Expr:
        tokens = static(ids)
        args, out = [ids, *weights.values()], ([count_of(ids), layout.k], "float32")
        return self.functions.call("embedding", (layout, tokens), lambda: embedding_func(layout, tokens), args, out)[0]

    def linear(self, x: Expr, weights: Mapping[str, Expr], layout: LaneLayout, bias: Expr | None, *, exact: bool) -> Expr:
        del exact  # it is
        tokens, args = static(x), [x, *weights.values(), *([] if bias is None else [bias])]
        key, out = (layout, tokens, bias is None), ([count_of(x), layout.n], "float32")
        return self.functions.call("linear", key, lambda: linear_func(layout, tokens, bias is not None, self.isa), args, out)[0]

    def norm(self, spec: NormSpec, inputs: Sequence[Expr]) -> list[Expr]:
        tokens, out = static(inputs[0]), ([count_of(inputs[0]), spec.size * spec.groups], "float32")
        return self.functions.call("norm", (spec, tokens), lambda: norm_func(spec, tokens, self.isa), inputs, *[out] * (1 + spec.residual))

    def rope(self, x: Expr, cos: Expr, sin: Expr, heads: int, d: int) -> Expr:
        tokens, out = static(x), ([count_of(x), heads * d], "float32")
        return self.functions.call("rope", (heads, d, tokens), lambda: rope_func(heads, d, tokens, self.isa), [x, cos, sin], out)[0]

    def attention(self, spec: AttentionSpec, caches: Sequence[Expr], inputs: Sequence[Expr]) -> Expr:
        tokens = static(inputs[0])
        kernel = self.functions.get("attention", (spec, tokens), lambda: attention_func(spec, tokens, self.isa))
        types = [*(cache.ty for cache in caches), relax.TensorType([count_of(inputs[0]), spec.heads * spec.dv], "float32")]
        result = self.bb.emit(relax.op.call_tir_inplace(kernel, relax.Tuple([*caches, *inputs]), [0, 1, -1], types))
        return self.bb.emit(relax.TupleGetItem(result, 2))

    def router(self, spec: RouterSpec, inputs: Sequence[Expr]) -> list[Expr]:
        tokens, shape = static(inputs[0]), [count_of(inputs[0]), spec.top_k]
        outs = (shape, "float32"), (shape, "int64")
        return self.functions.call("router", (spec, tokens), lambda: router_func(spec, tokens, self.isa), inputs, *outs)

    def skip(self, spec: SkipSpec, inputs: Sequence[Expr]) -> list[Expr]:
        tokens, shape = static(inputs[0]), [count_of(inputs[0]), spec.top_k]
        return self.functions.call("skip", (spec, tokens), lambda: skip_func(spec, tokens), inputs, (shape, "float32"), (shape, "int64"))

    def topk(self, x: Expr, k: int, largest: bool) -> list[Expr]:
        rows, size = static(x), int(x.ty.shape[1])
        key, shape = (size, k, largest, rows), [count_of(x), k]
        outs = (shape, "float32"), (shape, "int64")
        return self.functions.call("topk", key, lambda: topk_func(size, k, largest, rows, self.isa), [x], *outs)

    def experts(
        self, routed: Sequence[Expr], weights: Sequence[Mapping[str, Expr]], layout: ExpertsLayout, activation: ExpertActivation,
        biases: Sequence[Expr], counts: Expr | None,
    ) -> Expr:  # fmt: skip
        tokens, top_k = static(routed[0]), int(routed[1].ty.shape[1])
        kernel = self.functions.get(
            "experts",
            (layout, activation, tokens, top_k, bool(biases)),
            lambda: experts_func(layout, activation, self.isa, tokens=tokens, top_k=top_k, biases=bool(biases), counted=counts is not None),
        )
        assert counts is not None
        args = [*routed, *(array for arrays in weights for array in arrays.values()), *biases, counts]
        types = [counts.ty, relax.TensorType([count_of(routed[0]), layout.d], "float32")]
        result = self.bb.emit(relax.op.call_tir_inplace(kernel, relax.Tuple(args), [len(args) - 1, -1], types))
        return self.bb.emit(relax.TupleGetItem(result, 1))


class Layout(ExpertsLayout):
    """The experts of a layer, all of one format."""

    def stacks(self) -> dict[str, Alike]:
        """The layouts of all that an expert has, by name."""
        return {name: Alike(self.experts, matrix) for name, matrix in self.matrices().items()}


class CpuPlatform:
    """A processor."""

    chunk = 512
    page_tokens = PAGE
    cache_dtype = "float32"
    counted = True
    semaphores = 0
    tir_pipeline = "default"

    def __init__(self, target: TvmTarget) -> None:
        self.target, self.isa = target, Isa.of(target)

    def functions(self, graph: Graph) -> Sequence[Function]:
        del graph
        return ONE, ANY

    def kernels(self, functions: Functions, function: Function) -> CpuKernels:
        del function
        return CpuKernels(functions, self.isa)

    def matrix(self, n: int, k: int, format: str) -> LaneLayout:  # the field's word
        return LaneLayout(n, k, format)

    def experts(
        self, experts: int, d: int, f: int, formats: tuple[Formats, Formats], gated: bool, factors: tuple[Factors | None, Factors | None]
    ) -> Layout:
        up, down = formats
        if not isinstance(up, str) or not isinstance(down, str):
            found = ", ".join(sorted({name for names in formats if not isinstance(names, str) for name in names}))
            raise MoecError(f"experts of different formats ({found}) have no CPU kernel: split the layer (`uniform_experts`)")
        return Layout(experts, d, f, up, down, gated, *factors)

    def page_shapes(self, spec: AttentionSpec) -> Sequence[tuple[int, ...]]:
        return page_shapes(spec)

    def fusions(self, graph: Graph, storage: Mapping[str, Any], function: Function) -> Sequence[Fusion]:
        del graph, storage, function
        return ()

    def add_best(self, functions: Functions, vocabulary: int) -> None:
        """The host has the logits."""

    def schedules(self) -> list[tvm.transform.Pass]:
        return []

    def export(self, executable: Any, path: Path) -> dict[str, Any]:
        link(executable, path, self.target)
        if is_native(self.target):  # TVM's runtime travels along
            shutil.copy(runtime_library(RUNTIME), path.parent / RUNTIME)
        return {}


def link(executable: Any, path: Path, target: TvmTarget) -> None:
    """Write the library.

    Raises:
        MoecError: there is no C compiler to link with, or it fails.
    """
    compiler = _compiler(target)
    try:
        executable.export_library(str(path), fcompile=cc.cross_compiler(compiler))
    except RuntimeError as error:
        raise MoecError(f"linking {path.name} with {compiler} failed: {str(error).splitlines()[0]}") from error


def runtime_library(name: str) -> Path:
    """A library of TVM's runtime in the installed package.

    Raises:
        MoecError: the package has none.
    """
    found = next((path for folder in tvm.__path__ if (path := Path(folder, "lib", name)).is_file()), None)
    if found is None:
        raise MoecError(f"the installed apache-tvm has no {name}: install apache-tvm {tvm.__version__} from PyPI")
    return found


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
