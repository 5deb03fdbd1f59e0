"""What follows a layer: a batch norm, a sum with another branch, an activation."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

LEAST = 1e-3
"""scale of a batch norm's channel that still tells its inputs apart, relative to the largest"""

Range = tuple[float, float]


def _fixed(low: float, high: float) -> Callable[..., Range]:
    return lambda *_, **__: (low, high)


def _clamped(_: Tensor, min_val: float = -1.0, max_val: float = 1.0, *__: Any, **___: Any) -> Range:
    return min_val, max_val


_RELU = _fixed(0.0, math.inf)
FLAT: dict[Any, Callable[..., Range]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _RELU),
    F.relu6: _fixed(0.0, 6.0),
    F.hardtanh: _clamped,
    F.hardswish: _fixed(-3.0, math.inf),
    F.hardsigmoid: _fixed(-3.0, 3.0),
}
"""activations, and the values below and above which each is flat"""
SUMS = {torch.add, Tensor.add, Tensor.add_}  # `+` and `+=` come as the methods


class Affine(NamedTuple):
    """A batch norm with its statistics, `[N]` each."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, *args: Any, **kwargs: Any) -> Affine | None:
        """Read the arguments of `F.batch_norm`; None where it takes the batch's statistics."""
        given = inspect.signature(F.batch_norm).bind(*args, **kwargs)
        given.apply_defaults()
        _, mean, variance, weight, bias, training, _, eps = given.args
        if training or mean is None:
            return None
        scale = (variance + eps).rsqrt()
        if weight is not None:
            scale = scale * weight.detach()
        shift = -mean * scale
        return cls(scale, shift if bias is None else shift + bias.detach())


@dataclass(frozen=True, eq=False)
class Sequel:
    """What becomes of a layer's outputs y: φ(a y + b + s), by channel."""

    affine: Affine | None = None
    """a and b of a batch norm"""
    summed: bool = False
    """whether another branch s is added"""
    low: float = -math.inf
    """below, φ is flat"""
    high: float = math.inf
    """above, φ is flat"""

    @property
    def matters(self) -> bool:
        """Whether other outputs than the original's may do as well, or better."""
        return self.summed or self.cuts

    @property
    def cuts(self) -> bool:
        """Whether φ is flat anywhere."""
        return self.low > -math.inf or self.high < math.inf

    def goal(
        self,
        wanted: Tensor,
        reached: Tensor | None,
        beside: tuple[Tensor, Tensor] | None,
        dims: int,
    ) -> Tensor:
        """The outputs nearest to `reached` from which follows what follows from `wanted`.

        Args:
            wanted: the layer's outputs in the original, `[..., N, *positions]`.
            reached: the fitted layer's, of the same shape; None before there is one.
            beside: the other branch in the original and in the converted network, which is made
                up for.
            dims: number of dimensions of the positions.
        """
        scale, shift = (
            (torch.ones_like(wanted), torch.zeros_like(wanted))
            if self.affine is None
            else (part.view(-1, *[1] * dims) for part in self.affine)
        )
        old, new = (0.0, 0.0) if beside is None else beside
        goal = wanted * scale + shift + old
        if reached is not None:
            now = reached * scale + shift + new
            below, above = now.clamp(max=self.low), now.clamp(min=self.high)
            goal = torch.where(goal <= self.low, below, goal)
            goal = torch.where(goal >= self.high, above, goal)
        told = scale.abs() > LEAST * scale.abs().max()
        return torch.where(told, (goal - shift - new) / scale, wanted)


NOTHING = Sequel()


@dataclass(eq=False)
class Run:
    """One run of a layer, and of what follows it."""

    sequel: Sequel
    end: Tensor | None = None
    """the last of the outputs that the sequel describes"""
    beside: Tensor | None = None
    """the other branch, where there is a sum"""


@dataclass(eq=False)
class _Link:
    """A tensor on the way from a layer, and what has become of the layer's outputs there."""

    run: Run
    sequel: Sequel
    used: bool = False


class Stop(Exception):
    """Ends a forward pass once what was asked for has run."""


class _Follower(TorchFunctionMode):
    """Follows the outputs of layers from function to function, while it is entered."""

    def __init__(self, keep: bool, until_sum: bool) -> None:
        super().__init__()
        self._links: Any = WeakTensorKeyDictionary()
        self._keep, self._until_sum = keep, until_sum

    def start(self, output: Tensor) -> Run:
        """Follow a layer's output."""
        run = Run(NOTHING, output.clone() if self._keep else None)
        self._links[output] = [_Link(run, run.sequel)]
        return run

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function, and note what it makes of the outputs that are followed."""
        kwargs = kwargs or {}
        given = [part for arg in args for part in (arg if isinstance(arg, list | tuple) else [arg])]
        given = [part for part in given if isinstance(part, Tensor) and part in self._links]
        if not given:
            return func(*args, **kwargs)
        operands = _operands(func, args, kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor | list | tuple):
            return result  # a size, or the like
        links: list[_Link] = []
        for tensor in {id(tensor): tensor for tensor in given}.values():
            for link in self._links.pop(tensor) if tensor is result else self._links[tensor]:
                links += self._after(link, tensor, func, args, kwargs, operands)
        if links:  # the functions that are known return one tensor
            for link in links:
                link.run.end = result.clone() if self._keep else None  # type: ignore[union-attr]
            if func not in FLAT:
                self._links[result] = links
        return result

    def _after(
        self, link: _Link, tensor: Tensor, func: Any, args: Any, kwargs: Any, operands: Any
    ) -> Iterator[_Link]:
        """The link to a function's result, if the function is one that is known."""
        run, before = link.run, link.sequel
        if link.used:  # by two functions: neither says alone what becomes of it
            run.sequel = before
            if self._keep:
                run.end = tensor.clone()
            return
        link.used = True
        if func in FLAT:
            low, high = FLAT[func](*args, **kwargs)
            run.sequel = dataclasses.replace(before, low=low, high=high)
        elif func is F.batch_norm and not (before.affine or before.summed):
            norm = Affine.of(*args, **kwargs)
            if norm is None:
                return
            run.sequel = dataclasses.replace(before, affine=norm)
        elif operands and not before.summed:
            run.sequel = dataclasses.replace(before, summed=True)
            if self._keep:
                run.beside = operands[tensor is args[0]]
            if self._until_sum:
                raise Stop
        else:
            return
        yield _Link(run, run.sequel)


@contextmanager
def hooked(pairs: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Run a hook after each run of a module, within; inputs by name come to it by position."""
    handles = [
        module.register_forward_hook(_by_position(hook), with_kwargs=True) for module, hook in pairs
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_position(hook: Callable[..., Any]) -> Callable[..., Any]:
    return lambda module, args, kwargs, output: hook(module, (*args, *kwargs.values()), output)


@contextmanager
def followed(
    model: nn.Module, names: Iterable[str], *, keep: bool = True, until_sum: bool = False
) -> Iterator[dict[str, list[Run]]]:
    """Follow the outputs of the named layers while a model runs.

    Args:
        model: runs within.
        names: of the layers.
        keep: whether to keep the tensors, not only what became of them.
        until_sum: whether to raise Stop after the first sum with another branch.

    Returns:
        The runs of each layer, in their order.
    """
    runs: dict[str, list[Run]] = {name: [] for name in names}
    follower = _Follower(keep, until_sum)

    def starter(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            runs[name].append(follower.start(output))

        return hook

    starters = ((model.get_submodule(name), starter(name)) for name in runs)
    with suppress(Stop), hooked(starters), follower:
        yield runs


def _operands(func: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[Tensor, Tensor] | None:
    """The two operands of a sum of equal shapes, as they were before it."""
    if func not in SUMS or kwargs or len(args) != 2:
        return None
    first, second = args
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return None
    if first is second or first.shape != second.shape:
        return None
    return first.clone() if func is Tensor.add_ else first, second
