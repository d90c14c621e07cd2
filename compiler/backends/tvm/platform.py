"""What differs between kinds of hardware: how weights lie in memory, which kernels an op becomes, and how code is made for the module."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, tirx
from tvm.target import Target as TvmTarget

from moec.compiler.backends.tvm.fusion import Fusion
from moec.compiler.ir import Graph
from moec.runtime.tvm_functions import Function
from moec.targets import Target
from moec.targets.kernels.cpu.activation_functions import ExpertActivation
from moec.targets.kernels.cpu.experts_layout import Factors
from moec.targets.kernels.specs import AttentionSpec, NormSpec, RouterSpec, SkipSpec

Expr = Any

BEST = "best"
"""The function that finds the likeliest tokens."""

AHEAD = "ahead"
"""The function that makes the inputs of the next step of what `BEST` found."""

Arrays = Mapping[str, NDArray[np.generic]]
Formats = str | tuple[str, ...]


ONE, ANY = Function("decode", 1, 1, 1), Function("forward")


class MatrixLayout(Protocol):
    """How a matrix [N, K] lies in memory."""

    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def format(self) -> str: ...
    @property
    def integer(self) -> Any: ...
    def arrays(self, *lead: int) -> dict[str, tuple[tuple[int, ...], str]]: ...
    def tile(self, codes: Any, scale: Any, zero: Any = None) -> dict[str, NDArray[np.generic]]: ...
    def untile(self, arrays: Arrays) -> tuple[Any, Any, Any]: ...
    def tile_values(self, values: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]: ...
    def untile_values(self, arrays: Arrays) -> NDArray[np.generic]: ...


class MatrixStack(Protocol):
    """How one projection of all experts lies in memory: a layout for each format that occurs, whose arrays' names end in its suffix."""

    @property
    def classes(self) -> Sequence[MatrixLayout]: ...
    @property
    def mixed(self) -> bool: ...
    def members(self, index: int) -> Sequence[int]: ...
    def suffix(self, index: int) -> str: ...
    def table(self) -> NDArray[np.int32]: ...


@dataclass(frozen=True)
class Alike:
    """The stack of experts of one format."""

    experts: int
    layout: MatrixLayout
    mixed: bool = False

    @property
    def classes(self) -> Sequence[MatrixLayout]:
        """The one layout."""
        return (self.layout,)

    def members(self, index: int) -> Sequence[int]:
        """All experts."""
        del index
        return range(self.experts)

    def suffix(self, index: int) -> str:
        """Nothing."""
        del index
        return ""

    def table(self) -> NDArray[np.int32]:
        """int32 [E, 2]: the class of each expert, and its place there."""
        return np.stack([np.zeros(self.experts, np.int32), np.arange(self.experts, dtype=np.int32)], axis=1)


class ExpertsLayout(Protocol):
    """How the experts of a layer lie in memory."""

    @property
    def experts(self) -> int: ...
    @property
    def d(self) -> int: ...
    @property
    def f(self) -> int: ...
    @property
    def parts(self) -> int: ...
    @property
    def bias_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]: ...
    def stacks(self) -> Mapping[str, MatrixStack]: ...
    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]: ...
    def interleave(self, x: Any) -> Any: ...
    def deinterleave(self, x: Any) -> Any: ...
    def biases(self, gate_up: Any, down: Any) -> tuple[Any, Any]: ...
    def nbytes(self) -> int: ...


class Kernels(Protocol):
    """The ops, as calls of kernels that are emitted into a Relax function. T is static (1) or symbolic; numbers are float32."""

    def embedding(self, ids: Expr, weights: Mapping[str, Expr], layout: Any) -> Expr:
        """Rows [T, K] of a weight."""
        ...

    def linear(self, x: Expr, weights: Mapping[str, Expr], layout: Any, bias: Expr | None, *, exact: bool) -> Expr:
        """x [T, K] -> [T, N]; where it is to be `exact`, activations are not rounded to what was asked for."""
        ...

    def norm(self, spec: NormSpec, inputs: Sequence[Expr]) -> list[Expr]:
        """(x [, residual] [, weight] [, bias]) -> ([sum,] normalised)."""
        ...

    def rope(self, x: Expr, cos: Expr, sin: Expr, heads: int, d: int) -> Expr:
        """x [T, H*d], cos and sin [T, d] -> [T, H*d]."""
        ...

    def attention(self, spec: AttentionSpec, caches: Sequence[Expr], inputs: Sequence[Expr]) -> Expr:
        """Caches (K, V), which change; (q, k, v, blocks, page_table[, sinks]) -> [T, H*dv]."""
        ...

    def router(self, spec: RouterSpec, inputs: Sequence[Expr]) -> list[Expr]:
        """(logits [T, E][, bias]) -> weights [T, K], ids int64 [T, K]."""
        ...

    def skip(self, spec: SkipSpec, inputs: Sequence[Expr]) -> list[Expr]:
        """(weights, ids[, counts]) -> weights, ids."""
        ...

    def topk(self, x: Expr, k: int, largest: bool) -> list[Expr]:
        """x [N, M] -> values, indices int64 [N, k]."""
        ...

    def experts(
        self, routed: Sequence[Expr], weights: Sequence[Mapping[str, Expr]], layout: Any, activation: ExpertActivation,
        biases: Sequence[Expr], counts: Expr | None,
    ) -> Expr:  # fmt: skip
        """(x [T, D], ids, weights [T, K]), the arrays of gate_up, down and their factors -> [T, D]. `counts` int64 [8] grow, if any."""
        ...


class Platform(Protocol):
    """A kind of hardware."""

    target: TvmTarget
    chunk: int
    """Tokens of a call at most."""
    page_tokens: int
    """Tokens of a page of the attention caches."""
    cache_dtype: str
    """Type of the numbers in the caches: float32 or bfloat16."""
    counted: bool
    """Whether the experts' kernels count what they run."""
    semaphores: int
    """Counters that kernels of several thread blocks share, each of them zero between kernels."""
    tir_pipeline: str
    """TVM's name of the passes that make code of kernels."""

    def functions(self, graph: Graph) -> Sequence[Function]:
        """The functions of a library, those for fewer tokens first."""
        ...

    def kernels(self, functions: Functions, function: Function) -> Kernels:
        """The kernels for one function of a module, which has the PrimFuncs of all."""
        ...

    def matrix(self, n: int, k: int, format: str) -> MatrixLayout:  # the field's word
        """The layout of a weight."""
        ...

    def experts(
        self, experts: int, d: int, f: int, formats: tuple[Formats, Formats], gated: bool, factors: tuple[Factors | None, Factors | None]
    ) -> ExpertsLayout:
        """The layout of a layer's experts: formats (of all experts, or of each) and low-rank factors are those of gate_up and of down."""
        ...

    def page_shapes(self, spec: AttentionSpec) -> Sequence[tuple[int, ...]]:
        """Shapes of a page of K and of V."""
        ...

    def fusions(self, graph: Graph, storage: Mapping[str, Any], function: Function) -> Sequence[Fusion]:
        """Nodes that its kernels compute together in a function. No two share a node."""
        ...

    def add_best(self, functions: Functions, vocabulary: int) -> None:
        """Add a function `BEST`, from logits [R, V] to what `moec.runtime.sampler.Best.found` takes [R, 3], unless the host is as fast.

        And `AHEAD`, for which see `moec.runtime.tvm_call.Ahead`, where a call takes long to begin: from what `BEST` found, the streams
        `ids`, `positions` [T] and `blocks` [T, 4] of one token of each sequence, `turn` int32 [2] and `history` [N, R, 3], which changes
        like the streams and is the result.
        """
        ...

    def schedules(self) -> list[tvm.transform.Pass]:
        """What the operators that are no kernels need before code is generated."""
        ...

    def export(self, executable: Any, path: Path) -> dict[str, Any]:
        """Write the library, and what else the runtime needs beside it; return what it has to know."""
        ...


def platform_of(target: Target, cache_dtype: str, activations: str = "float") -> Platform:
    """The platform of a target's kind, with a cache and activations of these types, which it must have."""
    described: Any = json.loads(target.tvm) if target.tvm.lstrip().startswith("{") else target.tvm
    if target.kind == "cuda":
        from moec.compiler.backends.tvm.cuda import CudaPlatform

        return CudaPlatform(target, cache_dtype, activations)
    from moec.compiler.backends.tvm.cpu import CpuPlatform

    return CpuPlatform(TvmTarget(described))


@dataclass
class Functions:
    """PrimFuncs of a module, each built once however many layers call it."""

    bb: relax.BlockBuilder
    built: dict[object, Any] = field(default_factory=dict)
    made: dict[tuple[str, Expr], Expr] = field(default_factory=dict)

    def call(
        self, name: str, key: object, make: Callable[[], tirx.PrimFunc], args: Sequence[Expr], *outs: tuple[Sequence[Any], str]
    ) -> list[Expr]:
        """Call the kernel of this name and key; returns its outputs, whose shapes and dtypes are given."""
        types = [relax.TensorType(list(shape), dtype) for shape, dtype in outs]
        result = self.bb.emit(relax.call_tir(self.get(name, key, make), list(args), types[0] if len(types) == 1 else types))
        return [result] if len(types) == 1 else [self.bb.emit(relax.TupleGetItem(result, i)) for i in range(len(types))]

    def once(self, name: str, x: Expr, make: Callable[[], Expr]) -> Expr:
        """What is made of a variable under this name: the first time what `make` emits, later the same again."""
        if (name, x) not in self.made:
            self.made[name, x] = make()
        return self.made[name, x]

    def get(self, name: str, key: object, make: Callable[[], tirx.PrimFunc]) -> Any:
        """The global variable of a kernel."""
        if (name, key) not in self.built:
            self.built[name, key] = self.bb.add_func(make(), name)
        return self.built[name, key]


def count_of(x: Expr) -> Any:
    """The first dimension."""
    return x.ty.shape[0]


def static(x: Expr) -> int | None:
    """The first dimension, where it is known."""
    count = count_of(x)
    return int(count) if isinstance(count, tirx.IntImm) else None
