"""`compile`: a network in, machine code for this CPU out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..failures import in_a_line
from ..limits import check_threads
from ..progress import progress
from . import machine as machines
from .checking import TOLERANCE, outputs_deviation
from .compiled import CompiledModel
from .execute import Program
from .graph import Graph, Recipe, optimise
from .importing import NeedsFunctionalisation, import_graph
from .scheduling import schedule
from .validation import check_footprint
from .weights import TRACING, Weights, exported_weights


def compile(
    model: nn.Module,
    example_inputs: torch.Tensor | Sequence[Any],
    threads: int | None = None,
    isa: str | None = None,
    dynamic_batch: bool = False,
    fuse: bool = True,
) -> CompiledModel:
    """Generate machine code for a network, for this CPU and these shapes.

    Args:
        model: in eval mode, on the CPU.
        example_inputs: its arguments, float32; only their shapes and memory formats matter.
            Results are channels last where the model's own would be, and contiguous otherwise.
        threads: how many cores one call may use; all that this process may use if `None`.
        isa: `"avx512"`, `"avx2"`, `"sse2"` or `"neon"`; the best one here if `None`.
        dynamic_batch: accept any batch size; samples then run one after another.
        fuse: join convolutions, depthwise and pointwise ones above all, where that is estimated to
            be faster.

    Returns:
        The compiled model. Operators without a kernel still run in torch; `explain()` names them.

    Raises:
        TypeError: if the model is no module, the example no tensor or sequence, or `threads`
            no int.
        ValueError: if the model is in training mode, can't be traced, writes into its inputs, or
            mixes the samples of a batch though `dynamic_batch` is asked for; or an argument is out
            of its range.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` (a {type(model).__name__}) must be an nn.Module")
    if any(module.training for module in model.modules()):
        raise ValueError(
            "`model` must be in eval mode, as only inference is compiled: model.eval()"
        )
    check_threads(threads)
    count = machines.cores() if threads is None else threads
    machine = machines.host(isa)
    if not isinstance(example_inputs, torch.Tensor | Sequence):
        raise TypeError(
            f"`example_inputs` (a {type(example_inputs).__name__}) must be a tensor, or the "
            "arguments in a list or tuple"
        )
    args = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    if dynamic_batch:
        if not all(isinstance(x, torch.Tensor) and x.dim() and x.is_floating_point() for x in args):
            raise ValueError("`dynamic_batch=True` takes float32 tensors with a batch axis only")
        args = tuple(x[:1] for x in args)
    weights = Weights()
    with torch.no_grad():
        with progress("tracing the network"):
            exported = traced(model, args)
        constants = functools.partial(exported_weights, model=model, weights=weights)
        program = build(exported, machine, count, constants, weights, fuse)
    spec_in, spec_out = exported.call_spec.in_spec, exported.call_spec.out_spec
    assert spec_in is not None
    assert spec_out is not None
    examples = pytree.tree_leaves((args, {}))
    compiled = CompiledModel(program, (spec_in, spec_out), dynamic_batch, examples)
    if dynamic_batch:
        results = program.schedule.results
        if any(form is None or form.shape[:1] != (1,) for form in results):
            raise ValueError(
                "`dynamic_batch=True` needs float32 results with the batch as their first axis; "
                "compile the model for one batch size instead"
            )
        _check_samples_apart(model, compiled, args)
    return compiled


def traced(model: nn.Module, args: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """The graph of a model; raises `Untraceable` where torch can't trace it."""
    # an argument given twice would be taken for one
    args = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
    try:
        with TRACING:
            return torch.export.export(model, args)
    except Exception as error:  # torch names no common class of what tracing and the model raise
        raise _untraceable(error) from error


class Untraceable(ValueError):
    """A network that torch can't trace as one graph, or that writes into what it is given."""


def _untraceable(error: Exception) -> Untraceable:
    return Untraceable(
        f"`model` can't be traced as one graph for `example_inputs`: {in_a_line(error)}; "
        'torch.compile(model, backend="separable") compiles the parts that can'
    )


def build(
    exported: torch.export.ExportedProgram,
    machine: machines.Machine,
    threads: int,
    constants: Callable[[torch.export.ExportedProgram], dict[str, Recipe]],
    weights: Weights,
    fuse: bool = True,
) -> Program:
    """Take an exported graph through all passes to a program that can run.

    Args:
        exported: the graph.
        machine: the CPU to generate for.
        threads: of one call.
        constants: by placeholder, how to read the weights of a graph.
        weights: where those are watched.
        fuse: join convolutions where that is estimated to be faster.

    Raises:
        Untraceable: if the graph writes into its inputs or weights.
    """

    def translate(program: torch.export.ExportedProgram) -> Graph:
        module, signature = program.graph_module, program.graph_signature
        written = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
        if written:
            raise Untraceable(
                f"the model writes into its input or a weight ({', '.join(written.values())}); "
                "let it work on a copy (`x = x.clone()`)"
            )
        return import_graph(program.graph, constants(program), lambda name: getattr(module, name))

    try:
        graph = translate(exported)
    except NeedsFunctionalisation:
        try:
            with TRACING:
                functional = exported.run_decompositions({})
        except Exception as error:
            raise _untraceable(error) from error
        graph = translate(functional)
    steps = schedule(optimise(graph), machine, threads, fuse)
    for step in steps.steps:
        if step.kernel is not None:
            check_footprint(step.kernel, step.arguments)  # nothing reads beyond what there is
    program = Program(steps, machine, threads, watched=weights)
    program.pack()
    return program


def _check_samples_apart(
    model: nn.Module, compiled: CompiledModel, args: tuple[torch.Tensor, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = [x.new_empty((3, *x.shape[1:])).normal_(generator=generator) for x in args]
    with torch.no_grad():
        expected = model(*batch)
    if not outputs_deviation(compiled(*batch), expected) <= TOLERANCE:
        raise ValueError(
            "`dynamic_batch=True` needs a model whose samples do not depend on one another; "
            "compile it for one batch size instead"
        )
