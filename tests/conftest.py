"""The functions of recorded.py as fixtures."""

from __future__ import annotations

import pytest
import recorded


def pytest_unconfigure(config: pytest.Config) -> None:
    recorded.forget()


@pytest.fixture(scope="session")
def checkpoint():
    """The function `recorded.checkpoint`."""
    return recorded.checkpoint


@pytest.fixture(scope="session")
def golden():
    """The function `recorded.golden`."""
    return recorded.golden
