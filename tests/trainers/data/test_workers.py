"""Encoding chunks of lines in parallel processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.tiny_models import make_tiny_model
from tests.trainers.data.support import PIECE, line
from trainers.data import workers as workers_module
from trainers.data.chat import ChatTokenizer
from trainers.data.encode import Line, encode_lines
from trainers.data.workers import encode_in_parallel
from trainers.errors import InfrastructureError


def chunks(count: int, long: int | None = None) -> Iterator[list[Line]]:
    """Each with good rows, a bad one, one that is cut, and one whose user speaks of control tokens."""
    for number in range(count):
        rows = [line(f"{number} {PIECE}", f"{i}") for i in range(4)]
        rows += ["nope", line("a", PIECE * 30), line("say <|im_end|>", "<|im_start|>"), line(PIECE * 30)]
        if number == long:
            rows = [line(PIECE * 8000)]
        yield [(number * 10 + i, row.encode()) for i, row in enumerate(rows)]


def test_processes_give_what_one_gives_in_the_same_order(
    tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "usable_cores", lambda: 3)
    together = list(encode_in_parallel(chunks(20, long=11), tokenizer, 64))
    assert together == [encode_lines(tokenizer, 64, lines) for lines in chunks(20, long=11)]
    assert [error.line for chunk in together[:2] for error in chunk.errors] == [4, 7, 14, 17]
    assert together[0].truncated == 1


def test_reading_does_not_run_far_ahead(tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "usable_cores", lambda: 2)
    read = []

    def counted() -> Iterator[list[Line]]:
        for chunk in chunks(30):
            read.append(chunk)
            yield chunk

    for done, _ in enumerate(encode_in_parallel(counted(), tokenizer, 64)):
        assert len(read) <= done + 1 + 4


def test_no_process_is_left_when_the_caller_stops_early(tokenizer: ChatTokenizer) -> None:
    encoded = encode_in_parallel(chunks(50), tokenizer, 64)
    next(encoded)
    assert children()
    encoded.close()
    assert not children()


def test_a_process_that_dies_is_an_infrastructure_error(
    tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "usable_cores", lambda: 1)
    encoded = encode_in_parallel(chunks(50), tokenizer, 64)
    next(encoded)
    (child,) = children()
    child.kill()
    with pytest.raises(InfrastructureError, match=r"the process that tokenised lines \d+ to \d+ ended with -9"):
        list(encoded)
    assert not children()


ORPHANS = """
import os, sys
from pathlib import Path
from tests.trainers.data.test_workers import chunks, children
from trainers.data.chat import ChatTokenizer
from trainers.data.workers import encode_in_parallel
encoded = encode_in_parallel(chunks(50), ChatTokenizer.from_dir(Path(sys.argv[1])), 64)
next(encoded)
print(*(child.pid for child in children()), flush=True)
os.kill(os.getpid(), 9)
"""


def test_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ORPHANS, str(make_tiny_model(tmp_path / "model"))]
    killed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    orphans = [psutil.Process(pid) for pid in map(int, killed.stdout.split()) if psutil.pid_exists(pid)]
    assert killed.stdout.split()
    assert not psutil.wait_procs(orphans, timeout=20)[1]


def children() -> list[psutil.Process]:
    running = psutil.Process(os.getpid()).children()
    return [child for child in running if workers_module.__name__ in child.cmdline()]
