"""A network as an ONNX graph, made without torch's chatter."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import nn


def onnx_program(
    model: nn.Module, args: tuple[Any, ...], dynamic_shapes: Any = None, opset: int | None = None
) -> torch.onnx.ONNXProgram:
    """Export a network to ONNX.

    Args:
        model: in eval mode.
        args: its arguments.
        dynamic_shapes: which axes may change, as for `torch.export.export`.
        opset: version of the operators; torch's default if None.

    Returns:
        The graph, optimised; `save` writes it.
    """
    with quiet():
        program = torch.onnx.export(
            model,
            args,
            dynamo=True,
            verbose=False,
            dynamic_shapes=dynamic_shapes,
            opset_version=opset,
        )
    assert program is not None
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch logs of an export to itself; what matters of it is in the error."""
    before = logging.root.manager.disable
    # it prints the whole graph where it fails
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)
