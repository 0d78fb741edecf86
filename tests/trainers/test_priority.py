"""A job's processes give way to the service's."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainers.priority import AUTOGROUP, NICENESS, SESSION_NICENESS

SCRIPT = """
import os
from pathlib import Path
from trainers.priority import AUTOGROUP, give_way
give_way()
give_way()
group = AUTOGROUP.read_text().split()[-1] if AUTOGROUP.exists() else None
print(os.nice(0), group)
"""
ROOT = Path(__file__).parents[2]


def told(*, new_session: bool) -> tuple[int, str]:
    """Niceness of a process that gives way, and of its session."""
    command = [sys.executable, "-c", SCRIPT] if new_session else ["sh", "-c", f"{sys.executable} -c '{SCRIPT}'; true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, start_new_session=new_session)
    niceness, group = done.stdout.split()
    return int(niceness), group


def test_a_driver_lowers_itself_and_the_session_that_ray_gave_it() -> None:
    niceness, group = told(new_session=True)
    assert niceness == NICENESS
    if AUTOGROUP.exists():
        assert group == str(SESSION_NICENESS)


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this system has no autogroups")
def test_a_session_that_others_share_is_left_alone() -> None:
    before = AUTOGROUP.read_text().split()[-1]
    assert told(new_session=False) == (NICENESS, before)
    assert AUTOGROUP.read_text().split()[-1] == before
