"""Depthwise separable convolutions that pay: count, convert, train and run them in PyTorch.

The public names load on first use, so `import separable` imports neither torch nor CUDA.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOMS = ("nn", "cost", "models", "runtime")

_HOME = {
    "Account": "cost",
    "Comparison": "cost",
    "Measurement": "cost",
    "compare": "cost",
    "compile": "runtime",
    "count": "cost",
    "crosscheck": "cost",
    "load_compiled": "runtime",
    "measure": "cost",
    "total_learnables": "cost",
}

__all__ = ["__version__", *_ROOMS, *_HOME]

if TYPE_CHECKING:
    from . import cost, models, nn, runtime
    from .cost import (
        Account,
        Comparison,
        Measurement,
        compare,
        count,
        crosscheck,
        measure,
        total_learnables,
    )
    from .runtime import compile, load_compiled


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
