"""Depthwise, pointwise and depthwise separable convolutions, drop-in for `torch.nn.ConvNd`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ..limits import is_whole, whole_number

Size = int | Sequence[int]
Padding = Size | Literal["same", "valid"]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Order = Literal["depthwise-pointwise", "pointwise-depthwise"]


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        remedy = "; `groups`, before it in torch, is no argument here" if name == "bias" else ""
        raise TypeError(f"`{name}` (={value!r}) must be a bool{remedy}")
    return value


def _sizes(name: str, value: Any, dims: int, least: int) -> tuple[int, ...]:
    """Check an int, or one int per dimension, and return it as a tuple."""
    sizes = (value,) * dims if is_whole(value) else value
    if not isinstance(sizes, Sequence) or not all(map(is_whole, sizes)):
        raise TypeError(f"`{name}` (={value!r}) must be an int or a tuple of {dims} ints")
    if len(sizes) != dims:
        raise ValueError(f"`{name}` (={value!r}) must have {dims} entries, one per dimension")
    if any(size < least for size in sizes):
        raise ValueError(f"`{name}` (={value!r}) must be at least {least} in every dimension")
    return tuple(map(int, sizes))


def _geometry(
    dims: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, padding_mode: Any
) -> dict[str, Any]:
    """Check the arguments that place a filter on its input, and return them by name."""
    strides = _sizes("stride", stride, dims, least=1)
    if padding_mode not in get_args(PaddingMode):
        raise ValueError(
            f"`padding_mode` (={padding_mode!r}) must be one of {', '.join(get_args(PaddingMode))}"
        )
    if not isinstance(padding, str):
        padding = _sizes("padding", padding, dims, least=0)
    elif padding not in ("same", "valid"):
        raise ValueError(f"`padding` (={padding!r}) must be 'same', 'valid', an int or a tuple")
    elif padding == "same" and any(step != 1 for step in strides):
        raise ValueError(
            f"`padding` (='same') needs `stride` 1, got `stride` (={stride!r}); "
            "give the padding as ints instead"
        )
    return {
        "kernel_size": _sizes("kernel_size", kernel_size, dims, least=1),
        "stride": strides,
        "padding": padding,
        "dilation": _sizes("dilation", dilation, dims, least=1),
        "padding_mode": padding_mode,
    }


def _reset_depthwise(conv: nn.Module) -> None:
    """Initialise a depthwise filter so that it keeps the variance of its input.

    The fan-in of one depthwise filter is `weight[0].numel()`, kernel volume × inputs per group:
    uniform in ±sqrt(3 / fan_in), variance 1 / fan_in (LeCun et al. 1998). The pointwise half
    keeps torch's own initialisation, so a fresh separable pair has the output variance of the
    regular convolution it replaces, the biases aside.
    """
    weight, bias = conv.weight, conv.bias
    assert isinstance(weight, Tensor)
    fan_in = weight[0].numel()
    nn.init.uniform_(weight, -math.sqrt(3 / fan_in), math.sqrt(3 / fan_in))
    if isinstance(bias, Tensor):
        nn.init.uniform_(bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


class _Depthwise(nn.modules.conv._ConvNd):
    """One filter per input channel; mixed in before the `nn.ConvNd` of its dimension."""

    _dims: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size | None = None,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        depth_multiplier: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        in_channels = whole_number("in_channels", in_channels, least=1)
        if depth_multiplier is not None:
            depth_multiplier = whole_number("depth_multiplier", depth_multiplier, least=1)
        if out_channels is None:
            out_channels = in_channels * (depth_multiplier or 1)
        out_channels = whole_number("out_channels", out_channels, least=1)
        if out_channels % in_channels:
            raise ValueError(
                f"`out_channels` (={out_channels}) must be a multiple of "
                f"`in_channels` (={in_channels}): each input channel has its own filters"
            )
        if depth_multiplier not in (None, out_channels // in_channels):
            raise ValueError(
                f"`depth_multiplier` (={depth_multiplier}) must be `out_channels` "
                f"(={out_channels}) / `in_channels` (={in_channels}); leave one of the two out"
            )
        geometry = _geometry(self._dims, kernel_size, stride, padding, dilation, padding_mode)
        super().__init__(
            in_channels,
            out_channels,
            groups=in_channels,
            bias=_bool("bias", bias),
            device=device,
            dtype=dtype,
            **geometry,
        )

    @property
    def depth_multiplier(self) -> int:
        """Filters per input channel."""
        return self.out_channels // self.in_channels

    def reset_parameters(self) -> None:
        """Draw new weights and bias; see the class for the distribution."""
        _reset_depthwise(self)


class DepthwiseConv1d(_Depthwise, nn.Conv1d):
    """One filter per input channel: `nn.Conv1d` with `groups=in_channels`; see DepthwiseConv2d.

    Shape: `[N, C, L]` or `[C, L]` to `[N, C × depth_multiplier, L_out]` or without `N`.
    """

    _dims = 1


class DepthwiseConv2d(_Depthwise, nn.Conv2d):
    """One filter per input channel: `nn.Conv2d` with `groups=in_channels`.

    Weights start uniform in ±sqrt(3 / fan_in), biases in ±1 / sqrt(fan_in), where the fan-in of a
    depthwise filter is its kernel volume.

    Shape: `[N, C, H, W]` or `[C, H, W]` to `[N, C × depth_multiplier, H_out, W_out]` or
    without `N`, with `nn.Conv2d`'s formula for `H_out` and `W_out`.

    Args:
        in_channels: channels C of the input.
        out_channels: channels of the output, a multiple of `in_channels`; `in_channels ×
            depth_multiplier` where left out.
        kernel_size: taps per dimension.
        stride: step of the filter, in samples.
        padding: samples added on each side per dimension, "same" or "valid".
        dilation: distance between taps, in samples.
        bias: whether each output channel has a learnable bias.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        depth_multiplier: filters per input channel; `out_channels / in_channels` where left out.
        device: device of the parameters.
        dtype: data type of the parameters.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of its range, or `out_channels` is not `in_channels ×
            depth_multiplier`.
    """

    _dims = 2


class DepthwiseConv3d(_Depthwise, nn.Conv3d):
    """One filter per input channel: `nn.Conv3d` with `groups=in_channels`; see DepthwiseConv2d.

    Shape: `[N, C, D, H, W]` or `[C, D, H, W]` to `[N, C × depth_multiplier, D_out, H_out, W_out]`
    or without `N`.
    """

    _dims = 3


class _Pointwise(nn.modules.conv._ConvNd):
    """A 1×1 convolution; mixed in before the `nn.ConvNd` of its dimension."""

    _dims: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 1,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        in_channels = whole_number("in_channels", in_channels, least=1)
        out_channels = whole_number("out_channels", out_channels, least=1)
        _bool("bias", bias)
        geometry = _geometry(self._dims, kernel_size, stride, padding, dilation, padding_mode)
        if any(size != 1 for size in geometry["kernel_size"]):
            raise ValueError(
                f"`kernel_size` (={kernel_size!r}) must be 1: a pointwise convolution mixes "
                "channels only; use SeparableConv or nn.Conv for a larger kernel"
            )
        super().__init__(
            in_channels, out_channels, bias=bias, device=device, dtype=dtype, **geometry
        )


class PointwiseConv1d(_Pointwise, nn.Conv1d):
    """A mix of the channels at each sample: `nn.Conv1d` with kernel size 1; see PointwiseConv2d.

    Shape: `[N, C, L]` or `[C, L]` to `[N, out_channels, L]` or without `N`, at stride 1.
    """

    _dims = 1


class PointwiseConv2d(_Pointwise, nn.Conv2d):
    """A mix of the channels at each pixel: `nn.Conv2d` with kernel size 1.

    Shape: `[N, C, H, W]` or `[C, H, W]` to `[N, out_channels, H, W]` or without `N`, at stride 1.

    Args:
        in_channels: channels C of the input.
        out_channels: channels of the output.
        kernel_size: 1, or 1 per dimension; here so that a swap from `nn.Conv2d` is a rename.
        stride: step of the filter, in samples.
        padding: samples added on each side per dimension, "same" or "valid".
        dilation: without effect on a single tap.
        bias: whether each output channel has a learnable bias.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: device of the parameters.
        dtype: data type of the parameters.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of its range, or `kernel_size` is not 1.
    """

    _dims = 2


class PointwiseConv3d(_Pointwise, nn.Conv3d):
    """A mix of the channels at each voxel: `nn.Conv3d` with kernel size 1; see PointwiseConv2d.

    Shape: `[N, C, D, H, W]` or `[C, D, H, W]` to `[N, out_channels, D, H, W]` or without `N`, at
    stride 1.
    """

    _dims = 3


class _Separable(nn.Module):
    """A depthwise and a pointwise convolution in either order."""

    _dims: ClassVar[int]
    _conv: ClassVar[type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        depth_multiplier: int = 1,
        order: Order = "depthwise-pointwise",
        depthwise_bias: bool | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels = whole_number("in_channels", in_channels, least=1)
        self.out_channels = out_channels = whole_number("out_channels", out_channels, least=1)
        self.depth_multiplier = depth_multiplier = whole_number(
            "depth_multiplier", depth_multiplier, least=1
        )
        if order not in get_args(Order):
            raise ValueError(f"`order` (={order!r}) must be one of {', '.join(get_args(Order))}")
        self.order = order
        geometry = _geometry(self._dims, kernel_size, stride, padding, dilation, padding_mode)
        _bool("bias", bias)
        geometry["bias"] = (
            bias if depthwise_bias is None else _bool("depthwise_bias", depthwise_bias)
        )
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        if order == "depthwise-pointwise":
            hidden = in_channels * depth_multiplier
            self.depthwise = self._conv(
                in_channels, hidden, groups=in_channels, **geometry, **place
            )
            self.pointwise = self._conv(hidden, out_channels, 1, bias=bias, **place)
        else:
            hidden = out_channels * depth_multiplier
            # a bias before the depthwise filter would be missing from its zero padding
            self.pointwise = self._conv(in_channels, hidden, 1, bias=False, **place)
            self.depthwise = self._conv(
                hidden, out_channels, groups=out_channels, **geometry, **place
            )
        _reset_depthwise(self.depthwise)

    def forward(self, input: Tensor) -> Tensor:
        """Map `[N, in_channels, *spatial]` to `[N, out_channels, *spatial_out]`."""
        if self.order == "depthwise-pointwise":
            return self.pointwise(self.depthwise(input))  # type: ignore[no-any-return]
        return self.depthwise(self.pointwise(input))  # type: ignore[no-any-return]

    def reset_parameters(self) -> None:
        """Draw new weights and biases for both convolutions; see the class for the distribution."""
        self.pointwise.reset_parameters()
        _reset_depthwise(self.depthwise)

    def extra_repr(self) -> str:
        """Show the order, which the order of the children alone does not tell."""
        return f"order={self.order!r}"


class SeparableConv1d(_Separable):
    """A depthwise and a pointwise convolution in place of one `nn.Conv1d`; see SeparableConv2d.

    Shape: `[N, in_channels, L]` or `[in_channels, L]` to `[N, out_channels, L_out]` or without `N`.
    """

    _dims = 1
    _conv = nn.Conv1d


class SeparableConv2d(_Separable):
    """A depthwise and a pointwise convolution in place of one `nn.Conv2d`.

    The children `depthwise` and `pointwise` are plain `nn.Conv2d`s. Stride, padding, dilation and
    padding mode belong to the depthwise one. There is no normalisation or activation between the
    two (Chollet 2017, section 4.7, finds none to be better).

    With order "depthwise-pointwise" (Sifre 2014; Howard et al. 2017) every input channel is
    filtered by `depth_multiplier` filters, then the `in_channels × depth_multiplier` results are
    mixed. With "pointwise-depthwise" (blueprint separable, Haase & Amthor 2020) the input is mixed
    to `out_channels × depth_multiplier` channels first, without a bias, and every output channel
    is the sum of `depth_multiplier` filtered ones.

    At `depth_multiplier` 1 it has `in_channels × kernel volume + in_channels × out_channels`
    weights, where the regular convolution has `in_channels × out_channels × kernel volume`.

    Depthwise weights start uniform in ±sqrt(3 / fan_in), so that the depthwise half keeps its
    input's variance, and the pointwise half as in torch: the pair starts with the output variance
    of the `nn.Conv2d` it replaces, the biases aside.

    Shape: `[N, in_channels, H, W]` or `[in_channels, H, W]` to `[N, out_channels, H_out, W_out]`
    or without `N`, the shape that `nn.Conv2d` with the same arguments gives.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: taps per dimension.
        stride: step of the filter, in samples.
        padding: samples added on each side per dimension, "same" or "valid".
        dilation: distance between taps, in samples.
        bias: whether the output has a learnable bias per channel.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        depth_multiplier: filters per channel.
        order: "depthwise-pointwise" or "pointwise-depthwise".
        depthwise_bias: whether the depthwise convolution has a bias. None follows `bias`. In front
            of a pointwise convolution it is redundant, the pointwise bias can express it, and
            False drops it. In order "pointwise-depthwise" it is the output's bias.
        device: device of the parameters.
        dtype: data type of the parameters.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of its range.

    Example:
        >>> import torch
        >>> from separable.nn import SeparableConv2d
        >>> layer = SeparableConv2d(3, 64, 5, stride=2)
        >>> sum(parameter.numel() for parameter in layer.parameters())
        334
        >>> layer(torch.zeros(1, 3, 228, 228)).shape
        torch.Size([1, 64, 112, 112])
    """

    _dims = 2
    _conv = nn.Conv2d


class SeparableConv3d(_Separable):
    """A depthwise and a pointwise convolution in place of one `nn.Conv3d`; see SeparableConv2d.

    Shape: `[N, in_channels, D, H, W]` or `[in_channels, D, H, W]` to `[N, out_channels, D_out,
    H_out, W_out]` or without `N`.
    """

    _dims = 3
    _conv = nn.Conv3d
