"""Elementwise arithmetic as small trees: activations, residuals and gates in one vocabulary.

An expression is a number, an operand `("x", i)`, or `(primitive, *expressions)`; being nested
tuples, it is hashable and part of what a kernel is specialised to. `PRIMITIVES` says what each
primitive is in torch and as vector code; everything else is composed of them, so a new activation
is one line in `ACTIVATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from llvmlite import ir

from .builder import I32, Builder, Value

Expression = Any

# exp(r) = 1 + r P(r) for |r| <= ln(2) / 2, relative error 9e-8
_EXP = (0.9999997, 0.4999915, 0.16667637, 0.041897975, 0.0082903067)
_LN2 = 0.6931471805599453
_LN2_SPLIT = (0.693359375, -2.12194440e-4)  # the first times a small integer is exact
# tanh(x) = x + x³ P(x²) for |x| <= 0.625, relative error 4e-9
_TANH = (-0.3333328, 0.13331442, -0.05373972, 0.020639097, -0.0057049962)
# log((1 + s) / (1 - s)) = 2 s + s³ P(s²) for |s| <= 0.172, relative error 3e-8
_LOG = (0.66666667, 0.40000122, 0.28550783, 0.23331338)
# log((1 + s) / (1 - s)) = s P(s²) for |s| <= 1/3, relative error 8e-9
_LOG_FAR = (2.0, 0.66666316, 0.40024854, 0.27961419, 0.28174657)
# P[X < -a] = exp(-a² / 2) P(1 / (1 + 0.3 a)) for normal X and a >= 0, relative error 6e-8
_TAIL = (
    7.1695786e-06,
    0.11948767,
    0.12192045,
    0.09468306,
    0.14253667,
    -0.07650834,
    0.22866182,
    -0.169167,
    0.03837848,
)


def operand(i: int) -> Expression:
    """The `i`-th input."""
    return ("x", i)


def relu(x: Expression) -> Expression:
    """`max(x, 0)`."""
    return ("max", x, 0.0)


def clamp(x: Expression, low: float, high: float) -> Expression:
    """`min(max(x, low), high)`."""
    return ("min", ("max", x, low), high)


def hardsigmoid(x: Expression) -> Expression:
    """`relu6(x + 3) / 6`."""
    return ("mul", clamp(("add", x, 3.0), 0.0, 6.0), 1 / 6)


def leaky_relu(x: Expression, slope: float = 0.01) -> Expression:
    """`max(x, 0) + slope * min(x, 0)`."""
    return ("add", ("max", x, 0.0), ("mul", ("min", x, 0.0), slope))


def elu(x: Expression, alpha: float = 1.0, scale: float = 1.0, below: float = 1.0) -> Expression:
    """`x` above 0 and `alpha (exp(x) - 1)` below; exp(x) - 1 = 2 t / (1 - t), t = tanh(x / 2)."""
    t = ("tanh", ("mul", ("min", x, 0.0), below / 2))
    small = ("div", ("mul", t, 2.0 * alpha), ("sub", 1.0, t))
    return ("mul", ("add", ("max", x, 0.0), small), scale)


def mish(x: Expression) -> Expression:
    """`x tanh(log(1 + exp(x)))` = `x u / (u + 2 f)`, f = exp(-x), u = 1 / f + 2."""
    f = ("exp", ("mul", ("min", x, 30.0), -1.0))
    u = ("add", ("div", 1.0, f), 2.0)
    return ("mul", x, ("div", u, ("add", u, ("add", f, f))))


def _log_one_plus_exp_below(x: Expression) -> Expression:
    """`log(1 + exp(-|x|))`; log(1 + e) = log((1 + s) / (1 - s)), s = e / (2 + e) <= 1/3."""
    e = ("exp", ("min", x, ("mul", x, -1.0)))
    s = ("div", e, ("add", e, 2.0))
    square = ("mul", s, s)
    sum_: Expression = _LOG_FAR[-1]
    for coefficient in reversed(_LOG_FAR[:-1]):
        sum_ = ("fma", sum_, square, coefficient)
    return ("mul", s, sum_)


def softplus(x: Expression, beta: float = 1.0, threshold: float = 20.0) -> Expression:
    """`log(1 + exp(beta x)) / beta`, or `x` where `beta x` is above the threshold."""
    scaled = ("mul", x, float(beta)) if beta != 1 else x
    smooth = ("add", ("max", scaled, 0.0), _log_one_plus_exp_below(scaled))
    return ("above", scaled, float(threshold), x, ("mul", smooth, 1 / beta))


def log_sigmoid(x: Expression) -> Expression:
    """`-log(1 + exp(-x))`."""
    return ("sub", ("min", x, 0.0), _log_one_plus_exp_below(x))


def gelu(x: Expression, approximate: str = "none") -> Expression:
    """`x P[X < x]` for normal X, exact or by the tanh formula of Hendrycks and Gimpel (2016)."""
    if approximate == "none":
        return ("mul", x, ("normal_cdf", x))
    # (1 + tanh(u)) / 2 = sigmoid(2 u), which is exact in the lower tail, too
    inner = ("mul", ("mul", x, 1.5957691216), ("fma", ("mul", x, x), 0.044715, 1.0))
    return ("mul", x, ("sigmoid", inner))


ACTIVATIONS: dict[str, Callable[..., Expression]] = {
    "relu": relu,
    "relu6": lambda x: clamp(x, 0.0, 6.0),
    "hardtanh": lambda x, low=-1.0, high=1.0: clamp(x, low, high),
    "leaky_relu": leaky_relu,
    "hardsigmoid": hardsigmoid,
    "hardswish": lambda x: ("mul", x, hardsigmoid(x)),
    "sigmoid": lambda x: ("sigmoid", x),
    "silu": lambda x: ("silu", x),
    "tanh": lambda x: ("tanh", x),
    "gelu": gelu,
    "elu": elu,
    "selu": lambda x: elu(x, 1.6732632423543772, 1.0507009873554805),
    "celu": lambda x, alpha=1.0: elu(x, alpha, 1.0, 1 / alpha),
    "softshrink": lambda x, limit=0.5: ("sub", x, clamp(x, -limit, limit)),
    "hardshrink": lambda x, limit=0.5: ("above", ACTIVATIONS["abs"](x), float(limit), x, 0.0),
    "threshold": lambda x, limit=0.0, below=0.0: ("above", x, float(limit), x, float(below)),
    "softplus": softplus,
    "log_sigmoid": log_sigmoid,
    "mish": mish,
    "abs": lambda x: ("max", x, ("sub", 0.0, x)),
    "neg": lambda x: ("mul", x, -1.0),
    "reciprocal": lambda x: ("div", 1.0, x),
    "sqrt": lambda x: ("sqrt", x),
    "rsqrt": lambda x: ("div", 1.0, ("sqrt", x)),
    "exp": lambda x: ("exp", x),
    "log": lambda x: ("log", x),
}


def _like(b: Builder, number: float, value: Value) -> Value:
    return b.constant(number, value.type)


def _polynomial(b: Builder, x: Value, coefficients: Sequence[float]) -> Value:
    result = _like(b, coefficients[-1], x)
    for coefficient in reversed(coefficients[:-1]):
        result = b.fma(result, x, _like(b, coefficient, x))
    return result


def _maximum(b: Builder, x: Value, y: Value) -> Value:
    # As in torch, a NaN in either operand comes out: y is taken unless x is larger or NaN.
    if isinstance(y, ir.Constant):
        return b.ir.select(b.ir.fcmp_ordered("<", x, y), y, x)
    return b.ir.select(b.ir.fcmp_unordered("!=", x, x), x, _larger(b, x, y))


def _larger(b: Builder, x: Value, y: Value) -> Value:
    return b.ir.select(b.ir.fcmp_ordered(">", x, y), x, y)


def _minimum(b: Builder, x: Value, y: Value) -> Value:
    if isinstance(y, ir.Constant):
        return b.ir.select(b.ir.fcmp_ordered(">", x, y), y, x)
    smaller = b.ir.select(b.ir.fcmp_ordered("<", x, y), x, y)
    return b.ir.select(b.ir.fcmp_unordered("!=", x, x), x, smaller)


def _above(b: Builder, x: Value, limit: Value, above: Value, other: Value) -> Value:
    # As in torch, a NaN counts as above.
    return b.ir.select(b.ir.fcmp_unordered(">", x, limit), above, other)


def _exp(b: Builder, x: Value) -> Value:
    fraction, power = _exp_parts(b, x)
    return b.ir.fmul(fraction, power)


def _exp_parts(b: Builder, x: Value, sign: float = 1.0) -> tuple[Value, Value]:
    """exp(sign × x) as a number near 1 and a power of two."""
    # Results below the smallest normal number are 0, above 2.4e38 they are infinite.
    bounds = sorted((sign * -88.0, sign * 89.0))
    x = _minimum(b, _maximum(b, x, _like(b, bounds[0], x)), _like(b, bounds[1], x))
    # Adding 1.5 × 2^23 + 127 leaves the biased exponent of 2^n in the low bits, n = sign × x / ln 2
    # rounded; NaN stays NaN through r = x - sign × n ln 2.
    magic = _like(b, 12583039.0, x)
    rounded = b.fma(x, _like(b, sign / _LN2, x), magic)
    n = b.ir.fsub(rounded, magic)
    r = x
    # One rounding at the end leaves next to nothing of the product's; else it must be exact.
    for part in (_LN2,) if b.machine.fma else _LN2_SPLIT:
        r = b.fma(n, _like(b, -sign * part, x), r)
    terms = [c * sign ** (k + 1) for k, c in enumerate(_EXP)]
    fraction = _polynomial(b, r, (1.0, *terms))
    integers = ir.VectorType(I32, x.type.count)
    shift = ir.Constant(integers, [23] * x.type.count)
    power = b.ir.shl(b.ir.bitcast(rounded, integers), shift)
    return fraction, b.ir.bitcast(power, x.type)


def _log(b: Builder, x: Value) -> Value:
    integers = ir.VectorType(I32, x.type.count)

    def whole(number: int) -> Value:
        return ir.Constant(integers, [number] * x.type.count)

    # Numbers that are not normal become so, times 2^23.
    small = b.ir.fcmp_ordered("<", x, _like(b, 2.0**-126, x))
    normal = b.ir.select(small, b.ir.fmul(x, _like(b, 2.0**23, x)), x)
    # x = 2^n m with sqrt(1/2) <= m < sqrt(2): exponents count from the bits of sqrt(1/2).
    bits = b.ir.sub(b.ir.bitcast(normal, integers), whole(0x3F3504F3))
    n = b.ir.sitofp(b.ir.ashr(bits, whole(23)), x.type)
    n = b.ir.fsub(n, b.ir.select(small, _like(b, 23.0, x), _like(b, 0.0, x)))
    m = b.ir.add(b.ir.and_(bits, whole(0x7FFFFF)), whole(0x3F3504F3))
    # log m = f - f² / 2 + s (f² / 2 + s² P(s²)), f = m - 1, s = f / (2 + f): what is small is added
    # up before what is large (W. Cody and W. Waite, 1980).
    f = b.ir.fsub(b.ir.bitcast(m, x.type), _like(b, 1.0, x))
    s = b.ir.fdiv(f, b.ir.fadd(f, _like(b, 2.0, x)))
    square = b.ir.fmul(s, s)
    half = b.ir.fmul(b.ir.fmul(f, f), _like(b, 0.5, x))
    high, low = (_like(b, part, x) for part in _LN2_SPLIT)
    tail = b.fma(b.ir.fmul(square, _polynomial(b, square, _LOG)), s, b.ir.fmul(s, half))
    tail = b.ir.fsub(b.fma(n, low, tail), half)
    result = b.fma(n, high, b.ir.fadd(f, tail))
    # Infinity and NaN stay; of 0 it is -infinity, below that NaN.
    result = b.ir.select(b.ir.fcmp_ordered("<", x, _like(b, float("inf"), x)), result, x)
    result = b.ir.select(
        b.ir.fcmp_ordered("==", x, _like(b, 0.0, x)), _like(b, float("-inf"), x), result
    )
    negative = b.ir.fcmp_ordered("<", x, _like(b, 0.0, x))
    return b.ir.select(negative, _like(b, float("nan"), x), result)


def _over_one_plus_exp(b: Builder, numerator: Value, x: Value) -> Value:
    """numerator / (1 + exp(-x))."""
    return b.ir.fdiv(numerator, b.fma(*_exp_parts(b, x, -1.0), _like(b, 1.0, x)))


def _sigmoid(b: Builder, x: Value) -> Value:
    return _over_one_plus_exp(b, _like(b, 1.0, x), x)


def _tanh(b: Builder, x: Value) -> Value:
    square = b.ir.fmul(x, x)
    near = b.fma(b.ir.fmul(square, x), _polynomial(b, square, _TANH), x)
    one = _like(b, 1.0, x)
    magnitude = b.intrinsic("fabs", x)
    # Past 30 it is 1 in single precision.
    double = _minimum(b, b.ir.fadd(magnitude, magnitude), _like(b, 60.0, x))
    far = b.ir.fsub(one, b.quotient(_like(b, 2.0, x), b.fma(*_exp_parts(b, double), one)))
    far = b.intrinsic("copysign", far, x)
    is_near = b.ir.fcmp_ordered("<", magnitude, _like(b, 0.625, x))
    return b.ir.select(is_near, near, far)


def _normal_cdf(b: Builder, x: Value) -> Value:
    one = _like(b, 1.0, x)
    a = b.intrinsic("fabs", x)
    # Past 14 the tail is 0 in single precision, and a² must not overflow into inf - inf.
    a = _minimum(b, a, _like(b, 14.5, x))
    t = b.quotient(one, b.fma(a, _like(b, 0.3, x), one))
    exponent = b.ir.fmul(b.ir.fmul(a, a), _like(b, -0.5, x))
    tail = b.ir.fmul(_exp(b, exponent), _polynomial(b, t, _TAIL))
    below = b.ir.fcmp_ordered("<", x, _like(b, 0.0, x))
    return b.ir.select(below, tail, b.ir.fsub(one, tail))


def _above_torch(x: torch.Tensor, limit: Any, above: Any, other: Any) -> torch.Tensor:
    return torch.where(~(x <= limit), above, other)


def _normal_cdf_torch(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.special.ndtr(x)
    return result


# primitive: (vector code, torch)
PRIMITIVES: dict[str, tuple[Callable[..., Value], Callable[..., Any]]] = {
    "add": (lambda b, x, y: b.ir.fadd(x, y), torch.add),
    "sub": (lambda b, x, y: b.ir.fsub(x, y), torch.sub),
    "mul": (lambda b, x, y: b.ir.fmul(x, y), torch.mul),
    "div": (lambda b, x, y: b.ir.fdiv(x, y), torch.div),
    "fma": (lambda b, x, y, z: b.fma(x, y, z), lambda x, y, z: x * y + z),
    "max": (_maximum, torch.maximum),
    "min": (_minimum, torch.minimum),
    "above": (_above, _above_torch),
    "sqrt": (lambda b, x: b.intrinsic("sqrt", x), torch.sqrt),
    "exp": (_exp, torch.exp),
    "log": (_log, torch.log),
    "sigmoid": (_sigmoid, torch.sigmoid),
    "silu": (lambda b, x: _over_one_plus_exp(b, x, x), F.silu),
    "tanh": (_tanh, torch.tanh),
    "normal_cdf": (_normal_cdf, _normal_cdf_torch),
}


def emit(b: Builder, expression: Expression, operands: Callable[[int], Value]) -> Value:
    """Emit `expression`; equal parts of it are computed once.

    Args:
        b: where to emit.
        expression: what to compute.
        operands: the vector of operand `i`.
    """
    known: dict[Expression, Value] = {}

    def visit(e: Expression) -> Value:
        if e not in known:
            if isinstance(e, int | float):
                known[e] = b.constant(float(e))
            elif e[0] == "x":
                known[e] = operands(e[1])
            else:
                known[e] = PRIMITIVES[e[0]][0](b, *(visit(part) for part in e[1:]))
        return known[e]

    return visit(expression)


def evaluate(expression: Expression, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same in torch: the reference of `emit`."""
    if isinstance(expression, int | float):
        return torch.tensor(float(expression), dtype=operands[0].dtype)
    if expression[0] == "x":
        chosen: torch.Tensor = operands[expression[1]]
        return chosen
    parts = (evaluate(part, operands) for part in expression[1:])
    result: torch.Tensor = PRIMITIVES[expression[0]][1](*parts)
    return result


def substitute(expression: Expression, replacements: Sequence[Expression]) -> Expression:
    """Replace each operand `i` by `replacements[i]`."""
    if isinstance(expression, int | float):
        return expression
    if expression[0] == "x":
        return replacements[expression[1]]
    return (expression[0], *(substitute(part, replacements) for part in expression[1:]))


def operands_of(expression: Expression) -> set[int]:
    """The numbers of the operands that occur in `expression`."""
    if isinstance(expression, int | float):
        return set()
    if expression[0] == "x":
        return {expression[1]}
    return set().union(*(operands_of(part) for part in expression[1:]))
