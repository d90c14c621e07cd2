"""Elementary functions as TIR expressions that stay in vector registers.

LLVM calls libm once a lane for the exponential of a vector; this is a polynomial. Choices are written as `Select` with the
comparison that fails for NaN, so that NaN stays NaN (TVM folds `x != x`, and its min and max lose NaN).
"""

from __future__ import annotations

from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.emit import Expr, lane_type, splat

_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOWEST, _HIGHEST = -87.3, 88.3


def exp(x: Expr, lanes: int = 1) -> Expr:
    """e^x of float32 to about 1e-7 relatively; 0 below -87.3, finite above 88.3.

    As expf of Cephes (https://www.netlib.org/cephes/): x = n ln 2 + r, a polynomial in r, n added to the exponent's bits.
    """

    def f(value: float) -> Expr:
        return splat(value, "float32", lanes)

    x = T.Bind(x)
    inside = T.Bind(T.Select(x > f(_HIGHEST), f(_HIGHEST), T.Select(x < f(_LOWEST), f(_LOWEST), x)))
    n = T.Bind(T.floor(inside * f(_LOG2E) + f(0.5)))
    r = T.Bind(inside - n * f(_LN2_HIGH) - n * f(_LN2_LOW))
    series = f(_COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        series = series * r + f(coefficient)
    exponent = T.cast(n, lane_type("int32", lanes)) + splat(127, "int32", lanes)
    power = T.reinterpret(lane_type("float32", lanes), T.shift_left(exponent, splat(23, "int32", lanes)))
    return T.Select(x < f(_LOWEST), f(0.0), (series * r * r + r + f(1.0)) * power)


def sigmoid(x: Expr, lanes: int = 1) -> Expr:
    """1 / (1 + e^-x)."""
    one = splat(1.0, "float32", lanes)
    return one / (one + exp(splat(0.0, "float32", lanes) - x, lanes))


def tanh(x: Expr, lanes: int = 1) -> Expr:
    """1 - 2 / (e^2x + 1), to about 1e-7 absolutely."""
    one, two = splat(1.0, "float32", lanes), splat(2.0, "float32", lanes)
    return one - two / (exp(x * two, lanes) + one)
