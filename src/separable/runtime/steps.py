"""What a compiled model consists of: steps in order, and the memory they need."""

from __future__ import annotations

from dataclasses import dataclass, field

from .emit.kernel import Kernel
from .graph import Node, Recipe
from .memory import Buffer, Form, Place


@dataclass(eq=False)
class Step:
    """One kernel launch, or one call of a torch operator.

    Attributes:
        node: what it computes; `None` for a copy.
        arguments: buffers and offsets in floats, in the kernel's order, the output last.
        kernel: the kernel, or `None` where torch runs.
        operands: of a torch step, where they lie, by node.
        output: where a torch step's result goes, or `None` if it is no float32 tensor.
        replaces: the steps that a chain was made of.
    """

    node: Node | None
    arguments: list[tuple[Buffer, int]]
    kernel: Kernel | None = None
    operands: dict[Node, Place] = field(default_factory=dict)
    output: Place | None = None
    replaces: tuple[Step, ...] = ()


@dataclass(eq=False)
class Schedule:
    """All steps in order, with the memory they need.

    Attributes:
        steps: in execution order.
        constants: buffers of packed weights and the recipes that fill them.
        arguments: the graph's inputs.
        inputs: per argument, its buffer; `None` if it is no float32 tensor.
        outputs: per result, its buffer, or the node of a result that only torch holds.
        expected: per argument, its form; `None` if it is no float32 tensor.
        results: per result, its form, likewise.
    """

    steps: list[Step]
    constants: list[tuple[Buffer, Recipe]]
    arguments: list[Node]
    inputs: list[Buffer | None]
    outputs: list[Buffer | Node]
    expected: list[Form | None]
    results: list[Form | None]
