"""The platform of NVIDIA GPUs: kernels in CUDA, compiled to machine code that lies beside the library."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.target import Target as TvmTarget

from moec.compiler.backends.tvm import cuda_module, fusions
from moec.compiler.backends.tvm.cpu import link, runtime_library
from moec.compiler.backends.tvm.cuda_choices import CHUNK, FEW, Choices, layer_of
from moec.compiler.backends.tvm.fusion import Fusion
from moec.compiler.backends.tvm.platform import AHEAD, BEST, Expr, Formats, Functions, count_of, static
from moec.compiler.backends.tvm.storage import experts_layout
from moec.compiler.cuda_code import machine_code, need_cuda_compiler
from moec.compiler.ir import Graph
from moec.runtime.executors.tvm import CUDA_RUNTIME, RUNTIME
from moec.runtime.tvm_functions import Function
from moec.targets import Target
from moec.targets.kernels.cpu.activation_functions import ExpertActivation
from moec.targets.kernels.cpu.experts_layout import Factors
from moec.targets.kernels.cuda import pipeline, plain
from moec.targets.kernels.cuda.ahead import ahead_func
from moec.targets.kernels.cuda.arrival import SEMAPHORES
from moec.targets.kernels.cuda.attention import PAGE, attention, attention_step, page_shapes, takes_step
from moec.targets.kernels.cuda.best import best_func
from moec.targets.kernels.cuda.calls import Gpu
from moec.targets.kernels.cuda.embedding import embedding_func
from moec.targets.kernels.cuda.experts import experts
from moec.targets.kernels.cuda.experts_layout import ExpertsLayout
from moec.targets.kernels.cuda.layout import FragmentLayout
from moec.targets.kernels.cuda.linear import TERMS, few_tokens, linear
from moec.targets.kernels.cuda.linear_tokens import TokensSpec, linear_tokens_func
from moec.targets.kernels.cuda.matrices import Projection
from moec.targets.kernels.cuda.norm import norm_func
from moec.targets.kernels.cuda.projections import ProjectionsSpec, projections_func
from moec.targets.kernels.cuda.projections_columns import TOKENS
from moec.targets.kernels.cuda.rope import rope_func
from moec.targets.kernels.cuda.router import router_func, topk_func
from moec.targets.kernels.cuda.routing_step import RoutingSpec
from moec.targets.kernels.cuda.routing_tokens import routing
from moec.targets.kernels.cuda.rows import layout_of
from moec.targets.kernels.cuda.skip import skip_func
from moec.targets.kernels.cuda.space import has_many, limits
from moec.targets.kernels.cuda.step_spec import StepOptions, StepSpec
from moec.targets.kernels.cuda.tuned import Choice
from moec.targets.kernels.specs import AttentionSpec, NormSpec, RouterSpec, SkipSpec

CUBIN = "kernels.cubin"

HOPPER_MEMORY, LEAST_MEMORY = 160 << 10, 96 << 10
"""Bytes of shared memory that attention takes at most; the latter every GPU's thread blocks get."""


class CudaKernels:
    """The CUDA kernels in a module."""

    def __init__(self, functions: Functions, platform: CudaPlatform, function: Function) -> None:
        self.bb, self.functions = functions.bb, functions
        self._platform, self._function = platform, function

    def embedding(self, ids: Expr, weights: Mapping[str, Expr], layout: FragmentLayout) -> Expr:
        tokens, kind = _one(ids), str(ids.ty.dtype)
        args, out = [ids, *weights.values()], ([count_of(ids), layout.k], "float32")
        return self.functions.call("embedding", (layout, tokens, kind), lambda: embedding_func(layout, tokens, kind), args, out)[0]

    def linear(self, x: Expr, weights: Mapping[str, Expr], layout: FragmentLayout, bias: Expr | None, *, exact: bool) -> Expr:
        gpu, most, tokens = self._platform.gpu, self._function.most, static(x)
        if layout.in_fragments:
            matrix, inputs = [Projection(layout, bias is not None)], [x, *weights.values(), *([] if bias is None else [bias])]
            if tokens in TOKENS:
                spec = ProjectionsSpec.of(matrix, gpu.multiprocessors, tokens=tokens)
                if spec.suits(gpu):
                    return self.projections(spec, inputs)[0]
            elif tokens is None and most is not None and self._platform.products and TokensSpec.suits(matrix, gpu, most):
                return self.linear_tokens(TokensSpec.of(matrix, gpu, most), inputs)[0]
        stacked = {name: self.bb.emit(relax.op.reshape(array, [1, *array.ty.shape])) for name, array in weights.items()}
        if layout.in_fragments and (self._platform.products or few_tokens(layout, bias is not None, tokens, gpu) is not None):
            return linear(self.functions, x, stacked, layout, bias, most, gpu, TERMS if exact else self._platform.terms)
        if not layout.in_fragments:
            self._platform.choices.only_plain(f"weights in {layout.format}")
        return plain.linear(self.functions, x, stacked, layout, bias)

    def projections(self, spec: ProjectionsSpec, inputs: Sequence[Expr]) -> list[Expr]:
        """Products of a few tokens with several matrices: the inputs and results of `projections_func`."""
        wide, norm = ([spec.tokens, spec.k], "float32"), spec.norm
        outs = [wide] * (int(norm is not None and norm.residual) + spec.written)
        outs += [([spec.tokens, matrix.layout.n], "float32") for matrix in spec.matrices]
        return self.functions.call("projections", spec, lambda: projections_func(spec), inputs, *outs)

    def linear_tokens(self, spec: TokensSpec, inputs: Sequence[Expr]) -> list[Expr]:
        """Products of any number of tokens with several matrices: the inputs and results of `linear_tokens_func`."""
        outs = [([count_of(inputs[0]), matrix.layout.n], "float32") for matrix in spec.matrices]
        return self.functions.call("linear_tokens", spec, lambda: linear_tokens_func(spec), inputs, *outs)

    def norm(self, spec: NormSpec, inputs: Sequence[Expr]) -> list[Expr]:
        tokens, out = _one(inputs[0]), ([count_of(inputs[0]), spec.size * spec.groups], "float32")
        return self.functions.call("norm", (spec, tokens), lambda: norm_func(spec, tokens), inputs, *[out] * (1 + spec.residual))

    def rope(self, x: Expr, cos: Expr, sin: Expr, heads: int, d: int) -> Expr:
        tokens, out = _one(x), ([count_of(x), heads * d], "float32")
        return self.functions.call("rope", (heads, d, tokens), lambda: rope_func(heads, d, tokens), [x, cos, sin], out)[0]

    def attention(self, spec: AttentionSpec, caches: Sequence[Expr], inputs: Sequence[Expr]) -> Expr:
        return attention(self.bb, self.functions.get, caches, inputs, spec, self._platform.cache_dtype)

    def attention_step(self, spec: StepSpec, caches: Sequence[Expr], inputs: Sequence[Expr]) -> Expr:
        """Attention with what the spec says of q and k, where `takes_step` -> [T, H*dv]. Caches (K, V) change.

        Args:
            inputs: q, k, v, blocks, page_table, semaphores[, weights of the norms][, cos, sin][, sinks].
        """
        platform, most = self._platform, self._function.most or CHUNK
        options = StepOptions.of(spec, platform.cache_dtype, platform.attention_memory, platform.gpu.multiprocessors, most)
        return attention_step(self.bb, self.functions.get, caches, inputs, spec, options, platform.cache_dtype)

    def router(self, spec: RouterSpec, inputs: Sequence[Expr]) -> list[Expr]:
        tokens, shape = _one(inputs[0]), [count_of(inputs[0]), spec.top_k]
        return self.functions.call(
            "router", (spec, tokens), lambda: router_func(spec, tokens), inputs, (shape, "float32"), (shape, "int64")
        )

    def routing_step(self, spec: RoutingSpec, inputs: Sequence[Expr], layers: Sequence[tuple[ExpertsLayout, int]]) -> list[Expr]:
        """The inputs and results of `routing_step_func`.

        Args:
            layers: the experts that read the normalised row, and how many of them run.
        """
        choices = [self._choice(layout, top_k) for layout, top_k in layers] if spec.tokens != 1 else []
        terms = [choice.options["terms"] for choice in choices if choice is not None and choice.kernel == "prefill"]
        return routing(self.functions, spec, inputs, terms[0] if terms else 0)

    def _choice(self, layout: ExpertsLayout, top_k: int) -> Choice | None:
        """What a layer of experts runs; None: plain kernels."""
        return self._platform.choices.of(layer_of(layout, top_k), self._function) if layout.in_fragments else None

    def skip(self, spec: SkipSpec, inputs: Sequence[Expr]) -> list[Expr]:
        tokens, shape = _one(inputs[0]), [count_of(inputs[0]), spec.top_k]
        return self.functions.call("skip", (spec, tokens), lambda: skip_func(spec, tokens), inputs, (shape, "float32"), (shape, "int64"))

    def topk(self, x: Expr, k: int, largest: bool) -> list[Expr]:
        rows, size = _one(x), int(x.ty.shape[1])
        key, shape = (size, k, largest, rows), [count_of(x), k]
        return self.functions.call("topk", key, lambda: topk_func(size, k, largest, rows), [x], (shape, "float32"), (shape, "int64"))

    def experts(
        self, routed: Sequence[Expr], weights: Sequence[Mapping[str, Expr]], layout: ExpertsLayout, activation: ExpertActivation,
        biases: Sequence[Expr], counts: Expr | None,
    ) -> Expr:  # fmt: skip
        parts = [*layout.stacks()]
        named = {f"{part}_{name}": array for part, arrays in zip(parts, weights, strict=True) for name, array in arrays.items()}
        x, ids, routing = routed
        both = (biases[0], biases[1]) if biases else None
        choice = self._choice(layout, int(ids.ty.shape[1]))
        if not layout.in_fragments:
            self._platform.choices.only_plain(f"experts with {', '.join(sorted(_plain_parts(layout)))}")
        if choice is None:
            return plain.experts(self.functions, x, ids, routing, named, layout, activation, both, counts)
        return experts(self.functions, x, ids, routing, named, layout, activation, both, counts, choice)


def _one(x: Expr) -> int | None:
    """1 for one token, which has kernels of its own; kernels of any number serve all others."""
    return 1 if static(x) == 1 else None


def _plain_parts(layout: ExpertsLayout) -> set[str]:
    """What of a layer the kernels of the tensor cores do not read."""
    stacks = layout.stacks()
    formats = {f"weights in {c.format}" for stack in stacks.values() for c in stack.classes if not c.in_fragments and c.format != "zero"}
    return {"low-rank factors"} if len(stacks) > 2 else formats


class Layout(ExpertsLayout):
    """The experts of a layer."""

    @property
    def bias_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of what `biases` returns."""
        return (self.experts, self.gate_up.n), (self.experts, self.d)


class CudaPlatform:
    """An NVIDIA GPU."""

    chunk = CHUNK
    page_tokens = PAGE
    counted = True
    semaphores = SEMAPHORES
    tir_pipeline = pipeline.NAME

    def __init__(self, target: Target, cache_dtype: str = "bfloat16", activations: str = "float") -> None:
        self.cache_dtype, self.terms = cache_dtype, TERMS if activations == "float" else 1
        described = json.loads(target.tvm)
        self.arch = str(described["arch"])
        self.target = TvmTarget({**described, "host": {"kind": "llvm"}})
        self.gpu, self.products = Gpu(*limits(target)), has_many(target)
        self.choices = Choices(target, self.products, activations)
        self.attention_memory = HOPPER_MEMORY if self.gpu.clusters else LEAST_MEMORY

    def functions(self, graph: Graph) -> Sequence[Function]:
        nodes = [node for node in graph.nodes if node.op == "experts"]
        layers = []
        for node in nodes:
            layout = experts_layout(graph, node, self)
            assert isinstance(layout, Layout)
            if layout.in_fragments:
                layers.append(layer_of(layout, int(graph.type_of(node.inputs[1]).shape[-1])))
        return self.choices.functions(list(dict.fromkeys(layers)))

    def kernels(self, functions: Functions, function: Function) -> CudaKernels:
        return CudaKernels(functions, self, function)

    def matrix(self, n: int, k: int, format: str) -> FragmentLayout:  # the field's word
        return layout_of(n, k, format)

    def experts(
        self, experts: int, d: int, f: int, formats: tuple[Formats, Formats], gated: bool, factors: tuple[Factors | None, Factors | None]
    ) -> Layout:
        up, down = (None if found is None else (found.rank, found.left, found.right) for found in factors)
        return Layout(experts, d, f, *formats, gated, (), up, down)

    def page_shapes(self, spec: AttentionSpec) -> Sequence[tuple[int, ...]]:
        return page_shapes(spec)

    def fusions(self, graph: Graph, storage: Mapping[str, Any], function: Function) -> Sequence[Fusion]:
        tokens, most = function.tokens, function.most
        if tokens in (1, *FEW):
            return fusions.match(graph, storage, self.gpu, tokens)
        steps = fusions.attention.match(graph, storage, self.gpu, None)
        fitting = [step for step in steps if takes_step(step.spec.attention, None, self.cache_dtype, self.attention_memory)]
        return fitting if most is None else [*fitting, *fusions.match_up_to(graph, storage, self.gpu, most)]

    def add_best(self, functions: Functions, vocabulary: int) -> None:
        rows, bb = tirx.Var("R", "int64"), functions.bb
        logits = relax.Var("logits", relax.TensorType([rows, vocabulary], "float32"))
        with bb.function(BEST, [logits]):
            with bb.dataflow():
                found = functions.call("best_rows", vocabulary, lambda: best_func(vocabulary, None), [logits], ([rows, 3], "float32"))
                result = bb.emit_output(found[0])
            bb.emit_func_output(result)
        self._add_ahead(functions)

    def _add_ahead(self, functions: Functions) -> None:
        rows, tokens, steps = (tirx.Var(name, "int64") for name in "RTN")
        types = {
            "found": ([rows, 3], "float32"), "ids": ([tokens], "int64"), "positions": ([tokens], "int64"), "blocks": ([tokens, 4], "int32"),
            "turn": ([2], "int32"), "history": ([steps, rows, 3], "float32"),
        }  # fmt: skip
        inputs = [relax.Var(name, relax.TensorType(*kind)) for name, kind in types.items()]
        bb, kernel = functions.bb, functions.get("next_inputs", None, ahead_func)
        with bb.function(AHEAD, inputs):
            with bb.dataflow():
                changed, places = [var.ty for var in inputs[1:]], list(range(1, len(inputs)))
                found = bb.emit(relax.op.call_tir_inplace(kernel, relax.Tuple(inputs), places, changed))
                result = bb.emit_output(relax.TupleGetItem(found, len(changed) - 1))
            bb.emit_func_output(result)

    def schedules(self) -> list[tvm.transform.Pass]:
        return cuda_module.schedules()

    def export(self, executable: Any, path: Path) -> dict[str, Any]:
        link(executable, path, self.target)
        (source,) = cuda_module.sources(executable.mod)
        (path.parent / CUBIN).write_bytes(machine_code(source, self.arch, need_cuda_compiler()))
        for name in (RUNTIME, CUDA_RUNTIME):
            shutil.copy(runtime_library(name), path.parent / name)
        code = {"arch": self.arch, "cubin": CUBIN, "source_sha256": hashlib.sha256(source.encode()).hexdigest()}
        return {"cuda": code, "choices": self.choices.made(), "notes": self.choices.lines()}
