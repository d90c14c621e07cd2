"""What kernels of rows are told about an op, on any hardware: its attributes, and the shapes that are known when it is compiled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NormSpec:
    """A normalisation of every `size` neighbouring values of a row of `groups * size`.

    Args:
        size, groups: as above; a norm over heads has a group a head.
        eps, offset: as in the ops.
        center: subtract the mean first (layer_norm).
        weight, bias: whether there are weights and biases [size].
        residual: add a second input first, and return the sum too.
    """

    size: int
    groups: int
    eps: float
    offset: float = 0.0
    center: bool = False
    weight: bool = True
    bias: bool = False
    residual: bool = False


@dataclass(frozen=True)
class AttentionSpec:
    """The attributes and shapes of an `attention` op, which has to be causal.

    Args:
        heads, kv_heads, d, dv: H, HK, and the head sizes of q/k and of v.
        scale, window, chunk, softcap: as in `moec.compiler.ops.attention`.
        sinks: whether there are attention sinks.
    """

    heads: int
    kv_heads: int
    d: int
    dv: int
    scale: float
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False


@dataclass(frozen=True)
class RouterSpec:
    """The attributes and shapes of a `router` op."""

    experts: int
    top_k: int
    score: str = "softmax"
    normalize: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    bias: bool = False


@dataclass(frozen=True)
class SkipSpec:
    """The attributes and shapes of a `skip` op."""

    top_k: int
    experts: int
    ratio: float = 0.0
    top_p: float = 1.0
    normalize: bool = False
    counts: bool = False
