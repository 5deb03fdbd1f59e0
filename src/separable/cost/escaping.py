"""Fake tensors that outlive their run: a later run would read them and compute no values."""

from __future__ import annotations

import gc
import weakref
from types import CellType
from typing import Any

import torch
from torch import Tensor

References = list["weakref.ref[Tensor]"]


class Escaped(RuntimeError):
    """Something that can't be emptied holds a fake tensor."""


def forget(fakes: References) -> None:
    """Take the tensors that are still alive out of what holds them.

    A dictionary loses the entry, a variable's list or set the element, a function of
    `functools.lru_cache` its results; an attribute, a global variable and one of a closure become
    None.

    Raises:
        Escaped: something else holds one.
    """
    torch.clear_autocast_cache()  # of weights cast to fakes
    if not _alive(fakes):
        return
    gc.collect()  # cycles of the run, such as a caught exception and its frame
    for fake in fakes:  # one by one: a list of them would be one more that holds them
        if (tensor := fake()) is not None:
            _take_out(tensor)
            del tensor
    if _alive(fakes):
        gc.collect()
    alive = _alive(fakes)
    # what Python doesn't hold no later run can read
    holders = [each for fake in alive for each in gc.get_referrers(fake) if each is not alive]
    if holders:
        raise Escaped(
            "`model` keeps tensors of the run outside of its modules, where `count` can't put back "
            f"what was there (in a {type(holders[0]).__name__}); they have no values and would "
            "spoil later runs: empty what holds them, and let the model hold them in attributes of "
            "its modules"
        )


def _alive(fakes: References) -> list[Tensor]:
    return [tensor for fake in fakes if (tensor := fake()) is not None]


def _take_out(value: Any, ours: tuple[Any, ...] = ()) -> None:
    # no comprehension here may use a variable: its cell would be taken for one that holds a value
    holders = gc.get_referrers(value)
    for holder in holders:
        if _is_one_of(ours, holder):
            continue
        if hasattr(holder, "cache_clear"):
            holder.cache_clear()
        elif isinstance(holder, CellType):
            holder.cell_contents = None
        elif isinstance(holder, tuple):
            _take_out(holder, (*ours, holders))
        elif isinstance(holder, dict):
            _take_out_of(holder, value)
        elif isinstance(holder, (list, set)) and _is_variable(holder, (*ours, holders)):
            _take_out_of_variable(holder, value)
        elif hasattr(holder, "__dict__"):
            _take_out_of(vars(holder), value)


def _is_one_of(ours: tuple[Any, ...], holder: Any) -> bool:
    return any(each is holder for each in ours)


def _take_out_of_variable(container: Any, value: Any) -> None:
    kept = [each for each in container if each is not value]
    container.clear()
    getattr(container, "extend" if isinstance(container, list) else "update")(kept)


def _take_out_of(mapping: dict[Any, Any], value: Any) -> None:
    owner = _owner(mapping)
    for name in [name for name, each in mapping.items() if each is value]:
        if owner is None:
            del mapping[name]
        else:
            setattr(owner, name, None)


def _owner(mapping: dict[Any, Any]) -> Any:
    """The class, module or object whose attributes a dictionary holds."""
    for each in gc.get_referrers(mapping):
        if isinstance(each, type):
            if dict(each.__dict__) == mapping:
                return each
        elif getattr(each, "__dict__", None) is mapping:
            return each
    return None


def _is_variable(container: Any, ours: tuple[Any, ...]) -> bool:
    """Whether no container but ours holds one: it might have been made for what is in it."""
    return not any(
        isinstance(each, (list, tuple, set)) or (isinstance(each, dict) and _owner(each) is None)
        for each in gc.get_referrers(container)
        if not _is_one_of(ours, each)
    )
