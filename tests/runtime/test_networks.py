"""Compiled networks against eager: operators end to end, weights, arguments, threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import separable
from separable.runtime import CompiledModel
from separable.runtime.dynamo import backend

from .kernels import assert_as_exact_as_eager


class Call(nn.Module):
    """A function of one tensor as a module, with layers it may use."""

    def __init__(self, function: Callable[..., object], **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = function

    def forward(self, x: torch.Tensor) -> object:
        return self.function(x, **dict(self.layers.items()))


def shuffle(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def squeeze_excite(x: torch.Tensor, a: nn.Module, b: nn.Module) -> torch.Tensor:
    return x * torch.sigmoid(b(F.relu(a(x.mean((2, 3), keepdim=True)))))


def in_regions(x: torch.Tensor, a: nn.Module, b: nn.Module) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        y = a(x).relu() + torch.ones(7)
    with torch.no_grad():
        return b(y) * y.mean((2, 3), keepdim=True)[:, :6]


def in_place(x: torch.Tensor, conv: nn.Module) -> torch.Tensor:
    y = conv(x)
    y += x
    y.relu_()
    z = y.view(2, 12, 70)
    z.mul_(2.0)  # written through a view
    return y * 3 + F.hardswish(z.view(2, 12, 10, 7))


class Doubling(nn.Module):
    """Its weight is computed from itself, 40 times in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 12, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        for _ in range(40):
            weight = (weight + weight) / 2
        return F.conv2d(x, weight)


def masked(x: torch.Tensor) -> torch.Tensor:
    mask = x.new_zeros((10, 7))
    mask[2:5] = 1.0
    mask[:, 3].fill_(-2.0)
    return x * mask


def c(i: int, o: int, k: int = 1, **named: int) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2 * named.get("dilation", 1), **named)


# name: (network of a [2, 12, 10, 7] input, whether all of it has kernels)
NETWORKS: dict[str, tuple[nn.Module, bool]] = {
    "conv-bn-relu": (nn.Sequential(c(12, 20, 3), nn.BatchNorm2d(20), nn.ReLU()), True),
    "depthwise-separable": (
        nn.Sequential(c(12, 12, 3, groups=12, stride=2), nn.ReLU6(), c(12, 30), nn.Hardswish()),
        True,
    ),
    "separable-module": (separable.nn.SeparableConv2d(12, 9, 3, padding="same"), True),
    "small-groups": (
        nn.Sequential(
            c(12, 24), nn.ReLU(), c(24, 24, 3, groups=6), nn.BatchNorm2d(24), nn.SiLU(), c(24, 8)
        ),
        True,
    ),
    "bn-first": (nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), c(12, 8)), True),
    "residual": (Call(lambda x, conv: F.relu(conv(x) + x), conv=c(12, 12, 3)), True),
    "two-convs-added": (
        Call(lambda x, a, b: F.silu(a(x) + b(x)), a=c(12, 16, 3), b=c(12, 16)),
        True,
    ),
    "squeeze-excite": (Call(squeeze_excite, a=c(12, 4), b=c(4, 12)), True),
    "classifier": (
        nn.Sequential(c(12, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
        True,
    ),
    "flatten-image": (nn.Sequential(c(12, 3), nn.Flatten(), nn.Linear(210, 40)), True),
    "pages": (
        Call(
            lambda x, a, b, d: F.relu(torch.cat([a(x), b(x)], 1) + d(b(x))),
            a=c(12, 512),
            b=c(12, 512),
            d=nn.Sequential(c(512, 512, 3, groups=512), c(512, 1024)),
        ),
        True,
    ),
    "pages-pooled": (
        nn.Sequential(c(12, 1024), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 5)),
        True,
    ),
    "pages-flat": (nn.Sequential(c(12, 512), nn.Flatten(), nn.Linear(35840, 6)), True),
    "pools": (nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, padding=1), c(12, 6)), True),
    "ceil-pool": (nn.MaxPool2d(3, 2, ceil_mode=True), True),
    "adaptive-pool": (nn.AdaptiveAvgPool2d((5, 7)), True),
    "pixel-shuffle": (nn.Sequential(c(12, 18), nn.PixelShuffle(3), nn.ReLU(), c(2, 5)), True),
    "pixel-unshuffle": (nn.Sequential(nn.ZeroPad2d((0, 1, 0, 0)), nn.PixelUnshuffle(2)), True),
    "channel-shuffle": (nn.Sequential(c(12, 18), nn.ChannelShuffle(3), c(18, 4)), True),
    "gated": (nn.Sequential(c(12, 18), nn.GLU(1), nn.GLU(2)), True),
    "shrinking": (nn.Sequential(nn.SELU(), nn.Softshrink(0.3), nn.CELU(0.7), c(12, 6)), True),
    "narrowed": (
        Call(
            lambda x, a: torch.max(a(x).narrow(1, -5, 3), x.movedim(1, -1).mT[:, :3].sum()),
            a=c(12, 8),
        ),
        True,
    ),
    "to-what-it-is": (
        Call(lambda x, a: a(x.to(x.dtype)).type_as(x).to("cpu").to(x), a=c(12, 6)),
        True,
    ),
    "padded-below": (nn.Sequential(nn.ZeroPad2d((0, 0, 0, 1)), c(12, 16)), True),
    "padded-right": (nn.Sequential(nn.ZeroPad2d((0, 2, 0, 0)), c(12, 16), c(16, 8, 3)), True),
    "padded-strided": (
        nn.Sequential(nn.ZeroPad2d((0, 2, 0, 1)), nn.Conv2d(12, 16, 1, stride=2)),
        True,
    ),
    "padded-pointwise": (
        nn.Sequential(
            nn.Conv2d(12, 16, 1, padding=1), c(16, 16, 3, groups=16), nn.Conv2d(16, 8, 1, padding=2)
        ),
        True,
    ),
    "padded-pointwise-row": (
        nn.Sequential(
            nn.Flatten(2), nn.Conv1d(12, 8, 1, padding=1), nn.Conv1d(8, 8, 1, 2, 3), nn.ReLU()
        ),
        True,
    ),
    "adaptive-windows": (nn.Sequential(nn.AdaptiveAvgPool2d((2, 4)), nn.SiLU()), True),
    "adaptive-wider": (nn.AdaptiveAvgPool2d((13, 3)), True),
    "adaptive-max": (nn.Sequential(c(12, 6), nn.AdaptiveMaxPool2d((3, 5))), True),
    "adaptive-max-divides": (nn.AdaptiveMaxPool2d((1, 7)), True),
    "reflect": (nn.Conv2d(12, 9, 3, padding=1, padding_mode="reflect"), True),
    "reflect-far": (nn.Sequential(nn.ReflectionPad2d((4, 0, 1, 3)), nn.ReLU()), True),
    "replicate": (nn.Sequential(nn.ReplicationPad2d((0, 9, 7, 2)), c(12, 6, 3)), True),
    "circular": (nn.Conv2d(12, 9, (3, 5), padding=(1, 2), padding_mode="circular"), True),
    "concatenate": (
        Call(lambda x, a, b: torch.cat([a(x), x, b(x)], 1), a=c(12, 5), b=c(12, 7, 3)),
        True,
    ),
    "dense-block": (
        Call(
            lambda x, a, b: torch.cat([x, y := a(x), b(torch.cat([x, y], 1))], 1),
            a=c(12, 8, 3),
            b=c(20, 4),
        ),
        True,
    ),
    "split-shuffle": (
        Call(
            lambda x, a: shuffle(torch.cat([(p := x.chunk(2, 1))[0], a(p[1])], 1)), a=c(6, 6, 3)
        ),
        True,
    ),
    "upsample": (
        Call(
            lambda x, a: (
                F.interpolate(a(x), scale_factor=2, mode="nearest")
                + F.interpolate(x, size=(20, 14), mode="bilinear")
            ),
            a=c(12, 12),
        ),
        True,
    ),
    "upsample-corners": (nn.Upsample((13, 21), mode="bilinear", align_corners=True), True),
    "layer-norm-gelu": (
        Call(
            lambda x, n, w: w(F.gelu(n(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2) + x,
            n=nn.LayerNorm(12),
            w=nn.Linear(12, 12),
        ),
        True,
    ),
    "activations-with-logarithms": (
        Call(
            lambda x, a, b: (
                F.softplus(a(x), 2.0, 1.5) + F.logsigmoid(x) + (x.square() + 0.1).log() + b(x).exp()
            ),
            a=c(12, 12),
            b=c(12, 12),
        ),
        True,
    ),
    "activations-with-steps": (
        nn.Sequential(c(12, 12), nn.Hardshrink(0.2), c(12, 9), nn.Threshold(0.1, -2.0)),
        True,
    ),
    "roots": (
        Call(lambda x, a: (y := a(x).abs() + 0.1) ** 0.5 + y**-0.5 + y**-1, a=c(12, 12)),
        True,
    ),
    "log-softmax": (
        Call(lambda x, a: a(F.log_softmax(x, 1)).mean((2, 3)).log_softmax(-1) * 2, a=c(12, 10)),
        True,
    ),
    "instance-norm": (
        nn.Sequential(
            c(12, 18, 3),
            nn.InstanceNorm2d(18, affine=True),
            nn.ReLU(),
            nn.InstanceNorm2d(18, track_running_stats=True),
            c(18, 5),
            nn.Flatten(2),
            nn.InstanceNorm1d(5),
        ),
        True,
    ),
    "rms-norm": (
        Call(
            lambda x, n, m, w: m(w(n(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)),
            n=nn.RMSNorm(12, eps=1e-6),
            m=nn.RMSNorm([12, 10, 7]),
            w=nn.Linear(12, 12),
        ),
        True,
    ),
    "layer-norm-of-images": (
        nn.Sequential(c(12, 6), nn.LayerNorm([6, 10, 7]), nn.LayerNorm([10, 7], bias=False)),
        True,
    ),
    "softmax": (Call(lambda x: x.softmax(1) * x.softmax(-1)), True),
    "pad": (Call(lambda x, a: a(F.pad(x, (0, 1, 2, 3))), a=c(12, 6, 3)), True),
    "pad-value": (Call(lambda x: F.pad(x, (1, 0, 0, 2), value=1.5)), True),
    "conv1d": (
        nn.Sequential(
            nn.Flatten(2), nn.Conv1d(12, 12, 5, groups=12), nn.GELU(), nn.Conv1d(12, 7, 1)
        ),
        True,
    ),
    "scalars": (Call(lambda x: (1 - x * 2) / 3 + x.clamp(-0.5, 0.5) - 2 * x), True),
    "input-twice": (Call(lambda x: x * x + x), True),
    "layer-scale": (
        Call(lambda x, a, s: x + s.weight.view(12, 1, 1) * a(x), a=c(12, 12), s=nn.Linear(12, 1)),
        True,
    ),
    "in-place": (Call(in_place, conv=c(12, 12, 3)), True),
    "several-outputs": (
        Call(lambda x, a: {"y": (y := a(x)), "m": y.mean((2, 3)), "x": x}, a=c(12, 4)),
        True,
    ),
    "group-norm": (
        nn.Sequential(c(12, 18, 3), nn.GroupNorm(3, 18), nn.ReLU(), c(18, 5), nn.GroupNorm(1, 5)),
        True,
    ),
    "group-norm-first": (nn.Sequential(nn.GroupNorm(4, 12), nn.PReLU(12), c(12, 7)), True),
    "group-norm-of-a-page": (
        nn.Sequential(c(12, 512), nn.GroupNorm(1, 512), c(512, 512), nn.GroupNorm(32, 512)),
        True,
    ),
    "response-norm": (
        Call(
            lambda x, a: (
                (y := a(x)) * (g := y.norm(2, (2, 3), keepdim=True)) / (g.mean(1, True) + 1e-6) + y
            ),
            a=c(12, 20),
        ),
        True,
    ),
    "efficient-channel-attention": (
        Call(
            lambda x, a: x * a(x.mean((2, 3))[:, None]).sigmoid().view(-1, 12, 1, 1).expand_as(x),
            a=nn.Conv1d(1, 1, 3, padding=1),
        ),
        True,
    ),
    "regions": (Call(in_regions, a=c(12, 12), b=c(12, 6)), True),
    "spatial-attention": (
        Call(
            lambda x, a: x * a(torch.cat([x.mean(1, True), x.max(1, True)[0]], 1)).sigmoid(),
            a=c(2, 1, 7),
        ),
        True,
    ),
    "extremes": (
        Call(lambda x, a: a(x.amax((2, 3), True) - x.amin(-1, True)) + a(x).max(), a=c(12, 6)),
        True,
    ),
    "standardised": (
        Call(
            lambda x, a: (
                a(x - x.mean((2, 3), True)) / a(x).std((2, 3), keepdim=True)
                + x.var(1, keepdim=True, correction=0)
            ),
            a=c(12, 12),
        ),
        True,
    ),
    "repeats": (
        Call(
            lambda x, a: (
                a(x.roll((2, -3), (2, 3))).repeat_interleave(2, 1)
                + x.mean((2, 3), True).repeat(1, 1, 10, 7)
                + x.mean(1).repeat(12, 1, 1, 1).transpose(0, 1)
            ),
            a=c(12, 6),
        ),
        True,
    ),
    "other-names-of-views": (
        Call(
            lambda x, a: (
                torch.concat([a(x), x.movedim((1, -1), (2, 0)).moveaxis(0, 3)], 1).swapdims(1, 3)
                + x.min(1).values[:, None].tile(18, 1, 1).swapdims(1, 3)
                + x[0].adjoint().mH[0].T.ravel().sum()
            ),
            a=c(12, 6),
        ),
        True,
    ),
    "causal-attention": (
        Call(
            lambda x, a: F.scaled_dot_product_attention(
                *a(x).flatten(2).mT.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4), is_causal=True
            ),
            a=c(12, 48),
        ),
        True,
    ),
    "causal-cross-attention": (
        Call(
            lambda x, a: F.scaled_dot_product_attention(
                a(x)[:, :, 0], x[:, :, 1], x[:, :, 2], is_causal=True
            ),
            a=c(12, 12),
        ),
        True,
    ),
    "linear-of-many-axes": (
        Call(lambda x, a: a(x.permute(0, 2, 3, 1)[:, None, None]), a=nn.Linear(12, 5)),
        True,
    ),
    "constant-on-the-left": (
        Call(lambda x, a: (a.weight[:, :, 0, 0] @ x.flatten(2)).relu(), a=c(12, 7)),
        True,
    ),
    "one-channel-residual": (
        Call(
            lambda x, a, b, d: d(y := x[:, 3:4]) - y + b(F.relu(a(y))) * y,
            a=c(1, 28, 3),
            b=c(28, 1),
            d=nn.Conv2d(1, 1, 3, padding=1, groups=1),
        ),
        True,
    ),
    "branches": (
        Call(
            lambda x, a: sum(torch.stack([p.pow(2), -p.abs()], 1).sum(1) for p in a(x).unbind(2)),
            a=c(12, 6),
        ),
        True,
    ),
    "detached": (
        Call(
            lambda x, a: torch.addcmul(x.square(), (y := a(x)).detach_(), y + 1, value=2),
            a=c(12, 12),
        ),
        True,
    ),
    "made-tensors": (
        Call(
            lambda x, a: (
                a(x) * torch.arange(7.0) + x.new_full((10, 1), 0.5) - torch.ones_like(x)[:, :1]
            ),
            a=c(12, 12),
        ),
        True,
    ),
    "computed-weight": (Doubling(), True),
    "maxout": (
        Call(
            lambda x, a, b: torch.maximum(y := a(x), z := b(x)) + torch.minimum(y, z) * z.mean(),
            a=c(12, 6),
            b=c(12, 6, 3),
        ),
        True,
    ),
    "mask": (Call(lambda x, a: masked(a(x)), a=c(12, 12)), True),
    "largest": (nn.Sequential(c(12, 6), nn.AdaptiveMaxPool2d(1), c(6, 4)), True),
    "pools-1d": (
        nn.Sequential(
            nn.Flatten(2),
            nn.Conv1d(12, 12, 3, padding=1),
            nn.MaxPool1d(3, 2, 1),
            nn.AvgPool1d(2),
            nn.Mish(),
            nn.Upsample(scale_factor=2),
            nn.ELU(),
            nn.Upsample(scale_factor=2, mode="linear"),
            nn.AdaptiveAvgPool1d(1),
        ),
        True,
    ),
    "windows-1d": (
        nn.Sequential(
            nn.Flatten(2),
            nn.Conv1d(12, 12, 5, padding=2, padding_mode="reflect"),
            nn.ReplicationPad1d((3, 0)),
            nn.AdaptiveMaxPool1d(17),
            nn.CircularPad1d(4),
            nn.AdaptiveAvgPool1d(7),
        ),
        True,
    ),
    "transposed": (nn.Sequential(c(12, 8), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU()), True),
    "transposed-beside": (
        Call(
            lambda x, a, b, d: torch.cat([b(F.relu(a(x))), d(x)], 1),
            a=nn.Sequential(c(12, 8, 3), nn.MaxPool2d(2)),
            b=nn.Sequential(nn.ConvTranspose2d(8, 6, 4, 2, 1, (0, 1)), nn.BatchNorm2d(6)),
            d=c(12, 5),
        ),
        True,
    ),
    "transposed-dilated": (nn.ConvTranspose2d(12, 6, 3, dilation=2), False),
    "attention": (
        Call(lambda x, a: F.scaled_dot_product_attention(*[a(x).flatten(2)] * 3), a=c(12, 8)),
        True,
    ),
    "torch-behind-fused": (
        Call(lambda x, a: F.hardtanh(F.relu(a(x))).cumsum(1) * x, a=c(12, 12)),
        False,
    ),
    "sort": (Call(lambda x, a: a(x).sort(1), a=c(12, 8)), False),
    "positions": (Call(lambda x: x.argmax(1)), False),
}  # fmt: skip


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        bound = 1 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.5
        parameter.data.uniform_(-bound, bound, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def fallbacks(compiled: CompiledModel) -> list[str]:
    steps = compiled.program.schedule.steps
    return [str(s.node.attributes["target"]) for s in steps if s.kernel is None and s.node]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("model", "whole"), NETWORKS.values(), ids=NETWORKS.keys())
def test_networks(model: nn.Module, whole: bool, threads: int) -> None:
    randomised(model)
    x = torch.randn(2, 12, 10, 7, generator=torch.Generator().manual_seed(0))
    compiled = separable.compile(model, x, threads=threads)
    assert bool(fallbacks(compiled)) != whole, fallbacks(compiled)
    with torch.no_grad():
        eager = torch.utils._pytree.tree_leaves(model(x.clone()))
        exact = torch.utils._pytree.tree_leaves(model.double()(x.double()))
    model.float()
    first = torch.utils._pytree.tree_leaves(compiled(x))
    for _ in range(3):
        again = torch.utils._pytree.tree_leaves(compiled(x))
    for y, z, e, d in zip(first, again, eager, exact, strict=True):
        assert torch.equal(y, z)
        assert y.dtype == e.dtype
        if y.dtype == torch.float32:
            assert_as_exact_as_eager(y, e, d)


sizes = st.integers(1, 5)


@settings(max_examples=30, deadline=None)
@given(
    axes=st.lists(st.tuples(st.integers(1, 9), sizes, sizes, sizes, sizes), min_size=1, max_size=2),
    groups=st.sampled_from([1, 2, 5]),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 9)),
    bias=st.booleans(),
)
def test_transposed_convolutions(
    axes: list[tuple[int, ...]], groups: int, channels: tuple[int, int], bias: bool
) -> None:
    length, kernel, stride, padding, more = zip(*axes, strict=True)
    inner, out = (count * groups for count in channels)
    ends = tuple(m % s for m, s in zip(more, stride, strict=True))
    outputs = zip(length, kernel, stride, padding, ends, strict=True)
    assume(all((i - 1) * s - 2 * p + k + m > 0 for i, k, s, p, m in outputs))
    layer = nn.ConvTranspose2d if len(axes) == 2 else nn.ConvTranspose1d
    model = layer(inner, out, kernel, stride, padding, ends, groups, bias).eval()
    x = torch.randn(2, inner, *length)
    compiled = separable.compile(model, x, threads=1)
    assert not fallbacks(compiled)
    y = compiled(x)
    with torch.no_grad():
        assert_as_exact_as_eager(y, model(x), model.double()(x.double()))


def small() -> nn.Sequential:
    return nn.Sequential(c(12, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), c(16, 4)).eval()


def test_weights_changed_after_compiling_are_seen() -> None:
    model, x = small(), torch.randn(1, 12, 6, 6)
    compiled = separable.compile(model, x, threads=1)
    changes: list[Callable[[], object]] = [
        lambda: model[0].weight.mul_(2),
        lambda: model[1].running_mean.add_(1),
        lambda: setattr(model[3], "bias", nn.Parameter(torch.ones(4))),
        lambda: model.load_state_dict(small().state_dict()),
    ]
    with torch.no_grad():
        for change in changes:
            before = compiled(x)
            change()
            torch.testing.assert_close(compiled(x), model(x))
            assert not torch.equal(compiled(x), before)


def test_statistics_that_training_changed_are_seen() -> None:
    # torch counts no version of them, but of the number of batches
    model, x = small(), torch.randn(1, 12, 6, 6)
    compiled = separable.compile(model, x, threads=1)
    before = compiled(x)
    model.train()(torch.randn(4, 12, 6, 6) * 3 + 1)
    model.eval()
    assert not torch.equal(compiled(x), before)
    assert torch.allclose(compiled(x), model(x), atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_changed_weights_are_seen_by_all_callers(threads: int) -> None:
    model, x = small(), torch.randn(1, 12, 6, 6)
    compiled = separable.compile(model, x, threads=threads)
    turn, results = threading.Barrier(5), [torch.zeros(0)] * 4

    def call(number: int) -> None:
        for _ in range(30):
            turn.wait()
            results[number] = compiled(x)
            turn.wait()

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    wrong = 0
    for _ in range(30):
        with torch.no_grad():
            model[0].weight.normal_()
            expected = model(x)
        turn.wait()
        turn.wait()
        wrong += sum(not torch.allclose(r, expected, rtol=1e-4, atol=1e-4) for r in results)
    for caller in callers:
        caller.join()
    assert wrong == 0


def test_inputs_of_any_stride_and_gradient() -> None:
    model, x = small(), torch.randn(2, 12, 6, 8)
    compiled = separable.compile(model, x)
    expected = model(x).detach()
    strided = torch.randn(2, 12, 6, 16)[..., ::2].copy_(x)
    others = (nn.Parameter(x), torch._neg_view(-x))
    for argument in (
        *(x.to(memory_format=torch.channels_last), strided, x.clone().requires_grad_()),
        *others,
    ):
        result = compiled(argument)
        torch.testing.assert_close(result, expected)
        assert not result.requires_grad


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        (torch.zeros(1, 12, 6, 7), ValueError),
        (torch.zeros(2, 12, 6, 6), ValueError),
        (torch.zeros(12, 6, 6), ValueError),
        (torch.zeros(1, 12, 6, 6, dtype=torch.float64), TypeError),
        (torch.zeros(1, 12, 6, 6, device="meta"), TypeError),
        (torch.zeros(1, 12, 6, 6).to_sparse(), TypeError),
        (3.0, TypeError),
    ],
)
def test_wrong_arguments_never_reach_native_code(argument: object, error: type) -> None:
    compiled = separable.compile(small(), torch.zeros(1, 12, 6, 6), threads=1)
    with pytest.raises(error, match="argument 0"):
        compiled(argument)
    with pytest.raises(TypeError, match="as it was compiled"):
        compiled(torch.zeros(1, 12, 6, 6), argument)


def test_compile_rejects() -> None:
    x = torch.zeros(1, 12, 6, 6)
    with pytest.raises(ValueError, match="eval mode"):
        separable.compile(small().train(), x)
    with pytest.raises(ValueError, match="`threads`"):
        separable.compile(small(), x, threads=0)
    with pytest.raises(ValueError, match="`threads`"):
        separable.compile(small(), x, threads=10**6)
    with pytest.raises(ValueError, match="`threads`"):
        backend(torch.fx.symbolic_trace(small()), [x], threads=0)
    with pytest.raises(ValueError, match="`isa`"):
        separable.compile(small(), x, isa="mmx")
    with pytest.raises(ValueError, match="into its input"):
        separable.compile(Call(lambda x: x.relu_()).eval(), x)
    with pytest.raises(ValueError, match="can't be traced"):
        separable.compile(Call(lambda x: x if x.sum() > 0 else -x).eval(), x)


def test_any_batch_from_one_compile() -> None:
    model = nn.Sequential(small(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    compiled = separable.compile(model, torch.zeros(2, 12, 6, 6), dynamic_batch=True)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 12, 6, 6)
        torch.testing.assert_close(compiled(x), model(x).detach())
    with pytest.raises(ValueError, match="samples"):
        separable.compile(
            Call(lambda x: x - x.mean(0, keepdim=True)).eval(),
            torch.zeros(2, 12, 6, 6),
            dynamic_batch=True,
        )


def test_many_threads_call_one_model() -> None:
    model = small()
    compiled = separable.compile(model, torch.zeros(1, 12, 20, 20), threads=2)
    failures = []

    def work(seed: int) -> None:
        x = torch.randn(1, 12, 20, 20, generator=torch.Generator().manual_seed(seed))
        expected = compiled(x)
        failures.extend(seed for _ in range(50) if not torch.equal(compiled(x), expected))

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures
