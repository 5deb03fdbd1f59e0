"""The runtime's own small operator graph, and the passes that fold and fuse it.

A torch graph becomes nodes of few kinds (see `Node.kind`). Shapes are torch's, `[N, C, H, W]`;
where values lie in memory is decided later, by `schedule`. Constants are recipes: they are computed
again when a weight changes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .emit import expression
from .emit.expression import Expression, operand
from .memory import Form

Recipe = Callable[[], torch.Tensor]


class _Known(threading.local):
    values: dict[Recipe, torch.Tensor] | None = None


_KNOWN = _Known()


@contextmanager
def evaluation() -> Iterator[None]:
    """Within it, what recipes share is computed once."""
    outer = _KNOWN.values
    _KNOWN.values = {} if outer is None else outer
    try:
        yield
    finally:
        _KNOWN.values = outer


def once(recipe: Recipe) -> Recipe:
    """The same recipe, which one evaluation computes once, however many recipes read it."""

    def value() -> torch.Tensor:
        with evaluation():
            known = _KNOWN.values
            assert known is not None
            if recipe not in known:
                known[recipe] = recipe()
            return known[recipe]

    return value


MOST_TAPS = 4096
"""of a convolution or pool along an axis: kernels unroll them"""


@dataclass(eq=False)
class Node:
    """One operation.

    Attributes:
        kind: `"input"`, `"constant"`, `"conv"` (also linear layers), `"window"` (depthwise, pools),
            `"product"` (of matrices), `"map"` (elementwise), `"reduce"`, `"norm"`, `"softmax"`,
            `"resample"`, `"cat"`, `"pad"`, `"view"`, or `"torch"` for what torch itself runs.
        shape: of the result; `None` if it is no float32 tensor.
        inputs: the operands; extras of the epilogue come last.
        attributes: what else the kind needs, named as in the kernel's own description.
        epilogue: elementwise arithmetic on the result (operand 0) and the extras.
        extras: how many of the inputs belong to the epilogue.
        name: the layer it comes from.
        absorbed: layers that were fused into it.
    """

    kind: str
    shape: tuple[int, ...] | None
    inputs: list[Node] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    epilogue: Expression = ("x", 0)
    extras: int = 0
    name: str = ""
    absorbed: list[str] = field(default_factory=list)

    @property
    def channel_axis(self) -> int:
        """The axis of the result that the weights of a convolution or linear layer produce."""
        assert self.shape is not None
        return len(self.shape) - 1 if self.attributes.get("linear") else 1


@dataclass(frozen=True)
class Operand:
    """In the arguments of a `"torch"` node, the place of one of its inputs.

    Attributes:
        number: of the input.
    """

    number: int


def constant(recipe: Recipe, shape: Iterable[int], name: str = "") -> Node:
    """A constant, computed by `recipe` once per version of the weights."""
    return Node("constant", tuple(shape), attributes={"recipe": recipe}, name=name)


@dataclass
class Graph:
    """Nodes in execution order.

    Attributes:
        inputs: one per tensor argument.
        outputs: the results.
        expected: the form of each argument; `None` where it is no float32 tensor.
        results: the form of each result, likewise.
        nodes: everything between; constants and inputs are not among them.
    """

    inputs: list[Node]
    outputs: list[Node]
    nodes: list[Node]
    expected: list[Form | None]
    results: list[Form | None]

    def users(self) -> dict[Node, list[Node | None]]:
        """Who reads each node; `None` stands for the caller."""
        users: dict[Node, list[Node | None]] = {}
        for node in self.nodes:
            for source in node.inputs:
                users.setdefault(source, []).append(node)
        for node in self.outputs:
            users.setdefault(node, []).append(None)
        return users

    def replace(self, replaced: dict[Node, Node]) -> None:
        """Let the readers of each key read its value instead, and drop the keys."""

        def final(node: Node) -> Node:
            while node in replaced:
                node = replaced[node]
            return node

        self.nodes = [node for node in self.nodes if node not in replaced]
        for node in self.nodes:
            node.inputs = [final(source) for source in node.inputs]
        self.outputs = [final(node) for node in self.outputs]

    def prune(self) -> None:
        """Drop nodes whose result nobody reads."""
        needed: set[Node] = set(self.outputs)
        kept = []
        for node in reversed(self.nodes):
            if node in needed:
                needed.update(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]


def optimise(graph: Graph) -> Graph:
    """Fold constants into weights and elementwise arithmetic into the kernels before it."""
    graph.prune()
    fold_padding(graph)
    fold_affine(graph)
    fuse_epilogues(graph)
    graph.prune()
    return graph


def fold_padding(graph: Graph) -> None:
    """Let convolutions add the zeros that a separate node would."""
    for node in graph.nodes:
        source = node.inputs[0] if node.inputs else None
        weighted = node.kind == "conv" or node.attributes.get("kind") == "conv"
        if not (source and weighted and source.kind == "pad" and not node.attributes.get("linear")):
            continue
        before, after, value = (source.attributes[key] for key in ("before", "after", "value"))
        inside = source.inputs[0].shape
        if value or inside is None or any(before[:2]) or any(after[:2]):
            continue
        extra = (0, *before[2:])[-2:]
        node.attributes["padding"] = tuple(
            p + e for p, e in zip(node.attributes["padding"], extra, strict=True)
        )
        node.inputs[0] = source.inputs[0]
    graph.prune()


def fold_affine(graph: Graph) -> None:
    """Fold per-channel factors and shifts (batch norm, layer scale) into the weights before."""
    users = graph.users()
    replaced: dict[Node, Node] = {}
    for node in graph.nodes:
        node.inputs = [replaced.get(source, source) for source in node.inputs]
        if node.kind != "map" or not node.inputs:
            continue
        conv = node.inputs[0]
        if (
            not (conv.kind == "conv" or conv.attributes.get("kind") == "conv")
            or conv.shape != node.shape
            or conv.extras
            or conv.epilogue != operand(0)
            or len(users[conv]) != 1
        ):
            continue
        factor, shift = _affine(node, conv)
        if factor is None and shift is None:
            continue
        _scale_weights(conv, factor, shift)
        conv.absorbed.append(node.name)
        replaced[node] = conv
        users[conv] = users.get(node, [])
    graph.replace(replaced)


def _affine(node: Node, conv: Node) -> tuple[Recipe | None, Recipe | None]:
    """The per-channel factor or shift that a map applies to its first operand, if it is one."""
    e = node.epilogue
    if not (isinstance(e, tuple) and len(e) == 3 and e[0] in ("add", "sub", "mul", "div")):
        return None, None
    kind, first, second = e
    if kind in ("add", "mul") and first != operand(0):
        first, second = second, first
    if first != operand(0):
        return None, None
    assert conv.shape is not None
    channels = conv.shape[conv.channel_axis]
    if isinstance(second, int | float):
        number = float(second)
        if not math.isfinite(number) or (kind == "div" and number == 0):
            return None, None

        def recipe() -> torch.Tensor:
            return torch.full((channels,), number, dtype=torch.float32, device="cpu")
    elif second == operand(1) and node.inputs[1].kind == "constant":
        source = node.inputs[1]
        shape = (1,) * (len(conv.shape) - len(source.shape or ())) + (source.shape or ())
        if any(size != 1 for axis, size in enumerate(shape) if axis != conv.channel_axis):
            return None, None
        inner = source.attributes["recipe"]

        def recipe() -> torch.Tensor:
            value: torch.Tensor = inner()
            return value.reshape(-1).expand(channels)
    else:
        return None, None
    return {
        "mul": (recipe, None),
        "div": (lambda: 1 / recipe(), None),
        "add": (None, recipe),
        "sub": (None, lambda: -recipe()),
    }[kind]


def _scale_weights(conv: Node, factor: Recipe | None, shift: Recipe | None) -> None:
    weight, bias = conv.inputs[1:3]
    w, b = weight.attributes["recipe"], bias.attributes["recipe"]
    if factor is not None:
        scale = factor
        conv.inputs[1] = constant(
            lambda: w() * scale().reshape(-1, *[1] * (w().dim() - 1)), weight.shape or ()
        )
        conv.inputs[2] = constant(lambda: b() * scale(), bias.shape or ())
    if shift is not None:
        offset = shift
        conv.inputs[2] = constant(lambda: b() + offset(), bias.shape or ())


# Kernels that can compute on their results before storing them.
_HAS_EPILOGUE = ("conv", "window", "map", "norm", "resample", "reduce", "product")
_MOST_EXTRAS = 4


def fuse_epilogues(graph: Graph) -> None:
    """Let each elementwise node run inside the last kernel that computes one of its operands."""
    users = graph.users()
    replaced: dict[Node, Node] = {}
    place = {node: i for i, node in enumerate(graph.nodes)}
    for position, node in enumerate(graph.nodes):
        node.inputs = [replaced.get(source, source) for source in node.inputs]
        if node.kind != "map":
            continue
        hosts = [
            source
            for source in dict.fromkeys(node.inputs)
            if source.kind in _HAS_EPILOGUE
            and source.shape == node.shape
            and all(user is users[source][0] for user in users[source])
            and users[source][0] is not None
            and _operands(source) + len(set(node.inputs)) - 1 <= _MOST_EXTRAS
        ]
        if not hosts:
            continue
        host = max(hosts, key=lambda source: (source.kind != "map", place[source]))
        _absorb(host, node)
        replaced[node] = host
        place[host] = position
        users[host] = users.get(node, [])
        for source in host.inputs:
            users[source] = [host if user is node else user for user in users.get(source, [])]
    graph.replace(replaced)
    graph.nodes.sort(key=lambda node: place[node])


def _operands(node: Node) -> int:
    return len(node.inputs) if node.kind == "map" else node.extras


def _absorb(host: Node, node: Node) -> None:
    """Append the arithmetic of `node` to the epilogue of `host`, one of its operands."""
    own = 0 if host.kind == "map" else 1  # operand 0 of a map is its first input
    fixed = len(host.inputs) - host.extras
    extras = host.inputs[fixed:] if host.kind != "map" else list(host.inputs)
    replacements = []
    for source in node.inputs:
        if source is host:
            replacements.append(host.epilogue)
            continue
        if source not in extras:
            extras.append(source)
        replacements.append(operand(extras.index(source) + own))
    host.epilogue = expression.substitute(node.epilogue, replacements)
    if host.kind == "map":
        host.inputs = extras
    else:
        host.inputs[fixed:] = extras
        host.extras = len(extras)
    host.absorbed.append(node.name)
