"""Fixtures shared by the runtime's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from separable.runtime import machine as machines


@pytest.fixture(autouse=True, scope="session")
def _kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the tests' kernels out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder: Path = tmp_path_factory.mktemp("cache")
        patch.setenv("SEPARABLE_CACHE_DIR", str(folder))
        yield


@pytest.fixture(params=dict.fromkeys(("avx512", *machines.available_isas())))
def machine(request: pytest.FixtureRequest) -> machines.Machine:
    """This CPU, restricted to each instruction set it has.

    Where it has no AVX-512, vectors of 16 are pairs of smaller ones, and 32 registers partly
    memory: slow, but every mask, tail and panel is that of AVX-512.
    """
    return machines.with_vectors_of(request.param)
