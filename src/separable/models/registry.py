"""Networks by name: from this package, torchvision, timm or a Python file."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from .mobilenet import mobilenet_v1

_OWN: dict[str, Callable[..., nn.Module]] = {"mobilenet_v1": mobilenet_v1}

# options with which torchvision and timm download weights or read them from a pickle
_WEIGHT_OPTIONS = ("checkpoint_path", "pretrained", "weights", "weights_backbone")


def create_model(name: str) -> nn.Module:
    """Build the network that `name` describes, with random weights.

    A name is a source, a colon, what to build there, and options separated by commas, which
    become keyword arguments: Python literals, or text where they are not.

    | name                                             | network                             |
    |--------------------------------------------------|-------------------------------------|
    | `separable:mobilenet_v1,conv=regular,width=0.5`  | `separable.models.mobilenet_v1`     |
    | `torchvision:resnet18,num_classes=10`            | `torchvision.models.get_model`      |
    | `timm:mobilenetv1_100,in_chans=1`                | `timm.create_model`                 |
    | `path/to/file.py:build,depth=3`                  | what `build(depth=3)` in it returns |

    A file's attribute may also be a network itself. The file runs as `python path/to/file.py`
    would run it: modules beside it can be imported.

    Args:
        name: the description, as above.

    Raises:
        ValueError: the source or the network is unknown, or an option is malformed or loads
            weights.
        TypeError: the file's attribute is neither a network nor a function that returns one.
        FileNotFoundError: the file does not exist.
        ImportError: the package that has the network is not installed.

    What the file or the network's constructor raises passes through.
    """
    target, *options = name.split(",")
    source, colon, attribute = target.rpartition(":")
    if not colon or not source or not attribute:
        raise ValueError(
            f"`name` (={name!r}) must be SOURCE:NAME, with a source of {', '.join(_SOURCES)} "
            "or path/to/file.py"
        )
    arguments = dict(_option(text) for text in options)
    if source in _SOURCES:
        return _SOURCES[source](attribute, arguments)
    if source.endswith(".py"):
        return _from_file(Path(source), attribute, arguments)
    raise ValueError(
        f"the source {source!r} in `name` (={name!r}) must be one of {', '.join(_SOURCES)} or "
        f"path/to/file.py{_suggestion(source, _SOURCES)}"
    )


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ValueError(f"the option {text!r} must be KEY=VALUE, as in width=0.5")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _refuse_weights(arguments: dict[str, Any]) -> None:
    for option in _WEIGHT_OPTIONS:
        if arguments.get(option):
            raise ValueError(
                f"the option {option}={arguments[option]!r} loads weights, which may be a pickle "
                "and run code; write a function that does it into a file: path/to/file.py:function"
            )


def _own(name: str, arguments: dict[str, Any]) -> nn.Module:
    if name not in _OWN:
        raise ValueError(
            f"separable has no network {name!r}, only {', '.join(_OWN)}{_suggestion(name, _OWN)}"
        )
    return _OWN[name](**arguments)


def _package(source: str) -> Any:
    try:
        return import_module(source)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{source} is not installed: pip install 'separable[zoo]'", name=error.name
        ) from error


def _from_torchvision(name: str, arguments: dict[str, Any]) -> nn.Module:
    models = _package("torchvision").models
    known = models.list_models()
    if name not in known:
        raise ValueError(f"torchvision has no network {name!r}{_suggestion(name, known)}")
    _refuse_weights(arguments)
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        arguments = {"weights_backbone": None, **arguments}  # else it downloads them
    model: nn.Module = models.get_model(name, **{"weights": None, **arguments})
    return model


def _from_timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    timm = _package("timm")
    if not timm.is_model(name):
        raise ValueError(f"timm has no network {name!r}{_suggestion(name, timm.list_models())}")
    _refuse_weights(arguments)
    model: nn.Module = timm.create_model(name, **arguments)
    return model


_SOURCES: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "separable": _own,
    "torchvision": _from_torchvision,
    "timm": _from_timm,
}


# by folder, the modules that files in it have imported from it
_BESIDE: dict[str, set[str]] = {}


def _from_file(path: Path, attribute: str, arguments: dict[str, Any]) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    module = _run(path)
    if not hasattr(module, attribute):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise ValueError(f"{path} defines no {attribute!r}{_suggestion(attribute, public)}")
    model = getattr(module, attribute)
    if not isinstance(model, nn.Module) and callable(model):
        with _importing_from(path.parent):
            model = model(**arguments)
    elif arguments:
        raise ValueError(f"{attribute!r} in {path} is no function: it takes no options")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{attribute!r} in {path} must be a torch.nn.Module or a function that returns one, "
            f"not {type(model).__name__}"
        )
    return model


def _run(path: Path) -> ModuleType:
    # no package has this name, and dataclasses and pickle find the module by it
    name = f"separable_file_{path.stem}_{zlib.crc32(bytes(path.resolve())):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _importing_from(path.parent):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Let imports find the modules in `folder` first, as for a script in it.

    Those that a file of another folder has imported are forgotten, for they may have the same
    names; what was made of them keeps them.
    """
    entry = str(folder.resolve())
    for other, names in _BESIDE.items():
        if other != entry:
            for name in names:
                sys.modules.pop(name, None)
            names.clear()
    before = set(sys.modules)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
        _BESIDE.setdefault(entry, set()).update(
            name
            for name in set(sys.modules) - before
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(entry + os.sep)
        )
