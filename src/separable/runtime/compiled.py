"""A compiled model: checks its arguments, keeps its weights fresh, and runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .execute import Program
from .explaining import Explanation, assembly, explain
from .weights import Weights


class CompiledModel:
    """A model as machine code; call it like the model.

    Safe to call from many threads at once. Weights that changed since the last call are packed
    again. The results carry no gradient.

    Attributes:
        program: the steps and their memory.
        expected: the shape of each argument; `None` where it is no float32 tensor.
        structures: how arguments and results are nested.
        dynamic_batch: whether any batch size is accepted.
    """

    def __init__(
        self,
        program: Program,
        expected: Sequence[tuple[int, ...] | None],
        structures: tuple[pytree.TreeSpec, pytree.TreeSpec],
        weights: Weights | None,
        dynamic_batch: bool,
    ) -> None:
        self.program = program
        self.expected = tuple(expected)
        self.structures = structures
        self.dynamic_batch = dynamic_batch
        self._weights = weights
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on new inputs.

        Raises:
            TypeError: if the arguments are not structured, typed or placed as in the example.
            ValueError: if a shape differs from the example's.
        """
        flat, structure = pytree.tree_flatten((args, kwargs))
        if structure != self.structures[0]:
            raise TypeError(
                f"arguments {structure} differ from the example's {self.structures[0]}; "
                "call the model as it was compiled"
            )
        batch = flat[0].shape[0] if self.dynamic_batch and flat[0].dim() else None
        inputs = [
            value if shape is None else self._checked(i, value, shape, batch)
            for i, (value, shape) in enumerate(zip(flat, self.expected, strict=True))
        ]
        if self._weights is not None and self._weights.changed():
            self._refresh()
        results = self.program(inputs) if batch is None else self._each(inputs, batch)
        return pytree.tree_unflatten(results, self.structures[1])

    def explain(self, repeats: int = 10) -> Explanation:
        """What runs in which kernel, what was fused, and how fast each is.

        Args:
            repeats: measurements per kernel, of which the best counts.
        """
        generator = torch.Generator().manual_seed(0)
        inputs = [
            None if shape is None else torch.randn(shape, generator=generator)
            for shape in self.expected
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

    def _checked(
        self, number: int, value: Any, shape: tuple[int, ...], batch: int | None
    ) -> torch.Tensor:
        if batch is not None:
            shape = (batch, *shape[1:])
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
        return value.detach().contiguous()

    def _refresh(self) -> None:
        assert self._weights is not None
        with self._lock:
            if self._weights.changed():
                self._weights.remember()
                self.program.pack()

    def _each(self, inputs: Sequence[torch.Tensor], batch: int) -> list[Any]:
        """Run sample by sample, each result written where it belongs."""
        shapes = [shape or () for shape in self.program.result_shapes]
        outputs = [torch.empty(batch, *shape[1:]) for shape in shapes]
        for i in range(batch):
            self.program([x[i : i + 1] for x in inputs], outputs=[y[i : i + 1] for y in outputs])
        return outputs
