"""The separable forms of a convolution: their factors, cost, dense equivalent and modules.

A dense weight is seen per group as `[G, N, C, P]`: N output and C input channels of each of G
groups, P taps. A form writes it as a sum of products of smaller factors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

Form = Literal[
    "depthwise-pointwise", "pointwise-depthwise", "pointwise-depthwise-pointwise", "low-rank"
]
FORMS: tuple[Form, ...] = get_args(Form)

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVS: tuple[type[Conv], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PASSES = ("forward", "_conv_forward")
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


def random_factors(form: Form, shape: Shape, rank: int) -> Factors:
    """Factors of normal noise, always the same."""
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, Any] = {"lead": None, "last": None}
    for name, size in _sizes(form, shape, rank).items():
        parts[name] = torch.randn(size, generator=generator, dtype=torch.float32)
    return Factors(form, **parts)


def _sizes(form: Form, shape: Shape, rank: int) -> dict[str, tuple[int, ...]]:
    groups, outputs, inputs, taps = shape
    if form == "depthwise-pointwise":
        return {"spatial": (groups, inputs, rank, taps), "last": (groups, outputs, inputs, rank)}
    if form == "pointwise-depthwise":
        return {"lead": (groups, outputs, rank, inputs), "spatial": (groups, outputs, rank, taps)}
    if form == "low-rank":
        return {"spatial": (groups, rank, inputs, taps), "last": (groups, outputs, rank)}
    return {
        "lead": (groups, rank, inputs),
        "spatial": (groups, rank, taps),
        "last": (groups, outputs, rank),
    }


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
        assert exact is not None
        assert exact.last is not None
        terms = exact.spatial.shape[2]
        lead = torch.eye(inputs, dtype=weight.dtype, device=weight.device)
        lead = lead.repeat_interleave(terms, 0).expand(groups, -1, -1)
        return Factors(form, lead, exact.spatial.flatten(1, 2), exact.last.flatten(2))
    if rank >= outputs * min(inputs, taps):
        exact = weight_only(weight, "pointwise-depthwise", min(inputs, taps))
        assert exact is not None
        assert exact.lead is not None
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


def plain_class(conv: Conv) -> type[Conv]:
    """The `nn.ConvNd` that a convolution is or derives from."""
    return next(base for base in CONVS if isinstance(conv, base))


def customised(conv: Conv) -> bool:
    """Whether the class of a convolution has a forward pass of its own."""
    plain = plain_class(conv)
    return any(getattr(type(conv), name) is not getattr(plain, name) for name in PASSES)


def attached(conv: nn.Module) -> str:
    """What else runs with a convolution, and would be lost with it; nothing if nothing does."""
    if any(name in vars(conv) for name in PASSES):
        return "its forward pass was replaced"
    hooks: Any = conv
    kinds = (hooks._forward_pre_hooks, hooks._forward_hooks)
    if any((*kinds, hooks._backward_pre_hooks, hooks._backward_hooks)):
        return "it has hooks"
    return ""


def like(conv: Conv, inputs: int, outputs: int, groups: int, bias: bool) -> Conv:
    """A convolution with the geometry, class, dtype and device of another.

    Raises:
        TypeError: the class of `conv` is not built with `nn.ConvNd`'s arguments.
    """
    kind: Any = type(conv) if customised(conv) else plain_class(conv)
    mode = {} if conv.padding_mode == "zeros" else {"padding_mode": conv.padding_mode}
    sizes: Any = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    with torch.random.fork_rng(devices=[]):  # the initial weights are never used
        made = kind(inputs, outputs, *sizes, groups=groups, bias=bias, **mode)
    return made.to(conv.weight.device, conv.weight.dtype)  # type: ignore[no-any-return]


class SeparatedConv(nn.Sequential):
    """The convolutions that stand in the place of a dense one.

    The children are `nn.ConvNd`s: `lead` and `last` are pointwise, `spatial` carries the
    original's kernel size, stride, padding, dilation and padding mode, and its class where that
    has a forward pass of its own. A leading pointwise convolution has no bias: the spatial one's
    zero padding would miss it.

    Networks that look at the dense convolution find its sizes, `weight` and `bias` here too.

    Attributes:
        form: the form.
        shape: the sizes of the dense convolution.
    """

    if TYPE_CHECKING:  # TorchScript knows neither
        form: Form
        shape: Shape
    # nor what the properties compute
    __jit_unused_properties__ = (
        *("spatial_conv", "in_channels", "out_channels", "groups", "kernel_size", "stride"),
        *("padding", "dilation", "padding_mode", "weight", "bias"),
    )

    def extra_repr(self) -> str:
        """Show the form."""
        return f"form={self.form!r}"

    @property
    def spatial_conv(self) -> Conv:
        """The child that carries the kernel."""
        return self.spatial  # type: ignore[return-value]

    @property
    def in_channels(self) -> int:
        """Channels of the input, as of the dense convolution."""
        return self.shape.groups * self.shape.inputs

    @property
    def out_channels(self) -> int:
        """Channels of the output, as of the dense convolution."""
        return self.shape.groups * self.shape.outputs

    @property
    def groups(self) -> int:
        """Groups of the dense convolution."""
        return self.shape.groups

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Kernel size, as of the dense convolution."""
        return self.spatial_conv.kernel_size

    @property
    def stride(self) -> tuple[int, ...]:
        """Stride, as of the dense convolution."""
        return self.spatial_conv.stride

    @property
    def padding(self) -> str | tuple[int, ...]:
        """Padding, as of the dense convolution."""
        return self.spatial_conv.padding

    @property
    def dilation(self) -> tuple[int, ...]:
        """Dilation, as of the dense convolution."""
        return self.spatial_conv.dilation

    @property
    def padding_mode(self) -> str:
        """Padding mode, as of the dense convolution."""
        return self.spatial_conv.padding_mode

    @property
    def weight(self) -> Tensor:
        """`[out_channels, in_channels / groups, *kernel_size]`, multiplied out on each use."""
        own = self.spatial_conv.weight
        dense = factors_of(self).to(torch.float64).dense().flatten(0, 1)
        return dense.reshape(*dense.shape[:2], *self.kernel_size).to(own.dtype)

    @property
    def bias(self) -> Tensor | None:
        """`[out_channels]`, or None."""
        tail: Any = self.get_submodule("last") if hasattr(self, "last") else self.spatial
        return tail.bias  # type: ignore[no-any-return]


def separated(conv: Conv, factors: Factors, bias: Tensor | None) -> SeparatedConv:
    """Build the module of a form in the place of `conv`, with its dtype, device and flags.

    Args:
        conv: the dense convolution.
        factors: the weights, of any dtype.
        bias: the bias `[out_channels]`, or None.

    Returns:
        A module that maps the same inputs to the same output shape.

    Raises:
        TypeError: the class of `conv` is not built with `nn.ConvNd`'s arguments.
    """
    shape = Shape.of(conv)
    plain = plain_class(conv)
    module = SeparatedConv()
    module.form, module.shape = factors.form, shape
    ones = (1,) * len(conv.kernel_size)
    channels = conv.in_channels

    def pointwise(weight: Tensor, bias: Tensor | None) -> Conv:
        inputs, outputs = weight.shape[1] * shape.groups, len(weight)
        with torch.random.fork_rng(devices=[]):
            layer = plain(inputs, outputs, 1, groups=shape.groups, bias=bias is not None)
        layer.to(conv.weight.device, conv.weight.dtype)
        return _filled(layer, weight.reshape(*weight.shape, *ones), bias, conv)

    if factors.lead is not None:
        weight = factors.lead.reshape(-1, shape.inputs)
        module.add_module("lead", pointwise(weight, None))
        channels = len(weight)
    groups = channels
    weight = factors.spatial.reshape(-1, 1, shape.taps)
    if factors.form == "low-rank":
        groups, weight = shape.groups, factors.spatial.flatten(0, 1)
    elif factors.form == "pointwise-depthwise":
        groups, weight = conv.out_channels, factors.spatial.flatten(0, 1)
    own = bias if factors.last is None else None
    layer = like(conv, channels, len(weight), groups, own is not None)
    weight = weight.reshape(*weight.shape[:2], *conv.kernel_size)
    module.add_module("spatial", _filled(layer, weight, own, conv))
    if factors.last is not None:
        module.add_module("last", pointwise(factors.last.flatten(0, 1).flatten(1), bias))
    return module.train(conv.training)


@torch.no_grad()
def _filled(layer: Conv, weight: Tensor, bias: Tensor | None, source: Conv) -> Conv:
    layer.weight.copy_(weight)
    layer.weight.requires_grad_(source.weight.requires_grad)
    if bias is not None and layer.bias is not None:
        layer.bias.copy_(bias)
        flag = source.weight if source.bias is None else source.bias
        layer.bias.requires_grad_(flag.requires_grad)
    plain_layout = source.weight.is_contiguous()
    if not plain_layout and source.weight.dim() == 4:
        layer.to(memory_format=torch.channels_last)
    return layer


def factors_of(module: SeparatedConv) -> Factors:
    """Read the factors back from a module that `separated` built."""
    parts: dict[str, Any] = {"lead": None, "last": None}
    for name, size in _sizes(module.form, module.shape, -1).items():
        weight = module.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        parts[name] = weight.reshape(size)
    return Factors(module.form, **parts)


def merged(module: SeparatedConv) -> Conv:
    """The dense convolution that computes what `module` computes."""
    spatial, bias = module.spatial_conv, module.bias
    sizes = (module.in_channels, module.out_channels, module.groups)
    dense = _filled(like(spatial, *sizes, bias is not None), module.weight, bias, spatial)
    return dense.train(module.training)
