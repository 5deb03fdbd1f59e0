"""The separable forms of a convolution: their factors, cost, dense equivalent and modules.

A dense weight is seen per group as `[G, N, C, P]`: N output and C input channels of each of G
groups, P taps. A form writes it as a sum of products of smaller factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

Form = Literal[
    "depthwise-pointwise", "pointwise-depthwise", "pointwise-depthwise-pointwise", "low-rank"
]
FORMS: tuple[Form, ...] = get_args(Form)

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVS: tuple[type[Conv], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Shape(NamedTuple):
    """The sizes of a convolution that its forms depend on."""

    groups: int
    outputs: int
    """output channels per group"""
    inputs: int
    """input channels per group"""
    taps: int

    @classmethod
    def of(cls, conv: Conv) -> Shape:
        """Read the sizes of a convolution."""
        groups = conv.groups
        taps = math.prod(conv.kernel_size)
        return cls(groups, conv.out_channels // groups, conv.in_channels // groups, taps)


class Factors(NamedTuple):
    """The weights of a form, per group.

    | form | lead | spatial | last |
    |---|---|---|---|
    | depthwise-pointwise, T terms | - | `[G, C, T, P]` | `[G, N, C, T]` |
    | pointwise-depthwise, T terms | `[G, N, T, C]` | `[G, N, T, P]` | - |
    | pointwise-depthwise-pointwise, R terms | `[G, R, C]` | `[G, R, P]` | `[G, N, R]` |
    | low-rank, R terms | - | `[G, R, C, P]` | `[G, N, R]` |

    In the low-rank form the spatial factor is the whole first convolution.
    """

    form: Form
    lead: Tensor | None
    spatial: Tensor
    last: Tensor | None

    def dense(self) -> Tensor:
        """The weight `[G, N, C, P]` that the factors multiply out to."""
        if self.form == "depthwise-pointwise":
            return torch.einsum("gnct,gctp->gncp", self.last, self.spatial)
        if self.form == "pointwise-depthwise":
            return torch.einsum("gntc,gntp->gncp", self.lead, self.spatial)
        if self.form == "low-rank":
            return torch.einsum("gnr,grcp->gncp", self.last, self.spatial)
        return torch.einsum("gnr,grc,grp->gncp", self.last, self.lead, self.spatial)

    def to(self, *args: Any) -> Factors:
        """Move or cast each factor as `Tensor.to` does."""
        moved = [None if part is None else part.to(*args) for part in self[1:]]
        return Factors(self.form, *moved)  # type: ignore[arg-type]


def grouped(weight: Tensor, groups: int) -> Tensor:
    """View a weight `[N, C / groups, *K]` as `[G, N / G, C / G, P]`."""
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def exact_rank(form: Form, shape: Shape) -> int:
    """The smallest rank at which every weight of the shape has the form exactly.

    For the canonical form pointwise-depthwise-pointwise it is the smaller one of the two bounds
    that the other two forms, its special cases, give; the tensor's own rank may be smaller.
    """
    _, outputs, inputs, taps = shape
    if form == "depthwise-pointwise":
        return min(outputs, taps)
    if form == "pointwise-depthwise":
        return min(inputs, taps)
    if form == "low-rank":
        return min(outputs, inputs * taps)
    return min(inputs * min(outputs, taps), outputs * min(inputs, taps))


def weights_per_position(form: Form, shape: Shape, rank: int) -> tuple[int, int]:
    """Weights used at each input position and at each output position of the convolution.

    Their sum is the form's parameters, biases left out; its MACs are their sum after each is
    multiplied by the number of its positions (Howard et al. 2017, section 3.1, for rank 1).
    """
    groups, outputs, inputs, taps = shape
    if form == "depthwise-pointwise":
        return 0, groups * inputs * rank * (taps + outputs)
    if form == "pointwise-depthwise":
        return groups * outputs * rank * inputs, groups * outputs * rank * taps
    if form == "low-rank":
        return 0, groups * rank * (inputs * taps + outputs)
    return groups * rank * inputs, groups * rank * (taps + outputs)


def weight_only(weight: Tensor, form: Form, rank: int) -> Factors | None:
    """The closed-form factors nearest to a weight `[G, N, C, P]`, or None where there is no such.

    Depthwise-pointwise, pointwise-depthwise and low-rank are truncated singular value
    decompositions, block by block, optimal by Eckart and Young (1936); the first is the
    "network decoupling" of Guo et al. (2018). Pointwise-depthwise-pointwise has a closed form
    at ranks where one of the first two, its special cases, is exact.
    """
    groups, outputs, inputs, taps = weight.shape
    if form == "depthwise-pointwise":
        left, right = _truncated(weight.transpose(1, 2), rank)  # [G, C, N, T], [G, C, T, P]
        return Factors(form, None, right, left.transpose(1, 2))
    if form == "pointwise-depthwise":
        left, right = _truncated(weight, rank)  # [G, N, C, T], [G, N, T, P]
        return Factors(form, left.transpose(2, 3), right, None)
    if form == "low-rank":
        left, right = _truncated(weight.flatten(2), rank)
        return Factors(form, None, right.unflatten(2, (inputs, taps)), left)
    if rank >= inputs * min(outputs, taps):
        exact = weight_only(weight, "depthwise-pointwise", min(outputs, taps))
        assert exact is not None and exact.last is not None
        terms = exact.spatial.shape[2]
        lead = torch.eye(inputs, dtype=weight.dtype, device=weight.device)
        lead = lead.repeat_interleave(terms, 0).expand(groups, -1, -1)
        return Factors(form, lead, exact.spatial.flatten(1, 2), exact.last.flatten(2))
    if rank >= outputs * min(inputs, taps):
        exact = weight_only(weight, "pointwise-depthwise", min(inputs, taps))
        assert exact is not None and exact.lead is not None
        terms = exact.spatial.shape[2]
        last = torch.eye(outputs, dtype=weight.dtype, device=weight.device)
        last = last.repeat_interleave(terms, 1).expand(groups, -1, -1)
        return Factors(form, exact.lead.flatten(1, 2), exact.spatial.flatten(1, 2), last)
    return None


def _truncated(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors `[..., M, rank]` and `[..., rank, N]` of the nearest matrices of a rank."""
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    root = values[..., :rank].sqrt()
    return left[..., :rank] * root[..., None, :], root[..., :, None] * right[..., :rank, :]


def _plain(conv: Conv) -> type[Conv]:
    return next(base for base in CONVS if isinstance(conv, base))


class SeparatedConv(nn.Sequential):
    """The convolutions that stand in the place of a dense one.

    The children are plain `nn.ConvNd`s: `lead` and `last` are pointwise, `spatial` carries the
    original's kernel size, stride, padding, dilation and padding mode, and its class where that
    was a subclass of `nn.ConvNd`. A leading pointwise convolution has no bias: the spatial one's
    zero padding would miss it.
    """

    form: Form
    shape: Shape

    def extra_repr(self) -> str:
        """Show the form."""
        return f"form={self.form!r}"


def separated(conv: Conv, factors: Factors, bias: Tensor | None) -> SeparatedConv:
    """Build the module of a form in the place of `conv`, with its dtype and device.

    Args:
        conv: the dense convolution; its geometry and flags are taken over.
        factors: the weights.
        bias: the bias `[out_channels]`, or None.

    Returns:
        A module that maps the same inputs to the same output shape.

    Raises:
        TypeError: `conv`'s class is not built with `nn.ConvNd`'s arguments.
    """
    shape = Shape.of(conv)
    plain = _plain(conv)
    kind = plain if type(conv).__module__.startswith("torch.nn") else type(conv)
    place = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    layers: dict[str, nn.Module] = {}
    ones = (1,) * len(conv.kernel_size)

    def pointwise(weight: Tensor, bias: Tensor | None) -> nn.Module:
        outputs, inputs = weight.shape[0], weight.shape[1] * shape.groups
        layer = plain(
            inputs, outputs, 1, groups=shape.groups, bias=bias is not None, **place  # type: ignore[arg-type]
        )
        return _filled(layer, weight.unflatten(1, (-1, *ones)), bias, conv)

    channels = conv.in_channels
    if factors.lead is not None:
        lead = factors.lead.reshape(-1, shape.inputs)
        layers["lead"] = pointwise(lead, None)
        channels = len(lead)
    if factors.form == "low-rank":
        weight, groups = factors.spatial.flatten(0, 1), shape.groups
    elif factors.form == "pointwise-depthwise":
        weight, groups = factors.spatial.flatten(0, 1), conv.out_channels
    else:
        weight = factors.spatial.reshape(-1, 1, shape.taps)
        groups = channels
    mode = {} if conv.padding_mode == "zeros" else {"padding_mode": conv.padding_mode}
    own = bias if factors.last is None else None
    spatial = kind(
        channels,
        len(weight),
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        groups=groups,
        bias=own is not None,
        **mode,  # type: ignore[arg-type]
    ).to(**place)  # type: ignore[call-overload]
    layers["spatial"] = _filled(spatial, weight.unflatten(2, conv.kernel_size), own, conv)
    if factors.last is not None:
        last = factors.last.flatten(0, 1).flatten(1)
        layers["last"] = pointwise(last, bias)
    module = SeparatedConv()
    for name, layer in layers.items():
        module.add_module(name, layer)
    module.form, module.shape = factors.form, shape
    return module.train(conv.training)


@torch.no_grad()
def _filled(layer: Any, weight: Tensor, bias: Tensor | None, like: Conv) -> nn.Module:
    layer.weight.copy_(weight)
    layer.weight.requires_grad_(like.weight.requires_grad)
    if bias is not None:
        layer.bias.copy_(bias)
        layer.bias.requires_grad_((like.weight if like.bias is None else like.bias).requires_grad)
    if len(like.kernel_size) == 2 and like.weight.is_contiguous(memory_format=torch.channels_last):
        if not like.weight.is_contiguous():
            layer.to(memory_format=torch.channels_last)
    return layer  # type: ignore[no-any-return]


def factors_of(module: SeparatedConv) -> Factors:
    """Read the factors back from a module that `separated` built."""
    groups, outputs, inputs, taps = module.shape
    layers = dict(module.named_children())
    lead, spatial, last = (
        layers[name].weight.detach() if name in layers else None  # type: ignore[union-attr, operator]
        for name in ("lead", "spatial", "last")
    )
    shapes: dict[str, tuple[Sequence[int], Sequence[int], Sequence[int]]] = {
        "depthwise-pointwise": ((), (inputs, -1, taps), (outputs, inputs, -1)),
        "pointwise-depthwise": ((outputs, -1, inputs), (outputs, -1, taps), ()),
        "pointwise-depthwise-pointwise": ((-1, inputs), (-1, taps), (outputs, -1)),
        "low-rank": ((), (-1, inputs, taps), (outputs, -1)),
    }
    parts = [
        None if part is None else part.reshape(groups, *shape)
        for part, shape in zip((lead, spatial, last), shapes[module.form], strict=True)
    ]
    return Factors(module.form, *parts)  # type: ignore[arg-type]
