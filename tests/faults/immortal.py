"""A process that may be killed at any moment and is back at once.

`python -m MODULE DIRECTORY` is only the parent, which forks the next process whenever one dies: importing takes longer
than forking. It ends, with its child, when its standard input does.
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
    """The parent's main: `work` is done in the children, on the directory of the command line."""
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
    """The module's process runs, or is about to."""
    command = [sys.executable, "-m", module, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as parent:
        yield
        assert parent.stdin is not None
        parent.stdin.close()
        assert parent.wait(60) == 0
