"""Figures in words: amounts, times, ratios and shares as the report writes them."""

from __future__ import annotations

import math

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def amount(number: float) -> str:
    """Three significant digits and a prefix: 11.7 M."""
    for scale, prefix in _PREFIXES:
        if abs(number) >= 0.9995 * scale:
            return f"{_three(number / scale)} {prefix}"
    return f"{number:,.0f}"


def milliseconds(seconds: float | None) -> str:
    """Milliseconds without their unit, three significant digits, at most three decimals."""
    if seconds is None:
        return ""
    value = 1e3 * seconds
    return f"{value:.3f}" if value < 1 else _three(value)


def times(ratio: float) -> str:
    """A ratio: 7.4×."""
    if not math.isfinite(ratio):
        return "∞×"
    return f"{_three(ratio)}×" if ratio < 10 else f"{ratio:,.1f}×"


def small(number: float) -> str:
    """An error, two significant digits: 0.031, 2.4·10⁻⁶."""
    mantissa, _, exponent = f"{number:.2g}".partition("e")
    if not exponent:
        return mantissa
    return f"{mantissa}·10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def percent(share: float) -> str:
    """A share in per cent, one decimal."""
    return f"{100 * share:.1f} %"


def size(shape: tuple[int, ...] | None) -> str:
    """A shape: 1×64×56×56."""
    return "×".join(map(str, shape or ()))


def _three(value: float) -> str:
    """Three significant digits; in scientific notation only where it is tiny."""
    if 0 < abs(value) < 0.095:
        return small(value)
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:,.{decimals}f}"
