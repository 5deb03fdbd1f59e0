"""Arguments and results in torch's memory formats, read and written where they lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import separable
from separable.runtime.emit.chain import Chain
from separable.runtime.emit.conv import Conv
from separable.runtime.emit.window import Window


class Ends(nn.Module):
    """Images that come and go in several ways: as they are, pooled, concatenated, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 20, 3, padding=1)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.conv(x)
        pooled = F.max_pool2d(y, 2)
        return y, torch.cat([x, z], 1), pooled, pooled.flatten(1), z * 2


@pytest.mark.parametrize("first", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("second", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(first: torch.memory_format, second: torch.memory_format) -> None:
    model = Ends().eval()
    x = torch.randn(2, 12, 6, 8).to(memory_format=first)
    z = torch.randn(2, 12, 6, 8).to(memory_format=second)
    compiled = separable.compile(model, (x, z), threads=1)
    for given in ((x, z), (x.contiguous(), z.contiguous())):
        for result, expected in zip(compiled(*given), model(x, z), strict=True):
            torch.testing.assert_close(result, expected)
            assert result.stride() == expected.stride()


@pytest.mark.parametrize("channels", [3, 64, 512])
def test_channels_last_is_read_and_written_in_place(channels: int, tmp_path: Path) -> None:
    model = separable.nn.SeparableConv2d(channels, channels, 3, padding=1).eval()
    x = torch.randn(1, channels, 9, 7).to(memory_format=torch.channels_last)
    compiled = separable.compile(model, x, threads=1)
    kinds = [step.kernel.does for step in compiled.program.schedule.steps if step.kernel]
    stages = [s for does in kinds for s in (does.stages if isinstance(does, Chain) else [does])]
    assert [type(stage) for stage in stages] == [Window, Conv]
    compiled.save(tmp_path / "model")
    for run in (compiled, separable.load_compiled(tmp_path / "model")):
        torch.testing.assert_close(run(x), model(x), atol=1e-4, rtol=1e-4)
        assert run(x).is_contiguous(memory_format=torch.channels_last)


def test_any_batch_of_channels_last() -> None:
    model = nn.Sequential(nn.Conv2d(12, 20, 3), nn.ReLU(), nn.Conv2d(20, 7, 1)).eval()
    x = torch.randn(5, 12, 6, 8).to(memory_format=torch.channels_last)
    compiled = separable.compile(model, x, threads=1, dynamic_batch=True)
    result = compiled(x[:3])
    torch.testing.assert_close(result, model(x[:3]))
    assert result.stride() == model(x[:3]).stride()


def test_backend_gives_results_as_eager_lays_them_out() -> None:
    model = nn.Sequential(nn.Conv2d(12, 20, 3), nn.ReLU()).eval()
    compiled = torch.compile(model, backend="separable")
    x = torch.randn(2, 12, 6, 8)
    with torch.no_grad():
        for given in (x, x.to(memory_format=torch.channels_last)):
            torch.testing.assert_close(compiled(given), model(given))
            assert compiled(given).stride() == model(given).stride()
