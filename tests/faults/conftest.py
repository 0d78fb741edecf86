"""The fault suite: processes are killed and connections cut while the service works, and nothing may be lost.

Short by default. `--long` is the whole of it (`make faults`); `--faults-seed` repeats a run whose seed was printed.
"""

import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.killing import Faults, a_service, inputs_in
from tests.service.conftest import Api


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the fault suite in full: hours, not minutes")
    parser.addoption("--faults-seed", type=int, default=None, help="the seed that a run of the fault suite printed")


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--long", default=False))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this test's random choices. It is printed, so that a failure can be repeated."""
    given = request.config.getoption("--faults-seed", default=None)
    chosen = secrets.randbelow(2**31) if given is None else int(given)
    print(f"repeat with --faults-seed={chosen}")  # noqa: T201  -- pytest shows it with a failure
    return chosen


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs_in(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="package")
def faults(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    """One service, shared by all tests here that don't end it."""
    with a_service(tmp_path_factory.mktemp("storage"), inputs) as service:
        yield Faults(Api(service, inputs / "tiny", inputs / "rows.jsonl"))


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory, where a sync takes no time: only the simulated disk loses anything."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="tw-", dir=shared if shared.is_dir() else None) as directory:
        yield Path(directory)
