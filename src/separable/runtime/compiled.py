"""A compiled model: checks its arguments and runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..limits import whole_number
from .execute import Program
from .explaining import Explanation, assembly, explain
from .memory import Form


class CompiledModel:
    """A model as machine code; call it like the model.

    Safe to call from many threads at once. Weights that changed since the last call are packed
    again. The results carry no gradient.

    Attributes:
        program: the steps and their memory.
        expected: the form of each argument; `None` where it is no float32 tensor.
        structures: how arguments and results are nested.
        dynamic_batch: whether any batch size is accepted.
        examples: of arguments that are no float32 tensors, numbers or tensors without memory; only
            torch reads them.
    """

    def __init__(
        self,
        program: Program,
        structures: tuple[pytree.TreeSpec, pytree.TreeSpec],
        dynamic_batch: bool,
        examples: Sequence[Any] = (),
    ) -> None:
        self.program = program
        self.expected = tuple(program.schedule.expected)
        self.structures = structures
        self.dynamic_batch = dynamic_batch
        self.examples = [_example(x) for x in examples] or [None] * len(self.expected)
        # Most models take tensors and return one: no need to take apart and to join anything.
        _, plain = pytree.tree_flatten(((0,) * len(self.expected), {}))
        self._plain = plain == structures[0] and not dynamic_batch and None not in self.expected
        self._single = structures[1].num_nodes == structures[1].num_leaves == 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on new inputs.

        Raises:
            TypeError: if the arguments are not structured, typed or placed as in the example.
            ValueError: if a shape differs from the example's.
        """
        plain = self._plain and not kwargs and len(args) == len(self.expected)
        if plain and all(map(_fits, args, self.expected)):
            return self._run(args)
        flat, structure = pytree.tree_flatten((args, kwargs))
        if structure != self.structures[0]:
            raise TypeError(
                f"arguments {structure} differ from the example's {self.structures[0]}; "
                "call the model as it was compiled"
            )
        first = flat[0] if self.dynamic_batch and isinstance(flat[0], torch.Tensor) else None
        batch = first.shape[0] if first is not None and first.dim() else None
        inputs = [
            _same(i, value, example) if form is None else self._checked(i, value, form, batch)
            for i, (value, form, example) in enumerate(
                zip(flat, self.expected, self.examples, strict=True)
            )
        ]
        return self._run(inputs, batch)

    def _run(self, inputs: Sequence[Any], batch: int | None = None) -> Any:
        results = self.program(inputs) if batch is None else self._each(inputs, batch)
        return results[0] if self._single else pytree.tree_unflatten(results, self.structures[1])

    def explain(self, repeats: int = 10) -> Explanation:
        """What runs in which kernel, what was fused, and how fast each is.

        Args:
            repeats: measurements per kernel, 1 or more, of which the best counts.
        """
        whole_number("repeats", repeats, least=1)
        generator = torch.Generator("cpu").manual_seed(0)
        inputs = [
            form.empty().normal_(generator=generator)
            if form is not None
            else torch.zeros_like(example, device="cpu")
            if isinstance(example, torch.Tensor)
            else example
            for form, example in zip(self.expected, self.examples, strict=True)
        ]
        return explain(self.program, inputs, repeats)

    def assembly(self, layer: str) -> str:
        """The assembly of the kernels of a layer, named as in `explain()`."""
        return assembly(self.program, layer)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write packed weights and code to a file for `load_compiled`.

        Raises:
            ValueError: if a part of the model runs in torch.
        """
        from .files import save

        save(self, path)

    def __reduce__(self) -> Any:
        """Refuse copies and pickles, for machine code has an address."""
        raise TypeError(
            "a compiled model can't be copied or pickled; compile a copy of the original, or use "
            "`save` and `separable.load_compiled`"
        )

    def _checked(self, number: int, value: Any, form: Form, batch: int | None) -> torch.Tensor:
        shape = form.shape if batch is None else (batch, *form.shape[1:])
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"argument {number} (={value!r}) must be a tensor of shape {shape}")
        if value.dtype != torch.float32 or value.device.type != "cpu":
            raise TypeError(
                f"argument {number} (={value.dtype} on {value.device}) must be float32 on the CPU; "
                "convert it with `.to('cpu', torch.float32)`"
            )
        if tuple(value.shape) != shape:
            raise ValueError(
                f"argument {number} (of shape {tuple(value.shape)}) must have the shape {shape} "
                "the model was compiled for; compile it again for another"
                + ("" if self.dynamic_batch else ", or for any batch with `dynamic_batch=True`")
            )
        if value.layout is not torch.strided:
            raise TypeError(
                f"argument {number} (of layout {value.layout}) must be dense; convert it with "
                "`.to_dense()`"
            )
        return value.detach().resolve_neg().contiguous(memory_format=form.memory_format)

    def _each(self, inputs: Sequence[torch.Tensor], batch: int) -> list[Any]:
        """Run sample by sample, each result written where it belongs."""
        outputs = [form.empty(batch) for form in self.program.schedule.results if form]
        for i in range(batch):
            self.program([x[i : i + 1] for x in inputs], outputs=[y[i : i + 1] for y in outputs])
        return outputs


def _example(x: Any) -> Any:
    """What is kept of an argument: not its memory."""
    return x.to("meta") if isinstance(x, torch.Tensor) else x


def _same(number: int, value: Any, example: Any) -> Any:
    """An argument that torch reads, if it is what the model was traced with."""
    if not isinstance(example, torch.Tensor):
        if type(value) is not type(example) or value != example:
            raise ValueError(
                f"argument {number} (={value!r}) must be {example!r}, which the model was compiled "
                "with; compile it again for another"
            )
    elif not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        raise TypeError(f"argument {number} (={value!r}) must be a tensor on the CPU")
    elif (value.dtype, value.shape) != (example.dtype, example.shape):
        raise ValueError(
            f"argument {number} (of {value.dtype} and shape {tuple(value.shape)}) must be of "
            f"{example.dtype} and shape {tuple(example.shape)}, which the model was compiled for; "
            "compile it again for another"
        )
    return value


def _fits(value: Any, form: Form | None) -> bool:
    """Whether a value can be read as it lies in memory."""
    return (
        type(value) is torch.Tensor
        and form is not None
        and value.dtype is torch.float32
        and value.is_cpu
        and value.shape == form.shape
        and value.layout is torch.strided
        and value.is_contiguous(memory_format=form.memory_format)
        and not value.is_neg()
    )
