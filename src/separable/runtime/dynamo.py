"""The backend of `torch.compile(model, backend="separable")`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from . import machine as machines
from .backend import build
from .compiled import CompiledModel
from .graph import Recipe
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
    tensors = [x for x in example_inputs if isinstance(x, torch.Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return module.forward
    return GraphRunner(module, chosen.get("threads") or machines.cores(), chosen.get("isa"))


class GraphRunner:
    """Runs a traced graph, compiled once per combination of argument shapes."""

    def __init__(self, module: torch.fx.GraphModule, threads: int, isa: str | None) -> None:
        self._module, self._threads, self._machine = module, threads, machines.host(isa)
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        """Run on the arguments of the traced graph, weights among them."""
        key = tuple((x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in args)
        compiled = self._compiled.get(key)
        if compiled is None:
            with self._lock:
                compiled = self._compiled.get(key) or self._compile(args)
                self._compiled[key] = compiled
        return compiled(*args)

    def _compile(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        weights, holder = Weights(), dict(enumerate(args))
        fixed = [i for i, x in enumerate(args) if _is_weight(x)]

        def constants(program: torch.export.ExportedProgram) -> dict[str, Recipe]:
            names = program.graph_signature.user_inputs
            lifted = exported_weights(program, self._module, weights)
            return lifted | {str(names[i]): weights.add(holder, i) for i in fixed}

        try:
            with torch.no_grad():
                exported = torch.export.export(self._module, args)
                program = build(exported, self._machine, self._threads, constants)
        except ValueError:  # the graph writes into its arguments
            return self._module.forward
        inputs = [i for i, x in enumerate(args) if i not in fixed]
        spec = exported.call_spec.out_spec
        assert spec is not None
        examples = [args[i] for i in inputs]
        _, structure = pytree.tree_flatten((tuple(examples), {}))
        inner = CompiledModel(program, program.argument_shapes, (structure, spec), weights, False)

        def run(*args: Any) -> Any:
            for i in fixed:
                holder[i] = args[i]
            return inner(*(args[i] for i in inputs))

        return run


def _is_weight(x: Any) -> bool:
    return isinstance(x, nn.Parameter) or (
        isinstance(x, torch.Tensor) and getattr(x, "_dynamo_static_input_type", None) is not None
    )
