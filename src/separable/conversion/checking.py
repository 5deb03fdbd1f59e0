"""What is wrong with the arguments of a conversion, before any work."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..cost.counting import check_module
from ..cost.preserving import copied
from .forms import FORMS, Form
from .sites import Site, replaced, trace


def check_model(model: Any, report: type) -> None:
    """See that a model is one that can be converted and given a report.

    Args:
        model: the model.
        report: the class of the reports that conversions leave on models.

    Raises:
        TypeError: it is no module.
        ValueError: it has no weights yet, or an attribute in the report's place.
    """
    check_module(model, "model")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            raise ValueError(f"`model` has no values: `{name}` is on the meta device; load them")
    own = getattr(model, "report", None)
    if own is not None and not isinstance(own, report):
        raise ValueError(
            f"`model` has an attribute `report` (a {type(own).__name__}), where a conversion "
            "leaves its own; rename it"
        )


def checked_skip(model: nn.Module, skip: Any) -> tuple[str, ...]:
    """The names and patterns of layers to skip, each of which must be of some.

    Raises:
        TypeError: they are no sequence of strings.
        ValueError: one of them names nothing.
    """
    if isinstance(skip, str) or not isinstance(skip, Sequence):
        raise TypeError(f"`skip` (={skip!r}) must be a sequence of names, like ['layer1']")
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern in skip:
        if not isinstance(pattern, str):
            raise TypeError(f"`skip` (={skip!r}) must hold names; {pattern!r} is none")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"`skip` (={pattern!r}) must name a layer of the model, and none does")
    return tuple(skip)


def checked_forms(forms: Any) -> tuple[Form, ...]:
    """The forms to choose from.

    Raises:
        TypeError: they are no iterable.
        ValueError: one of them is unknown, or there are none.
    """
    try:
        given = tuple(forms)
    except TypeError:
        raise TypeError(f"`forms` (={forms!r}) must be a sequence of forms") from None
    if not given or isinstance(forms, str):
        raise ValueError(f"`forms` (={forms!r}) must be a sequence of forms: {', '.join(FORMS)}")
    for form in given:
        if form not in FORMS:
            raise ValueError(f"`forms` (={form!r}) must be among {', '.join(FORMS)}")
    return given


def check_fit(sites: Sequence[Site], forms: tuple[Form, ...]) -> None:
    """See that some layer can have one of the forms: low-rank is for those without taps.

    Raises:
        ValueError: none can.
    """
    for site in sites:
        assert site.shape is not None
        if any((form == "low-rank") == (site.shape.taps == 1) for form in forms):
            return
    if sites:
        raise ValueError(
            f"`forms` (={list(forms)}) fits no layer: 'low-rank' is for 1×1 convolutions, the "
            "others for larger ones"
        )


def check_compile(compile: Any) -> None:
    """See that what networks are compiled with can be called.

    Raises:
        TypeError: it cannot.
    """
    if compile is not None and not callable(compile):
        raise TypeError(f"`compile` (={compile!r}) must be a function of a model and an input")


@torch.no_grad()
def check_example(model: nn.Module, example: Any, used: bool) -> None:
    """See that the network takes an example input, where it is used.

    Raises:
        TypeError: it is no tensor.
        ValueError: the network rejects it.
    """
    if not isinstance(example, Tensor):
        raise TypeError(f"`example` (a {type(example).__name__}) must be a tensor, an input batch")
    if not used:
        return
    try:
        model(example.clone())
    except Exception as error:
        raise ValueError(
            f"`example`: the model rejects a batch of shape {tuple(example.shape)}: {error}"
        ) from error


def check_reached(
    model: nn.Module, sites: Sequence[Site], input: Tensor, further: Iterable[Tensor] = ()
) -> None:
    """See that a network would run what is put in the place of its layers.

    Args:
        model: the network; it is left as it is.
        sites: the layers, as `trace` found them on the same inputs.
        input: as for `trace`.
        further: as for `trace`.

    Raises:
        ValueError: it would go on running one of the layers itself.
    """
    twins = copied(model)
    for site in sites:
        conv = twins.get_submodule(site.name)
        twin = conv.__new__(type(conv))  # the same, parameters too, but hooks of its own
        twin.__dict__.update(vars(conv))
        twin._forward_hooks, twin._forward_hooks_with_kwargs = OrderedDict(), OrderedDict()
        twin._compiled_call_impl = None
        twins = replaced(twins, site.names, twin)
    reached = {site.name: site.calls for site in trace(twins, input, further)}
    for site in sites:
        if reached[site.name] < site.calls:
            raise ValueError(
                f"layer `{site.name}` is not run by its name: the network keeps it in a list or "
                "dict of its own, or compiled, and would go on running the dense one; call it by "
                "its attribute (nn.ModuleList, nn.ModuleDict), compile the network after the "
                "conversion, or keep the layer dense with `skip`"
            )
