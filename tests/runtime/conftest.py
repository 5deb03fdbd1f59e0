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


@pytest.fixture(params=machines.available_isas())
def machine(request: pytest.FixtureRequest) -> machines.Machine:
    """This CPU, restricted to each instruction set it has."""
    return machines.host(request.param)
