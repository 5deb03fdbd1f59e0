"""Converted networks on disk: one safetensors file with the plan in its metadata."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..cost.preserving import copied
from ..failures import whole_message
from ..outputs import OUTPUTS
from ..writing import whole_file
from .applying import Report
from .checking import check_model
from .forms import CONVS, Shape, random_factors, separated
from .plans import Plan
from .sites import convolutions, geometry, replaced

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
        TypeError: `weights` are no state dict.
        ValueError: the model is not a converted one, `weights` are of another, or there is state
            that is no tensor.
    """
    report = getattr(model, "report", None)
    if not isinstance(report, Report):
        raise ValueError("`model` has no `report`: it did not come from `convert` or `apply`")
    own = model.state_dict()
    given = own if weights is None else _matching(weights, own)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"`model` has the extra state `{name}`, a {type(tensor).__name__}: the file holds "
                "tensors only; let `get_extra_state` return one, or save with torch.save"
            )
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


def _matching(weights: Any, own: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """A state dict, which must have the names and sizes of a model's own."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"`weights` (a {type(weights).__name__}) must be a state dict")
    if weights.keys() != own.keys():
        odd = sorted(map(str, weights.keys() ^ own.keys()))[:3]
        raise ValueError(
            f"`weights` must have the names of the model's state dict; {', '.join(odd)} are in one "
            "of them only"
        )
    for name, value in own.items():
        if isinstance(value, Tensor) and getattr(weights[name], "shape", None) != value.shape:
            raise ValueError(
                f"`weights` must have `{name}` of the model's shape {list(value.shape)}"
            )
    return weights


def load(path: str | os.PathLike[str], *, model: nn.Module) -> nn.Module:
    """Read a converted network.

    Args:
        path: a file that `save` wrote.
        model: the unconverted network, with any weights; it is left as it was.

    Returns:
        The converted network, on the device and in the dtype of `model`, with its `report`.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: `model` is no module.
        ValueError: the file is damaged, of another kind, or of another network.
    """
    check_model(model, Report)
    report, tensors = _read(path)
    result = copied(model)
    names = convolutions(result)
    for row in report.plan.rows:
        conv: Any = result.get_submodule(row.name) if row.name in names else None
        if row.geometry and conv is not None and row.geometry != geometry(conv):
            raise ValueError(
                f"`path` (={os.fspath(path)!r}) holds another network than `model`: its layer "
                f"`{row.name}` has {row.geometry}, not {geometry(conv)}"
            )
        if row.form is None:
            continue
        if not isinstance(conv, CONVS) or Shape.of(conv) != row.shape:
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
    for name, value in result.state_dict().items():
        if name in tensors and tensors[name].is_floating_point() != value.is_floating_point():
            raise ValueError(
                f"`path` (={os.fspath(path)!r}) holds another network than `model`: its `{name}` "
                f"is of {tensors[name].dtype}, not {value.dtype}"
            )
    try:
        result.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"`path` (={os.fspath(path)!r}) holds another network than `model`: "
            f"{whole_message(error)}"
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
        report = _report(plan, json.loads(metadata["report"]))
        for name, source in json.loads(metadata["aliases"]).items():
            tensors[name] = tensors[source]
    except (
        SafetensorError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError(
            f"`path` (={os.fspath(path)!r}) is no converted network that `save` wrote: {error}"
        ) from error
    return report, tensors


def _report(plan: Plan, fields: dict[str, Any]) -> Report:
    report = Report(plan, **{**fields, "notes": tuple(fields.get("notes", ()))})
    flags = all(isinstance(x, bool) for x in (report.batch_norm, report.refined, report.trained))
    told = report.outputs in OUTPUTS and all(isinstance(note, str) for note in report.notes)
    measured = report.error is None or type(report.error) in (int, float)
    if not (flags and told and measured):
        raise ValueError("its report is damaged")
    return report
