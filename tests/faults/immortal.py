"""Replaces a process at once whenever it is killed.

`python -m MODULE DIRECTORY` starts only the parent, which forks a new child whenever one dies: forking is faster than
importing again. When its standard input ends, the parent ends, with its child.
"""

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path


def back_at_once(work: Callable[[Path], Coroutine[None, None, None]]) -> None:
    """The parent's main function. The children do `work` in the directory given on the command line."""
    directory = Path(sys.argv[1])
    while True:
        if (child := os.fork()) == 0:
            asyncio.run(work(directory))
            os._exit(0)
        ended = os.pidfd_open(child)
        ready, _, _ = select.select([ended, sys.stdin], [], [])
        if sys.stdin in ready:
            os.kill(child, signal.SIGKILL)
            return
        os.waitpid(child, 0)
        os.close(ended)


@contextmanager
def kept_alive(module: str, directory: Path) -> Iterator[None]:
    """Within it, the module's process runs, or a new one is being forked."""
    command = [sys.executable, "-m", module, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as parent:
        yield
        assert parent.stdin is not None
        parent.stdin.close()
        assert parent.wait(60) == 0
