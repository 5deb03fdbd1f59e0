"""The count: one walk over the operators that a model runs, attributed to its modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from prettytable import PrettyTable
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .account import Account, Cost, Row
from .formulas import FIRST_RESULT_ONLY, Margins, Operation, find_formula, operator_name
from .inputs import DTypes, Inputs, Sizes, make_inputs, model_device
from .untouched import plain_operators, train_flags, untouched


def count(
    model: nn.Module,
    input_size: Sizes | None = None,
    *,
    inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    dtypes: DTypes | None = None,
    device: torch.device | str | None = None,
    strict: bool = False,
    backward: bool = True,
    training: bool | None = False,
) -> Account:
    """Count what one forward pass of a model costs.

    The model runs once on fake tensors, which have shapes and no values, so nothing is computed
    and no memory is needed; where its control flow asks for values it runs once on real ones.
    Operators are counted where they are executed, so functional calls, `.forward`, subclasses,
    parametrised, shared and compiled modules all count. The model, the random state and torch's
    switches are as before afterwards, also when the model raises.

    Args:
        model: any `nn.Module`, on the CPU, a CUDA device or the meta device; of a compiled or
            data-parallel one, the original is counted.
        input_size: shape of the input with its batch, such as `(1, 3, 224, 224)`, or a list of
            shapes for several inputs.
        inputs: instead of `input_size`, a tensor, or a tuple or list of positional arguments,
            which may be nested.
        kwargs: keyword arguments of the forward.
        dtypes: data type of what is made from `input_size`, or one per input; that of the model's
            first floating point parameter by default.
        device: device of what is made from `input_size`; that of the model by default.
        strict: raise where an operator has no formula.
        backward: record gradients, for `backward_macs` and `saved_for_backward_bytes`; both are 0
            if False. Only what autograd records is seen: neither the recomputation of checkpoints
            nor the products inside of a hand-written `autograd.Function`.
        training: count the model in training mode (True), in evaluation mode (False), or each
            module as it stands (None).

    Returns:
        The account; printing it draws a table.

    Raises:
        TypeError: `model` is not an `nn.Module` that runs in Python, or the inputs are missing.
        ValueError: `input_size` lacks the batch, or the model has parameters without a shape.
        NotImplementedError: `strict`, and an operator has no formula.
        Exception: what the model itself raises on these inputs.
    """
    model = _plain(model)
    given = make_inputs(
        model, input_size, inputs=inputs, kwargs=kwargs, dtypes=dtypes, device=_place(model, device)
    )
    walk = _count_operators(model, given, backward, training, from_size=input_size is not None)
    if strict and walk.unknown:
        raise NotImplementedError(
            f"no formula for {', '.join(sorted(walk.unknown))}; add one with "
            "separable.cost.formula, or count with strict=False for a lower bound"
        )
    return _account(model, walk)


def total_learnables(model: nn.Module) -> tuple[int, PrettyTable]:
    """Count the learnables of a model.

    Args:
        model: any `nn.Module`. Shared parameters count once, frozen ones are left out.

    Returns:
        The total, and a table of each learnable and its count, with names as
        `named_parameters()` gives them.
    """
    table = PrettyTable(["Learnable", "Count"])
    table.align["Learnable"], table.align["Count"] = "l", "r"
    learnables = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    for place, (name, number) in enumerate(learnables.items(), start=1):
        table.add_row([name, number], divider=place == len(learnables))
    total = sum(learnables.values())
    table.add_row(["total", total])
    return total, table


def _plain(model: Any) -> nn.Module:
    """The model to run: not its compiled or data-parallel wrapper."""
    while isinstance(model, nn.Module):
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            break
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` (a {type(model).__name__}) must be an nn.Module")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"`{name}` in `model`" if name else "`model`"
            raise TypeError(
                f"{where} is a TorchScript module, which runs outside of Python and can't be "
                "counted; count the nn.Module that it was scripted or traced from"
            )
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(
            f"`model` has parameters without a shape ({', '.join(lazy)}); run it once on an input "
            "to initialise them"
        )
    return model


def _place(model: nn.Module, device: torch.device | str | None) -> torch.device:
    # no memory is used anyway, and a model's weights and inputs must share their device
    if device is None or torch.device(device).type == "meta":
        return model_device(model)
    return torch.device(device)


def _count_operators(
    model: nn.Module, given: Inputs, backward: bool, training: bool | None, *, from_size: bool
) -> _Walk:
    def run(fake: FakeTensorMode | None) -> _Walk:
        walk = _Walk(model, fake, reject_unbatched=from_size)
        with ExitStack() as stack:
            stack.enter_context(untouched(model, values=fake is None))
            stack.enter_context(train_flags(model, training))
            stack.enter_context(plain_operators())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(backward))
            if fake is not None:
                args = given.map(fake.from_tensor)
                stack.enter_context(fake)
            else:
                args = given.map(lambda tensor: tensor.clone())
            walk.run(args)
        return walk

    try:
        if any(tensor.device.type == "meta" for tensor in (*model.parameters(), *model.buffers())):
            return run(None)
        try:
            return run(FakeTensorMode(allow_non_fake_inputs=True))
        except _Unbatched:
            raise
        except Exception:
            # control flow on values, a missing shape rule, or an error of the model: run and see
            return run(None)
    except Exception as error:
        if not isinstance(error, _Unbatched):
            shapes = [tuple(leaf.shape) for leaf in _tensors((given.args, given.kwargs))]
            error.add_note(f"raised by the model while counted on inputs of shape {shapes}")
        raise


class _Unbatched(ValueError):
    """An `input_size` without its batch."""


class _Walk(TorchDispatchMode):
    """Runs a model and records the cost of every operator under the module that calls it."""

    def __init__(
        self, model: nn.Module, fake: FakeTensorMode | None, *, reject_unbatched: bool
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.fake = fake
        self.reject_unbatched = reject_unbatched
        self.names = {id(module): name for name, module in model.named_modules()}
        self.stack: list[str] = [""]
        self.own: dict[str, Cost] = defaultdict(Cost)
        self.calls: dict[str, int] = {}  # in the order of the first call
        self.output_shape: dict[str, tuple[int, ...] | None] = {}
        self.unknown: set[str] = set()
        self.activations = _Activations()
        self.saved: dict[int, int] = {}
        self.margins: dict[int, tuple[tuple[int, ...], Margins]] = {}

    def run(self, inputs: Inputs) -> None:
        """Run the model on inputs, its forward included, and record."""
        tensors = _tensors((inputs.args, inputs.kwargs))
        self.input_shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        self.inputs = {id(tensor) for tensor in tensors}
        for tensor in tensors:
            self.activations.make(tensor)
        with self._follow_modules(), saved_tensors_hooks(self._save, lambda tensor: tensor), self:
            output = self.model(*inputs.args, **inputs.kwargs)
        results = _tensors(output)
        self.output_shapes = tuple(tuple(tensor.shape) for tensor in results)
        self.activations.keep(results)

    @contextmanager
    def _follow_modules(self) -> Iterator[None]:
        # torch's global hooks: the model's own are left alone, and they are called for every module
        with register_module_forward_pre_hook(self._enter):  # noqa: SIM117
            with register_module_forward_hook(self._leave, always_call=True):
                yield

    def _enter(self, module: nn.Module, args: Any) -> None:
        name = self.names.get(id(module), self.stack[-1])
        self.stack.append(name)
        if id(module) in self.names:
            self.calls[name] = self.calls.get(name, 0) + 1
        if (
            self.reject_unbatched
            and isinstance(module, _ConvNd)
            and args
            and id(args[0]) in self.inputs
            and args[0].dim() == len(module.kernel_size) + 1
        ):
            size = tuple(args[0].shape)
            raise _Unbatched(f"`input_size` (={size}) must include the batch, as in {(1, *size)}")

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()
        name = self.names.get(id(module))
        if name is not None and name not in self.output_shape:
            first = next(iter(_tensors(output)), None)
            self.output_shape[name] = None if first is None else tuple(first.shape)

    def _save(self, tensor: Tensor) -> Tensor:
        key = self.activations.key(tensor)
        if key in self.activations.size:
            self.saved[key] = self.activations.size[key]
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.fake is not None:
            args, kwargs = tree_map_only(Tensor, self._to_fake, (args, kwargs))
        name = operator_name(func)
        if name.startswith("prim::"):
            return func(*args, **kwargs)
        if find_formula(func) is None and hasattr(func, "decompose"):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self._record(name, func, args, kwargs, result)
        return result

    def _to_fake(self, tensor: Tensor) -> Tensor:
        # weights: made fake once, so that their views are known to be no activations;
        # scalars are left to the fake mode, which remembers their values
        if isinstance(tensor, FakeTensor) or tensor.dim() == 0:
            return tensor
        assert self.fake is not None
        return self.fake.from_tensor(tensor)

    def _record(self, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        results = _tensors(result)
        if name in FIRST_RESULT_ONLY:
            results = results[:1]
        operands = _tensors((args, kwargs))
        if not results or _is_view(func):
            return
        formula = find_formula(func)
        if formula is None:
            self.unknown.add(name)
        else:
            operation = self._operation(name, func, args, kwargs, results)
            self.own[self.stack[-1]] += formula(operation)
            self._note_padding(operation)
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
        margins: Margins = ()
        if "input" in tensors:
            key = self.activations.key(tensors["input"])
            shape, noted = self.margins.get(key, ((), ()))
            margins = noted if shape == tuple(tensors["input"].shape) else ()
        return Operation(
            name,
            arguments,
            results,
            frozenset(needs_grad) if torch.is_grad_enabled() else frozenset(),
            margins,
            bias,
        )

    def _note_padding(self, operation: Operation) -> None:
        """Remember the zeros that a padding operator puts around its input."""
        if operation.name != "constant_pad_nd" or operation["value"] != 0:
            return
        result, pad = operation.results[0], list(operation["pad"])
        ends = [(max(low, 0), max(high, 0)) for low, high in zip(pad[::2], pad[1::2], strict=True)]
        ends = ends[::-1]  # the last dimension comes first
        dims = result.dim() - 2
        margins = ((0, 0),) * (dims - len(ends)) + tuple(ends[-dims:])
        self.margins[self.activations.key(result)] = (tuple(result.shape), margins)


class _Activations:
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


def _tensors(tree: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _is_view(func: Any) -> bool:
    """Whether an operator returns its input, seen in another way."""
    if torch.Tag.inplace_view in getattr(func, "tags", ()):
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


def _account(model: nn.Module, walk: _Walk) -> Account:
    rows = tuple(_rows(model, walk))
    parameters = list(model.parameters())
    total = rows[0]
    return Account(
        **{name: getattr(total, name) for name in Cost.__dataclass_fields__},
        rows=rows,
        params=sum(p.numel() for p in parameters),
        trainable_params=sum(p.numel() for p in parameters if p.requires_grad),
        param_bytes=sum(p.numel() * p.element_size() for p in parameters),
        peak_activation_bytes=walk.activations.peak(),
        saved_for_backward_bytes=sum(walk.saved.values()),
        unknown=tuple(sorted(walk.unknown)),
        input_shapes=walk.input_shapes,
        output_shapes=walk.output_shapes,
    )


def _rows(model: nn.Module, walk: _Walk) -> list[Row]:
    """One row per module: a container, then its children in the order of their first call."""
    modules = dict(model.named_modules())
    children: dict[str, list[str]] = defaultdict(list)
    for name in modules:
        if name:
            children[name.rpartition(".")[0]].append(name)
    order = {name: place for place, name in enumerate(walk.calls)}

    def below(name: str) -> tuple[float, Cost, list[Row]]:
        """Place in the execution, cost and rows of a module and of those below it."""
        parts = sorted((below(child) for child in children[name]), key=lambda part: part[0])
        own = walk.own.get(name, Cost())
        cost = sum((part[1] for part in parts), start=own)
        first = min([order.get(name, float("inf")), *(part[0] for part in parts)])
        row = Row(
            **{field: getattr(cost, field) for field in Cost.__dataclass_fields__},
            name=name,
            kind=type(modules[name]).__name__,
            calls=walk.calls.get(name, 0),
            output_shape=walk.output_shape.get(name),
            params=sum(p.numel() for p in modules[name].parameters()),
            own=own,
        )
        return first, cost, [row, *(row for part in parts for row in part[2])]

    return below("")[2]
