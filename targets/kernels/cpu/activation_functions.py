"""Activation functions of expert MLPs, on vectors of float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from moec.runtime.errors import unknown
from moec.targets.kernels.cpu.emit import Expr, splat
from moec.targets.kernels.cpu.math import exp, sigmoid

ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)  # Abramowitz and Stegun 7.1.26, error < 1.5e-7


@dataclass(frozen=True)
class ExpertActivation:
    """What an expert applies between its projections.

    `kind` names a function of FUNCTIONS; a gated expert computes f(gate) * up. `clamped_swiglu` (gated only) is
    (up + 1) * gate * sigmoid(alpha * gate) with gate <= limit and -limit <= up <= limit.
    """

    kind: str = "silu"
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        if self.kind != "clamped_swiglu" and self.kind not in FUNCTIONS:
            raise unknown("expert activation", self.kind, [*FUNCTIONS, "clamped_swiglu"])

    def plain(self, x: Expr, lanes: int) -> Expr:
        """f(x)."""
        return FUNCTIONS[self.kind](x, lanes)

    def gated(self, gate: Expr, up: Expr, lanes: int) -> Expr:
        """f(gate) * up."""
        if self.kind != "clamped_swiglu":
            return FUNCTIONS[self.kind](gate, lanes) * up
        limit = _f(self.limit, lanes)
        gate = T.Bind(T.min(gate, limit))
        up = T.min(T.max(up, _f(-self.limit, lanes)), limit)
        return (up + _f(1, lanes)) * gate * sigmoid(gate * _f(self.alpha, lanes), lanes)


def _f(value: float, lanes: int) -> Expr:
    return splat(float(value), "float32", lanes)


def silu(x: Expr, lanes: int) -> Expr:
    return x * sigmoid(x, lanes)


def relu(x: Expr, lanes: int) -> Expr:
    return T.max(x, _f(0, lanes))


def relu_squared(x: Expr, lanes: int) -> Expr:
    return relu(x, lanes) * relu(x, lanes)


def gelu_tanh(x: Expr, lanes: int) -> Expr:
    """0.5 x (1 + tanh(y)) = x sigmoid(2 y), y = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x * sigmoid(_f(1.5957691216057308, lanes) * (x + _f(0.044715, lanes) * x * x * x), lanes)


def gelu(x: Expr, lanes: int) -> Expr:
    """0.5 x (1 + erf(x / sqrt(2)))."""
    z = T.Bind(T.fabs(x) * _f(0.7071067811865476, lanes))
    t = T.Bind(_f(1, lanes) / (_f(1, lanes) + _f(0.3275911, lanes) * z))
    p = _f(ERF[0], lanes)
    for coefficient in ERF[1:]:
        p = p * t + _f(coefficient, lanes)
    tail = T.Bind(p * t * exp(_f(0, lanes) - z * z, lanes))  # 1 - erf(z)
    return x * _f(0.5, lanes) * T.Select(x < _f(0, lanes), tail, _f(2, lanes) - tail)


def quick_gelu(x: Expr, lanes: int) -> Expr:
    return x * sigmoid(_f(1.702, lanes) * x, lanes)


FUNCTIONS: dict[str, Callable[[Expr, int], Expr]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": relu,
    "relu_squared": relu_squared,
}
