"""A torch graph of ATen operators, as `torch.export` and AOTAutograd make it, into nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.fx
from torch.utils import _pytree as pytree

from .graph import Graph, Node, Operand, constant, once
from .lowering import LOWERINGS
from .memory import Form


class NeedsFunctionalisation(Exception):
    """An operator writes into memory that has, or may have, another name."""


def import_graph(
    graph: torch.fx.Graph,
    constants: Mapping[str, Callable[[], torch.Tensor]],
    attribute: Callable[[str], torch.Tensor],
) -> Graph:
    """Translate an fx graph.

    Args:
        graph: of ATen operators, with shapes in `meta["val"]`.
        constants: by name, the placeholders that are weights, and where to read them.
        attribute: reads a tensor that the graph holds as an attribute.

    Returns:
        The same computation; operators without a kernel are `"torch"` nodes.

    Raises:
        NeedsFunctionalisation: if the graph writes to aliased memory.
    """
    return _Importer(constants, attribute).run(graph)


class _Importer:
    def __init__(
        self,
        constants: Mapping[str, Callable[[], torch.Tensor]],
        attribute: Callable[[str], torch.Tensor],
    ) -> None:
        self.constants, self.attribute = constants, attribute
        self.values: dict[torch.fx.Node, Any] = {}
        self.nodes: list[Node] = []
        self.inputs: list[Node] = []
        self.expected: list[Form | None] = []
        self.known: set[Node] = set()  # nodes that are appended
        self.views: set[Node] = set()  # those that torch makes

    def run(self, graph: torch.fx.Graph) -> Graph:
        order = {node: i for i, node in enumerate(graph.nodes)}
        outputs: list[Node] = []
        results: list[Form | None] = []
        for node in graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self.placeholder(node)
            elif node.op == "get_attr":
                self.values[node] = self.held(str(node.target), self.attribute)
            elif node.op == "output":
                results = [_form(result) for result in node.args[0]]
                found = zip(self.value(node.args[0]), results, strict=True)
                outputs = [self.result(value, form) for value, form in found]
            else:
                self.values[node] = self.call(node)
                if _writes(node):
                    self.rename(node, order)
        return Graph(self.inputs, outputs, self.nodes, self.expected, results)

    def held(self, target: str, read: Callable[[str], Any]) -> Any:
        """A tensor that a graph holds as a constant, or what else that is as it is."""
        found = read(target)
        if isinstance(found, torch.Tensor):
            return constant(partial(read, target), found.shape, target)
        return found

    def region(self, module: torch.fx.GraphModule, *operands: Any) -> Any:
        """The results of a graph that another calls, in whose place it could as well stand."""
        given = iter(operands)
        for node in module.graph.nodes:
            if node.op == "output":
                return self.value(node.args[0])
            if node.op == "placeholder":
                self.values[node] = next(given)
            elif node.op == "get_attr":
                self.values[node] = self.held(str(node.target), partial(getattr, module))
            elif _writes(node):
                raise NeedsFunctionalisation
            else:
                self.values[node] = self.call(node)
        return None

    def placeholder(self, node: torch.fx.Node) -> Node:
        meta = node.meta["val"]
        if node.name in self.constants or node.target in self.constants:
            recipe = self.constants.get(node.name) or self.constants[str(node.target)]
            return constant(recipe, meta.shape, node.name)
        form = _form(node)
        self.expected.append(form)
        self.inputs.append(Node("input", None if form is None else form.shape, name=node.name))
        return self.inputs[-1]

    def result(self, value: Any, form: Form | None) -> Node:
        """The node that a result is read from."""
        if form is not None:
            assert isinstance(value, Node)
            return value
        if isinstance(value, Node) and value.kind == "torch":
            return value
        known = Node("torch", None, [], _torch_call(as_it_is, (value,), {}, as_it_is))
        if isinstance(value, Node):
            known.inputs, known.attributes["arguments"] = [value], (Operand(0),)
        self.add(known, "")
        return known

    def call(self, node: torch.fx.Node) -> Any:
        name = str(node.target).replace("_.", ".") if _writes(node) else str(node.target)
        if _is_item(node):
            source, index = self.value(node.args)
            if isinstance(source, tuple | list) and index < len(source):
                return source[index]
        if (first := _region(node)) is not None:
            return self.region(*self.value(node.args[first:]))
        arguments, named = self.value(node.args), self.value(node.kwargs)
        tensors = [x for x in node.all_input_nodes if x.op != "get_attr"]
        operands = [x for x in pytree.tree_leaves((arguments, named)) if isinstance(x, Node)]
        fixed = all(x.kind == "constant" for x in operands)
        if _creates(name):  # nothing but the shape of an operand matters
            fixed = all(x.kind == "constant" or x.shape is not None for x in operands)
        if fixed and (operands or _creates(name)) and not _writes(node) and not _draws(node):
            return self.fold(node, arguments, named)
        lower = LOWERINGS.get(name)
        plain = all(_is_float(x.meta.get("val")) for x in tensors) and all(
            isinstance(x, Node) and x.shape is not None for x in operands
        )
        result = None
        if lower and plain:
            # A lowering need not know each argument, nor tensors without axes.
            with suppress(TypeError, ValueError, IndexError, ArithmeticError):
                result = lower(*arguments, **named)
        if result is None or not _serves(result, node):
            return self.fallback(node, arguments, named)
        layer = _layer(node)
        for produced in result if isinstance(result, tuple) else (result,):
            self.add(produced, layer)
        return result

    def add(self, node: Node, layer: str) -> None:
        """Append a node after the new ones it was built on."""
        if node.kind in ("constant", "input") or node in self.known:
            return
        for source in node.inputs:
            self.add(source, layer)
        node.name = node.name or layer
        self.nodes.append(node)
        self.known.add(node)

    def fold(self, node: torch.fx.Node, arguments: Any, named: Any) -> Node:
        def value(x: Node) -> torch.Tensor:
            if x.kind != "constant":
                return torch.empty(x.shape or (), dtype=torch.float32, device="cpu")
            known: torch.Tensor = x.attributes["recipe"]()
            return known

        def recipe() -> Any:
            args, kwargs = pytree.tree_map_only(Node, value, (arguments, named))
            return node.target(*args, **kwargs)  # type: ignore[operator]

        return constant(once(recipe), getattr(node.meta.get("val"), "shape", ()), node.name)

    def fallback(self, node: torch.fx.Node, arguments: Any, named: Any) -> Node:
        meta: Any = node.meta.get("val")
        leaves = [x for x in pytree.tree_leaves((arguments, named)) if isinstance(x, Node)]
        inputs = list(dict.fromkeys(leaves))
        arguments, named = pytree.tree_map_only(
            Node, lambda x: Operand(inputs.index(x)), (arguments, named)
        )
        result = Node(
            "torch",
            tuple(meta.shape) if _is_float(meta) else None,
            inputs,
            _torch_call(node.target, arguments, named, _handed_over(node)),
        )
        if _is_view(node) or (_is_item(node) and self.views.intersection(inputs)):
            self.views.add(result)
        self.add(result, _layer(node))
        return result

    def rename(self, node: torch.fx.Node, order: dict[torch.fx.Node, int]) -> None:
        """After an operator that writes in place, its operand means the new value."""
        written = node.args[0]
        if not isinstance(written, torch.fx.Node) or "out" in node.kwargs:
            raise NeedsFunctionalisation
        root = self.root(self.values[written])
        if root.kind in ("input", "constant"):  # or a copy of one, which is none to us
            raise NeedsFunctionalisation
        for other, value in self.values.items():
            if other in (node, written) or not isinstance(value, Node):
                continue
            if self.root(value) is not root:
                continue
            if any(order[user] > order[node] for user in other.users):
                if _writes(other) and other.args[0] is written:
                    self.values[other] = self.values[node]
                    continue
                raise NeedsFunctionalisation
        self.values[written] = self.values[node]

    def root(self, node: Node) -> Node:
        """What a view is one of."""
        while node.kind == "view" or node in self.views:
            node = node.inputs[0]
        return node

    def value(self, structure: Any) -> Any:
        return torch.fx.node.map_aggregate(
            structure, lambda x: self.values[x] if isinstance(x, torch.fx.Node) else x
        )


def as_it_is(value: Any) -> Any:
    """Hand a value over; `explain()` shows this name."""
    return value


def _torch_call(
    target: Any, arguments: Any, named: Any, handed: Callable[[Any], Any]
) -> dict[str, Any]:
    """The attributes of a `"torch"` node."""
    return {"target": target, "arguments": arguments, "named": named, "handed": handed}


def _handed_over(node: torch.fx.Node) -> Callable[[Any], Any]:
    """What an operator that torch runs is given of a tensor in our memory."""
    if "as_strided" in str(node.target):  # counts floats in memory as torch has it
        return torch.Tensor.contiguous
    # Its memory may have other names, which a write in place must not reach.
    return torch.Tensor.clone if _writes(node) else as_it_is


def _is_view(node: torch.fx.Node) -> bool:
    """Whether an operator's results may lie in the memory of its first operand."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def _is_item(node: torch.fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _region(node: torch.fx.Node) -> int | None:
    """Where the arguments of a region begin whose mode does not matter to inference in float32."""
    match getattr(node.target, "__name__", ""), node.args:
        case "wrap_with_set_grad_enabled", _:
            return 1
        case "wrap_with_autocast", (device, _, enabled, *_) if device != "cpu" or not enabled:
            return 4
    return None


def _draws(node: torch.fx.Node) -> bool:
    """Whether an operator's results are random."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _writes(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    # detach_ is called mutable, for what it does to the graph of gradients
    return schema is not None and schema.is_mutable and not schema.name.endswith("::detach_")


def _creates(name: str) -> bool:
    """Whether an operator makes a tensor of known numbers."""
    _, _, rest = name.partition("aten.")
    kind = rest.partition(".")[0].removeprefix("new_").removesuffix("_like")
    return kind in ("zeros", "ones", "full", "arange", "linspace", "eye", "scalar_tensor")


def _is_float(meta: Any) -> bool:
    return (
        isinstance(meta, torch.Tensor)
        and meta.dtype == torch.float32
        and meta.device.type == "cpu"
        and meta.layout == torch.strided
        and all(isinstance(size, int) and size > 0 for size in meta.shape)
    )


def _form(node: Any) -> Form | None:
    meta: Any = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return Form.of(meta) if _is_float(meta) else None


def _serves(result: Node | tuple[Node, ...], node: torch.fx.Node) -> bool:
    """Whether what an operator was lowered to is all that is read of its results."""
    meta: Any = node.meta.get("val")
    if isinstance(result, Node):
        return _is_float(meta) and tuple(meta.shape) == result.shape
    read: list[Any] = [u.args[1] if _is_item(u) else len(result) for u in node.users if u.users]
    return max(read, default=0) < len(result) and all(
        _is_float(m) and tuple(m.shape) == r.shape for r, m in zip(result, meta, strict=False)
    )


def _layer(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return str(path) or node.name
