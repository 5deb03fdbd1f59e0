"""One small function per operator: its arguments and results in, its `Cost` out.

A formula is registered under the operator's name, "convolution" for all overloads and the in-place
form of `aten::convolution`. Traffic follows the same rule for every operator, so it is no part of
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .account import Cost
from .operation import Margins, Operation, formula, pointwise

# Their other results are for the backward pass, or indices: no part of the compulsory traffic.
FIRST_RESULT_ONLY = frozenset(
    """
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    cudnn_batch_norm miopen_batch_norm _batch_norm_with_update _batch_norm_no_update
    native_layer_norm native_group_norm _fused_rms_norm native_dropout
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    _scaled_dot_product_fused_attention_overrideable
    """.split()
)

# Views that their schema does not tell.
VIEWS = frozenset(
    "_unsafe_view _reshape_alias unsafe_split unsafe_split_with_sizes unsafe_chunk".split()
)


@formula(
    *"""
    clone copy _to_copy cat stack constant_pad_nd reflection_pad1d reflection_pad2d
    reflection_pad3d replication_pad1d replication_pad2d replication_pad3d pad
    index _unsafe_index index_select index_put _index_put_impl _unsafe_index_put gather scatter
    take take_along_dim masked_select masked_fill masked_scatter where nonzero
    embedding roll flip repeat repeat_interleave tile im2col pixel_shuffle pixel_unshuffle
    channel_shuffle native_channel_shuffle max_unpool2d max_unpool3d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d tril triu tril_indices triu_indices diag_embed
    select_scatter slice_scatter diagonal_scatter as_strided_scatter index_fill index_copy
    empty empty_like empty_strided empty_permuted new_empty new_empty_strided new_zeros new_ones
    new_full zeros zeros_like ones ones_like full full_like fill zero arange linspace eye
    scalar_tensor rand rand_like randn randn_like randint randint_like randperm bernoulli
    uniform normal exponential random one_hot
    resize set _local_scalar_dense item equal is_same_size sym_size sym_numel sym_stride
    sym_storage_offset _assert_async _assert_tensor_metadata _assert_scalar
    lift lift_fresh lift_fresh_copy
    """.split()
)
def movement(op: Operation) -> Cost:
    """Nothing: data are moved, made, drawn or looked at without arithmetic."""
    return Cost()


# torch tags the others itself
formula(*"dropout native_dropout relu6 hardswish log_sigmoid_forward _prelu_kernel".split())(
    pointwise
)
formula(*"rrelu_with_noise glu addcmul addcdiv lerp".split())(pointwise)


@formula("add")
def add(op: Operation) -> Cost:
    """One per result, in the column of the biases where a vector of parameters is added."""
    return Cost(bias_adds=op.numel) if op.bias else Cost(elementwise=op.numel)


@formula("_softmax", "_log_softmax", "_safe_softmax")
def softmax(op: Operation) -> Cost:
    """An exponential, a summand and a division (or subtraction) per element."""
    return Cost(elementwise=3 * op.numel)


@formula("_weight_norm_interface")
def weight_norm(op: Operation) -> Cost:
    """A sum of squares and a scaling: 2 per element of the direction `v`."""
    return Cost(elementwise=2 * op["v"].numel())


@formula(
    *"sum nansum prod amax amin aminmax max min any all argmax argmin var std var_mean std_mean "
    "linalg_vector_norm norm logsumexp count_nonzero cumsum cumprod logcumsumexp cummax cummin "
    "mse_loss nll_loss_forward nll_loss2d_forward scatter_add scatter_reduce index_add col2im "
    "median".split()
)
def reduction(op: Operation) -> Cost:
    """One per element of the input; of the result where two tensors are compared (`max(a, b)`)."""
    source = next(value for value in op.arguments.values() if isinstance(value, Tensor))
    return Cost(elementwise=max(source.numel(), op.numel))


@formula("mean")
def mean(op: Operation) -> Cost:
    """A global average pooling: one per element of the input."""
    return Cost(pool=op["self"].numel())


# Convolutions


def valid_taps(
    output: int, kernel: int, stride: int, padding: int, dilation: int, low: int, high: int
) -> int:
    """Pairs of an output position and a tap that meet a sample in [low, high), in one dimension."""
    positions = np.arange(output)[:, None] * stride - padding + np.arange(kernel) * dilation
    return int(np.count_nonzero((positions >= low) & (positions < high)))


def convolution_macs(
    input: Sequence[int],
    weight: Sequence[int],
    output: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool = False,
    margins: Margins = (),
) -> tuple[int, int]:
    """MACs of a convolution with and without those that padding makes void.

    Args:
        input: shape `[N, C, *spatial]`.
        weight: shape `[out_channels, C / groups, *kernel]`, or `[C, out_channels / groups,
            *kernel]` if transposed.
        output: shape `[N, out_channels, *spatial_out]`.
        stride: step per dimension.
        padding: zeros on both sides per dimension; if transposed, samples cropped.
        dilation: distance between taps per dimension.
        transposed: whether it is a transposed convolution, with
            `input elements × (out_channels / groups) × kernel volume` MACs.
        margins: zeros that the input already has at both ends of each dimension.
    """
    kernel = weight[2:]
    margins = margins or ((0, 0),) * len(kernel)
    # a transposed convolution scatters: its input positions take the part of the outputs
    walked, met = (input, output) if transposed else (output, input)
    pairs = 1
    for dim, taps in enumerate(kernel):
        before, after = margins[dim]
        length = walked[2 + dim]
        shift = padding[dim]
        low, high = 0, met[2 + dim]
        if transposed:
            length, shift = length - before - after, shift - before * stride[dim]
        else:
            low, high = before, high - after
        pairs *= valid_taps(length, taps, stride[dim], shift, dilation[dim], low, high)
    channels = walked[1] * weight[1]
    macs = math.prod(walked) * weight[1] * math.prod(kernel)
    return macs, walked[0] * channels * pairs


@formula("convolution", "_convolution")
def convolution(op: Operation) -> Cost:
    """Output elements × (in_channels / groups) × kernel volume; see `convolution_macs`."""
    output = op.results[0].shape
    dims = len(op["weight"].shape) - 2

    def per_dim(name: str) -> list[int]:
        value = list(op[name])
        return value * dims if len(value) == 1 else value

    macs, without_padding = convolution_macs(
        op["input"].shape,
        op["weight"].shape,
        output,
        stride=per_dim("stride"),
        padding=per_dim("padding"),
        dilation=per_dim("dilation"),
        transposed=op["transposed"],
        margins=op.margins,
    )
    bias_adds = op.numel if op["bias"] is not None else 0
    cost = op.product(macs, "input", "weight", without_padding=without_padding)
    return cost + Cost(bias_adds=bias_adds)


# Matrix products


@formula("mm", "bmm", "_int_mm")
def mm(op: Operation) -> Cost:
    """`[.., n, k] @ [.., k, m]`: n·k·m each."""
    return op.product(op.numel * op["self"].shape[-1], "self", "mat2")


@formula("addmm", "_addmm_activation")
def addmm(op: Operation) -> Cost:
    """A matrix product whose addend is a bias if it is a vector."""
    cost = op.product(op.numel * op["mat1"].shape[-1], "mat1", "mat2")
    return cost + _addend(op)


@formula("baddbmm", "addbmm")
def baddbmm(op: Operation) -> Cost:
    """A batched matrix product with an addend."""
    batch1, batch2 = op["batch1"].shape, op["batch2"].shape
    return op.product(math.prod(batch1) * batch2[-1], "batch1", "batch2") + _addend(op)


@formula("mv")
def mv(op: Operation) -> Cost:
    """`[n, k] @ [k]`: n·k."""
    return op.product(op["self"].numel(), "self", "vec")


@formula("addmv")
def addmv(op: Operation) -> Cost:
    """A matrix-vector product with an addend."""
    return op.product(op["mat"].numel(), "mat", "vec") + _addend(op)


@formula("dot", "vdot")
def dot(op: Operation) -> Cost:
    """`[k] @ [k]`: k."""
    return op.product(op["self"].numel(), "self", "other" if op.name == "vdot" else "tensor")


def _addend(op: Operation) -> Cost:
    if op.arguments.get("beta", 1) == 0:
        return Cost()
    if op["self"].dim() <= 1:
        return Cost(bias_adds=op.numel)
    return Cost(elementwise=op.numel)


@formula(
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
def attention(op: Operation) -> Cost:
    """softmax(q kᵀ) v, for q `[B, H, L, E]`, k `[B, H, S, E]` and v `[B, H, S, V]`."""
    *batch, length, width = op["query"].shape
    scores = math.prod(batch) * length * op["key"].shape[-2]
    attended = {"value"} & op.needs_grad | (
        {"scores"} if {"query", "key"} & op.needs_grad else set()
    )
    values = scores * op["value"].shape[-1]
    return (
        op.product(scores * width, "query", "key")
        + Cost(macs=values, macs_without_padding=values, backward_macs=values * len(attended))
        + Cost(elementwise=(2 + 3) * scores)
    )


# The cells that CUDA fuses: the pointwise part of `LSTMCell` and `GRUCell` as torch writes it out


@formula("_thnn_fused_lstm_cell")
def lstm_cell(op: Operation) -> Cost:
    """Sum of the gates (4), four activations, and five operations for the states."""
    biases = 2 * 4 * op["cx"].numel() if op["input_bias"] is not None else 0
    return Cost(elementwise=13 * op["cx"].numel(), bias_adds=biases)


@formula("_thnn_fused_gru_cell")
def gru_cell(op: Operation) -> Cost:
    """Two gates and the new state, ten operations per element."""
    biases = 2 * 3 * op["hx"].numel() if op["input_bias"] is not None else 0
    return Cost(elementwise=10 * op["hx"].numel(), bias_adds=biases)


# Normalisations


def _normalise(op: Operation, *, statistics: bool) -> Cost:
    affine = op.arguments.get("weight") is not None
    return Cost(norm=op.numel * ((5 + 2 * affine) if statistics else 2))


@formula(
    *"native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "cudnn_batch_norm miopen_batch_norm _batch_norm_with_update _batch_norm_no_update "
    "batch_norm".split()
)
def batch_norm(op: Operation) -> Cost:
    """Per element: 2 with running statistics, else 5, and 2 for scale and shift."""
    always = op.name == "_batch_norm_with_update"
    return _normalise(op, statistics=bool(op.arguments.get("training", always)))


@formula("native_layer_norm", "native_group_norm")
def layer_norm(op: Operation) -> Cost:
    """Per element: 1 for the mean, 3 for the variance, 1 to scale, and 2 for scale and shift."""
    return _normalise(op, statistics=True)


@formula("_fused_rms_norm", "rms_norm")
def rms_norm(op: Operation) -> Cost:
    """Per element: 2 for the mean square, 1 to scale, and 1 for the learned scale."""
    return Cost(norm=op.numel * (3 + (op.arguments.get("weight") is not None)))


# Poolings and interpolations


@formula(
    *"avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d "
    "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices".split()
)
def pool(op: Operation) -> Cost:
    """Output elements × window volume."""
    window = op["kernel_size"]
    dims = int(op.name.removesuffix("_with_indices")[-2])
    volume = math.prod(window) if len(window) == dims else window[0] ** dims
    return Cost(pool=op.numel * volume)


@formula(
    *"adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d".split()
)
def adaptive_pool(op: Operation) -> Cost:
    """The sum of all windows, [floor(i·n/m), ceil((i+1)·n/m)) for output i of m per dimension."""
    source, result = op["self"].shape, op.results[0].shape
    dims = int(op.name[-2])
    taps = math.prod(source[:-dims])
    for n, m in zip(source[-dims:], result[-dims:], strict=True):
        taps *= sum(-(-(i + 1) * n // m) - i * n // m for i in range(m))
    return Cost(pool=taps)


@formula("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")
def upsample_linear(op: Operation) -> Cost:
    """Two taps per dimension and output element."""
    return Cost(pool=2 ** (op["self"].dim() - 2) * op.numel)


@formula("upsample_bicubic2d")
def upsample_bicubic(op: Operation) -> Cost:
    """4 × 4 taps per output element."""
    return Cost(pool=16 * op.numel)


@formula("grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(op: Operation) -> Cost:
    """Taps per dimension and output element: 2 for linear, none for nearest, 4 for cubic."""
    taps = {0: 2, 1: 0, 2: 4}[op["interpolation_mode"]]
    return Cost(pool=taps ** (op["input"].dim() - 2) * op.numel)
