"""One call of an operator, and the register of formulas that say what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .account import Cost

Margins = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Operation:
    """One call of an operator.

    Attributes:
        name: its name, without overload: "convolution", or "torchvision::nms" outside of aten.
        arguments: its arguments by the names of its schema, defaults filled in.
        results: the tensors that it returned.
        needs_grad: names of the tensor arguments that autograd needs a gradient of.
        margins: zeros that padding put around each spatial dimension of `arguments["input"]`.
        bias: whether one of the arguments is a parameter with one dimension.
    """

    name: str
    arguments: dict[str, Any]
    results: tuple[Tensor, ...]
    needs_grad: frozenset[str] = frozenset()
    margins: Margins = ()
    bias: bool = False

    def __getitem__(self, argument: str) -> Any:
        return self.arguments[argument]

    @property
    def numel(self) -> int:
        """Elements of the first result."""
        return self.results[0].numel() if self.results else 0

    def product(self, macs: int, *operands: str, without_padding: int | None = None) -> Cost:
        """Cost of an operator that is linear in each of `operands`."""
        gradients = sum(operand in self.needs_grad for operand in operands)
        return Cost(
            macs=macs,
            macs_without_padding=macs if without_padding is None else without_padding,
            backward_macs=macs * gradients,
        )


Formula = Callable[[Operation], Cost]

_FORMULAS: dict[str, Formula] = {}


def formula(*names: str) -> Callable[[Formula], Formula]:
    """Register a function as the formula of the operators `names`.

    Args:
        names: "namespace::operator"; for one of aten's, the operator's name suffices.

    Example:
        >>> from separable.cost import Cost, formula
        >>> @formula("mylib::scale")
        ... def scale(op):
        ...     return Cost(elementwise=op.numel)
    """

    def register(function: Formula) -> Formula:
        _FORMULAS.update(dict.fromkeys((name.removeprefix("aten::") for name in names), function))
        return function

    return register


def find_formula(operator: Any) -> Formula | None:
    """The formula of a `torch._ops.OpOverload`, None where it is not known."""
    name = operator_name(operator)
    found = _FORMULAS.get(name)
    if found is None and name.endswith("_"):
        found = _FORMULAS.get(name[:-1])
    if found is None and _is_pointwise(operator, name):
        found = pointwise
    return found


def operator_name(operator: Any) -> str:
    """The name of an operator without its overload; without its namespace where that is aten."""
    name = operator._schema.name if hasattr(operator, "_schema") else str(operator)
    return str(name).removeprefix("aten::")


def pointwise(op: Operation) -> Cost:
    """One per result."""
    return Cost(elementwise=op.numel)


def _is_pointwise(operator: Any, name: str) -> bool:
    if torch.Tag.pointwise in getattr(operator, "tags", ()):
        return True
    # before torch 2.9 in-place forms lack the tag
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )
