"""Depthwise separable convolutions that pay: count, convert, train and run them in PyTorch.

The public names load on first use, so `import separable` imports neither torch nor CUDA.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOMS = ("nn", "cost", "models", "conversion", "runtime", "training", "exporting", "reporting")

_HOME = {
    "Account": "cost",
    "Comparison": "cost",
    "Measurement": "cost",
    "Plan": "conversion",
    "apply": "conversion",
    "compare": "cost",
    "compile": "runtime",
    "convert": "conversion",
    "count": "cost",
    "crosscheck": "cost",
    "export": "exporting",
    "finetune": "training",
    "load": "conversion",
    "load_compiled": "runtime",
    "measure": "cost",
    "merge": "conversion",
    "plan": "conversion",
    "report": "reporting",
    "save": "conversion",
    "total_learnables": "cost",
    "train": "training",
}

__all__ = [
    "Account",
    "Comparison",
    "Measurement",
    "Plan",
    "__version__",
    "apply",
    "compare",
    "compile",
    "conversion",
    "convert",
    "cost",
    "count",
    "crosscheck",
    "export",
    "exporting",
    "finetune",
    "load",
    "load_compiled",
    "measure",
    "merge",
    "models",
    "nn",
    "plan",
    "report",
    "reporting",
    "runtime",
    "save",
    "total_learnables",
    "train",
    "training",
]

if TYPE_CHECKING:
    from . import conversion, cost, exporting, models, nn, reporting, runtime, training
    from .conversion import Plan, apply, convert, load, merge, plan, save
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
    from .exporting import export
    from .reporting import report
    from .runtime import compile, load_compiled
    from .training import finetune, train


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
