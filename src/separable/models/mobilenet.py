"""MobileNetV1, with depthwise separable convolutions and with regular ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor, nn

from ..limits import whole_number

ConvForm = Literal["separable", "regular"]
Activation = Literal["relu", "relu6"]

# (output channels, stride) of the blocks after the stem; Howard et al. 2017, table 1. The table
# prints stride 2 for the last block too, but leaves its 7×7 map as it is: the stride is 1.
_STEM_CHANNELS = 32
_BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)
_LEAST_CHANNELS = 8
_ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6}


def _block(
    in_channels: int, out_channels: int, stride: int, conv: ConvForm, activation: Activation
) -> nn.Sequential:
    """Regular: 3×3 convolution, norm, activation. Separable: that for depthwise and pointwise."""
    act = _ACTIVATIONS[activation]
    if conv == "regular":
        return nn.Sequential(
            OrderedDict[str, nn.Module](
                conv=nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
                norm=nn.BatchNorm2d(out_channels),
                act=act(inplace=True),
            )
        )
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            # torch's own class, which quantisers and counters that look types up know
            depthwise=nn.Conv2d(
                in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False
            ),
            depthwise_norm=nn.BatchNorm2d(in_channels),
            depthwise_act=act(inplace=True),
            pointwise=nn.Conv2d(in_channels, out_channels, 1, bias=False),
            pointwise_norm=nn.BatchNorm2d(out_channels),
            pointwise_act=act(inplace=True),
        )
    )


class MobileNetV1(nn.Module):
    """MobileNetV1 (Howard et al. 2017, arXiv:1704.04861); build it with `mobilenet_v1`.

    Children: `stem` (a regular 3×3 convolution), `blocks` (13 of them), `pool`, `dropout` and
    `classifier`.

    Shape: images `[N, in_channels, H, W]` of any height and width to logits `[N, num_classes]`.
    """

    def __init__(
        self,
        conv: ConvForm = "separable",
        width: float = 1.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        stem_stride: int = 2,
        dropout: float = 0.0,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        if conv not in get_args(ConvForm):
            raise ValueError(f"`conv` (={conv!r}) must be one of {', '.join(get_args(ConvForm))}")
        if not isinstance(activation, str) or activation not in _ACTIVATIONS:
            raise ValueError(
                f"`activation` (={activation!r}) must be one of {', '.join(_ACTIVATIONS)}"
            )
        if isinstance(width, bool) or not isinstance(width, int | float):
            raise TypeError(f"`width` (={width!r}) must be a number")
        if not 0 < width < float("inf"):
            raise ValueError(f"`width` (={width}) must be greater than 0 and finite")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float):
            raise TypeError(f"`dropout` (={dropout!r}) must be a number")
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` (={dropout}) must be at least 0 and less than 1")
        whole_number("num_classes", num_classes, least=1)
        whole_number("in_channels", in_channels, least=1)
        whole_number("stem_stride", stem_stride, least=1)

        def scaled(channels: int) -> int:
            return max(_LEAST_CHANNELS, int(channels * width))

        channels = scaled(_STEM_CHANNELS)
        self.stem = nn.Sequential(
            OrderedDict[str, nn.Module](
                conv=nn.Conv2d(in_channels, channels, 3, stem_stride, padding=1, bias=False),
                norm=nn.BatchNorm2d(channels),
                act=_ACTIVATIONS[activation](inplace=True),
            )
        )
        self.blocks = nn.Sequential()
        for base_channels, stride in _BLOCKS:
            out_channels = scaled(base_channels)
            self.blocks.append(_block(channels, out_channels, stride, conv, activation))
            channels = out_channels
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # fan_in, for torch's fan_out is wrong with groups; the factor 2 of a ReLU (He 2015)
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, input: Tensor) -> Tensor:
        """Map images `[N, in_channels, H, W]` to logits `[N, num_classes]`."""
        features = self.pool(self.blocks(self.stem(input))).flatten(1)
        return self.classifier(self.dropout(features))  # type: ignore[no-any-return]


def mobilenet_v1(
    conv: ConvForm = "separable",
    width: float = 1.0,
    num_classes: int = 1000,
    in_channels: int = 3,
    stem_stride: int = 2,
    dropout: float = 0.0,
    activation: Activation = "relu",
) -> MobileNetV1:
    """Build MobileNetV1 (Howard et al. 2017, arXiv:1704.04861) with random weights.

    Batch normalisation and the activation follow every convolution, in the separable form both
    the depthwise and the pointwise one. The regular form is the "Conv MobileNet" of the paper's
    table 4: one regular 3×3 convolution in place of each separable pair. On 1×3×224×224, classifier
    included (the table's 4866 million leaves its million out):

    | conv      | parameters | multiply-adds |
    |-----------|------------|---------------|
    | separable |  4,231,976 |   568,740,352 |
    | regular   | 29,294,088 | 4,867,293,184 |

    Shape: images `[N, in_channels, H, W]` of any height and width to logits `[N, num_classes]`.
    The last feature map is `H / (16 × stem_stride)` high, rounded up.

    Args:
        conv: "separable" or "regular".
        width: the paper's width multiplier α: a factor on every number of channels, rounded down
            and at least 8.
        num_classes: logits.
        in_channels: channels of the images.
        stem_stride: stride of the first convolution; 1 keeps the resolution of small images.
        dropout: probability of dropping a feature before the classifier.
        activation: "relu" as in the paper, or "relu6" (ReLU cut off at 6) as in the published
            weights of TensorFlow and timm.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of its range.

    Example:
        >>> model = mobilenet_v1(width=0.25, num_classes=10)
        >>> model(torch.zeros(2, 3, 224, 224)).shape
        torch.Size([2, 10])
    """
    return MobileNetV1(conv, width, num_classes, in_channels, stem_stride, dropout, activation)


# timm names a block `blocks.<stage>.<index>`; these are the stages' lengths
_TIMM_STAGES = (1, 2, 2, 6, 2)
_TIMM_LAYERS = {
    "conv_dw": "depthwise",
    "bn1": "depthwise_norm",
    "conv_pw": "pointwise",
    "bn2": "pointwise_norm",
}


def _modules_in_timm() -> dict[str, str]:
    """Map the name of each module with a state in timm's `mobilenetv1_*` to the name here."""
    names = {"conv_stem": "stem.conv", "bn1": "stem.norm", "classifier": "classifier"}
    places = [(stage, index) for stage, n in enumerate(_TIMM_STAGES) for index in range(n)]
    for block, (stage, index) in enumerate(places):
        for theirs, ours in _TIMM_LAYERS.items():
            names[f"blocks.{stage}.{index}.{theirs}"] = f"blocks.{block}.{ours}"
    return names


def load_timm_state_dict(model: MobileNetV1, state_dict: Mapping[str, Tensor]) -> None:
    """Copy the weights of a timm `mobilenetv1_100` into `model`, in place.

    The two networks then give the same logits, up to rounding. `model` is left as it was where
    an error is raised.

    Args:
        model: `mobilenet_v1(activation="relu6")`, the activation of timm's network, with the
            same width, `num_classes` and `in_channels` as the source.
        state_dict: what `state_dict()` of timm's network returns.

    Raises:
        ValueError: `model` has regular convolutions or another activation, or the names or shapes
            in `state_dict` are not those of a `mobilenetv1_*` that fits `model`.

    Example:
        >>> model = mobilenet_v1(activation="relu6")
        >>> load_timm_state_dict(model, timm.create_model("mobilenetv1_100").state_dict())
    """
    if not isinstance(model.stem.act, nn.ReLU6):
        raise ValueError(
            "`model` has the activation ReLU, timm's networks have ReLU6: "
            'build it with mobilenet_v1(activation="relu6")'
        )
    if not hasattr(model.blocks[0], "depthwise"):
        raise ValueError(
            "`model` has regular convolutions, timm's networks have separable ones: "
            'build it with mobilenet_v1(conv="separable")'
        )
    modules = _modules_in_timm()
    own = model.state_dict()
    translated: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        module, _, leaf = name.rpartition(".")
        own_name = f"{modules.get(module)}.{leaf}"
        if own_name not in own:
            raise ValueError(f"`state_dict` has {name!r}, which timm's mobilenetv1_100 has not")
        if value.shape != own[own_name].shape:
            raise ValueError(
                f"`state_dict`[{name!r}] has the shape {list(value.shape)}, `model` needs "
                f"{list(own[own_name].shape)}: build it with the same width, num_classes and "
                "in_channels"
            )
        translated[own_name] = value
    if missing := own.keys() - translated.keys():
        raise ValueError(
            f"`state_dict` lacks the values of {len(missing)} of `model`'s "
            f"{len(own)} parameters and buffers, {min(missing)!r} for one"
        )
    model.load_state_dict(translated)
