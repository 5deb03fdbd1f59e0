"""Inputs for a model, made from sizes or given as tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map_only

from ..limits import is_whole

Sizes = Sequence[int] | Sequence[Sequence[int]]
MOST_ELEMENTS = 2**63 - 1  # what torch's indices count to

DTypes = torch.dtype | Sequence[torch.dtype]


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of a model's forward."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """Apply a function once to every tensor, however nested; one given twice stays one."""
        results: dict[int, Tensor] = {}

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in results:
                results[id(tensor)] = function(tensor)
            return results[id(tensor)]

        args, kwargs = tree_map_only(Tensor, once, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs)


def model_device(model: nn.Module) -> torch.device:
    """Device of a model's first parameter or buffer; the CPU where it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def make_inputs(
    model: nn.Module | None,
    input_size: Sizes | None = None,
    *,
    inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    dtypes: DTypes | None = None,
    device: torch.device | str | None = None,
) -> Inputs:
    """Gather a model's arguments, or draw them where only their size is given.

    Floating point values are drawn from a normal distribution by a generator of their own, the
    global random state is left alone; others are zero, a valid index for every embedding.

    Args:
        model: gives the default for `dtypes` and `device`.
        input_size: shape of the input with its batch, such as `(1, 3, 224, 224)`, or a list of
            shapes for several inputs.
        inputs: instead of `input_size`, a tensor, or a tuple or list of positional arguments.
        kwargs: keyword arguments of the forward.
        dtypes: data type of what is made from `input_size`, or one per input; that of the model's
            first floating point parameter by default.
        device: device of what is made from `input_size`; that of the model by default.

    Raises:
        TypeError: neither or both of `input_size` and `inputs` are given, a size is not made of
            ints, or `dtypes` not of data types.
        ValueError: a size is empty, has a negative entry or too many elements, or `dtypes` is of
            another length.
    """
    kwargs = dict(kwargs or {})
    if input_size is not None and inputs is not None:
        raise TypeError("`input_size` and `inputs` exclude each other; give one of them")
    if inputs is not None:
        several = isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence)
        return Inputs(tuple(inputs) if several else (inputs,), kwargs)
    if input_size is None:
        if kwargs:
            return Inputs((), kwargs)
        raise TypeError(
            "`input_size` or `inputs` is missing: give a shape such as (1, 3, 224, 224)"
        )
    sizes = _check_sizes(input_size)
    if dtypes is None:
        floating = (p.dtype for p in model.parameters() if p.is_floating_point()) if model else ()
        dtypes = next(iter(floating), torch.get_default_dtype())
    if isinstance(dtypes, torch.dtype):
        dtypes = [dtypes] * len(sizes)
    if not all(isinstance(dtype, torch.dtype) for dtype in dtypes):
        raise TypeError(
            f"`dtypes` (={dtypes!r}) must be a torch.dtype such as torch.float32, or one per input"
        )
    if len(dtypes) != len(sizes):
        raise ValueError(
            f"`dtypes` has {len(dtypes)} entries for {len(sizes)} inputs; give one each"
        )
    place = torch.device(device) if device is not None else None
    if place is None:
        place = model_device(model) if model is not None else torch.device("cpu")
    drawn = (_draw(size, dtype, place) for size, dtype in zip(sizes, dtypes, strict=True))
    return Inputs(tuple(drawn), kwargs)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Sequence) and any(isinstance(part, Tensor) for part in value):
        return f"a {type(value).__name__} with tensors"
    return f"={value!r}"


def _check_sizes(input_size: Any) -> list[tuple[int, ...]]:
    if not isinstance(input_size, Sequence) or isinstance(input_size, str) or not input_size:
        raise TypeError(
            f"`input_size` ({_shown(input_size)}) must be a shape such as (1, 3, 224, 224), or a "
            "list of shapes; tensors are given as `inputs`"
        )
    sizes = [input_size] if isinstance(input_size[0], Integral) else list(input_size)
    for size in sizes:
        if not isinstance(size, Sequence) or not all(map(is_whole, size)):
            raise TypeError(
                f"`input_size` ({_shown(input_size)}) must be made of ints; tensors are given as "
                "`inputs`"
            )
        if not size or any(n < 0 for n in size):
            raise ValueError(f"`input_size` (={input_size!r}) must have entries of 0 or more")
        if math.prod(map(int, size)) > MOST_ELEMENTS:
            raise ValueError(
                f"`input_size` (={input_size!r}) must have at most {MOST_ELEMENTS} elements"
            )
    return [tuple(map(int, size)) for size in sizes]


def _draw(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "meta" or not dtype.is_floating_point:
        return torch.zeros(size, dtype=dtype, device=device)
    generator = _generator().manual_seed(0)
    return torch.randn(size, generator=generator, dtype=torch.float32).to(device, dtype)


@functools.cache
def _generator() -> torch.Generator:
    return torch.Generator()  # one for all, because torch's fake tensors keep each that they meet
