"""Activation functions of expert MLPs on single float32, as device functions."""

from __future__ import annotations

from moec.runtime.errors import unknown
from moec.targets.kernels.cpu.activation_functions import ExpertActivation
from moec.targets.kernels.cuda.emit import Expr, const
from moec.targets.kernels.cuda.intrinsics import call

_SOURCE = r"""
#ifndef MOEC_ACTIVATION
#define MOEC_ACTIVATION
__device__ __forceinline__ float moec_sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
__device__ __forceinline__ float moec_silu(float x) { return x * moec_sigmoid(x); }
__device__ __forceinline__ float moec_gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678f)); }
__device__ __forceinline__ float moec_gelu_tanh(float x) { return x * moec_sigmoid(1.59576912f * (x + 0.044715f * x * x * x)); }
__device__ __forceinline__ float moec_quick_gelu(float x) { return x * moec_sigmoid(1.702f * x); }
__device__ __forceinline__ float moec_relu(float x) { return fmaxf(x, 0.f); }
__device__ __forceinline__ float moec_relu_squared(float x) { const float y = fmaxf(x, 0.f); return y * y; }
__device__ __forceinline__ float moec_clamped_swiglu(float gate, float up, float alpha, float limit) {
  gate = fminf(gate, limit);
  up = fminf(fmaxf(up, -limit), limit);
  return (up + 1.f) * gate * moec_sigmoid(gate * alpha);
}
#endif
"""

FUNCTIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared")


def plain(activation: ExpertActivation, x: Expr) -> Expr:
    """f(x)."""
    if activation.kind not in FUNCTIONS:
        raise unknown("expert activation", activation.kind, FUNCTIONS)
    return call(f"moec_{activation.kind}", _SOURCE, x, result="float32")


def gated(activation: ExpertActivation, gate: Expr, up: Expr) -> Expr:
    """f(gate) * up, or what `ExpertActivation` says of `clamped_swiglu`."""
    if activation.kind != "clamped_swiglu":
        return plain(activation, gate) * up
    alpha, limit = (const(value, "float32") for value in (activation.alpha, activation.limit))
    return call("moec_clamped_swiglu", _SOURCE, gate, up, alpha, limit, result="float32")
