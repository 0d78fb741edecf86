"""CPU priority: the service goes before jobs that share its processors."""

import os
from contextlib import suppress
from pathlib import Path

NICENESS = 19
"""Ray's workers, including the service's, have 15."""
SESSION_NICENESS = 5
"""Gives a session a third of the weight of another one: enough to read the data of one job while another one trains."""
AUTOGROUP = Path("/proc/self/autogroup")


def give_way() -> None:
    """Lowers the priority of this process, so that requests are answered, and Ray's health checks pass, while a job
    imports, tokenises or trains on the same cores. Nothing but the job itself waits for such a process.

    On Linux with autogroups, niceness only counts within a session, and all sessions have the same weight. Ray gives a
    job's driver a session of its own, which would weigh as much as the whole service. So this lowers the weight of the
    session, too, unless other processes share it.
    """
    os.nice(max(0, NICENESS - os.nice(0)))
    with suppress(FileNotFoundError):  # on Linux niceness is per thread, and there may be several already
        for thread in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, int(thread.name), NICENESS)
    if os.getsid(0) in (os.getpid(), os.getppid()):
        with suppress(OSError):  # not Linux, or no autogroups
            AUTOGROUP.write_text(str(SESSION_NICENESS))
