"""The command line: `python -m trainers CONFIG.json` submits one job, follows it, and exits with its outcome.

    ray job submit --working-dir . -- python -m trainers CONFIG.json

CONFIG.json is the body of POST /fine_tuning/jobs/submit. Local files that it names by a path relative to the working
directory are copied into the service's storage first, because the job outlives the directory that `ray job submit`
unpacked. `ray job stop`, SIGTERM and Ctrl-C cancel the job. While the event log can't be reached, they only end this
process, which says so. A second signal ends it at once.

`python -m trainers drain` prepares a shutdown: running jobs stop at a checkpoint, and go on after the restart.

`python -m trainers run JOB_ID` is the runner, which the dispatcher starts.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from events.join import join_cluster
from trainers.priority import give_way
from trainers.settings import InvalidSettingsError, settings

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a program that was ended by SIGINT."""
NOT_SUBMITTED = 2


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["run"]:
        give_way()
        from trainers.running.runner import run

        try:
            return run(_runner_arguments(arguments[1:]), settings())
        except KeyboardInterrupt:  # the dispatcher stops it, and records why
            sys.stdout.flush()
            os._exit(INTERRUPTED)  # not waiting for threads, which may download a model
    if arguments[:1] == ["drain"]:
        timeout_s = _drain_arguments(arguments[1:])
        try:
            join_cluster()
        except ConnectionError as error:
            sys.stderr.write(f"tunewright: no Ray cluster answers: {error}\n")
            return 1
        from trainers.dispatching.drain import drain

        return drain(timeout_s)
    config = _arguments(arguments)
    try:
        found = settings()
        join_cluster()
        from trainers.submit import submit_and_follow

        return submit_and_follow(config, found)
    except ConnectionError as error:
        sys.stderr.write(f"tunewright: nothing was submitted: no Ray cluster answers: {error}\n")
        return NOT_SUBMITTED
    except InvalidSettingsError as error:
        sys.stderr.write(f"{error}\n")
        return NOT_SUBMITTED
    except KeyboardInterrupt:  # before there was anything to cancel
        return INTERRUPTED


def _runner_arguments(arguments: list[str]) -> str:
    parser = argparse.ArgumentParser("python -m trainers run", description="Run one job of the event log.")
    parser.add_argument("job_id")
    job_id: str = parser.parse_args(arguments).job_id
    return job_id


def _drain_arguments(arguments: list[str]) -> float:
    parser = argparse.ArgumentParser(
        "python -m trainers drain",
        description="Before a shutdown of the cluster: stops running jobs at a checkpoint.",
    )
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for the checkpoints (default: 60)")
    timeout_s: float = parser.parse_args(arguments).timeout
    return timeout_s


def _arguments(arguments: list[str]) -> Path:
    parser = argparse.ArgumentParser(
        "python -m trainers",
        description="Submit one fine-tuning job and follow its log to its end. A signal cancels the job.",
        epilog="Before a shutdown of the cluster: python -m trainers drain --help",
    )
    parser.add_argument("config", type=Path, help="a JSON file with the body of POST /fine_tuning/jobs/submit")
    path: Path = parser.parse_args(arguments).config
    return path


if __name__ == "__main__":
    sys.exit(main())
