"""The backend of `torch.compile(model, backend="separable")`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..limits import check_threads
from . import machine as machines
from .backend import Untraceable, build, traced
from .compiled import CompiledModel
from .graph import Recipe
from .memory import Form
from .weights import Weights, exported_weights


def backend(
    module: torch.fx.GraphModule, example_inputs: Sequence[Any], **options: Any
) -> Callable[..., Any]:
    """The backend of `torch.compile(model, backend="separable")`.

    Args:
        module: the graph that was traced; its weights are among its arguments.
        example_inputs: the arguments.
        options: `threads` and `isa`, as in `compile`, given as `options={...}`.

    Returns:
        A function that compiles on the first call with each shape. Where a gradient is asked
        for, or the graph writes into its arguments, it is `module` itself.
    """
    chosen = options.get("options", options)
    unknown = set(chosen) - {"threads", "isa"}
    if unknown:
        raise ValueError(f"`options` has no {sorted(unknown)}; `threads` and `isa` can be given")
    threads, isa = chosen.get("threads"), chosen.get("isa")
    check_threads(threads)
    machine = machines.host(isa)
    tensors = [x for x in example_inputs if isinstance(x, torch.Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return module.forward
    fixed = [i for i, x in enumerate(example_inputs) if _is_weight(x)]
    return GraphRunner(module, fixed, machines.cores() if threads is None else threads, machine)


SHAPES = 64
"""compilations of one graph that are kept, each with packed weights; the oldest goes first"""


class GraphRunner:
    """Runs a traced graph, compiled once per combination of argument shapes.

    Args:
        module: the graph.
        fixed: which of its arguments are weights; their shapes do not change.
        threads: of one call.
        machine: the CPU to generate for.
    """

    def __init__(
        self,
        module: torch.fx.GraphModule,
        fixed: Sequence[int],
        threads: int,
        machine: machines.Machine,
    ) -> None:
        self._module, self._threads, self._machine = module, threads, machine
        count = sum(node.op == "placeholder" for node in module.graph.nodes)
        self._fixed, self._free = fixed, [i for i in range(count) if i not in set(fixed)]
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        """Run on the arguments of the traced graph, weights among them."""
        free = [args[i] for i in self._free]
        key = tuple(_kind(x) for x in free)
        compiled = self._compiled.get(key)
        if compiled is None:
            with self._lock:
                compiled = self._compiled.get(key)
                if compiled is None:
                    while len(self._compiled) >= SHAPES:
                        self._compiled.pop(next(iter(self._compiled)))
                    compiled = self._compiled[key] = self._compile(args)
        return compiled(*args)

    def _compile(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        weights, fixed = Weights(), self._fixed
        holder = [args[i] for i in fixed]

        def constants(program: torch.export.ExportedProgram) -> dict[str, Recipe]:
            names = program.graph_signature.user_inputs
            lifted = exported_weights(program, self._module, weights)
            held = enumerate(fixed)
            return lifted | {str(names[i]): weights.add(holder, number) for number, i in held}

        try:
            with torch.no_grad():
                exported = traced(self._module, args)
                program = build(exported, self._machine, self._threads, constants, weights)
        except Untraceable:
            return self._module.forward
        spec = exported.call_spec.out_spec
        assert spec is not None
        examples = [args[i] for i in self._free]
        _, structure = pytree.tree_flatten((tuple(examples), {}))
        inner = CompiledModel(program, (structure, spec), False, examples)
        one_by_one = threading.Lock()  # other instances of the same class have other weights

        def run(*args: Any) -> Any:
            with one_by_one:
                holder[:] = [args[i] for i in fixed]
                return inner(*(args[i] for i in self._free))

        return run


def _kind(x: Any) -> Any:
    """What a compilation is specialised to: the form of a tensor, the value of anything else."""
    if not isinstance(x, torch.Tensor):
        return x
    return x.dtype, Form.of(x) if x.layout is torch.strided else x.shape


def _is_weight(x: Any) -> bool:
    return isinstance(x, nn.Parameter) or (
        isinstance(x, torch.Tensor) and getattr(x, "_dynamo_static_input_type", None) is not None
    )
