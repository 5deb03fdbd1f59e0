"""What all tests of the conversion share."""

import pytest

from separable.conversion import refining


@pytest.fixture(scope="package", autouse=True)
def short_last_pass():
    """Most tests look at other things than how far the last pass gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refining, "STEPS", 20)
        yield
