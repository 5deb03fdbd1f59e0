"""The comparison of a regular network with its separable form."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import separable
from separable.cost import Measurement
from separable.nn import SeparableConv2d

SIZE = (1, 3, 228, 228)


def pair() -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(3, 64, 5, stride=2), SeparableConv2d(3, 64, 5, stride=2)


def test_the_promise_in_figures() -> None:
    comparison = separable.compare(*pair(), input_size=SIZE, latency=False)
    assert comparison.regular.params == 4864
    assert comparison.separable.params == 334
    assert 1 - 1 / comparison.ratio["params"] == pytest.approx(0.9313, abs=1e-4)
    assert comparison.ratio["macs"] == pytest.approx(17.98, abs=5e-3)
    assert 1 / comparison.ratio["traffic_bytes"] == pytest.approx(1.07, abs=5e-3)
    assert comparison.promise_kept is None
    lines = {
        line.split("|")[1].strip(): line for line in str(comparison).splitlines() if "|" in line
    }
    assert "-93.13%" in lines["params"]
    assert "17.98x" in lines["macs"]
    assert "+7.34%" in lines["traffic_bytes"]


def measurement(*times: float) -> Measurement:
    return Measurement(times, 1000, 1, "a device", "float32", {"torch": "2"})


def test_share_of_the_promise() -> None:
    """Speed-up 2, the median of the pairwise ratios 1.5, 2 and 4, of 17.98x fewer MACs."""
    counted = separable.compare(*pair(), input_size=SIZE, latency=False)
    measured = (measurement(3.0, 4.0, 8.0), measurement(2.0, 2.0, 2.0))
    comparison = separable.Comparison(counted.regular, counted.separable, measured)
    assert comparison.ratio["latency"] == 2
    assert comparison.promise_kept == pytest.approx(0.11125, abs=1e-5)
    assert json.loads(comparison.to_string("json"))["promise_kept"] == comparison.promise_kept
    assert "Share of the promise: 11%, measured speed-up 2.00x" in str(comparison)
    assert "a device, 1 thread, float32, torch 2" in str(comparison)


def test_measured_for_real() -> None:
    comparison = separable.compare(*pair(), input_size=SIZE, repeats=2, min_seconds=0.01)
    figures = json.loads(comparison.to_string("json"))
    assert figures["metrics"]["latency"]["regular"] > 0
    assert figures["promise_kept"] > 0
    assert len(figures["measured"]) == 2
    assert figures["regular"]["macs"] == 60_211_200


def test_zeros_have_a_ratio() -> None:
    comparison = separable.compare(nn.Conv2d(3, 3, 1), nn.ReLU(), input_size=SIZE, latency=False)
    assert comparison.ratio["params"] == math.inf
    assert comparison.to_dict()["metrics"]["params"]["ratio"] is None
    same = separable.compare(nn.ReLU(), nn.ReLU(), input_size=SIZE, latency=False)
    assert same.ratio["macs"] == 1
    assert "+0.00%" in str(same)


def test_no_multiply_adds_are_no_promise() -> None:
    pools = nn.AvgPool2d(1), nn.Conv2d(3, 3, 1)
    for pair in (pools, pools[::-1]):
        counted = separable.compare(*pair, input_size=SIZE, latency=False)
        times = measurement(3.0), measurement(2.0)
        comparison = separable.Comparison(counted.regular, counted.separable, times)
        assert comparison.promise_kept is None
        assert json.loads(comparison.to_string("json"))["promise_kept"] is None
        assert "No MACs in one of the networks, so no promise; measured speed-up 1.5" in str(
            comparison
        )
        assert "infx" not in str(comparison)


def test_lower_bounds_have_no_exact_ratio() -> None:
    """Each side whose operators have no formula is named, and bounds the ratio from its side."""
    known, unknown = nn.Conv2d(3, 3, 3), nn.Sequential(nn.Conv2d(3, 3, 3), Inverse())

    def row(*pair: nn.Module) -> tuple[str, list[str]]:
        text = str(separable.compare(*pair, input_size=(1, 3, 6, 6), latency=False))
        line = next(line for line in text.splitlines() if line.startswith("| flops"))
        return text, [cell.strip() for cell in line.split("|")[4:6]]

    text, cells = row(known, unknown)
    assert cells[0].startswith("<= ")
    assert cells[1].startswith(">= ")
    assert "no formula for linalg_inv_ex of the separable network" in text
    text, cells = row(unknown, known)
    assert cells[0].startswith(">= ")
    assert cells[1].startswith("<= ")
    assert "no formula for linalg_inv_ex of the regular network" in text
    assert row(unknown, unknown)[1] == ["unknown", "unknown"]


class Inverse(nn.Module):
    """An operator without a formula."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x)


class Scores(nn.Linear):
    """Returns an object."""

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(scores=super().forward(x))


def test_outputs_in_plain_objects_are_compared() -> None:
    with pytest.raises(ValueError, match=r"must map the same inputs to the same output shapes"):
        separable.compare(Scores(4, 3), Scores(4, 9), (2, 4), latency=False)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"must map the same inputs to the same output shapes"):
        separable.compare(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 5), input_size=SIZE)
    with pytest.raises(ValueError, match="meta device"):
        separable.compare(*(m.to("meta") for m in pair()), input_size=SIZE)
    with pytest.raises(ValueError, match="must include the batch"):
        separable.compare(*pair(), input_size=(3, 228, 228))
    with pytest.raises(TypeError, match="missing"):
        separable.compare(*pair())
    with pytest.raises(TypeError, match=r"`separable` \(a function\) must be an nn.Module"):
        separable.compare(nn.ReLU(), lambda x: x, SIZE)


@pytest.mark.parametrize("format", ["table", "csv", "markdown", "html"])
def test_formats(format: str) -> None:
    comparison = separable.compare(*pair(), inputs=torch.zeros(SIZE), latency=False)
    assert ("17.977" if format == "csv" else "17.98x") in comparison.to_string(format)
    with pytest.raises(ValueError, match="`format`"):
        comparison.to_string("xml")
