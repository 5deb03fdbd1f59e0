"""The layers against `torch.nn.ConvNd`, a dense weight composed of their halves, and the tools."""

import copy
import inspect
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from separable.nn import (
    DepthwiseConv1d,
    DepthwiseConv2d,
    DepthwiseConv3d,
    PointwiseConv1d,
    PointwiseConv2d,
    PointwiseConv3d,
    SeparableConv1d,
    SeparableConv2d,
    SeparableConv3d,
)

REGULAR = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SEPARABLE = {1: SeparableConv1d, 2: SeparableConv2d, 3: SeparableConv3d}
DEPTHWISE = {1: DepthwiseConv1d, 2: DepthwiseConv2d, 3: DepthwiseConv3d}
POINTWISE = {1: PointwiseConv1d, 2: PointwiseConv2d, 3: PointwiseConv3d}
ORDERS = ("depthwise-pointwise", "pointwise-depthwise")

# in_channels, out_channels, kernel_size, other arguments of nn.ConvNd, by number of dimensions
CASES = {
    "plain-1d": (1, (4, 6, 3, {})),
    "strided-1d": (1, (3, 5, 4, {"stride": 3, "padding": 2, "dilation": 2})),
    "same-even-kernel-1d": (1, (2, 4, 4, {"padding": "same"})),
    "replicate-1d": (1, (2, 3, 3, {"padding": 2, "padding_mode": "replicate"})),
    "first-layer-2d": (2, (3, 64, 5, {"stride": 2})),
    "valid-2d": (2, (2, 3, (3, 2), {"padding": "valid"})),
    "same-dilated-2d": (2, (3, 4, (3, 4), {"padding": "same", "dilation": (2, 1)})),
    "tuples-2d": (2, (4, 2, (1, 3), {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)})),
    "circular-2d": (2, (3, 4, 3, {"padding": 1, "padding_mode": "circular", "stride": 2})),
    "reflect-same-2d": (2, (3, 2, 3, {"padding": "same", "padding_mode": "reflect"})),
    "no-bias-2d": (2, (3, 4, 3, {"bias": False})),
    "single-tap-2d": (2, (3, 4, 1, {})),
    "single-channel-2d": (2, (1, 1, 3, {"padding": 1})),
    "plain-3d": (3, (2, 3, 3, {"padding": 1})),
    "tuples-3d": (3, (3, 2, (1, 2, 3), {"stride": (1, 2, 1), "padding": (0, 1, 2)})),
}
cases = pytest.mark.parametrize(("dims", "arguments"), CASES.values(), ids=CASES.keys())
orders = pytest.mark.parametrize("order", ORDERS)

# torch itself warns about padding="same" with an even number of taps
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

LENGTHS = (9, 8, 7)


def random_input(dims, channels, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, channels, *LENGTHS[:dims])
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def dense(layer, regular):
    """Load into `regular` the one dense filter that the two halves of `layer` amount to."""
    depth, point = layer.depthwise.weight, layer.pointwise.weight.flatten(1)
    factor = layer.depth_multiplier
    if layer.order == "depthwise-pointwise":
        depth = depth.reshape(layer.in_channels, factor, *depth.shape[2:])
        point = point.reshape(layer.out_channels, layer.in_channels, factor)
        weight = torch.einsum("nct,ct...->nc...", point, depth)
    else:
        point = point.reshape(layer.out_channels, factor, layer.in_channels)
        weight = torch.einsum("ntc,nt...->nc...", point, depth)
    bias = torch.zeros(layer.out_channels, dtype=weight.dtype)
    if layer.order == "depthwise-pointwise":
        if layer.depthwise.bias is not None:
            bias = bias + layer.pointwise.weight.flatten(1) @ layer.depthwise.bias
        if layer.pointwise.bias is not None:
            bias = bias + layer.pointwise.bias
    elif layer.depthwise.bias is not None:
        bias = bias + layer.depthwise.bias
    with torch.no_grad():
        regular.weight.copy_(weight)
        if regular.bias is not None:
            regular.bias.copy_(bias)
    return regular


def learnables(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_first_layer_of_the_readme():
    regular, separable = nn.Conv2d(3, 64, 5, stride=2), SeparableConv2d(3, 64, 5, stride=2)
    image = torch.zeros(1, 3, 228, 228)
    assert separable(image).shape == regular(image).shape == (1, 64, 112, 112)
    assert {name: p.numel() for name, p in separable.named_parameters()} == {
        "depthwise.weight": 75,
        "depthwise.bias": 3,
        "pointwise.weight": 192,
        "pointwise.bias": 64,
    }
    assert (learnables(separable), learnables(regular)) == (334, 4864)
    assert round(100 * (1 - 334 / 4864), 2) == 93.13


@pytest.mark.parametrize(
    ("arguments", "total"),
    [
        ({}, 4 * 9 + 4 + 4 * 6 + 6),
        ({"bias": False}, 4 * 9 + 4 * 6),
        ({"depthwise_bias": False}, 4 * 9 + 4 * 6 + 6),
        ({"bias": False, "depthwise_bias": True}, 4 * 9 + 4 + 4 * 6),
        ({"depth_multiplier": 3}, 12 * 9 + 12 + 12 * 6 + 6),
        ({"order": "pointwise-depthwise"}, 4 * 6 + 6 * 9 + 6),
        ({"order": "pointwise-depthwise", "bias": False}, 4 * 6 + 6 * 9),
        ({"order": "pointwise-depthwise", "depthwise_bias": False}, 4 * 6 + 6 * 9),
        ({"order": "pointwise-depthwise", "depth_multiplier": 3}, 4 * 18 + 18 * 9 + 6),
    ],
    ids=str,
)
def test_number_of_learnables(arguments, total):
    assert learnables(SeparableConv2d(4, 6, 3, **arguments)) == total


@pytest.mark.parametrize("depth_multiplier", [1, 2, 3])
@orders
@cases
def test_output_is_that_of_the_composed_dense_filter(dims, arguments, order, depth_multiplier):
    in_channels, out_channels, kernel_size, others = arguments
    layer = SEPARABLE[dims](
        in_channels,
        out_channels,
        kernel_size,
        **others,
        order=order,
        depth_multiplier=depth_multiplier,
        dtype=torch.float64,
    )
    regular = REGULAR[dims](in_channels, out_channels, kernel_size, **others, dtype=torch.float64)
    x = random_input(dims, in_channels)
    torch.testing.assert_close(layer(x), dense(layer, regular)(x))
    torch.testing.assert_close(layer(x[0]), regular(x[0]))


def test_depthwise_bias_is_redundant_before_a_pointwise_one():
    layer = SeparableConv2d(3, 4, 3, padding=1, dtype=torch.float64)
    bare = SeparableConv2d(3, 4, 3, padding=1, depthwise_bias=False, dtype=torch.float64)
    assert bare.depthwise.bias is None
    with torch.no_grad():
        bare.depthwise.weight.copy_(layer.depthwise.weight)
        bare.pointwise.weight.copy_(layer.pointwise.weight)
        bare.pointwise.bias.copy_(
            layer.pointwise.bias + layer.pointwise.weight.flatten(1) @ layer.depthwise.bias
        )
    x = random_input(2, 3)
    torch.testing.assert_close(bare(x), layer(x))


@cases
def test_depthwise_is_the_grouped_convolution(dims, arguments):
    channels, _, kernel_size, others = arguments
    layer = DEPTHWISE[dims](channels, 2 * channels, kernel_size, **others, dtype=torch.float64)
    assert layer.depth_multiplier == 2
    assert isinstance(layer, REGULAR[dims])
    x = random_input(dims, channels)
    each = REGULAR[dims](1, 2, kernel_size, **others, dtype=torch.float64)
    outputs = []
    for channel in range(channels):
        pair = slice(2 * channel, 2 * channel + 2)
        state = {name: value[pair] for name, value in layer.state_dict().items()}
        each.load_state_dict(state)
        outputs.append(each(x[:, channel : channel + 1]))
    torch.testing.assert_close(layer(x), torch.cat(outputs, dim=1))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pointwise_is_a_linear_map_of_the_channels(dims):
    layer = POINTWISE[dims](4, 6, stride=2, dtype=torch.float64)
    assert isinstance(layer, REGULAR[dims])
    x = random_input(dims, 4)
    sampled = x[(slice(None), slice(None), *(slice(None, None, 2),) * dims)]
    expected = nn.functional.linear(
        sampled.movedim(1, -1), layer.weight.flatten(1), layer.bias
    ).movedim(-1, 1)
    torch.testing.assert_close(layer(x), expected)


@st.composite
def drawn_arguments(draw):
    dims = draw(st.integers(1, 3))

    def size(least, most):
        one = st.integers(least, most)
        return draw(
            st.one_of(one, st.tuples(*[one] * dims), st.lists(one, min_size=dims, max_size=dims))
        )

    arguments = {
        "in_channels": draw(st.integers(1, 5)),
        "out_channels": draw(st.integers(1, 5)),
        "kernel_size": size(1, 4),
        "stride": size(1, 3),
        "dilation": size(1, 3),
        "padding": draw(st.sampled_from(["same", "valid", "numbers"])),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
    }
    if arguments["padding"] == "numbers":
        arguments["padding"] = size(0, 3)
    elif arguments["padding"] == "same":
        arguments["stride"] = 1
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    lengths = draw(st.tuples(*[st.integers(1, 12)] * dims))
    return dims, arguments, (*batch, arguments["in_channels"], *lengths)


@given(drawn_arguments(), st.sampled_from(ORDERS), st.integers(1, 2))
def test_output_shape_is_the_regular_convolutions(drawn, order, depth_multiplier):
    dims, arguments, shape = drawn
    regular = REGULAR[dims](**arguments, device="meta")
    x = torch.empty(shape, dtype=arguments["dtype"], device="meta")
    try:
        expected = regular(x)
    except RuntimeError:  # the kernel is larger than the padded input
        assume(False)
    layer = SEPARABLE[dims](
        **arguments, order=order, depth_multiplier=depth_multiplier, device="meta"
    )
    output = layer(x)
    assert (output.shape, output.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@orders
def test_dtype_reaches_every_parameter_and_the_output(order, dtype):
    layer = SeparableConv2d(3, 4, 3, order=order, dtype=dtype)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert layer(random_input(2, 3, dtype)).dtype == dtype


@orders
def test_children_are_exactly_the_convolutions_of_torch(order):
    for dims, kind in SEPARABLE.items():
        layer = kind(4, 6, 3, order=order, depth_multiplier=2)
        children = dict(layer.named_children())
        assert set(children) == {"depthwise", "pointwise"}
        assert {type(child) for child in children.values()} == {REGULAR[dims]}
        assert layer.pointwise.kernel_size == (1,) * dims
        assert layer.depthwise.groups == (4 if order == "depthwise-pointwise" else 6)
        assert layer.pointwise.groups == 1


@pytest.mark.parametrize("kind", [SeparableConv2d, DepthwiseConv2d, PointwiseConv2d])
def test_signature_is_that_of_torch(kind):
    """Every argument of `nn.Conv2d` but `groups`, by its name, order and default."""
    ours = inspect.signature(kind).parameters
    theirs = [p for p in inspect.signature(nn.Conv2d).parameters.values() if p.name != "groups"]
    positional = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [p.name for p in theirs if p.name not in ("device", "dtype")]
    for name in ("stride", "padding", "dilation", "bias", "padding_mode", "device", "dtype"):
        assert ours[name].default == inspect.signature(nn.Conv2d).parameters[name].default


def test_depthwise_takes_channels_or_multiplier():
    assert DepthwiseConv2d(4, kernel_size=3).out_channels == 4
    assert DepthwiseConv2d(4, kernel_size=3, depth_multiplier=3).out_channels == 12
    assert DepthwiseConv2d(4, 12, 3).depth_multiplier == 3
    assert DepthwiseConv2d(4, 12, 3, depth_multiplier=3).groups == 4


def test_integers_of_numpy_are_integers():
    layer = SeparableConv2d(np.int64(4), np.int32(6), np.int64(3), stride=(np.int64(2), 1))
    assert layer(torch.zeros(1, 4, 9, 9)).shape == (1, 6, 4, 7)
    assert type(layer.in_channels) is int


# class, arguments that are wrong, error, its message
ERRORS = [
    (SeparableConv2d, {"in_channels": 0}, ValueError, "`in_channels` (=0) must be at least 1"),
    (SeparableConv2d, {"in_channels": 2.0}, TypeError, "`in_channels` (=2.0) must be an int"),
    (SeparableConv2d, {"in_channels": True}, TypeError, "`in_channels` (=True) must be an int"),
    (SeparableConv2d, {"out_channels": -1}, ValueError, "`out_channels` (=-1) must be at least 1"),
    (SeparableConv2d, {"out_channels": "6"}, TypeError, "`out_channels` (='6') must be an int"),
    (
        SeparableConv2d,
        {"kernel_size": 0},
        ValueError,
        "`kernel_size` (=0) must be at least 1 in every dimension",
    ),
    (
        SeparableConv2d,
        {"kernel_size": (3, 3, 3)},
        ValueError,
        "`kernel_size` (=(3, 3, 3)) must have 2 entries, one per dimension",
    ),
    (
        SeparableConv2d,
        {"kernel_size": 2.5},
        TypeError,
        "`kernel_size` (=2.5) must be an int or a tuple of 2 ints",
    ),
    (
        SeparableConv2d,
        {"kernel_size": "33"},
        TypeError,
        "`kernel_size` (='33') must be an int or a tuple of 2 ints",
    ),
    (SeparableConv2d, {"stride": (1, 0)}, ValueError, "`stride` (=(1, 0)) must be at least 1"),
    (SeparableConv2d, {"stride": None}, TypeError, "`stride` (=None) must be an int or a tuple"),
    (SeparableConv2d, {"padding": -1}, ValueError, "`padding` (=-1) must be at least 0"),
    (SeparableConv2d, {"padding": (1,)}, ValueError, "`padding` (=(1,)) must have 2 entries"),
    (
        SeparableConv2d,
        {"padding": "full"},
        ValueError,
        "`padding` (='full') must be 'same', 'valid', an int or a tuple",
    ),
    (
        SeparableConv2d,
        {"padding": "same", "stride": (1, 2)},
        ValueError,
        "`padding` (='same') needs `stride` 1, got `stride` (=(1, 2)); give the padding as ints",
    ),
    (SeparableConv2d, {"dilation": 0}, ValueError, "`dilation` (=0) must be at least 1"),
    (SeparableConv2d, {"dilation": True}, TypeError, "`dilation` (=True) must be an int or"),
    (
        SeparableConv2d,
        {"padding_mode": "constant"},
        ValueError,
        "`padding_mode` (='constant') must be one of zeros, reflect, replicate, circular",
    ),
    (
        SeparableConv2d,
        {"order": "pointwise"},
        ValueError,
        "`order` (='pointwise') must be one of depthwise-pointwise, pointwise-depthwise",
    ),
    (
        SeparableConv2d,
        {"depth_multiplier": 0},
        ValueError,
        "`depth_multiplier` (=0) must be at least 1",
    ),
    (SeparableConv2d, {"bias": 4}, TypeError, "`bias` (=4) must be a bool"),
    (SeparableConv2d, {"depthwise_bias": 1}, TypeError, "`depthwise_bias` (=1) must be a bool"),
    (SeparableConv1d, {"stride": (1, 1)}, ValueError, "`stride` (=(1, 1)) must have 1 entries"),
    (SeparableConv3d, {"padding": (1, 1)}, ValueError, "`padding` (=(1, 1)) must have 3 entries"),
    (
        DepthwiseConv2d,
        {"out_channels": 6},
        ValueError,
        "`out_channels` (=6) must be a multiple of `in_channels` (=4)",
    ),
    (
        DepthwiseConv2d,
        {"out_channels": 8, "depth_multiplier": 3},
        ValueError,
        "`depth_multiplier` (=3) must be `out_channels` (=8) / `in_channels` (=4)",
    ),
    (
        DepthwiseConv2d,
        {"kernel_size": None},
        TypeError,
        "`kernel_size` (=None) must be an int or a tuple of 2 ints",
    ),
    (DepthwiseConv2d, {"depth_multiplier": 0}, ValueError, "`depth_multiplier` (=0) must be at"),
    (DepthwiseConv2d, {"in_channels": 0}, ValueError, "`in_channels` (=0) must be at least 1"),
    (DepthwiseConv2d, {"padding": "up"}, ValueError, "`padding` (='up') must be 'same'"),
    (DepthwiseConv2d, {"bias": None}, TypeError, "`bias` (=None) must be a bool"),
    (
        PointwiseConv2d,
        {"kernel_size": (1, 3)},
        ValueError,
        "`kernel_size` (=(1, 3)) must be 1: a pointwise convolution mixes channels only",
    ),
    (PointwiseConv2d, {"out_channels": 0}, ValueError, "`out_channels` (=0) must be at least 1"),
    (PointwiseConv2d, {"stride": 0}, ValueError, "`stride` (=0) must be at least 1"),
    (PointwiseConv2d, {"bias": 8}, TypeError, "`bias` (=8) must be a bool"),
]
ERROR_IDS = [
    f"{kind.__name__}-" + "-".join(f"{name}={value}" for name, value in wrong.items())
    for kind, wrong, _, _ in ERRORS
]


@pytest.mark.parametrize(("kind", "wrong", "error", "message"), ERRORS, ids=ERROR_IDS)
def test_error_names_argument_value_and_rule(kind, wrong, error, message):
    arguments = {"in_channels": 4, "out_channels": 8, "kernel_size": 3}
    if kind is PointwiseConv2d:
        arguments["kernel_size"] = 1
    if kind is DepthwiseConv2d and "depth_multiplier" in wrong:
        del arguments["out_channels"]
    with pytest.raises(error) as caught:
        kind(**arguments | wrong)
    assert message in str(caught.value)


def test_groups_in_its_place_of_torch_is_an_error():
    """`groups` comes before `bias` in `nn.Conv2d`; it must not be taken for a bias."""
    with pytest.raises(TypeError, match=r"`bias` \(=4\) must be a bool"):
        SeparableConv2d(4, 8, 3, 1, 0, 1, 4)


@pytest.mark.parametrize("depth_multiplier", [1, 4])
@orders
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_fresh_output_variance_is_the_regular_convolutions(dims, order, depth_multiplier):
    torch.manual_seed(0)
    channels, taps, length = 64, {1: 9, 2: 3, 3: 3}[dims], {1: 512, 2: 24, 3: 8}[dims]
    x = torch.randn(8, channels, *[length] * dims)
    arguments = (channels, 128, taps)
    separable = SEPARABLE[dims](
        *arguments, bias=False, order=order, depth_multiplier=depth_multiplier
    )
    regular = REGULAR[dims](*arguments, bias=False)
    with torch.no_grad():
        ratio = separable(x).var() / regular(x).var()
    assert ratio.item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("make", "fan_in"),
    [
        (lambda: DepthwiseConv2d(512, 1024, (3, 5)), 15),
        (lambda: SeparableConv2d(512, 8, (3, 5), depth_multiplier=4).depthwise, 15),
        (lambda: SeparableConv2d(8, 512, (3, 5), order=ORDERS[1]).depthwise, 15),
        (
            lambda: SeparableConv2d(8, 512, (3, 5), order=ORDERS[1], depth_multiplier=4).depthwise,
            60,
        ),
    ],
    ids=["depthwise", "depthwise-first", "pointwise-first", "pointwise-first-multiplied"],
)
def test_depthwise_filters_are_drawn_from_their_fan_in(make, fan_in):
    torch.manual_seed(0)
    layer = make()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    assert weight.abs().max().item() <= math.sqrt(3 / fan_in)
    assert weight.var().item() == pytest.approx(1 / fan_in, rel=0.1)
    assert bias.abs().max().item() <= 1 / math.sqrt(fan_in)
    assert bias.var().item() == pytest.approx(1 / (3 * fan_in), rel=0.2)


@pytest.mark.parametrize("kind", [SeparableConv2d, DepthwiseConv2d, PointwiseConv2d])
def test_reset_parameters_draws_anew_what_the_constructor_draws(kind):
    torch.manual_seed(0)
    layer = kind(128, 256) if kind is PointwiseConv2d else kind(128, 256, 3)
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    for name, value in layer.state_dict().items():
        assert not torch.equal(value, before[name])
        assert value.std().item() == pytest.approx(before[name].std().item(), rel=0.2)


def trained_like(order, **arguments):
    torch.manual_seed(0)
    return SeparableConv2d(3, 8, 3, padding=1, order=order, depth_multiplier=2, **arguments).eval()


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@orders
def test_state_dict_round_trip(order):
    layer, other = (
        trained_like(order),
        SeparableConv2d(3, 8, 3, padding=1, order=order, depth_multiplier=2),
    )
    assert not torch.equal(layer(IMAGE), other(IMAGE))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(IMAGE), other(IMAGE))


@orders
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_copies_compute_the_same_and_share_nothing(order, duplicate):
    for layer in (trained_like(order), DepthwiseConv2d(3, 6, 3), PointwiseConv2d(3, 6)):
        twin = duplicate(layer)
        assert type(twin) is type(layer)
        assert torch.equal(layer(IMAGE), twin(IMAGE))
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not torch.equal(layer(IMAGE), twin(IMAGE))


def test_repr_shows_the_order():
    assert "order='pointwise-depthwise'" in repr(trained_like("pointwise-depthwise"))


@orders
def test_export(order):
    layer = trained_like(order)
    program = torch.export.export(layer, (IMAGE,))
    torch.testing.assert_close(program.module()(IMAGE), layer(IMAGE))


@orders
# the exporter's own deprecations, none of them reached from here by choice
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_export_runs_in_onnxruntime(order, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    layer = trained_like(order)
    path = tmp_path / "layer.onnx"
    torch.onnx.export(layer, (IMAGE,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), layer(IMAGE), rtol=1e-4, atol=1e-5)


@orders
def test_compile_in_one_graph_with_gradients(order):
    layer = trained_like(order)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    output = compiled(IMAGE)
    torch.testing.assert_close(output, layer(IMAGE))
    gradients = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
    expected = torch.autograd.grad(layer(IMAGE).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(gradients, expected)


@orders
def test_distributed_data_parallel(order, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        layer = trained_like(order)
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(layer))
        parallel(IMAGE).square().sum().backward()
        layer(IMAGE).square().sum().backward()
        for ours, theirs in zip(layer.parameters(), parallel.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_meta_layer_is_materialised_by_torch():
    layer = nn.utils.skip_init(SeparableConv2d, 3, 8, 3)
    layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")
@pytest.mark.parametrize("dims", SEPARABLE)
@orders
def test_torchscript(order, dims):
    layer = SEPARABLE[dims](3, 4, 3, padding="same", order=order)
    x = random_input(dims, 3, torch.float32)
    assert torch.equal(torch.jit.script(layer)(x), layer(x))
