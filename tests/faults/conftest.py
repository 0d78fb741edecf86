"""What the fault tests share: how long they take, and a seed to replay them with."""

import secrets

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the fault tests in full, not in a minute")
    parser.addoption("--faults-seed", type=int, help="replay the fault tests with this seed")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether to run in full."""
    return bool(request.config.getoption("--long", default=False))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Printed, so that what failed can be run again."""
    given = request.config.getoption("--faults-seed", default=None)
    seed = secrets.randbelow(2**32) if given is None else int(given)
    print(f"--faults-seed {seed}")  # noqa: T201  -- pytest shows it with a failure
    return seed
