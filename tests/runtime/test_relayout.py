"""Changes of layout alone, and the copies that can be one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from separable.runtime.emit import relayout
from separable.runtime.emit.elementwise import Map, transposed_axis
from separable.runtime.emit.kernel import Kernel
from separable.runtime.emit.relayout import Relayout
from separable.runtime.emit.tiling import merge_axes
from separable.runtime.machine import Machine, host
from separable.runtime.validation import footprints

from .kernels import run


def copied(gathers: bool, x: torch.Tensor, y: torch.Tensor) -> Map:
    """The copy of `x` to `y`, both `[N, C, H, W]` of any strides, as it is scheduled."""
    order = (0, 2, 3, 1) if gathers else (0, 1, 2, 3)
    walks = [[t.stride(i) for i in order] for t in (x, y)]
    sizes, (x_walk, y_walk) = merge_axes([x.shape[i] for i in order], walks)
    return Map(tuple(sizes), (tuple(x_walk),), tuple(y_walk))


def images(n: int, c: int, h: int, w: int, gap: int, planes: bool) -> torch.Tensor:
    """Random `[N, C, H, W]`, channels last if not in `planes`, and floats in between."""
    generator = torch.Generator().manual_seed(0)
    if planes:
        return torch.randn(n, c, h, w + gap, generator=generator)[..., :w]
    return torch.randn(n, h, w, c + gap, generator=generator)[..., :c].permute(0, 3, 1, 2)


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 40))
GAPS = st.sampled_from([0, 0, 1, 7])


@settings(max_examples=60, deadline=None)
@given(SIZES, GAPS, GAPS, st.booleans())
def test_copies_of_images(
    sizes: tuple[int, int, int, int], x_gap: int, y_gap: int, gathers: bool
) -> None:
    n, c, h, w = sizes
    x = images(*sizes, x_gap, planes=gathers)
    y = images(*sizes, y_gap, planes=not gathers)
    map_ = copied(gathers, x, y)
    if not map_.sizes or transposed_axis(map_) is None:  # both layouts are one
        return
    does = relayout.of_map(map_, n, (h, w), gathers)
    assert does
    assert (does.channels, does.gathers) == (c, gathers)
    for kernel in (Kernel(does, host()), Kernel(map_, host())):
        floats = 1 + sum((s - 1) * d for s, d in zip(y.shape, y.stride(), strict=True))
        result = run(kernel, [x.as_strided((x.untyped_storage().nbytes() // 4,), (1,))], floats)
        assert torch.equal(result.as_strided(y.shape, y.stride()), x)
    # Any rows will do where no stage says otherwise.
    batch, (height, width) = relayout.rows(map_, gathers)
    assert batch * height * width == n * h * w
    assert relayout.of_map(map_, batch, (height, width), gathers)


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("size", [(1, 16, 1, 16), (2, 17, 3, 5), (1, 3, 2, 50), (1, 70, 7, 33)])
def test_relayout(size: tuple[int, ...], gathers: bool, machine: Machine) -> None:
    n, c, h, w = size
    planes, pixels = (c * h * w, w, 1, h * w), (h * w * c, w * c, c, 1)
    walks = (planes, pixels) if gathers else (pixels, planes)
    x = torch.randn(n * c * h * w)
    y = run(Kernel(Relayout(n, (h, w), c, *walks), machine), [x], x.numel())
    expected = x.view(n, c, h * w) if gathers else x.view(n, h * w, c)
    assert torch.equal(y.view(expected.mT.shape), expected.mT)


def test_other_images_are_no_layout() -> None:
    map_ = Map((12, 5), ((1, 12),), (5, 1))
    assert relayout.of_map(map_, 1, (3, 4), gathers=True)
    assert relayout.of_map(map_, 1, (3, 5), gathers=True) is None
    assert relayout.of_map(map_, 2, (3, 4), gathers=True) is None
    thin = relayout.of_map(map_, 1, (12, 1), gathers=True)
    assert thin
    assert thin.x_strides[2] == 1
    # Columns are neighbours, not the pixels of a row.
    assert relayout.of_map(Map((4, 6, 5), ((1, 4, 24),), (30, 5, 1)), 1, (4, 6), True) is None


@pytest.mark.parametrize(
    ("x_strides", "y_strides"),
    [
        ((60, 4, 1, 12), (60, 20, 5, 2)),  # neither side has channels side by side
        ((60, 8, 2, 12), (60, 20, 5, 1)),  # nor the other pixels
        ((60, 4, 1, 12), (60, 20, 4, 1)),  # results overlap
        ((4, 1, 12), (60, 20, 5, 1)),
    ],
)
def test_contradictions(x_strides: tuple[int, ...], y_strides: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"out of its range|overlap|do not fit"):
        footprints(Kernel(Relayout(1, (3, 4), 5, x_strides, y_strides), host()))
