"""Converted networks on disk: one safetensors file with the plan in its metadata."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..writing import whole_file
from .applying import Report
from .forms import Shape, random_factors, separated
from .plans import Plan
from .sites import convolutions, replaced

FORMAT = "separable-1"


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a converted network's weights and plan to a safetensors file.

    The file appears whole or not at all.

    Args:
        model: what `convert` or `apply` returned.
        path: the file to write.
        weights: a state dict to write in place of the model's own, as a moving average of it.

    Raises:
        ValueError: the model is not a converted one.
    """
    report = getattr(model, "report", None)
    if not isinstance(report, Report):
        raise ValueError("`model` has no `report`: it did not come from `convert` or `apply`")
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, tensor in (model.state_dict() if weights is None else weights).items():
        # safetensors stores no two views of one memory: tied weights are kept once
        view = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and view in seen:
            aliases[name] = seen[view]
        else:
            seen[view] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    metadata = {
        "format": FORMAT,
        "plan": report.plan.to_json(),
        "report": json.dumps({k: v for k, v in dataclasses.asdict(report).items() if k != "plan"}),
        "aliases": json.dumps(aliases),
    }
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata)


def load(path: str | os.PathLike[str], *, model: nn.Module) -> nn.Module:
    """Read a converted network.

    Args:
        path: a file that `save` wrote.
        model: the unconverted network, with any weights; it is left as it was.

    Returns:
        The converted network, on the device and in the dtype of `model`, with its `report`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind, or of another network.
    """
    report, tensors = _read(path)
    result = copy.deepcopy(model)
    names = convolutions(result)
    for row in report.plan.rows:
        if row.form is None:
            continue
        conv: Any = result.get_submodule(row.name) if row.name in names else None
        if conv is None or Shape.of(conv) != row.shape:
            raise ValueError(
                f"`path` (={os.fspath(path)!r}) holds another network than `model`: its layer "
                f"`{row.name}` has the shape {row.shape}"
            )
        factors = random_factors(row.form, row.shape, row.rank)
        child = "spatial" if factors.last is None else "last"
        prefix = f"{row.name}." if row.name else ""
        bias = tensors.get(f"{prefix}{child}.bias")
        if bias is None and conv.bias is not None:
            raise ValueError(
                f"`path` (={os.fspath(path)!r}) lacks the bias of layer `{row.name}`; save the "
                "network again"
            )
        module = separated(conv, factors, bias)
        result = replaced(result, names[row.name], module)
    try:
        result.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"`path` (={os.fspath(path)!r}) holds another network than `model`: {error}"
        ) from error
    result.report = report  # type: ignore[assignment]
    return result


def _read(path: str | os.PathLike[str]) -> tuple[Report, dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"`path` (={os.fspath(path)!r}) is no file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        plan = Plan.from_json(metadata["plan"])
        report = Report(plan, **json.loads(metadata["report"]))
        for name, source in json.loads(metadata["aliases"]).items():
            tensors[name] = tensors[source]
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`path` (={os.fspath(path)!r}) is no converted network that `save` wrote: {error}"
        ) from error
    return report, tensors
