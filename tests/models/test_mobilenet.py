"""MobileNetV1 against the paper's figures, hand counts and timm's network."""

import copy
import math

import pytest
import torch
from torch import nn

from separable.models import load_timm_state_dict, mobilenet_v1

# Howard et al. 2017, table 1, written out: input and output channels, stride
TABLE = [
    (32, 64, 1),
    (64, 128, 2),
    (128, 128, 1),
    (128, 256, 2),
    (256, 256, 1),
    (256, 512, 2),
    (512, 512, 1),
    (512, 512, 1),
    (512, 512, 1),
    (512, 512, 1),
    (512, 512, 1),
    (512, 1024, 2),
    (1024, 1024, 1),
]


def by_hand(conv, width=1.0, num_classes=1000, in_channels=3, stem_stride=2, size=224):
    """Parameters and MACs, from the table and the definitions alone."""

    def thin(channels):
        return max(8, int(channels * width))

    side = math.ceil(size / stem_stride)
    weights = 9 * in_channels * thin(32)
    params, macs = weights + 2 * thin(32), weights * side**2
    for inputs, outputs, stride in TABLE:
        inputs, outputs, side = thin(inputs), thin(outputs), math.ceil(side / stride)
        if conv == "regular":
            weights, norms = 9 * inputs * outputs, 2 * outputs
        else:
            weights, norms = 9 * inputs + inputs * outputs, 2 * (inputs + outputs)
        params, macs = params + weights + norms, macs + weights * side**2
    features = thin(1024)
    return params + (features + 1) * num_classes, macs + features * num_classes


def measured(model, size=224, in_channels=3):
    """Parameters and MACs of the built network: MACs from the shapes its layers really give."""
    macs = 0

    def add(layer, _, output):
        nonlocal macs
        macs += output.numel() * layer.weight[0].numel()

    model = copy.deepcopy(model).to("meta").eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(add)
    model(torch.zeros(1, in_channels, size, size, device="meta"))
    return sum(parameter.numel() for parameter in model.parameters()), macs


def test_the_papers_figures():
    assert measured(mobilenet_v1()) == (4_231_976, 568_740_352)
    params, macs = measured(mobilenet_v1("regular"))
    assert (params, macs) == (29_294_088, 4_867_293_184)
    assert round(params / 1e6, 1) == 29.3
    assert round((macs - 1_024_000) / 1e6) == 4866  # the table counts the convolutions


def test_depthwise_macs_of_the_separable_form():
    depthwise, side = 0, 112
    for inputs, _, stride in TABLE:
        side = math.ceil(side / stride)
        depthwise += 9 * inputs * side**2
    assert depthwise == 17_385_984
    layers = [block.depthwise for block in mobilenet_v1().blocks]
    assert [layer.in_channels for layer in layers] == [row[0] for row in TABLE]
    assert all(layer.groups == layer.in_channels for layer in layers)


@pytest.mark.parametrize("conv", ["separable", "regular"])
@pytest.mark.parametrize(
    "options",
    [
        {"width": 0.25},
        {"width": 0.3},
        {"width": 0.05},
        {"width": 1.25, "num_classes": 7},
        {"width": 0.5, "in_channels": 1, "stem_stride": 1, "size": 33},
    ],
    ids=str,
)
def test_counts_by_hand(conv, options):
    size = options.get("size", 224)
    built = {name: value for name, value in options.items() if name != "size"}
    model = mobilenet_v1(conv, **built)
    assert measured(model, size, options.get("in_channels", 3)) == by_hand(conv, **options)


@pytest.mark.parametrize("conv", ["separable", "regular"])
def test_norm_and_activation_follow_every_convolution(conv):
    layers = [m for m in mobilenet_v1(conv, activation="relu6").modules() if not list(m.children())]
    convolutions = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == (27 if conv == "separable" else 14)
    for i in convolutions:
        assert isinstance(layers[i + 1], nn.BatchNorm2d)
        assert isinstance(layers[i + 2], nn.ReLU6)
        assert layers[i].bias is None


@pytest.mark.parametrize("conv", ["separable", "regular"])
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 33, 65), (3, 3, 31, 2)], ids=str)
def test_any_image_size(conv, shape):
    model = mobilenet_v1(conv, width=0.25, num_classes=5).eval()
    assert model(torch.randn(shape)).shape == (shape[0], 5)


def test_random_weights_keep_the_signal():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 96, 96)
    for conv in ("separable", "regular"):
        assert 0.05 < mobilenet_v1(conv, width=0.5).eval()(images).std() < 5


@pytest.mark.parametrize("conv", ["separable", "regular"])
def test_export_with_free_batch_and_size(conv):
    model = mobilenet_v1(conv, width=0.25, num_classes=3).eval()
    # torch.export treats a feature map of one pixel apart, so the images stay above 32 pixels
    height, width = (torch.export.Dim(name, min=33) for name in ("height", "width"))
    dynamic = {0: torch.export.Dim("images"), 2: height, 3: width}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 48),), dynamic_shapes=(dynamic,))
    images = torch.randn(3, 3, 37, 83)
    torch.testing.assert_close(program.module()(images), model(images))


def test_trains_with_dropout():
    model = mobilenet_v1(width=0.25, num_classes=3, dropout=0.5)
    images = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"conv": "dense"}, ValueError, "`conv` (='dense') must be one of separable, regular"),
        ({"activation": []}, ValueError, "`activation` (=[]) must be one of relu, relu6"),
        ({"activation": "gelu"}, ValueError, "`activation` (='gelu') must be one of relu, relu6"),
        ({"width": 0}, ValueError, "`width` (=0) must be greater than 0 and finite"),
        ({"width": float("nan")}, ValueError, "`width` (=nan) must be greater than 0 and finite"),
        ({"width": "half"}, TypeError, "`width` (='half') must be a number"),
        ({"dropout": 1}, ValueError, "`dropout` (=1) must be at least 0 and less than 1"),
        ({"dropout": None}, TypeError, "`dropout` (=None) must be a number"),
        ({"num_classes": 0}, ValueError, "`num_classes` (=0) must be at least 1"),
        ({"in_channels": 2.0}, TypeError, "`in_channels` (=2.0) must be an int"),
        ({"stem_stride": 0}, ValueError, "`stem_stride` (=0) must be at least 1"),
    ],
    ids=str,
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error) as raised:
        mobilenet_v1(**options)
    assert str(raised.value) == message


def randomised(model):
    """Give every parameter and statistic a random value, so that each one shows in the output."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.dim() == 1:
            least, most = (0.5, 1.5) if name.endswith(("weight", "var")) else (-1.0, 1.0)
            value.uniform_(least, most)
    return model.eval()


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "width", "num_classes", "in_channels"),
    [("mobilenetv1_100", 1.0, 1000, 3), ("mobilenetv1_125", 1.25, 11, 1)],
)
def test_timm_weights_give_timms_outputs(timm, name, width, num_classes, in_channels):
    torch.manual_seed(0)
    theirs = randomised(timm.create_model(name, num_classes=num_classes, in_chans=in_channels))
    ours = mobilenet_v1(
        width=width, num_classes=num_classes, in_channels=in_channels, activation="relu6"
    ).eval()
    load_timm_state_dict(ours, theirs.state_dict())
    images = torch.randn(2, in_channels, 97, 131)
    expected = theirs(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(images), expected)


def test_timm_weights_that_do_not_fit_leave_the_model_alone(timm):
    state_dict = timm.create_model("mobilenetv1_100").state_dict()
    model = mobilenet_v1(activation="relu6")
    before = copy.deepcopy(model.state_dict())
    lacking = {name: value for name, value in state_dict.items() if name != "classifier.bias"}
    foreign = {**state_dict, "blocks.0.1.conv_dw.weight": torch.zeros(1)}
    thin = {**state_dict, "conv_stem.weight": torch.zeros(16, 3, 3, 3)}
    for bad, message in [
        (lacking, r"lacks the values of 1 of `model`'s 164 .* 'classifier.bias'"),
        (foreign, "has 'blocks.0.1.conv_dw.weight', which timm's mobilenetv1_100 has not"),
        (
            thin,
            r"'conv_stem.weight'\] has the shape \[16, 3, 3, 3\], `model` needs \[32, 3, 3, 3\]",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            load_timm_state_dict(model, bad)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_timm_weights_need_timms_architecture(timm):
    state_dict = timm.create_model("mobilenetv1_100").state_dict()
    with pytest.raises(ValueError, match="has the activation ReLU, timm's networks have ReLU6"):
        load_timm_state_dict(mobilenet_v1(), state_dict)
    with pytest.raises(ValueError, match="has regular convolutions"):
        load_timm_state_dict(mobilenet_v1("regular", activation="relu6"), state_dict)


def test_convolutions_are_of_torchs_own_class():
    """Tools that look up the exact type, as thop and eager quantisation do, then know them."""
    convolutions = [each for each in mobilenet_v1().modules() if isinstance(each, nn.Conv2d)]
    assert len(convolutions) == 1 + 2 * 13
    assert {type(each) for each in convolutions} == {nn.Conv2d}
