"""Fifty random networks against eager, and a short soak; `make fuzz` and `make soak` do more."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import fuzz, soak


@pytest.mark.parametrize("seed", range(50))
def test_random_network(seed: int) -> None:
    fuzz.check(seed)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc on this system")
def test_many_calls_keep_memory_flat() -> None:
    assert soak.soak(calls=600) <= soak.GROWTH
