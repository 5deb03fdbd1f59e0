"""Checks before a training begins: does the network take these inputs, and give these outputs?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..cost.preserving import copied

_ENLARGED = 16
IGNORED = -100
"""the label that cross-entropy leaves out"""


def input_channels(network: nn.Module) -> int:
    """Channels of the images that a network takes: of its first convolution, else 3."""
    for module in network.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            return module.in_channels if module.in_channels in (1, 3) else 3
    return 3


@torch.no_grad()
def outputs_of(network: nn.Module, input: Tensor, name: str) -> Tensor:
    """What a network returns for one input; it is left as it was.

    Args:
        network: on any device.
        input: without the batch's dimension.
        name: the argument that the network came from.

    Raises:
        ValueError: the network rejects the input, or strides over it.
    """
    probe = copied(network, name=name).eval()
    parameter = next(network.parameters(), None)
    batch = input[None] if parameter is None else input[None].to(parameter.device)
    size = "x".join(map(str, input.shape))
    outputs = _answer(probe, batch, f"`{name}` rejects inputs of {size}", name)
    stride = total_stride(probe, batch)
    if min(input.shape[1:], default=stride) < stride:
        raise ValueError(
            f"`data`: inputs of {size} are smaller than the stride of `{name}`, which is {stride}; "
            "give larger ones (`image_size`) or a network with a smaller stride"
        )
    return outputs


def _answer(network: nn.Module, batch: Tensor, failure: str, name: str) -> Tensor:
    try:
        outputs: Any = network(batch)
    except Exception as error:
        words = " ".join(str(error).split())
        raise ValueError(f"{failure}: {words}") from error
    if not isinstance(outputs, Tensor):
        raise TypeError(f"`{name}` must return a tensor, not {type(outputs).__name__}")
    return outputs


@torch.no_grad()
def check_training(network: nn.Module, input: Tensor, batch_size: int, name: str) -> None:
    """Refuse a network that answers otherwise in training, or needs more inputs at once.

    Two inputs are tried, and all of a pass where those do not do.

    Args:
        network: it is left as it was.
        input: without the batch's dimension.
        batch_size: inputs per pass.
        name: the argument that the network came from.

    Raises:
        TypeError: it returns no tensor.
        ValueError: it rejects the batch.
    """
    parameter = next(network.parameters(), None)
    input = input if parameter is None else input.to(parameter.device)
    failure = f"`{name}` rejects `batch_size` (={batch_size}) in training"
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        for count in sorted({min(batch_size, 2), batch_size}):
            try:
                twin = copied(network, name=name).train()
                _answer(twin, torch.stack([input] * count), failure, name)
                return
            except ValueError:
                if count == batch_size:
                    raise


def check_labels(labels: object, logits: torch.Size) -> Tensor:
    """Return labels as cross-entropy takes them.

    Args:
        labels: classes `[N, *spatial]`, whole numbers, or probabilities of the logits' shape.
        logits: the shape `[N, classes, *spatial]`.

    Raises:
        TypeError: they are neither.
        ValueError: one is not in 0 to classes - 1.
    """
    expected, classes = [logits[0], *logits[2:]], logits[1]
    kind = type(labels).__name__
    if isinstance(labels, Tensor):
        if labels.is_floating_point() and labels.shape == logits:
            return labels
        if not labels.is_floating_point() and list(labels.shape) == expected:
            labels = labels.long()
            # on a GPU, looking means waiting for it
            seen = labels[labels != IGNORED] if labels.device.type == "cpu" else labels[:0]
            if len(seen) and not 0 <= seen.min() <= seen.max() < classes:
                raise ValueError(
                    f"`data` has labels from {seen.min()} to {seen.max()}, and the network "
                    f"{classes} outputs; labels must be in 0 to {classes - 1}"
                )
            return labels
        kind = f"{list(labels.shape)} of {labels.dtype}"
    raise TypeError(
        f"`data`: labels must be classes, {expected} whole numbers, or probabilities "
        f"{list(logits)}, and not {kind}"
    )


def total_stride(network: nn.Module, input: Tensor) -> int:
    """How many input positions one step of the coarsest feature map makes; 1 if unknown.

    Found on shapes alone, of an input so much larger that rounding does not matter.
    """
    sizes: list[int] = []

    def record(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        # what has been pooled to one position has no stride
        if max(inputs[0].shape[2:]) > 1:
            sizes.append(max(output.shape[2:]))

    large = [_ENLARGED * size for size in input.shape[2:]]
    if not large:
        return 1
    probe = copied(network).to("meta")
    for module in probe.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            module.register_forward_hook(record)
    try:
        probe(torch.empty((*input.shape[:2], *large), device="meta", dtype=input.dtype))
    except Exception:  # a network of one input size alone has accepted this one
        return 1
    return max((max(large) // size for size in sizes if size), default=1)


def check_classes(outputs: Tensor, classes: int | None, name: str) -> None:
    """Refuse a network with fewer outputs than the data has classes.

    Args:
        outputs: for one input.
        classes: of the data; None if unknown.
        name: the argument that the network came from.

    Raises:
        ValueError: so it is.
    """
    if outputs.ndim != 2:
        raise ValueError(
            f"`{name}` returns {tuple(outputs.shape)} for one input; training with labels needs "
            "logits [N, classes]"
        )
    if classes is not None and outputs.shape[1] < classes:
        raise ValueError(
            f"`{name}` has {outputs.shape[1]} outputs and `data` {classes} classes; build it with "
            f"as many, as in num_classes={classes}"
        )
