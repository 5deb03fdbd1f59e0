"""Networks whose convolutions run as chains: results, memory, files, and what `explain` says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import separable
from separable.runtime import jit
from separable.runtime import machine as machines
from separable.runtime.compiled import CompiledModel
from separable.runtime.emit.chain import Chain
from separable.runtime.emit.elementwise import Map
from separable.runtime.scheduling import fusing


class InvertedResidual(nn.Module):
    """1×1, depthwise, 1×1, with a shortcut where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, gate: bool) -> None:
        super().__init__()
        wide = 3 * inputs + 1
        self.expand = nn.Sequential(nn.Conv2d(inputs, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide), nn.Hardswish()
        )
        self.gate = nn.Conv2d(wide, wide, 1) if gate else None
        self.project = nn.Conv2d(wide, outputs, 1)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(self.expand(x))
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        y = self.project(y)
        return x + y if self.shortcut else y


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 9, 3, 2, 1),
        separable.nn.SeparableConv2d(9, 17, 3, padding=1),
        nn.ReLU(),
        InvertedResidual(17, 17, 3, 1, gate=False),
        InvertedResidual(17, 20, 5, 2, gate=False),
        InvertedResidual(20, 20, 3, 1, gate=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuse whatever can be fused."""
    monkeypatch.setattr(fusing, "cycles_alone", lambda *_: 1e12)


def chains(model: CompiledModel) -> list[int]:
    """How many stages the steps have."""
    kernels = [step.kernel for step in model.program.schedule.steps]
    return [len(k.does.stages) if k and isinstance(k.does, Chain) else 1 for k in kernels]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 3, 35, 41), (3, 3, 20, 17), (1, 3, 1, 1)])
def test_network(shape: tuple[int, ...], threads: int) -> None:
    model, x = network(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    compiled = separable.compile(model, x, threads=threads)
    # stem, depthwise, pointwise; two whole blocks; expansion and depthwise before a gate
    assert [count for count in chains(compiled) if count > 1] == [3, 3, 3, 2]
    frame = compiled.program._new_frame()
    frame.arena.fill_(float("nan"))
    compiled.program._frames.append(frame)
    exact = model.double()(x.double()).detach()
    own = (model.float()(x).double() - exact).abs().max().detach()
    for _ in range(3):
        assert (compiled(x).double() - exact).abs().max() <= max(4 * own, 1e-6 * exact.abs().max())


@pytest.mark.usefixtures("always")
def test_weights_changed_in_place_are_seen() -> None:
    model, x = network(), torch.randn(1, 3, 16, 16)
    compiled = separable.compile(model, x, threads=1)
    with torch.no_grad():
        model[1].depthwise.weight.mul_(2.0)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("same_cpu", [True, False])
def test_files(tmp_path: Path, same_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), torch.randn(2, 3, 20, 20)
    compiled = separable.compile(model, x, threads=2)
    compiled.save(tmp_path / "model.bin")
    if same_cpu:
        monkeypatch.setattr(jit, "emit_object", lambda *_: pytest.fail("compiled again"))
    else:
        monkeypatch.setattr("separable.runtime.files._signed", lambda *_: False)
    loaded = separable.load_compiled(tmp_path / "model.bin")
    assert chains(loaded) == chains(compiled)
    assert torch.equal(loaded(x), compiled(x))


@pytest.mark.usefixtures("always")
def test_explain_names_all_layers() -> None:
    compiled = separable.compile(network(), torch.randn(1, 3, 20, 20), threads=1)
    row = compiled.explain(repeats=1).rows[1]
    assert row.operation == "pointwise + depthwise + pointwise"
    assert row.layer == "3.expand.0"
    assert {"3.expand.1", "3.expand.2", "3.depthwise.0", "3.project", "3"} <= set(row.fused)
    assert row.macs == 100 * (17 * 52 + 9 * 52 + 52 * 17)
    assert "window1:" in compiled.assembly("3.depthwise.0")


@pytest.mark.usefixtures("always")
def test_what_is_read_twice_is_stored() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.pointwise = nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.depthwise(x)
            return y, self.pointwise(y)

    model, x = Both().eval(), torch.randn(1, 8, 9, 9)
    compiled = separable.compile(model, x, threads=1)
    # The changes of layout join what is beside them; the copy of what is read twice does not.
    assert sorted(chains(compiled)) == [1, 2, 2]
    torch.testing.assert_close(compiled(x), model(x))


class Alone(nn.Module):
    """Some layers, of which nothing else is known."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


LAYERS = {
    "regular": (nn.Conv2d(20, 37, 3, padding=1), (1, 20, 23, 21), 3),
    "regular-5x5": (nn.Conv2d(20, 37, 5, 2, padding=2), (2, 20, 17, 12), 3),
    "regular-small": (nn.Conv2d(64, 64, 3, padding=1), (1, 64, 7, 7), 3),
    "depthwise": (nn.Conv2d(20, 20, 3, padding=1, groups=20), (1, 20, 23, 21), 3),
    "separable": (separable.nn.SeparableConv2d(33, 20, 3, padding=1), (2, 33, 19, 16), 4),
    "pointwise": (nn.Conv2d(20, 37, 1), (1, 20, 23, 21), 3),
    "pointwise-batch": (nn.Conv2d(20, 37, 1), (3, 20, 8, 21), 3),
    "block": (InvertedResidual(20, 30, 3, 1, gate=False), (2, 20, 14, 14), 5),
    "thin": (nn.Conv2d(20, 37, 3, padding=1), (1, 20, 33, 1), 3),
    "stem": (nn.Conv2d(3, 37, 3, 2, padding=1), (1, 3, 33, 20), 2),  # reads NCHW as it is
}


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("layer", "shape", "stages"), LAYERS.values(), ids=LAYERS.keys())
def test_layers_alone_change_their_layout(
    layer: nn.Module, shape: tuple[int, ...], stages: int, threads: int
) -> None:
    layer, x = Alone(layer).eval(), torch.randn(shape)
    compiled = separable.compile(layer, x, threads=threads)
    assert chains(compiled) == [stages]
    for _ in range(2):
        torch.testing.assert_close(compiled(x), layer(x).detach(), rtol=1e-4, atol=1e-5)
    (row,) = compiled.explain(repeats=1).rows
    assert row.operation.split(" + ").count("layout") == (1 if stages == 2 else 2)


@pytest.mark.parametrize(
    ("layer", "shape", "fused"),
    [
        (nn.Conv2d(64, 64, 3, padding=1), (1, 64, 64, 64), [3]),
        (separable.nn.SeparableConv2d(64, 64, 3, padding=1), (1, 64, 64, 64), [4]),
        (nn.Conv2d(256, 256, 3, padding=1), (1, 256, 20, 20), [1, 1, 1]),
    ],
)
def test_layers_alone_fuse_where_it_pays(
    layer: nn.Module, shape: tuple[int, ...], fused: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Images leave this L2 cache; the weights of the last layer do, too, were they read per band.
    machine = replace(machines.with_vectors_of("avx512"), l2=1 << 20)
    monkeypatch.setattr(machines, "host", lambda *_: machine)
    x = torch.randn(shape)
    compiled = separable.compile(layer.eval(), x, threads=1)
    assert chains(compiled) == fused
    torch.testing.assert_close(compiled(x), layer(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("always")
def test_copies_without_a_convolution_stay_copies() -> None:
    model, x = nn.LayerNorm(24), torch.randn(1, 24, 9, 9)

    class Turned(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return model(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()

    compiled = separable.compile(Turned().eval(), x, threads=1)
    kernels = [step.kernel for step in compiled.program.schedule.steps]
    assert sum(isinstance(k.does, Map) for k in kernels if k) >= 1
    assert set(chains(compiled)) == {1}


@pytest.mark.usefixtures("always")
def test_parts_of_a_batch_are_no_chain() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)[1:]).mean((2, 3))

    model, x = Part().eval(), torch.randn(2, 8, 9, 9)
    compiled = separable.compile(model, x, threads=1)
    torch.testing.assert_close(compiled(x), model(x).detach())


def test_fused_intermediates_take_no_memory() -> None:
    block = InvertedResidual(24, 20, 3, 1, gate=False).eval()
    # 10 MB between stages: more than any L2 cache; a few rows of it fit all
    x = torch.randn(1, 24, 576, 64)
    apart = separable.compile(block, x, threads=1, fuse=False)
    fused = separable.compile(block, x, threads=1)
    assert chains(fused) == [5]
    torch.testing.assert_close(fused(x), apart(x))
    assert fused.program.arena_bytes < apart.program.arena_bytes / 2
