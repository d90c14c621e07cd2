"""The TVM backend: a graph as Relax functions over CPU kernels written in TIR, compiled into one shared library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.targets.kernels.cuda.space import has_clusters

if TYPE_CHECKING:
    from moec.compiler.backends.tvm.backend import TvmBackend
    from moec.compiler.ir import Graph
    from moec.targets import Target


def make(
    graph: Graph,
    target: Target,
    portable: bool = False,  # noqa: ARG001  # an option of other backends
    cache_dtype: str | None = None,
    activations: str = "float",
) -> TvmBackend:
    """The backend for a graph and target.

    Args:
        activations: of linear layers and experts. `float`: 16 bits of them or more. On GPUs, in calls of more than a few hundred tokens (of
            experts, more than 8): `bfloat16`, rounded to it, but not where logits are computed, of tokens or of experts; `fp8`: the same,
            and experts whose weights are E4M3 multiply E4M3, on GPUs of compute capability 9.0.
    """
    from moec.compiler.backends.tvm.backend import TvmBackend  # importing TVM takes a second

    return TvmBackend(graph, target, cache_dtype, activations)


def activation_kinds(target: Target) -> tuple[str, ...]:
    """What products may be computed with, the usual one first."""
    if target.kind != "cuda":
        return ("float",)
    return ("float", "bfloat16", "fp8") if has_clusters(target) else ("float", "bfloat16")


def cache_dtypes(target: Target, activations: str = "float") -> tuple[str, ...]:  # noqa: ARG001  # an option of other backends
    """Types of cached keys and values, the usual one first.

    On GPUs that is bfloat16, half the memory and time of float32: it costs a trained model 5e-5 nats a token
    (`benchmarks.cache_precision`). The kernels for processors have float32 only.
    """
    return ("bfloat16", "float32") if target.kind == "cuda" else ("float32",)


def takes_mixed_experts(target: Target) -> bool:
    """Whether a layer whose experts differ in format can be one node: the GPU's kernels have a table of them."""
    return target.kind == "cuda"
