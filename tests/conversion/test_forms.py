"""The forms: exact at full rank, best at a lower one, and back to dense."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from separable.conversion.fitting import Target, curve, fit
from separable.conversion.forms import (
    FORMS,
    Shape,
    exact_rank,
    factors_of,
    grouped,
    merged,
    random_factors,
    separated,
    weight_only,
    weights_per_position,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

CONV_ATTRIBUTES = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    "padding_mode",
)
MODES = ["zeros", "reflect", "replicate", "circular"]


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    sizes = st.tuples(*[st.integers(1, 3)] * dims)
    stride = draw(st.tuples(*[st.integers(1, 2)] * dims))
    same = all(step == 1 for step in stride) and draw(st.booleans())
    return [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1](
        groups * draw(st.integers(1, 4)),
        groups * draw(st.integers(1, 4)),
        draw(sizes),
        stride,
        "same" if same else draw(st.tuples(*[st.integers(0, 2)] * dims)),
        draw(st.tuples(*[st.integers(1, 2)] * dims)),
        groups,
        draw(st.booleans()),
        draw(st.sampled_from(MODES)),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
    )


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-300)).item()


@settings(max_examples=120, deadline=None)
@given(conv=convolutions(), form=st.sampled_from(FORMS), seed=st.integers(0, 99))
def test_exact_at_full_rank_over_the_range_of_arguments(conv, form, seed):
    generator = torch.Generator().manual_seed(seed)
    size = (2, conv.in_channels, *[7] * len(conv.kernel_size))
    input = torch.randn(size, generator=generator, dtype=torch.float64).to(conv.weight)
    shape = Shape.of(conv)
    weight = grouped(conv.weight.detach(), conv.groups).double()
    factors = weight_only(weight, form, exact_rank(form, shape))
    module = separated(conv, factors, conv.bias)
    wanted = conv(input)
    limit = 1e-12 if conv.weight.dtype == torch.float64 else 1e-5
    assert relative(module(input), wanted) <= limit
    assert relative(merged(module)(input), wanted) <= limit
    assert module(input).shape == wanted.shape
    for name in CONV_ATTRIBUTES:
        assert getattr(module, name) == getattr(conv, name)
    assert relative(module.weight, conv.weight) <= limit
    assert module.weight.shape == conv.weight.shape
    assert module.weight.dtype == conv.weight.dtype
    assert (module.bias is None) == (conv.bias is None)
    lead, rest = weights_per_position(form, shape, exact_rank(form, shape))
    biases = sum(p.numel() for n, p in module.named_parameters() if n.endswith("bias"))
    assert sum(p.numel() for p in module.parameters()) - biases == lead + rest


@pytest.mark.parametrize("form", FORMS)
def test_no_smaller_rank_than_the_exact_one_is_exact(form):
    shape = Shape(1, 3, 4, 5)
    rank = exact_rank(form, shape)
    weight = torch.randn(shape, dtype=torch.float64)
    if form != "pointwise-depthwise-pointwise":  # the tensor's own rank may be lower there
        assert relative(weight_only(weight, form, rank - 1).dense(), weight) > 1e-3
    assert relative(weight_only(weight, form, rank).dense(), weight) < 1e-12


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("form", ["depthwise-pointwise", "pointwise-depthwise", "low-rank"])
def test_truncated_weights_have_the_error_of_eckart_and_young(form, rank):
    weight = torch.randn(2, 6, 5, 9, dtype=torch.float64)
    matrices = {
        "depthwise-pointwise": weight.transpose(1, 2),
        "pointwise-depthwise": weight,
        "low-rank": weight.flatten(2),
    }[form]
    left_out = torch.linalg.svdvals(matrices)[..., rank:].square().sum()
    found = (weight_only(weight, form, rank).dense() - weight).square().sum()
    torch.testing.assert_close(found, left_out, rtol=1e-6, atol=0)
    plain = sum(
        Target(group, None).norm(fit(Target(group, None), form, rank).dense()[0] - group)
        for group in weight
    )
    assert plain == pytest.approx(left_out.item(), rel=1e-6)


def correlated_target(outputs=6, inputs=5, taps=9, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    features = inputs * taps
    mixed = draw(500, features) @ draw(features, features) / features**0.5
    half = draw(outputs, outputs)
    half = half @ half.T / outputs + torch.eye(outputs)
    return Target(draw(outputs, inputs, taps), mixed.T @ mixed / 500, half)


@pytest.mark.parametrize("form", FORMS)
def test_a_fit_beats_the_truncated_weights_in_its_metric_and_its_own_start(form):
    target = correlated_target()
    most = exact_rank(form, target.shape)
    errors = curve(target, form, most)
    assert (errors.diff() <= 1e-9).all()
    for rank in (1, 2):
        reached = target.norm(fit(target, form, rank).dense()[0] - target.weight)
        assert reached <= errors[rank - 1] * (1 + 1e-6)
        plain = fit(Target(target.weight, None), form, rank).dense()[0]
        assert reached < target.norm(plain - target.weight)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "low-rank"])
def test_the_fit_descends_along_the_slope_of_its_error(form, monkeypatch):
    checked = []

    def check(loss, parts, *_):
        parts = tuple(part.clone().requires_grad_() for part in parts)
        checked.append(torch.autograd.gradcheck(loss, parts))
        return tuple(part.detach() for part in parts)

    monkeypatch.setattr("separable.conversion.fitting._minimise", check)
    fit(correlated_target(), form, 2)
    assert checked == [True]


def test_low_rank_fit_is_reduced_rank_regression():
    target = correlated_target(taps=1)
    root = torch.linalg.cholesky(target.gram)
    left_out = torch.linalg.svdvals(target.weighted(target.weight) @ root)[2:].square().sum()
    found = target.norm(fit(target, "low-rank", 2).dense()[0] - target.weight)
    assert found == pytest.approx(left_out.item(), rel=1e-6)


def test_one_term_depthwise_fit_is_no_worse_than_alternating_least_squares():
    target = correlated_target()
    weight, gram = target.half @ target.weight.flatten(1), target.gram
    spatial = torch.linalg.svd(target.weight.transpose(0, 1)).Vh[:, 0]  # [C, P]
    inputs, taps = spatial.shape
    for _ in range(300):
        filters = torch.block_diag(*spatial).T  # [C P, C]
        last = torch.linalg.solve(filters.T @ gram @ filters, filters.T @ gram @ weight.T).T
        # for fixed mixing the filters are a linear least-squares problem of C P unknowns
        normal = (last.T @ last).repeat_interleave(taps, 0).repeat_interleave(taps, 1) * gram
        right = torch.einsum("nc,ncp->cp", last, (weight @ gram).view(-1, inputs, taps))
        spatial = torch.linalg.solve(normal, right.flatten()).view(inputs, taps)
    filters = torch.block_diag(*spatial).T
    gap = last @ filters.T - weight
    reference = ((gap @ gram) * gap).sum().item()
    found = target.norm(fit(target, "depthwise-pointwise", 1).dense()[0] - target.weight)
    assert found <= reference * 1.01


def test_dead_channels_and_singular_moments_give_finite_factors():
    target = correlated_target()
    gram = target.gram.clone()
    gram[:18] = 0
    gram[:, :18] = 0
    for form in FORMS:
        for broken in (gram, torch.zeros_like(gram)):
            dense = fit(Target(target.weight, broken, target.half), form, 2).dense()
            assert dense.isfinite().all()


def test_factors_survive_the_module():
    conv = nn.Conv2d(6, 8, 3, groups=2, bias=False)
    for form in FORMS:
        factors = weight_only(
            grouped(conv.weight.detach(), 2), form, exact_rank(form, Shape.of(conv))
        )
        back = factors_of(separated(conv, factors, None))
        torch.testing.assert_close(back.dense(), factors.dense())
        assert (back.lead is None) == (factors.lead is None)


@pytest.mark.parametrize("form", FORMS)
def test_the_weight_passes_gradients_to_its_factors(form):
    conv = nn.Conv2d(6, 8, 3)
    module = separated(conv, random_factors(form, Shape.of(conv), 2), conv.bias)
    input = torch.randn(2, 6, 7, 7)
    nn.functional.conv2d(input, module.weight, module.bias).square().mean().backward()
    found = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    module(input).square().mean().backward()
    for grad, parameter in zip(found, module.parameters(), strict=True):
        assert relative(grad, parameter.grad) <= 1e-4


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")
@pytest.mark.parametrize("form", FORMS)
def test_torchscript(form):
    conv = nn.Conv2d(6, 8, 3, stride=2)
    module = separated(conv, random_factors(form, Shape.of(conv), 2), conv.bias)
    input = torch.randn(2, 6, 7, 7)
    assert torch.equal(torch.jit.script(module)(input), module(input))


def test_flags_layout_and_class_are_kept():
    class Doubled(nn.Conv2d):
        def forward(self, input):
            return super().forward(2 * input)

    conv = Doubled(4, 4, 3, dtype=torch.float64).eval().requires_grad_(False)
    conv.to(memory_format=torch.channels_last)
    factors = weight_only(grouped(conv.weight, 1), "depthwise-pointwise", 4)
    module = separated(conv, factors, conv.bias)
    assert isinstance(module.spatial, Doubled)
    assert not any(p.requires_grad for p in module.parameters())
    assert not module.training
    assert not module.last.training
    assert module.last.weight.is_contiguous(memory_format=torch.channels_last)
    input = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(module(input), conv(input))
