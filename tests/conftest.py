"""The functions of recorded.py as fixtures."""

from __future__ import annotations

import os

import numpy as np
import pytest
import recorded

from hadamoe import ops

pytest.register_assert_rewrite("attend_claims", "attention_cases", "moe_claims", "top_claims")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", action="store_true", help="tests/metal or tests/cuda on this machine's own GPU"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device"):
        import device

        device.use()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device"):
        items[:] = [item for item in items if not item.get_closest_marker("simulator")]


def pytest_unconfigure(config: pytest.Config) -> None:
    recorded.forget()


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same for every test."""
    return np.random.default_rng(7)


@pytest.fixture(scope="session")
def checkpoint():
    """The function `recorded.checkpoint`."""
    return recorded.checkpoint


@pytest.fixture(scope="session")
def golden():
    """The function `recorded.golden`."""
    return recorded.golden


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where everything is installed (.ci/run says so), a skipped test is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if skipped and os.environ.get("HADAMOE_SKIP") == "never":
        reporter.ensure_newline()
        for reason in sorted({str(r.longrepr[2]) for r in skipped}):
            reporter.write_line(f"must not skip here: {reason}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(params=ops.isas())
def isa(request):
    """Runs the test once per instruction set."""
    before = ops.isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)
