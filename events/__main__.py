"""The command line: `python -m events` looks into the event log, checks it, and copies it.

    python -m events backup FILE            a copy of the log, also while the service runs
    python -m events export [--log FILE]    every event as a line of JSON, in order
    python -m events inspect JOB_ID [--log FILE]
    python -m events verify FILE            is every event as it was written? exit code 1: no

Without `--log` it is the service's log, `events.db` in TUNEWRIGHT_STORAGE. While the service runs, no other process can
open that file, so the command asks the service through Ray, in the cluster at RAY_ADDRESS or the one that was last
started on this machine.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Protocol, TypeVar

from events.codec import encode
from events.decide import Refused
from events.job import fold
from events.join import join_cluster
from events.log import LogUnavailable
from events.sqlite import LOG_FILE, SqliteStore
from events.store import Damage, JobDamagedError, Recorded, StoreFailedError, StoreLockedError

T = TypeVar("T")


class Source(Protocol):
    """A log to read from. Pages of events after a position, or after a version of one job; the last page is empty."""

    def read_all(self, after_position: int) -> list[Recorded]: ...
    def read_stream(self, job_id: str, after_version: int) -> list[Recorded]: ...
    def backup(self, file: Path) -> None: ...


class _Service:
    """The log of a running service. Raises LogUnavailable."""

    def __init__(self, storage: Path) -> None:
        try:
            join_cluster()
        except ConnectionError as error:
            raise LogUnavailable(f"{storage}/events.db is in use, and no Ray cluster answers: {error}") from error
        import ray

        from events.actors import EVENT_LOG, NAMESPACE, StorageMismatchError, blocking, connect

        try:
            ray.get_actor(EVENT_LOG, NAMESPACE)  # `connect` would start one
            self._log = connect(storage).log
        except StorageMismatchError as error:
            raise LogUnavailable(f"{storage}/events.db is in use, and {error}") from error
        except ValueError as error:
            raise LogUnavailable(
                f"{storage}/events.db is in use, but not by the Ray cluster that was found: set RAY_ADDRESS to the "
                f"service's, as HOST:PORT ({error})"
            ) from error
        self._wait = blocking

    def read_all(self, after_position: int) -> list[Recorded]:
        return self._wait(self._log.subscribe(after_position))

    def read_stream(self, job_id: str, after_version: int) -> list[Recorded]:
        return self._wait(self._log.read(job_id, after_version))

    def backup(self, file: Path) -> None:
        self._wait(self._log.backup(str(file)))


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's flush at exit
        return 128 + signal.SIGPIPE
    except (StoreFailedError, StoreLockedError, JobDamagedError, Refused, LogUnavailable, OSError) as error:
        _say(str(error))
        return 1
    return code


def backup(arguments: argparse.Namespace) -> int:
    file: Path = arguments.file.absolute()
    _with_log(None, lambda log: log.backup(file))
    _say(f"the event log was copied to {file}")
    return 0


def export(arguments: argparse.Namespace) -> int:
    def write(log: Source) -> int:
        position, missing = 0, list[int]()
        while page := log.read_all(position):
            sys.stdout.writelines(map(_line, page))
            for recorded in page:  # positions have no gaps: what isn't there can't be read
                missing += range(position + 1, recorded.position)
                position = recorded.position
        if isinstance(log, SqliteStore):
            return _report(log.damage)
        return _report({position: Damage(position, (), "the event is damaged") for position in missing})

    return _with_log(arguments.log, write)


def inspect(arguments: argparse.Namespace) -> int:
    history = list(_with_log(arguments.log, lambda log: list(_history(log, arguments.job_id))))
    job = fold(history)
    if job is None:
        _say(f"there is no job {arguments.job_id} in {arguments.log or _storage() / 'events.db'}")
        return 1
    sys.stdout.write(json.dumps(job.wire(), indent=2) + "\n")
    sys.stdout.writelines(map(_line, history))
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Checks every event and every index. No other process may have the file open."""
    with closing(_opened(arguments.file)) as store:
        position = 0
        while (reached := store.check(position)) > position:
            position = reached
        found = store.integrity()
        for problem in found:
            _say(f"SQLite: {problem}")
        if _report(store.damage) or found:
            return 1
        _say(f"{arguments.file} is sound: {position} events")
    return 0


def _history(log: Source, job_id: str) -> Iterator[Recorded]:
    version = -1
    while page := log.read_stream(job_id, version):
        yield from page
        version = page[-1].version


def _storage() -> Path:
    return Path(os.environ.get("TUNEWRIGHT_STORAGE") or "~/.tunewright").expanduser()


def _with_log(file: Path | None, use: Callable[[Source], T]) -> T:
    storage = _storage()
    try:
        with closing(_opened(file or storage / LOG_FILE)) as store:
            return use(store)
    except StoreLockedError:
        if file is not None:
            raise
    return use(_Service(storage))


def _opened(file: Path) -> SqliteStore:
    if not file.exists():
        raise FileNotFoundError(f"there is no file {file}")
    return SqliteStore(file)


def _report(damage: Mapping[int, Damage]) -> int:
    for one in damage.values():
        whose = f" of {' or '.join(one.job_ids)}" if one.job_ids else ""
        _say(f"position {one.position}{whose}: {one.why}")
    return 1 if damage else 0


def _line(recorded: Recorded) -> str:
    line = {
        "position": recorded.position,
        "job_id": recorded.job_id,
        "version": recorded.version,
        "event_id": recorded.event_id,
        "time": recorded.time.isoformat(),
        "event": json.loads(encode(recorded.event)),
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m events", description="Read, check and back up the event log.")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("backup", help="copy the service's event log, even while the service runs")
    one.add_argument("file", type=Path, help="the copy to write: a path on the head node that doesn't exist yet")
    one.set_defaults(run=backup)
    one = commands.add_parser("export", help="print every event as a line of JSON")
    one.add_argument(
        "--log", type=Path, help="read this log, which no service has open, such as a backup (default: the service's)"
    )
    one.set_defaults(run=export)
    one = commands.add_parser("inspect", help="print one job and its events")
    one.add_argument("job_id")
    one.add_argument(
        "--log", type=Path, help="read this log, which no service has open, such as a backup (default: the service's)"
    )
    one.set_defaults(run=inspect)
    one = commands.add_parser("verify", help="check every event of a backup; exit code 1: it is damaged")
    one.add_argument("file", type=Path, help="a log that no service has open, such as a backup")
    one.set_defaults(run=verify)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
