"""Training on Lightning: from scratch, and of a converted network by its original.

The names load on first use, so that the options are known without Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Distillation": "recipe",
    "Recipe": "recipe",
    "Run": "running",
    "finetune": "starting",
    "train": "starting",
}

__all__ = ["Distillation", "Recipe", "Run", "finetune", "train"]

if TYPE_CHECKING:
    from .recipe import Distillation, Recipe
    from .running import Run
    from .starting import finetune, train


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is not installed: pip install 'separable[train]'", name=error.name
        ) from error
