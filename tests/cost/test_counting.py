"""MACs against definitions: convolutions of ones by ones sum up to the number of products."""

from __future__ import annotations

import copy
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import separable
from separable.nn import SeparableConv2d

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def ones(conv: nn.Module) -> nn.Module:
    """A copy in float64 with all weights 1 and no bias: every product of its adds 1."""
    twin = copy.deepcopy(conv).double()
    nn.init.ones_(twin.weight)
    twin.bias = None
    return twin


def padded_with(value: float, conv: nn.Module, x: Tensor) -> Tensor:
    """The sum over a convolution's outputs if its padding were made of `value`."""
    twin = ones(conv)
    if twin.padding != "valid":
        x = F.pad(x, twin._reversed_padding_repeated_twice, value=value)
    twin.padding = (0,) * len(twin.kernel_size)
    twin._reversed_padding_repeated_twice = [0] * (2 * len(twin.kernel_size))
    return twin(x).sum()


@st.composite
def convolutions(draw: Any) -> tuple[nn.Module, tuple[int, ...]]:
    dims = draw(st.integers(1, 3))

    def per_dim(low: int, high: int) -> Any:
        return st.tuples(*[st.integers(low, high)] * dims)

    kernel, dilation, groups = draw(per_dim(1, 4)), draw(per_dim(1, 3)), draw(st.integers(1, 3))
    stride = draw(per_dim(1, 3))
    padding: Any = draw(st.one_of(per_dim(0, 3), st.sampled_from(["valid", "same"])))
    if padding == "same":
        stride = 1
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [draw(st.integers(least, least + 3)) for least in span]
    bias = draw(st.booleans())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of "same" with an even kernel
        conv = CONVS[dims](*channels, kernel, stride, padding, dilation, groups, bias)
    return conv, (draw(st.integers(1, 2)), channels[0], *size)


@settings(deadline=None, max_examples=80)
@given(convolutions(), st.booleans())
def test_convolution_forward_and_backward(case: Any, input_grad: bool) -> None:
    conv, shape = case
    x = torch.zeros(shape, requires_grad=input_grad)
    account = separable.count(conv, inputs=x)

    probe = torch.ones(shape, dtype=torch.float64)
    assert account.macs == padded_with(1, conv, probe)
    assert account.macs_without_padding == padded_with(0, conv, probe)
    assert account.bias_adds == (conv(x).numel() if conv.bias is not None else 0)
    assert account.backward_macs == account.macs * (1 + input_grad)
    assert not account.unknown


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_backward_products_sum_over_the_same_index_set(dims: int, groups: int) -> None:
    """Gradients by autograd, of ones by ones: each gradient's sum is its number of products."""
    conv = CONVS[dims](4, 8, 3, stride=2, groups=groups)
    twin = ones(conv)
    x = torch.ones((2, 4, *[7] * dims), dtype=torch.float64, requires_grad=True)
    twin(x).sum().backward()
    account = separable.count(conv, inputs=x.detach().float().requires_grad_())
    assert account.backward_macs == twin.weight.grad.sum() + x.grad.sum()


@st.composite
def transposed_convolutions(draw: Any) -> tuple[nn.Module, tuple[int, ...]]:
    dims = draw(st.integers(1, 3))

    def per_dim(low: int, high: int) -> Any:
        return st.tuples(*[st.integers(low, high)] * dims)

    kernel, dilation, stride = draw(per_dim(1, 4)), draw(per_dim(1, 2)), draw(per_dim(1, 3))
    groups = draw(st.integers(1, 3))
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(draw(st.integers(0, (least - 1) // 2)) for least in span)
    room = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    output_padding = tuple(draw(st.integers(0, most)) for most in room)
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    conv = TRANSPOSED[dims](
        *channels, kernel, stride, padding, output_padding, groups, True, dilation
    )
    return conv, (draw(st.integers(1, 2)), channels[0], *draw(per_dim(1, 4)))


@settings(deadline=None, max_examples=60)
@given(transposed_convolutions())
def test_transposed_convolution(case: Any) -> None:
    conv, shape = case
    x = torch.zeros(shape, requires_grad=True)
    account = separable.count(conv, inputs=x)

    twin, probe = ones(conv), torch.ones(shape, dtype=torch.float64)
    assert account.macs_without_padding == twin(probe).sum()
    twin.padding = (0,) * len(twin.kernel_size)
    assert account.macs == twin(probe).sum()
    assert account.macs == probe.numel() * conv.weight[0].numel()
    assert account.backward_macs == 2 * account.macs


def test_the_pair_of_the_readme() -> None:
    regular = separable.count(nn.Conv2d(3, 64, 5, stride=2), (1, 3, 228, 228))
    pair = separable.count(SeparableConv2d(3, 64, 5, stride=2), (1, 3, 228, 228))
    assert (regular.macs, pair.macs) == (60_211_200, 3_349_248)
    assert (regular.params, pair.params) == (4864, 334)
    assert regular.traffic_bytes == 4 * (3 * 228 * 228 + 4864 + 64 * 112 * 112)
    assert pair.traffic_bytes / regular.traffic_bytes == pytest.approx(1.0734, abs=1e-4)
    assert [row.name for row in pair.rows] == ["", "depthwise", "pointwise"]
    assert [row.macs for row in pair.rows] == [3_349_248, 940_800, 2_408_448]


class Wrapped(nn.Module):
    """One convolution, called in the way that `forward` says."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.conv, x)


class Subclass(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * 1, self.bias)


def as_often_as_the_data_say(conv: nn.Module, x: Tensor) -> Tensor:
    for _ in range(1 + int(x.abs().max() < 0)):
        y = conv(x)
    return y


def weight_norm(name: str) -> nn.Module:
    conv = nn.Conv2d(3, 8, 3, padding=1)
    if name == "parametrized":
        return torch.nn.utils.parametrizations.weight_norm(conv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still in use
        return torch.nn.utils.weight_norm(conv)


def functional(conv: nn.Module, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, padding=1)


CALLS = {
    "functional": Wrapped(functional),
    "forward": Wrapped(lambda conv, x: conv.forward(x)),
    "loop over samples": Wrapped(lambda conv, x: torch.stack([conv(sample) for sample in x])),
    "loop on values": Wrapped(as_often_as_the_data_say),
    "checkpoint": Wrapped(
        lambda conv, x: torch.utils.checkpoint.checkpoint(conv, x, use_reentrant=False)
    ),
    "subclass": Subclass(3, 8, 3, padding=1),
    "parametrized weight norm": weight_norm("parametrized"),
    "weight norm by hooks": weight_norm("hooks"),
    "bfloat16": nn.Conv2d(3, 8, 3, padding=1).bfloat16(),
    "circular": nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
    "meta": nn.Conv2d(3, 8, 3, padding=1, device="meta"),
    "frozen": nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False),
    "compiled": torch.compile(nn.Conv2d(3, 8, 3, padding=1)),
    "compiled inside": nn.Sequential(torch.compile(nn.Conv2d(3, 8, 3, padding=1))),
}


@pytest.mark.parametrize("way", CALLS)
def test_every_way_to_call_a_convolution(way: str) -> None:
    account = separable.count(CALLS[way], (2, 3, 10, 12))
    assert account.macs == 2 * 8 * 10 * 12 * 3 * 9
    assert account.bias_adds == 2 * 8 * 10 * 12
    assert account.params == sum(p.numel() for p in CALLS[way].parameters())
    assert account.unknown == ()


def test_no_memory_is_needed() -> None:
    """2.6 TB of activations, from weights on the CPU."""
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
    account = separable.count(model, (1, 3, 100_000, 100_000), device="meta")
    assert account.macs == 10**10 * 3 * 64
    assert account.peak_activation_bytes == 4 * 10**10 * (64 + 64)


def test_without_a_batch_dimension() -> None:
    account = separable.count(nn.Conv2d(3, 8, 3, padding=1), inputs=torch.zeros(3, 10, 12))
    assert account.macs == 8 * 10 * 12 * 3 * 9


def test_shared_weights_count_each_call_and_one_parameter() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(4, 4, 3)
            self.second = nn.Conv2d(4, 4, 3)
            self.second.weight = self.first.weight
            self.again = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.second(self.first(x)))

    account = separable.count(Twice(), (1, 4, 12, 12))
    assert account.macs == (100 + 64 + 36) * 4 * 4 * 9
    assert account.params == 4 * 4 * 9 + 4 + 4
    assert {row.name: row.calls for row in account.rows} == {"": 1, "first": 2, "second": 1}


def test_zero_padding_by_hand_is_seen_as_padding() -> None:
    inside = separable.count(nn.Conv2d(3, 8, 3, padding=1), (1, 3, 9, 9))
    padded = separable.count(nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 8, 3)), (1, 3, 9, 9))
    assert padded.macs == inside.macs
    assert padded.macs_without_padding == inside.macs_without_padding < inside.macs
    reflected = separable.count(
        nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 8, 3)), (1, 3, 9, 9)
    )
    assert reflected.macs_without_padding == inside.macs


class Padded(nn.Module):
    """Pads in its own way, then convolves."""

    def __init__(self, pad: Any, **conv: Any) -> None:
        super().__init__()
        self.pad = pad
        self.conv = nn.Conv2d(1, 1, **{"kernel_size": 3, "bias": False, **conv})

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pad(x))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "model",
    [
        Padded(lambda x: F.pad(F.pad(x, (1, 1, 1, 1)), (2, 0, 1, 3))),
        Padded(lambda x: F.pad(F.pad(x, (2, 2, 2, 2)), (-1, -3, 0, 1))),
        Padded(lambda x: F.pad(F.pad(x, (1, 1)), (0, 0, 1, 1)), stride=2),
        Padded(nn.ZeroPad2d(1), kernel_size=2, padding="same"),
        Padded(lambda x: F.pad(x, (2, 2, 0, 0)).transpose(2, 3)),
    ],
    ids=["twice", "cropped", "by dimension", "same", "transposed"],
)
def test_paddings_compose(model: Padded) -> None:
    x = torch.ones(1, 1, 8, 8)
    account = separable.count(model, inputs=x)
    nn.init.ones_(model.conv.weight)
    valid = int(model(x).sum())
    if model.pad(x).shape[2:] == (12, 8):  # what is seen in another way isn't followed
        assert account.macs_without_padding == account.macs > valid
    else:
        assert account.macs_without_padding == valid


def test_padding_without_a_spatial_dimension_is_no_margin() -> None:
    padded = Function(lambda x: F.pad(F.pad(x, (1, 1)), (1, 0, 0, 1)))
    assert separable.count(padded, (4, 5)).output_shapes == ((5, 8),)


def test_padding_that_is_written_over_is_none() -> None:
    account = separable.count(Padded(lambda x: F.pad(x, (1, 1, 1, 1)).add_(1)), (1, 1, 8, 8))
    assert account.macs_without_padding == account.macs == 64 * 9


PRODUCTS = {
    "matmul": (lambda a, b: a @ b, [(5, 3), (3, 7)], 5 * 3 * 7),
    "batched": (torch.matmul, [(2, 4, 5, 3), (4, 3, 7)], 2 * 4 * 5 * 3 * 7),
    "vector": (torch.matmul, [(5, 3), (3,)], 5 * 3),
    "dot": (torch.matmul, [(3,), (3,)], 3),
    "bmm": (torch.bmm, [(2, 5, 3), (2, 3, 7)], 2 * 5 * 3 * 7),
    "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), [(2, 5, 3), (2, 7, 3)], 210),
    "addmm": (torch.addmm, [(5, 7), (5, 3), (3, 7)], 5 * 3 * 7),
    "baddbmm": (torch.baddbmm, [(2, 5, 7), (2, 5, 3), (2, 3, 7)], 2 * 5 * 3 * 7),
    "addbmm": (torch.addbmm, [(5, 7), (2, 5, 3), (2, 3, 7)], 2 * 5 * 3 * 7),
    "addmv": (torch.addmv, [(5,), (5, 3), (3,)], 5 * 3),
    "linear": (F.linear, [(2, 4, 3), (7, 3), (7,)], 2 * 4 * 3 * 7),
    "attention": (
        F.scaled_dot_product_attention,
        [(2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 10)],
        2 * 4 * 5 * 6 * (8 + 10),
    ),
}


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("grad", [False, True], ids=["constant", "grad"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_matrix_products(name: str, device: str, grad: bool) -> None:
    function, shapes, macs = PRODUCTS[name]
    inputs = [torch.zeros(shape, device=device, requires_grad=grad) for shape in shapes]
    account = separable.count(Function(function), inputs=inputs)
    assert account.macs == account.macs_without_padding == macs
    assert account.backward_macs == (2 * macs if grad else 0)
    assert account.unknown == ()


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference_mode"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_multihead_attention(mode: str, need_weights: bool, device: str) -> None:
    b, length, source, width = 2, 5, 7, 16
    attention = nn.MultiheadAttention(width, 4, batch_first=True, device=device)
    q = torch.zeros(b, length, width, device=device)
    kv = torch.zeros(b, source, width, device=device)
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with context.get(mode, torch.enable_grad)():
        account = separable.count(
            attention,
            inputs=(q, kv, kv),
            kwargs={"need_weights": need_weights},
            training=mode == "train",
        )
    projections = (2 * length + 2 * source) * width * width
    assert account.macs == b * (projections + 2 * length * source * width)
    assert account.bias_adds == b * (2 * length + 2 * source) * width


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(cell: Any, layers: int, bidirectional: bool) -> None:
    steps, batch, width, hidden = 5, 3, 6, 10
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[cell]
    ways = 1 + bidirectional
    sizes = [width] + [hidden * ways] * (layers - 1)
    macs = steps * batch * ways * sum(gates * hidden * (size + hidden) for size in sizes)
    for device in ("cpu", "meta"):
        layer = cell(width, hidden, layers, bidirectional=bidirectional, device=device)
        account = separable.count(layer, (steps, batch, width))
        assert account.macs == macs
        assert account.bias_adds == steps * batch * ways * 2 * gates * hidden * layers
        assert account.unknown == ()


def test_peak_activation_by_live_ranges() -> None:
    """x -> a -> b, then x + b: x lives on beside a and b; in floats of 4 bytes."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(4, 24, 1)
            self.narrow = nn.Conv2d(24, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.narrow(self.wide(x))

    account = separable.count(Residual(), (1, 4, 10, 10))
    assert account.peak_activation_bytes == 4 * 100 * (4 + 24 + 4)
    chain = nn.Sequential(nn.Conv2d(4, 24, 1), nn.ReLU(inplace=True), nn.Conv2d(24, 4, 1))
    assert separable.count(chain, (1, 4, 10, 10)).peak_activation_bytes == 4 * 100 * (4 + 24)


def test_saved_for_backward() -> None:
    """A convolution keeps its input, a ReLU its output; in-place they are the same tensor."""
    chain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1))
    assert separable.count(chain, (1, 3, 10, 10)).saved_for_backward_bytes == 4 * 100 * (3 + 8)
    chain.requires_grad_(False)
    assert separable.count(chain, (1, 3, 10, 10)).saved_for_backward_bytes == 0
    assert separable.count(chain, (1, 3, 10, 10), backward=False).backward_macs == 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "layer",
    [nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.LayerNorm(10)],
    ids=lambda layer: type(layer).__name__,
)
def test_saved_for_backward_is_what_autograd_keeps(layer: nn.Module, training: bool) -> None:
    """Indices and statistics included, which only the backward pass reads."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), layer, nn.Conv2d(8, 5, 1)).train(training)
    x = torch.ones(1, 3, 10, 10)
    account = separable.count(model, inputs=x, training=training)
    held = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)  # keeps the graph, so that no address is used twice
    assert account.saved_for_backward_bytes == sum(saved.values())
    del output


def test_one_sample_of_a_large_batch_is_as_large_as_itself() -> None:
    batch = torch.zeros(64, 3, 10, 10)
    account = separable.count(nn.Conv2d(3, 8, 1), inputs=batch[:1])
    assert account.peak_activation_bytes == 4 * 100 * (3 + 8)
    assert account.saved_for_backward_bytes == 4 * 100 * 3


def test_traffic_counts_dtypes_and_expanded_tensors_once() -> None:
    half = separable.count(nn.Conv2d(3, 8, 1, bias=False).half(), (1, 3, 10, 10))
    assert half.traffic_bytes == 2 * (300 + 24 + 800)
    assert half.param_bytes == 2 * 24
    expanded = Function(lambda x, y: x * y.expand(5, 10))
    account = separable.count(expanded, inputs=(torch.zeros(5, 10), torch.zeros(1, 10)))
    assert account.traffic_bytes == 4 * (50 + 10 + 50)


def test_rows_are_in_execution_order_and_add_up() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(8, 4, 3)
            self.blocks = nn.ModuleList([nn.Conv2d(3, 8, 1), nn.ReLU()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return F.conv2d(self.last(x), torch.ones(4, 4, 1, 1))

    account = separable.count(Swapped(), (1, 3, 6, 6))
    names = [row.name for row in account.rows]
    assert names == ["", "blocks", "blocks.0", "blocks.1", "last"]
    macs = {row.name: row.macs for row in account.rows}
    assert macs == {
        "": account.macs,
        "blocks": 36 * 24,
        "blocks.0": 36 * 24,
        "blocks.1": 0,
        "last": 16 * 8 * 4 * 9,
    }
    assert account.rows[0].own.macs == 16 * 16
    assert account.macs == sum(row.own.macs for row in account.rows)
    assert account.traffic_bytes == sum(row.own.traffic_bytes for row in account.rows)


def test_unknown_operators_are_named_and_make_a_lower_bound() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Function(torch.linalg.svdvals))
    account = separable.count(model, (1, 3, 5, 5))
    assert account.is_lower_bound
    assert account.unknown == ("_linalg_svd",)
    assert ">= 300" in str(account)
    assert "Lower bound (>=): no formula for _linalg_svd" in str(account)
    with pytest.raises(NotImplementedError, match="no formula for _linalg_svd"):
        separable.count(model, (1, 3, 5, 5), strict=True)


def test_what_the_walk_does_not_see_is_named() -> None:
    def in_a_thread(conv: nn.Module, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(conv, x).result()

    account = separable.count(Wrapped(in_a_thread), (1, 3, 8, 8))
    assert account.unknown == ("operators in other threads",)
    branches = Wrapped(lambda conv, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (conv(x),)))
    account = separable.count(branches, (1, 3, 8, 8), training=True)
    assert account.unknown == ("cond",)
    assert account.macs == 8 * 64 * 27


def test_gradients_inside_of_a_forward_are_counted_without_a_backward_pass() -> None:
    def gradient(conv: nn.Module, x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: conv(x).sum())(x)

    account = separable.count(Wrapped(gradient), (1, 3, 8, 8), backward=False)
    assert account.macs == 8 * 64 * 27


def test_transforms_that_refuse_hooks_are_counted_as_a_lower_bound() -> None:
    def gradient(conv: nn.Module, x: Tensor) -> Tensor:
        return torch.func.vjp(conv, x)[0]

    account = separable.count(Wrapped(gradient), (1, 3, 8, 8))
    assert (account.macs, account.backward_macs) == (8 * 64 * 27, 8 * 64 * 27)
    assert account.unknown == ("tensors saved beside torch.func",)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    for layout in (torch.strided, torch.jagged):
        rows = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=layout)
        with pytest.raises(TypeError, match=r"nested tensor.*to_padded_tensor"):
            separable.count(nn.Linear(4, 4), inputs=rows)


def test_outputs_in_plain_objects_have_shapes() -> None:
    class Scores(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return [SimpleNamespace(scores=super().forward(x), inner=SimpleNamespace(x=x))]

    account = separable.count(Scores(4, 5), (2, 4))
    assert account.output_shapes == ((2, 5), (2, 4))
    assert account.rows[0].output_shape == (2, 5)


def test_a_formula_must_return_a_cost() -> None:
    from separable.cost import formula, operation

    formula("_linalg_svd")(lambda op: 3)
    try:
        with pytest.raises(TypeError, match="formula of _linalg_svd returned a int"):
            separable.count(Function(torch.linalg.svdvals), (2, 5, 5))
    finally:
        del operation._FORMULAS["_linalg_svd"]


@pytest.mark.parametrize("name", ["_linalg_svd", "aten::_linalg_svd"])
def test_a_formula_can_be_added(name: str) -> None:
    from separable.cost import Cost, formula, operation

    @formula(name)
    def svd(op: Any) -> Cost:
        return Cost(elementwise=op["A"].numel())

    try:
        account = separable.count(Function(torch.linalg.svdvals), (2, 5, 5), strict=True)
        assert account.elementwise == 50
    finally:
        del operation._FORMULAS["_linalg_svd"]


def test_errors_name_the_argument() -> None:
    conv = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match=r"`input_size` .* must include the batch, as in \(1, 3"):
        separable.count(conv, (3, 10, 10))
    scaled = Wrapped(lambda conv, x: conv(x / 255))
    with pytest.raises(ValueError, match=r"`input_size` .* must include the batch, as in \(1, 3"):
        separable.count(scaled, (3, 10, 10))
    with pytest.raises(TypeError, match="`input_size` or `inputs` is missing"):
        separable.count(conv)
    with pytest.raises(TypeError, match="exclude each other"):
        separable.count(conv, (1, 3, 10, 10), inputs=torch.zeros(1, 3, 10, 10))
    with pytest.raises(TypeError, match="must be a shape"):
        separable.count(conv, "1x3x10x10")
    with pytest.raises(ValueError, match=r"`dtypes` has 2 entries for 1 inputs"):
        separable.count(conv, (1, 3, 10, 10), dtypes=[torch.float32] * 2)
    with pytest.raises(TypeError, match=r"`model` \(a function\) must be an nn.Module"):
        separable.count(lambda x: x, (1, 3, 10, 10))
    with pytest.raises(ValueError, match=r"parameters or buffers without a shape \(weight, bias\)"):
        separable.count(nn.LazyConv2d(4, 3), (1, 3, 10, 10))
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels") as caught:
        separable.count(conv, (1, 4, 10, 10))
    assert "(1, 4, 10, 10)" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match=r"`format` .* must be one of table, json, csv"):
        separable.count(conv, (1, 3, 10, 10)).to_string("xml")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_size": (True, True)}, TypeError, r"`input_size` \(=\(True, True\)\) must be made"),
        ({"input_size": (2**70, 4)}, ValueError, "must have at most 9223372036854775807 elements"),
        ({"input_size": (2, 4), "dtypes": "float32"}, TypeError, "`dtypes` .='float32'. must be"),
        ({"input_size": (2, 4), "dtypes": ["x"]}, TypeError, "`dtypes` .=.'x'.. must be"),
    ],
)
def test_sizes_and_dtypes_that_are_none(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        separable.count(nn.Linear(4, 4), **arguments)


def test_sizes_of_numpy() -> None:
    size = tuple(np.array([2, 4]))
    assert separable.count(nn.Linear(4, 4), size).input_shapes == ((2, 4),)
    assert separable.count(Function(torch.add), [size, (4,)]).input_shapes == ((2, 4), (4,))


def test_a_packed_sequence_is_one_argument() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.ones(7, 2, 5), torch.tensor([7, 4]))
    assert separable.count(nn.LSTM(5, 6), inputs=packed).macs == 11 * 4 * 6 * (5 + 6)


def test_lazy_modules_are_named() -> None:
    batch_norm = nn.Sequential(nn.LazyBatchNorm1d(affine=False))
    with pytest.raises(ValueError, match=r"without a shape \(0.running_mean, 0.running_var\)"):
        separable.count(batch_norm, (2, 4))
    with pytest.raises(ValueError, match=r"without a shape \(weight, bias\)"):
        separable.total_learnables(nn.LazyLinear(3))
    with pytest.raises(TypeError, match=r"`model` \(a function\) must be an nn.Module"):
        separable.total_learnables(lambda x: x)


@pytest.mark.parametrize("format", ["table", "csv", "markdown"])
def test_names_of_modules_break_no_row(format: Any) -> None:
    model = nn.Sequential()
    for name in ("a\nb\tc|d", "\x1b[31mx"):
        model.add_module(name, nn.Linear(4, 4))
    text = separable.count(model, (1, 4)).to_string(format)
    (line,) = (line for line in text.splitlines() if "a\\nb\\tc" in line)
    assert (r"c\|d" if format == "markdown" else "c|d") in line
    assert r"\x1b[31mx" in text
    assert all(each.isprintable() for each in text.splitlines())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_torchscript_is_refused_with_the_reason() -> None:
    scripted = torch.jit.script(nn.Conv2d(3, 4, 3))
    with pytest.raises(TypeError, match="TorchScript module, which runs outside of Python"):
        separable.count(scripted, (1, 3, 10, 10))
    with pytest.raises(TypeError, match="`0` in `model` is a TorchScript module"):
        separable.count(nn.Sequential(scripted), (1, 3, 10, 10))


def test_values_on_the_meta_device_are_refused_by_torch() -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        separable.count(Wrapped(as_often_as_the_data_say).to("meta"), (1, 3, 8, 8))


def test_several_nested_and_integer_inputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 6)
            self.mix = nn.Linear(6, 5)

        def forward(self, tokens: Tensor, more: dict[str, list[Tensor]], scale: float) -> Tensor:
            return self.mix(self.embed(tokens) + more["a"][0]) * scale

    tokens = torch.zeros(2, 7, dtype=torch.long)
    extra = {"a": [torch.zeros(2, 7, 6)]}
    account = separable.count(Net(), inputs=(tokens, extra), kwargs={"scale": 2.0})
    assert account.macs == 2 * 7 * 6 * 5
    assert account.input_shapes == ((2, 7), (2, 7, 6))
    assert account.output_shapes == ((2, 7, 5),)
    sized = separable.count(Function(torch.add), [(2, 3), (3,)], dtypes=[torch.float64] * 2)
    assert sized.traffic_bytes == 8 * (6 + 3 + 6)
    assert separable.count(nn.Embedding(10, 6), (2, 7), dtypes=torch.long).macs == 0


def test_learnables_are_listed_by_name() -> None:
    conv = nn.Conv2d(3, 64, 5, stride=2)
    total, table = separable.total_learnables(conv)
    assert total == 4864
    assert table.rows == [["weight", 4800], ["bias", 64], ["total", 4864]]
    conv.weight.requires_grad_(False)
    assert separable.total_learnables(conv)[0] == 64
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    names = [name for name, _ in separable.total_learnables(tied)[1].rows]
    assert names == ["0.weight", "0.bias", "1.bias", "total"]
    assert separable.total_learnables(nn.ReLU())[0] == 0


@pytest.mark.parametrize("format", ["table", "json", "csv", "markdown", "html"])
def test_formats(format: str) -> None:
    import csv
    import io
    import json

    account = separable.count(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (1, 3, 10, 10))
    text = account.to_string(format)
    if format == "json":
        assert json.loads(text)["macs"] == account.macs
        assert json.loads(text)["rows"][1]["name"] == "0"
    elif format == "csv":
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [row["name"] for row in rows] == ["", "0", "1"]
        assert [int(row["macs"]) for row in rows] == [account.macs, account.macs, 0]
    else:
        assert f"{account.macs:,}" in text
        assert "padding zeros included" in text
    assert len(account.to_string("csv", depth=0).splitlines()) == 2
    with pytest.raises(TypeError, match=r"`depth` \(='1'\) must be an int"):
        account.to_string(format, depth="1")  # type: ignore[arg-type]


def test_costs_add() -> None:
    from separable.cost import Cost

    total = Cost(macs=2, pool=3) + Cost(macs=5, traffic_bytes=8)
    assert total == Cost(macs=7, pool=3, traffic_bytes=8)
    assert total.flops == 2 * 7 + 3
    assert total.intensity == 7 / 8
    assert Cost().intensity == 0


def test_elementwise_norm_and_pool_columns() -> None:
    n, c, size = 2, 4, 12
    elements = n * c * size * size
    norm = nn.BatchNorm2d(c)
    assert separable.count(norm, (n, c, size, size)).norm == 2 * elements
    assert separable.count(norm, (n, c, size, size), training=True).norm == 7 * elements
    assert separable.count(nn.LayerNorm(size), (n, c, size, size)).norm == 7 * elements
    assert (
        separable.count(nn.GroupNorm(2, c, affine=False), (n, c, size, size)).norm == 5 * elements
    )
    assert separable.count(nn.Softmax(-1), (n, c)).elementwise == 3 * n * c
    for activation in (nn.ReLU(), nn.ReLU6(inplace=True), nn.Hardswish(), nn.GELU(), nn.SiLU()):
        account = separable.count(activation, (n, c, size, size))
        assert (account.elementwise, account.flops) == (elements, elements)
    pooled = separable.count(nn.MaxPool2d(3, 2), (n, c, size, size))
    assert pooled.pool == n * c * 5 * 5 * 9
    assert pooled.traffic_bytes == 4 * (elements + n * c * 25)
    assert separable.count(nn.AdaptiveAvgPool2d(1), (n, c, size, size)).pool == elements
    assert separable.count(nn.Upsample(scale_factor=2, mode="bilinear"), (n, c, 3, 3)).pool == (
        n * c * 36 * 4
    )


COLUMNS = {
    "bicubic": (nn.Upsample(scale_factor=2, mode="bicubic"), (2, 3, 5, 5), "pool", 600 * 16),
    "trilinear": (nn.Upsample(scale_factor=2, mode="trilinear"), (1, 2, 3, 3, 3), "pool", 432 * 8),
    "average 1d": (nn.AvgPool1d(3), (2, 4, 9), "pool", 2 * 4 * 3 * 3),
    "average 3d": (nn.AvgPool3d(2), (1, 2, 4, 4, 4), "pool", 2 * 8 * 8),
    "sum": (Function(torch.sum), (5, 7), "elementwise", 35),
    "log softmax": (nn.LogSoftmax(-1), (5, 7), "elementwise", 3 * 35),
    "bias of a vector": (
        Function(lambda x: torch.addmm(torch.ones(7), x, x)),
        (7, 7),
        "bias_adds",
        49,
    ),
    "addend of a matrix": (Function(lambda x: torch.addmm(x, x, x)), (7, 7), "elementwise", 49),
    "no addend": (Function(lambda x: torch.addmm(x, x, x, beta=0)), (7, 7), "flops", 2 * 343),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_other_columns(name: str) -> None:
    model, size, column, expected = COLUMNS[name]
    assert getattr(separable.count(model, size), column) == expected


@pytest.mark.parametrize(("mode", "taps"), [("bilinear", 4), ("nearest", 0), ("bicubic", 16)])
def test_grid_sampling_counts_its_taps(mode: str, taps: int) -> None:
    def sample(x: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(x, grid, mode=mode, align_corners=False)

    assert separable.count(Function(sample), [(2, 3, 5, 5), (2, 4, 6, 2)]).pool == 144 * taps


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_adaptive_pool_counts_its_windows(size: int) -> None:
    """Against the ones trick: a sum over each window, seen by the gradient of the pooling."""
    length = 11
    taps = 0
    for i in range(size):
        start, end = math.floor(i * length / size), math.ceil((i + 1) * length / size)
        taps += end - start
    account = separable.count(nn.AdaptiveMaxPool1d(size), (2, 3, length))
    assert account.pool == 2 * 3 * taps
