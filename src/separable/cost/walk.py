"""The walk: runs a model, and records each operator under the module that calls it."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..progress import progress
from .account import Cost
from .escaping import References
from .formulas import FIRST_RESULT_ONLY, VIEWS
from .inputs import Inputs
from .operation import Formula, Margins, Operation, find_formula, operator_name

Layout = tuple[tuple[int, ...], tuple[int, ...]] | None


class Unbatched(ValueError):
    """An `input_size` without its batch."""


class Box:
    """Holds a tensor that autograd saved.

    An operator that saves its own output would hold itself for ever, were the box not emptied.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor


class Walk(TorchDispatchMode):
    """Runs a model and records the cost of every operator under the module that calls it."""

    supports_higher_order_operators = True  # such as `torch.cond`: named as unknown

    def __init__(
        self,
        model: nn.Module,
        fake: FakeTensorMode | None,
        made: References,
        *,
        reject_unbatched: bool,
        saves: bool,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.fake = fake
        self.reject_unbatched = reject_unbatched
        self.saves = saves
        self.names = {id(module): name for name, module in model.named_modules()}
        self.stack: list[str] = [""]
        self.own: dict[str, Cost] = defaultdict(Cost)
        self.calls: dict[str, int] = {}  # in the order of the first call
        self.output_shape: dict[str, tuple[int, ...] | None] = {}
        self.unknown: set[str] = set()
        self.activations = Activations()
        self.by_products: dict[int, int] = {}  # sizes of results that only a backward pass reads
        self.saved: dict[int, int] = {}
        self.boxes: weakref.WeakSet[Box] = weakref.WeakSet()
        self.thread = threading.get_ident()
        self.margins: dict[int, tuple[Layout, Margins]] = {}
        self.made = made

    def run(self, inputs: Inputs) -> None:
        """Run the model on inputs, its forward included, and record."""
        tensors = tensors_in((inputs.args, inputs.kwargs))
        self.input_shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        for tensor in tensors:
            self.activations.make(tensor)
        self._note(tensors)
        with ExitStack() as stack:
            stack.callback(self.activations.forget_tensors)
            stack.enter_context(self._follow_modules())
            if self.saves:
                stack.enter_context(saved_tensors_hooks(self._save, lambda box: box.tensor))
                stack.callback(self._empty_boxes)
            stack.enter_context(self)
            self.bar = stack.enter_context(progress("counting", len(self.names), "module"))
            output = self.model(*inputs.args, **inputs.kwargs)
        results = tensors_of(output)
        self.output_shapes = tuple(tuple(tensor.shape) for tensor in results)
        self.activations.keep(results)

    @contextmanager
    def _follow_modules(self) -> Iterator[None]:
        # torch's global hooks leave the model's own alone; compiled modules warn of them
        with (
            warnings.catch_warnings(),
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ):
            warnings.filterwarnings("ignore", message="Using `torch.compile.*global hooks")
            yield

    def _enter(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() != self.thread:  # a dispatch mode sees its own thread only
            if id(module) in self.names:
                self.unknown.add("operators in other threads")
            return
        name = self.names.get(id(module), self.stack[-1])
        self.stack.append(name)
        if id(module) in self.names:
            self.calls[name] = self.calls.get(name, 0) + 1
        if (
            self.reject_unbatched
            and isinstance(module, _ConvNd)
            and args
            and args[0].dim() == len(module.kernel_size) + 1
            and (size := self._size_of(args[0].dim())) is not None
        ):
            raise Unbatched(f"`input_size` (={size}) must include the batch, as in {(1, *size)}")

    def _size_of(self, dims: int) -> tuple[int, ...] | None:
        """The first size with so many dimensions: a sample that a loop takes has fewer."""
        return next((size for size in self.input_shapes if len(size) == dims), None)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        self.stack.pop()
        name = self.names.get(id(module))
        if name is not None and name not in self.output_shape:
            first = next(iter(tensors_of(output)), None)
            self.output_shape[name] = None if first is None else tuple(first.shape)
            self.bar.update()

    def _save(self, tensor: Tensor) -> Box:
        key = self.activations.key(tensor)
        size = self.activations.size.get(key, self.by_products.get(key))
        if size is not None:
            self.saved[key] = size
        box = Box(tensor)
        self.boxes.add(box)
        return box

    def _empty_boxes(self) -> None:
        for box in self.boxes:
            box.tensor = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = operator_name(func)
        if name.startswith("prim::") or name == "lift_fresh":  # what `torch.tensor` makes is new
            return func(*args, **kwargs)
        if self.fake is not None:
            args, kwargs = tree_map_only(Tensor, self._to_fake, (args, kwargs))
        if _is_view(func):  # costs nothing, and shows a storage that is known already
            result = func(*args, **kwargs)
            self._note(tensors_in(result))
            return result
        formula = find_formula(func)
        if formula is None and hasattr(func, "decompose"):
            # an operator that is defined by others; outside of inference mode torch expands it
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self._note(tensors_in(result))
        self._record(name, func, formula, args, kwargs, result)
        return result

    def _note(self, tensors: tuple[Tensor, ...]) -> None:
        """Remember fake tensors, which some cache may keep beyond the run."""
        if self.fake is not None:
            self.made += map(weakref.ref, tensors)

    def _to_fake(self, tensor: Tensor) -> Tensor:
        # the fake mode makes a new one at each use, and writes to real scalars; made here once, a
        # weight stays as it is, and its views are known to be no activations
        assert self.fake is not None
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _record(
        self, name: str, func: Any, formula: Formula | None, args: Any, kwargs: Any, result: Any
    ) -> None:
        results = tensors_in(result)
        if name in FIRST_RESULT_ONLY:
            self.by_products.update((self.activations.key(t), _bytes(t)) for t in results[1:])
            results = results[:1]
        operands = tensors_in((args, kwargs))
        if not results:
            return
        if formula is None:
            self.unknown.add(name)
        else:
            operation = self._operation(name, func, args, kwargs, results)
            cost = formula(operation)
            if not isinstance(cost, Cost):
                raise TypeError(
                    f"the formula of {name} returned a {type(cost).__name__}; it must return a "
                    "separable.cost.Cost"
                )
            self.own[self.stack[-1]] += cost
            self._note_padding(operation)
        if self.margins:  # what is written in place loses its zeros
            written = {self.activations.key(tensor) for tensor in results}
            for key in written & {self.activations.key(tensor) for tensor in operands}:
                self.margins.pop(key, None)
        self.own[self.stack[-1]] += Cost(traffic_bytes=_traffic(operands, results))
        self.activations.step(operands, results)

    def _operation(
        self, name: str, func: Any, args: Any, kwargs: Any, results: tuple[Tensor, ...]
    ) -> Operation:
        arguments = {
            argument.name: args[place]
            if place < len(args)
            else kwargs.get(argument.name, argument.default_value)
            for place, argument in enumerate(func._schema.arguments)
        }
        tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
        needs_grad = {key for key, value in tensors.items() if value.requires_grad}
        bias = any(
            value.dim() == 1 and self.activations.key(value) not in self.activations.size
            for value in tensors.values()
        )
        return Operation(
            name,
            arguments,
            results,
            frozenset(needs_grad) if torch.is_grad_enabled() else frozenset(),
            self._margins_of(tensors["input"]) if "input" in tensors else (),
            bias,
        )

    def _margins_of(self, tensor: Tensor) -> Margins:
        layout, margins = self.margins.get(self.activations.key(tensor), (None, ()))
        return margins if layout == _layout(tensor) else ()

    def _note_padding(self, operation: Operation) -> None:
        """Remember the zeros that a padding operator puts around its input."""
        if operation.name != "constant_pad_nd" or operation["value"] != 0:
            return
        result, pad = operation.results[0], list(operation["pad"])
        sides = list(zip(pad[::2], pad[1::2], strict=True))[::-1]  # the last dimension comes first
        dims = result.dim() - 2
        if dims < 1:
            return
        sides = ([(0, 0)] * dims + sides)[-dims:]
        inner = self._margins_of(operation["self"]) or ((0, 0),) * dims
        # a negative padding crops, the zeros of an earlier padding first
        margins = tuple(
            (max(before + low, 0), max(after + high, 0))
            for (before, after), (low, high) in zip(inner, sides, strict=True)
        )
        self.margins[self.activations.key(result)] = (_layout(result), margins)


class Activations:
    """Sizes and live ranges of the storages that a walk makes."""

    def __init__(self) -> None:
        self.size: dict[int, int] = {}
        self._first: dict[int, int] = {}
        self._last: dict[int, int] = {}
        self._steps = 0
        self._references: dict[int, Any] = {}

    def key(self, tensor: Tensor) -> int:
        """A number for the tensor's storage, never used again for another one."""
        try:
            reference = StorageWeakRef(tensor.untyped_storage())
        except (NotImplementedError, RuntimeError):  # sparse and other tensors without a storage
            self._references[id(tensor)] = tensor
            return id(tensor)
        # a weak reference frees the data, and keeps the address from being used again
        self._references.setdefault(reference.cdata, reference)
        return int(reference.cdata)

    def make(self, tensor: Tensor) -> None:
        """Note a storage as an activation, unless it is known already."""
        key = self.key(tensor)
        if key not in self.size:
            has_storage = self._references[key] is not tensor
            self.size[key] = tensor.untyped_storage().nbytes() if has_storage else _bytes(tensor)
            self._first[key] = self._steps
        self._last[key] = self._steps

    def step(self, operands: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> None:
        """Note one operator: what it reads and what it makes."""
        self._steps += 1
        read = {self.key(tensor) for tensor in operands}
        for key in read & self.size.keys():
            self._last[key] = self._steps
        for tensor in results:
            # an in-place operator on a weight makes no activation
            if self.key(tensor) not in read:
                self.make(tensor)

    def keep(self, outputs: tuple[Tensor, ...]) -> None:
        """Let the outputs live to the end."""
        for tensor in outputs:
            if self.key(tensor) in self.size:
                self._last[self.key(tensor)] = self._steps

    def forget_tensors(self) -> None:
        """Let go of the tensors without a storage; no key is asked for after the run."""
        self._references.clear()

    def peak(self) -> int:
        """The largest sum of sizes alive at one operator."""
        change = [0] * (self._steps + 2)
        for key, size in self.size.items():
            change[self._first[key]] += size
            change[self._last[key] + 1] -= size
        peak = alive = 0
        for difference in change:
            alive += difference
            peak = max(peak, alive)
        return peak


def tensors_in(tree: Any) -> tuple[Tensor, ...]:
    """The tensors among the leaves of nested containers, in order."""
    return tuple(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def tensors_of(output: Any) -> tuple[Tensor, ...]:
    """The tensors of what a module returns: those in attributes of plain objects, too."""
    found: list[Tensor] = []
    seen: dict[int, Any] = {}
    pending = tree_leaves(output)[::-1]
    while pending:
        leaf = pending.pop()
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif id(leaf) not in seen and hasattr(leaf, "__dict__"):
            seen[id(leaf)] = leaf
            if not isinstance(leaf, (type, nn.Module)):
                pending += tree_leaves(dict(vars(leaf)))[::-1]
    return tuple(found)


def _layout(tensor: Tensor) -> Layout:
    """What tells a padded tensor from other views of its storage."""
    return (tensor.shape, tensor.stride()) if tensor.layout == torch.strided else None


def _is_view(func: Any) -> bool:
    """Whether an operator returns its input, seen in another way."""
    if torch.Tag.inplace_view in getattr(func, "tags", ()) or operator_name(func) in VIEWS:
        return True
    returns = func._schema.returns if hasattr(func, "_schema") else ()
    return any(value.alias_info and not value.alias_info.is_write for value in returns)


def _bytes(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor shows, those repeated by `expand` once."""
    if tensor.layout != torch.strided:
        return tensor.numel() * tensor.element_size()
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or size == 0 else 1
    return elements * tensor.element_size()


def _traffic(operands: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> int:
    read = {id(tensor): tensor for tensor in operands}
    return sum(map(_bytes, read.values())) + sum(map(_bytes, results))
