"""Shared fixtures."""

import jaxtyping
import pytest


@pytest.fixture(autouse=True)
def unchecked_types(request, monkeypatch):
    """Switch jaxtyping's runtime checks off in tests of bad input: users run without them, and must get our message."""
    if request.node.originalname and request.node.originalname.startswith("test_bad"):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
