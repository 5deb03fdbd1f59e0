"""Trained weights from files that others wrote."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

WRAPPERS = ("module.", "model.", "network.", "_orig_mod.")
"""what trainers and compilers put before the names of weights"""


def load_weights(network: nn.Module, path: Path, argument: str = "path") -> None:
    """Load a network's weights and buffers from a safetensors file.

    What a wrapper put before all names is taken off, and a weight that goes by several names needs
    to be there under one of them.

    Args:
        network: gets them.
        path: the file.
        argument: what the caller calls it, for errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or of another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{argument}: there is no file {str(path)!r}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{argument}: {str(path)!r} is no safetensors file: {error}") from error
    own = network.state_dict()
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) and name not in own for name in tensors):
            tensors = {name.removeprefix(wrapper): each for name, each in tensors.items()}
    problems = "; ".join(_problems(tensors, own))
    if problems:
        raise ValueError(f"{argument}: {str(path)!r} is of another network: {problems}")
    network.load_state_dict(tensors, strict=False)


def _problems(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """How the tensors of a file differ from a network's own: the first of each kind."""

    def place(name: str) -> tuple[int, object]:
        return own[name].data_ptr(), own[name].shape

    there = {place(name) for name in tensors if name in own}
    reshaped = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    kinds = {
        "it lacks {}": [name for name in own if name not in tensors and place(name) not in there],
        "the network has no {}": [name for name in tensors if name not in own],
        "{} has another shape": reshaped,
    }
    found = []
    for words, names in kinds.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            found.append(words.format(repr(names[0])) + more)
    if reshaped:
        name = reshaped[0]
        found[-1] += f" ({list(tensors[name].shape)}, not {list(own[name].shape)})"
    return found
