"""What tests of several rooms use."""

from contextlib import contextmanager

import pytest

from separable.conversion import applying, fitting, refining, varying


@contextmanager
def _few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varying, "ENOUGH", 1)
        patch.setattr(fitting, "LEAST_STEPS", 5)
        patch.setattr(fitting, "MOST_WORK", 0.0)
        patch.setattr(applying, "ROUNDS", 0)
        patch.setattr(refining, "STEPS", 20)
        yield


@pytest.fixture(scope="session")
def few_steps():
    """A context where conversions take few inputs and steps: they are worse, and soon done."""
    return _few_steps


@pytest.fixture(scope="module")
def hasty():
    """For tests that look at what is done with a conversion, not at how good it is."""
    with _few_steps():
        yield
