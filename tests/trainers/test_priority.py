"""A job's processes have a lower priority than the service's."""

import subprocess
import sys
from pathlib import Path

from trainers.priority import AUTOGROUP, NICENESS, SESSION_NICENESS

SCRIPT = """
import os
from pathlib import Path
from trainers.priority import AUTOGROUP, give_way
give_way()
give_way()
words = AUTOGROUP.read_text().split() if AUTOGROUP.exists() else []
print(os.nice(0), words[-1] if words else "none")
"""
ROOT = Path(__file__).parents[2]


def niceness_of_this_session() -> str:
    """ "none" where the system has no autogroups, or this process is in none: Linux's file is empty then."""
    words = AUTOGROUP.read_text().split() if AUTOGROUP.exists() else []
    return words[-1] if words else "none"


def told(*, new_session: bool) -> tuple[int, str]:
    """Niceness of a process that gives way, and of its session."""
    command = [sys.executable, "-c", SCRIPT] if new_session else ["sh", "-c", f"{sys.executable} -c '{SCRIPT}'; true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, start_new_session=new_session)
    niceness, group = done.stdout.split()
    return int(niceness), group


def test_a_driver_lowers_itself_and_the_session_that_ray_gave_it() -> None:
    niceness, group = told(new_session=True)
    assert niceness == NICENESS
    assert group in (str(SESSION_NICENESS), "none")
    if niceness_of_this_session() != "none":
        assert group == str(SESSION_NICENESS)


def test_every_thread_of_the_process_gives_way_whichever_of_them_asks() -> None:
    script = """
import os, threading
from trainers.priority import give_way
asking = threading.Thread(target=give_way)
asking.start()
asking.join()
print(os.getpriority(os.PRIO_PROCESS, os.getpid()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(NICENESS)


def test_a_session_that_others_share_is_left_alone() -> None:
    before = niceness_of_this_session()
    assert told(new_session=False) == (NICENESS, before)
    assert niceness_of_this_session() == before
