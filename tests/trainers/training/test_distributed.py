"""The memory that a worker may count on."""

from pathlib import Path

import psutil
import pytest
import torch

from trainers.training import distributed
from trainers.training.distributed import Ranks


@pytest.fixture
def limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory from which the limits of this process's cgroup are read."""
    monkeypatch.setattr(distributed, "MEMORY_LIMITS", (tmp_path / "memory.max", tmp_path / "limit_in_bytes"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path


@pytest.mark.parametrize("file", ["memory.max", "limit_in_bytes"])
def test_workers_on_a_cpu_share_the_memory_of_their_container(limits: Path, file: str) -> None:
    (limits / file).write_text("1000000\n")
    assert Ranks(0, 4, torch.device("cpu")).memory_bytes() == 250_000


@pytest.mark.parametrize("unlimited", [None, "max\n", "9223372036854771712\n"])
def test_without_a_limit_they_share_the_memory_of_the_machine(limits: Path, unlimited: str | None) -> None:
    if unlimited is not None:
        (limits / "memory.max").write_text(unlimited)
    assert Ranks(0, 2, torch.device("cpu")).memory_bytes() == psutil.virtual_memory().total // 2


def test_workers_on_other_nodes_have_no_share(limits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (limits / "memory.max").write_text("1000000\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of 4 workers in all
    assert Ranks(0, 4, torch.device("cpu")).memory_bytes() == 500_000
