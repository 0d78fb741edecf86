"""Who goes first where a job shares processors with the service: the service."""

import os
from contextlib import suppress
from pathlib import Path

NICENESS = 19
"""Ray gives its workers, the service's among them, 15."""
SESSION_NICENESS = 5
"""A third of the weight of another session: enough for the data of one job to be read while another one trains."""
AUTOGROUP = Path("/proc/self/autogroup")


def give_way() -> None:
    """Lets other processes of this node go first: requests are answered, and Ray's health checks met, while a job
    imports, tokenises or trains on the same cores. Nobody waits for a job's process who wouldn't wait for the job.

    On Linux with autogroups niceness counts only within a session, and each session as a whole counts like any other.
    Ray gives a job's driver a session of its own, so that it would weigh as much as all of the service: it lowers that
    session as well. (A session that others share is left alone.)
    """
    os.nice(max(0, NICENESS - os.nice(0)))
    with suppress(FileNotFoundError):  # Linux counts by thread, and this may not be the first one
        for thread in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, int(thread.name), NICENESS)
    if os.getsid(0) in (os.getpid(), os.getppid()):
        with suppress(OSError):  # not Linux, or no autogroups
            AUTOGROUP.write_text(str(SESSION_NICENESS))
