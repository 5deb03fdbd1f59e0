"""The count: one walk over the operators that a model runs, attributed to its modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from prettytable import PrettyTable
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy

from .account import Account, Cost, Row
from .escaping import Escaped, References, forget
from .inputs import DTypes, Inputs, Sizes, make_inputs, model_device
from .preserving import plain_operators, train_flags, untouched
from .walk import Unbatched, Walk, tensors_in


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
    switches are as before afterwards, also when the model raises. Caches outside of its modules
    (global ones, `functools.lru_cache`) lose what they took from the run. One thread counts at a
    time.

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
        TypeError: `model` is not an `nn.Module` that runs in Python, or the inputs are missing or
            nested tensors.
        ValueError: `input_size` lacks the batch, or the model has parameters or buffers without a
            shape.
        NotImplementedError: `strict`, and an operator has no formula.
        RuntimeError: the model keeps tensors of the run outside of its modules, in something that
            can't be emptied.
        Exception: what the model itself raises on these inputs.
    """
    model = unwrap(model)

    def draw() -> Inputs:
        place = _place(model, device)
        return make_inputs(
            model, input_size, inputs=inputs, kwargs=kwargs, dtypes=dtypes, device=place
        )

    _check_dense(inputs, kwargs)
    walk = _count_operators(model, draw, backward, training, from_size=input_size is not None)
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

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: `model` has parameters or buffers without a shape.
    """
    check_module(model, "model")
    table = PrettyTable(["Learnable", "Count"])
    table.align["Learnable"], table.align["Count"] = "l", "r"
    learnables = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    for place, (name, number) in enumerate(learnables.items(), start=1):
        table.add_row([name, number], divider=place == len(learnables))
    total = sum(learnables.values())
    table.add_row(["total", total])
    return total, table


def unwrap(model: Any, argument: str = "model") -> nn.Module:
    """The module that a compiled or data-parallel one wraps; raises where it can't be counted."""
    while isinstance(model, nn.Module):
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            break
    check_module(model, argument)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"`{name}` in `{argument}`" if name else f"`{argument}`"
            raise TypeError(
                f"{where} is a TorchScript module, which runs outside of Python and can't be "
                "counted; count the nn.Module that it was scripted or traced from"
            )
    checked: nn.Module = model
    return checked


def check_module(model: Any, argument: str) -> None:
    """See that a model is a module whose parameters and buffers have their shapes.

    Raises:
        TypeError: it is no module.
        ValueError: it has lazy ones.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`{argument}` (a {type(model).__name__}) must be an nn.Module")
    tensors = (*model.named_parameters(), *model.named_buffers())
    if lazy := [name for name, tensor in tensors if is_lazy(tensor)]:
        raise ValueError(
            f"`{argument}` has parameters or buffers without a shape ({', '.join(lazy)}); run it "
            "once on an input to initialise them"
        )


def _check_dense(*given: Any) -> None:
    if any(tensor.is_nested for tensor in tensors_in(given)):
        raise TypeError(
            "`inputs` has a nested tensor, whose operators have no fixed shapes to count; pad it "
            "with `to_padded_tensor`, or count each of its tensors"
        )


def _place(model: nn.Module, device: torch.device | str | None) -> torch.device:
    # no memory is used anyway, and a model's weights and inputs must share their device
    if device is None or torch.device(device).type == "meta":
        return model_device(model)
    return torch.device(device)


def _count_operators(
    model: nn.Module,
    draw: Callable[[], Inputs],
    backward: bool,
    training: bool | None,
    *,
    from_size: bool,
) -> Walk:
    made: References = []

    def run(*, fakes: bool, saves: bool = backward) -> Walk:
        fake = FakeTensorMode(allow_non_fake_inputs=True) if fakes else None
        walk = Walk(model, fake, made, reject_unbatched=from_size, saves=saves)
        with ExitStack() as stack:
            stack.enter_context(plain_operators())
            stack.enter_context(untouched(model, written=lambda tensor: fake is None))
            stack.enter_context(train_flags(model, training))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(backward))
            if fake is not None:
                stack.enter_context(fake)  # what is drawn then has no values
                # a clone, as below: one sample of a large batch is an activation of its own size
                walk.run(draw().map(lambda tensor: fake.from_tensor(tensor).clone()))
            else:
                walk.run(draw().map(torch.clone))
        return walk

    def attempt(*, fakes: bool) -> Walk:
        try:
            return run(fakes=fakes)
        except RuntimeError as error:
            if not backward or "saved tensor hooks" not in str(error):
                raise
        # transforms such as `torch.func.grad` refuse the hooks that see what autograd saves
        walk = run(fakes=fakes, saves=False)
        walk.unknown.add("tensors saved beside torch.func")
        return walk

    with FakeTensorMode():
        shapes = [tuple(tensor.shape) for tensor in tensors_in(draw().args)]

    try:
        if any(tensor.device.type == "meta" for tensor in (*model.parameters(), *model.buffers())):
            return attempt(fakes=False)
        try:
            walk = attempt(fakes=True)
        except Unbatched:
            raise
        except Exception:
            # control flow on values, a missing shape rule, or an error of the model: run and see
            walk = None
        forget(made)  # after the exception, whose frames hold tensors
        return walk or attempt(fakes=False)
    except Exception as error:
        if not isinstance(error, (Unbatched, Escaped)):
            error.add_note(f"raised by the model while counted on inputs of shape {shapes}")
        raise


def _account(model: nn.Module, walk: Walk) -> Account:
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


def _rows(model: nn.Module, walk: Walk) -> list[Row]:
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
